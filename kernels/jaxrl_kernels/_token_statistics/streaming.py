"""One pass over the vocabulary: what a block of logits contributes, how two contributions combine, what they say in the end.

With weights w_k = e^{z_k - m}, S = sum w_k and d_k = z_k - zref_k, a summary holds, next to m and S,

    shift  = sum w_k (z_k - m)            entropy   = log S - shift / S          (both terms >= 0: no cancellation)
    square = sum w_k^2                    collision = square / S^2
    centre = sum w_k d_k / S              = E_p[d]
    spread = sum w_k phi(centre - d_k)    KL(p || q) = log(1 + spread / S)       phi(x) = e^x - 1 - x >= 0
    growth = sum w_k phi(d_k - centre)    chi^2 + 1  = e^KL (1 + growth / S), or sum_k e^{2 z_k - zref_k} normalised where that is large

The KL form is exact, because l_k = d_k - centre + KL and E_p[e^{-l}] = 1, and every term of it is non-negative: KL keeps its relative
accuracy down to zero, where differences of log-normalisers lose every digit near 1e-7. Combining two summaries re-centres them by

    spread' = e^t spread + S phi(t),  t = centre' - centre        (a sum of non-negative terms again)

KL(q || p) is the same with the roles of policy and reference exchanged.
"""

import math
from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array
from jaxtyping import Bool
from jaxtyping import Float
from jaxtyping import Int

Rows = Float[Array, " N"]


class Moments(NamedTuple):
    """Weights of one distribution over the columns seen so far, and how a difference d of logits spreads under them."""

    maximum: Rows
    total: Rows
    centre: Rows | None = None
    spread: Rows | None = None
    growth: Rows | None = None


class Summary(NamedTuple):
    """Everything that one sweep accumulates; absent entries were not asked for."""

    policy: Moments
    shift: Rows
    square: Rows
    target: Rows
    target_kept: Rows | None = None
    ratio: Moments | None = None
    reference: Moments | None = None
    reference_outside: Rows | None = None


def excess(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """phi(x) = e^x - 1 - x, with full relative accuracy near 0; e^x is capped far below overflow."""
    terms = 7 if x.dtype.itemsize <= 4 else 13
    series = jnp.zeros_like(x)
    for k in reversed(range(terms)):
        series = series * x + 1 / math.factorial(k + 2)
    cap = 0.6 * math.log(float(jnp.finfo(x.dtype).max))
    return jnp.where(jnp.abs(x) < 0.5, x * x * series, jnp.exp(jnp.minimum(x, cap)) - 1 - x)


def _row_sum(x: Float[Array, "N B"]) -> Rows:
    return jnp.sum(x, axis=-1)


def _guarded(total: Rows, divisor: Rows) -> Rows:
    # 0 where no weight was seen (a block outside the safe set), so that its summary is neutral.
    return jnp.where(
        divisor == 0, jnp.zeros((), total.dtype), total / jnp.where(divisor == 0, jnp.ones((), total.dtype), divisor)
    )


def moments(
    weights: Float[Array, "N B"], maximum: Rows, difference: Float[Array, "N B"] | None, *, spread: bool, growth: bool
) -> Moments:
    """Moments of one block; `difference` is own logits minus the other distribution's."""
    total = _row_sum(weights)
    if difference is None or not (spread or growth):
        return Moments(maximum, total)
    centre = _guarded(_row_sum(weights * difference), total)
    u = difference - centre[:, None]
    return Moments(
        maximum,
        total,
        centre,
        _row_sum(weights * excess(-u)) if spread else None,
        _row_sum(weights * excess(u)) if growth else None,
    )


def _recentred(value: Rows, total: Rows, move: Rows) -> Rows:
    return jnp.exp(move) * value + jnp.where(total == 0, jnp.zeros((), total.dtype), total * excess(move))


def combine_moments(a: Moments, b: Moments) -> tuple[Moments, Rows, Rows]:
    """Moments of the union of two disjoint sets of columns, and the factors that rescaled the weights of each."""
    maximum = jnp.maximum(a.maximum, b.maximum)
    scale_a, scale_b = jnp.exp(a.maximum - maximum), jnp.exp(b.maximum - maximum)
    total_a, total_b = a.total * scale_a, b.total * scale_b
    total = total_a + total_b
    if a.centre is None or b.centre is None:
        return Moments(maximum, total), scale_a, scale_b
    centre = a.centre + (b.centre - a.centre) * _guarded(total_b, total)
    move_a, move_b = centre - a.centre, centre - b.centre
    spread, growth = None, None
    if a.spread is not None and b.spread is not None:
        spread = _recentred(a.spread * scale_a, total_a, move_a) + _recentred(b.spread * scale_b, total_b, move_b)
    if a.growth is not None and b.growth is not None:
        growth = _recentred(a.growth * scale_a, total_a, -move_a) + _recentred(b.growth * scale_b, total_b, -move_b)
    return Moments(maximum, total, centre, spread, growth), scale_a, scale_b


def pick(
    z: Float[Array, "N B"], targets: Int[Array, " N"], start: int | Int[Array, ""]
) -> tuple[Rows, Bool[Array, " N"]]:
    """(logit of the target or 0, whether the target is one of these columns)."""
    local = targets - start
    inside = (local >= 0) & (local < z.shape[1])
    value = jnp.take_along_axis(z, jnp.clip(local, 0, z.shape[1] - 1)[:, None], axis=1)[:, 0]
    return jnp.where(inside, value, jnp.zeros((), z.dtype)), inside


def row_maximum(z: Float[Array, "N B"]) -> Rows:
    """Largest logit of each row."""
    return jnp.max(z, axis=-1)


def summarise(
    z: Float[Array, "N B"],
    z_ref: Float[Array, "N B"] | None,
    targets: Int[Array, " N"],
    start: int | Int[Array, ""],
    wanted: tuple[str, ...],
    floor: Rows | None,
) -> Summary:
    """Summary of one block. Columns with logits under `floor` (if given) are outside the safe set and weigh nothing."""
    maximum = row_maximum(z)
    centred = z - maximum[:, None]
    weights = jnp.exp(centred)
    kept = None if floor is None else z >= floor[:, None]
    if kept is not None:
        weights = jnp.where(kept, weights, jnp.zeros((), z.dtype))
    value, inside = pick(z, targets, start)
    target_kept = None if floor is None else (inside & (value >= floor)).astype(z.dtype)
    policy_difference = None if z_ref is None else z - z_ref
    policy = moments(
        weights,
        maximum,
        policy_difference,
        spread=bool({"kl", "total_variation", "chi_square"} & set(wanted)),
        growth="chi_square" in wanted,
    )
    ratio = reference = outside = None
    if policy_difference is not None and "chi_square" in wanted:
        exponent = z + policy_difference
        if kept is not None:
            exponent = jnp.where(kept, exponent, -0.5 * float(jnp.finfo(z.dtype).max))
        peak = row_maximum(exponent)
        ratio = moments(jnp.exp(exponent - peak[:, None]), peak, None, spread=False, growth=False)
    if z_ref is not None and policy_difference is not None:
        top = row_maximum(z_ref)
        weights_ref = jnp.exp(z_ref - top[:, None])
        reference = moments(weights_ref, top, -policy_difference, spread="kl_reverse" in wanted, growth=False)
        if kept is not None:
            outside = _row_sum(jnp.where(kept, jnp.zeros((), z.dtype), weights_ref))
    return Summary(
        policy, _row_sum(weights * centred), _row_sum(weights * weights), value, target_kept, ratio, reference, outside
    )


def _sum(a: Rows | None, b: Rows | None) -> Rows | None:
    return None if a is None or b is None else a + b


def combine(a: Summary, b: Summary) -> Summary:
    """Summary of the union of two disjoint sets of columns."""
    policy, scale_a, scale_b = combine_moments(a.policy, b.policy)
    shift_a = scale_a * (a.shift + (a.policy.maximum - policy.maximum) * a.policy.total)
    shift_b = scale_b * (b.shift + (b.policy.maximum - policy.maximum) * b.policy.total)
    reference = outside = None
    if a.reference is not None and b.reference is not None:
        reference, ref_a, ref_b = combine_moments(a.reference, b.reference)
        if a.reference_outside is not None and b.reference_outside is not None:
            outside = ref_a * a.reference_outside + ref_b * b.reference_outside
    return Summary(
        policy,
        shift_a + shift_b,
        scale_a**2 * a.square + scale_b**2 * b.square,
        a.target + b.target,
        _sum(a.target_kept, b.target_kept),
        None if a.ratio is None or b.ratio is None else combine_moments(a.ratio, b.ratio)[0],
        reference,
        outside,
    )


def log_normaliser(own: Moments) -> Rows:
    """log sum_k e^{z_k}."""
    return own.maximum + jnp.log(own.total)


def divergence(own: Moments, other: Moments, missing: Rows | None) -> Rows:
    """KL(own || other) [nats] from the moments of own; `missing` is -log of the other's mass on own's support."""
    assert own.centre is not None
    assert own.spread is not None
    own_log, other_log = log_normaliser(own), log_normaliser(other)
    direct = own.centre - (own_log - other_log)
    refined = jnp.log1p(own.spread / own.total)
    if missing is not None:
        refined = refined + missing
    # The direct form is right to a rounding of the log-normalisers; the refined one is right to its own rounding unless the cap in `excess`
    # or an underflow of the weights took mass from it. Where they differ by more than a rounding, that has happened.
    return jnp.where(_agree(direct, refined, own_log, other_log), refined, lax.max(direct, jnp.zeros_like(direct)))


def _agree(direct: Rows, refined: Rows, *sizes: Rows) -> Bool[Array, " N"]:
    scale = 1 + sum(jnp.abs(size) for size in sizes)
    return jnp.abs(direct - refined) <= 64 * float(jnp.finfo(direct.dtype).eps) * scale


def chi_square(own: Moments, other: Moments, ratio: Moments, kl: Rows) -> Rows:
    """sum_k p_k^2 / q_k - 1; +inf where that is beyond the dtype."""
    assert own.growth is not None
    own_log, other_log = log_normaliser(own), log_normaliser(other)
    direct = log_normaliser(ratio) - 2 * own_log + other_log
    refined = jnp.expm1(kl) + jnp.exp(kl) * own.growth / own.total
    return jnp.where(_agree(direct, jnp.log1p(refined), own_log, other_log), refined, jnp.expm1(direct))
