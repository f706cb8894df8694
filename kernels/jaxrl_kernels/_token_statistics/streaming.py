"""One pass over the vocabulary: what a block of logits contributes, how two contributions combine, what they say in the
end.

With weights w_k = e^{z_k - m}, S = sum w_k and d_k = z_k - zref_k, a summary holds, next to m and S,

    shift  = sum w_k (z_k - m)            entropy   = log S - shift / S          (both terms >= 0: no cancellation)
    square = sum w_k^2                    collision = square / S^2
    centre = sum w_k d_k / S              = E_p[d]
    spread = sum w_k phi(centre - d_k)    KL(p || q) = log(1 + spread / S)       phi(x) = e^x - 1 - x >= 0
    growth = sum w_k phi(d_k - centre)    chi^2 + 1  = e^KL (1 + growth / S), or sum_k e^{2 z_k - zref_k} normalised
    where that is large

The KL form is exact, because l_k = d_k - centre + KL and E_p[e^{-l}] = 1, and every term of it is non-negative: KL
keeps its relative accuracy down to zero, where differences of log-normalisers lose every digit near 1e-7. Combining two
summaries re-centres them by

    spread' = e^t spread + S phi(t),  t = centre' - centre        (a sum of non-negative terms again)

KL(q || p) is the same with the roles of policy and reference exchanged.

Where the reference is given as logits, some may say that q_k = 0 (types.ReferenceLogits). There d_k is set to 0, which
no weight of q counts; the mass of the policy there says whether KL(p || q) is infinite, and completes KL(q || p).
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array
from jaxtyping import Bool
from jaxtyping import Float
from jaxtyping import Int

from jaxrl_kernels._token_statistics.elementary import across
from jaxrl_kernels._token_statistics.elementary import excess

NOTHING = -1e30
"""Logit of a token without probability: of columns beyond the vocabulary in the kernels, and of a reference up to here.
e^(NOTHING - m) is 0, and nothing that multiplies it is infinite."""

Rows = Float[Array, " N"]
Block = Float[Array, "N B"]


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
    shift: Rows | None
    square: Rows | None
    target: Rows
    target_kept: Rows | None = None
    ratio: Moments | None = None
    reference: Moments | None = None
    reference_outside: Rows | None = None
    top: Float[Array, "N k"] | None = None  # the largest logits, in falling order
    policy_outside: Rows | None = None  # weight of the policy where the reference has none


def _row_sum(x: Block) -> Rows:
    return jnp.sum(x, axis=-1)


def _guarded(total: Rows, divisor: Rows) -> Rows:
    # 0 where no weight was seen (a block outside the safe set), so that its summary is neutral.
    return jnp.where(
        divisor == 0, jnp.zeros((), total.dtype), total / jnp.where(divisor == 0, jnp.ones((), total.dtype), divisor)
    )


def _apart(apply: bool, *arrays: Array) -> tuple[Array, ...]:
    """The same arrays, as if they were new ones.

    On CPU a row sum reads its operands through cheap arithmetic for free, but arithmetic that two sums share is written
    out as a whole block and read back. Behind the barrier each sum has its own: 12 % less time and a quarter less
    memory for a sweep. Accelerators fuse several sums into one loop and do better without.
    """
    return lax.optimization_barrier(arrays) if apply else arrays


SLICES = 8
"""Parts into which a block is cut where arithmetic is summed that XLA's row sums on CPU do not take in themselves."""


def _sum_in_slices(term: Callable[..., Block], apart: bool, *blocks: Block) -> Rows:
    """Row sums of term(*blocks).

    On CPU a row sum cannot hold a comparison, so the whole block of terms would be written out and read back. Adding up
    the terms of eight slices first writes an eighth of it.
    """
    columns = blocks[0].shape[1]
    if not apart or columns % SLICES:
        return _row_sum(term(*blocks))
    width = columns // SLICES
    parts = [term(*(x[:, k * width : (k + 1) * width] for x in blocks)) for k in range(SLICES)]
    return _row_sum(*_apart(apart, sum(parts[1:], parts[0])))


def moments(
    weights: Block,
    maximum: Rows,
    own: Block | None,
    other: Block | None,
    *,
    spread: bool = False,
    growth: bool = False,
    apart: bool = False,
) -> Moments:
    """Moments of one block of logits `own` against `other`, with d = own - other."""
    total = _row_sum(weights)
    if own is None or other is None or not (spread or growth):
        return Moments(maximum, total)
    w, z, r = _apart(apart, weights, own, other)
    centre = _guarded(_row_sum(w * (z - r)), total)
    spread_sum = growth_sum = None
    if spread:
        w, z, r = _apart(apart, weights, own, other)
        spread_sum = _sum_in_slices(lambda w, z, r: w * excess(across(centre, z) - (z - r)), apart, w, z, r)
    if growth:
        w, z, r = _apart(apart, weights, own, other)
        growth_sum = _sum_in_slices(lambda w, z, r: w * excess((z - r) - across(centre, z)), apart, w, z, r)
    return Moments(maximum, total, centre, spread_sum, growth_sum)


def recentred(value: Rows, total: Rows, move: Rows) -> Rows:
    """A spread once its centre has moved by `move`: e^move value + total phi(move)."""
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
        spread = recentred(a.spread * scale_a, total_a, move_a) + recentred(b.spread * scale_b, total_b, move_b)
    if a.growth is not None and b.growth is not None:
        growth = recentred(a.growth * scale_a, total_a, -move_a) + recentred(b.growth * scale_b, total_b, -move_b)
    return Moments(maximum, total, centre, spread, growth), scale_a, scale_b


def pick(z: Block, targets: Int[Array, " N"], start: int | Int[Array, ""]) -> tuple[Rows, Bool[Array, " N"]]:
    """(logit of the target or 0, whether the target is one of these columns)."""
    local = targets - start
    inside = (local >= 0) & (local < z.shape[1])
    value = jnp.take_along_axis(z, jnp.clip(local, 0, z.shape[1] - 1)[:, None], axis=1)[:, 0]
    return jnp.where(inside, value, jnp.zeros((), z.dtype)), inside


def pick_by_comparison(
    z: Block, targets: Int[Array, " N"], start: int | Int[Array, ""]
) -> tuple[Rows, Bool[Array, " N"]]:
    """`pick` where columns cannot be gathered."""
    local = targets - start
    hit = lax.broadcasted_iota(targets.dtype, z.shape, 1) == across(local, z)
    value = _row_sum(jnp.where(hit, z, jnp.zeros((), z.dtype)))
    return value, (local >= 0) & (local < z.shape[1])


def row_maximum(z: Block) -> Rows:
    """Largest logit of each row."""
    return jnp.max(z, axis=-1)


def summarise(
    z: Block,
    z_ref: Block | None,
    targets: Int[Array, " N"],
    start: int | Int[Array, ""],
    wanted: tuple[str, ...],
    floor: Rows | None,
    *,
    in_kernel: bool = False,
    top_k: int | None = None,
    sparse: bool = False,
) -> Summary:
    """Summary of one block. Columns with logits under `floor` (if given) are outside the safe set and weigh nothing.

    in_kernel: whether this is part of a Pallas kernel, which cannot gather columns and needs no barriers.
    top_k: how many of the largest logits to keep.
    sparse: whether the reference may have logits of -inf.
    """
    apart = jax.default_backend() == "cpu" and not in_kernel
    zero = jnp.zeros((), z.dtype)
    maximum = row_maximum(z)
    weights = jnp.exp(z - across(maximum, z))
    kept = None if floor is None else z >= across(floor, z)
    if kept is not None:
        weights = jnp.where(kept, weights, zero)
    spread = bool({"kl", "total_variation", "chi_square"} & set(wanted))
    absent, near = None, z_ref
    if sparse and z_ref is not None:
        absent = z_ref <= NOTHING
        near = jnp.where(absent, z, z_ref)
    policy = moments(weights, maximum, z, near, spread=spread, growth="chi_square" in wanted, apart=apart)
    shift = square = target_kept = None
    if "entropy" in wanted:
        w, logits, top = _apart(apart, weights, z, maximum)
        shift = _row_sum(w * (logits - across(top, logits)))
    if "collision" in wanted:
        square = _row_sum(weights * weights)
    target, inside = (pick_by_comparison if in_kernel else pick)(z, targets, start)
    if floor is not None:
        target_kept = (inside & (target >= floor)).astype(z.dtype)
    top_logits = None if top_k is None else _largest(z if kept is None else jnp.where(kept, z, -jnp.inf), top_k)
    if z_ref is None or near is None:
        return Summary(policy, shift, square, target, target_kept, top=top_logits)
    ratio = _ratio(z, near, kept, absent) if "chi_square" in wanted else None
    top = row_maximum(z_ref)
    if absent is not None:
        top = lax.max(top, jnp.full_like(top, NOTHING))  # finite where the reference has nothing in this block
    weights_ref = jnp.exp(z_ref - across(top, z_ref))
    if absent is not None:
        weights_ref = jnp.where(absent, zero, weights_ref)
    reference = moments(weights_ref, top, near, z, spread="kl_reverse" in wanted, apart=apart)
    outside = None if kept is None else _row_sum(jnp.where(kept, zero, weights_ref))
    beyond = None if absent is None else _row_sum(jnp.where(absent, weights, zero))
    return Summary(policy, shift, square, target, target_kept, ratio, reference, outside, top_logits, beyond)


def _ratio(z: Block, near: Block, kept: Array | None, absent: Array | None) -> Moments:
    """Moments of p^2 / q over the columns that are kept and not absent."""
    exponent = z + (z - near)
    least = jnp.full((), -0.5 * float(jnp.finfo(z.dtype).max), z.dtype)
    if kept is not None:
        exponent = jnp.where(kept, exponent, least)
    if absent is not None:
        exponent = jnp.where(absent, least, exponent)
    peak = row_maximum(exponent)
    return moments(jnp.exp(exponent - across(peak, exponent)), peak, None, None)


def _largest(z: Block, count: int) -> Float[Array, "N k"]:
    missing = max(0, count - z.shape[1])
    found = lax.top_k(z, count - missing)[0]
    return jnp.pad(found, ((0, 0), (0, missing)), constant_values=-jnp.inf) if missing else found


def _sum(a: Rows | None, b: Rows | None) -> Rows | None:
    return None if a is None or b is None else a + b


def combine(a: Summary, b: Summary) -> Summary:
    """Summary of the union of two disjoint sets of columns."""
    policy, scale_a, scale_b = combine_moments(a.policy, b.policy)
    shift = square = ratio = reference = outside = None
    if a.shift is not None and b.shift is not None:
        shift_a = a.shift + (a.policy.maximum - policy.maximum) * a.policy.total
        shift_b = b.shift + (b.policy.maximum - policy.maximum) * b.policy.total
        shift = scale_a * shift_a + scale_b * shift_b
    if a.square is not None and b.square is not None:
        square = scale_a**2 * a.square + scale_b**2 * b.square
    if a.ratio is not None and b.ratio is not None:
        ratio = combine_moments(a.ratio, b.ratio)[0]
    if a.reference is not None and b.reference is not None:
        reference, ref_a, ref_b = combine_moments(a.reference, b.reference)
        if a.reference_outside is not None and b.reference_outside is not None:
            outside = ref_a * a.reference_outside + ref_b * b.reference_outside
    kept = None if a.target_kept is None or b.target_kept is None else a.target_kept + b.target_kept
    top = None if a.top is None or b.top is None else _largest(jnp.concatenate([a.top, b.top], 1), a.top.shape[1])
    beyond = None
    if a.policy_outside is not None and b.policy_outside is not None:
        beyond = scale_a * a.policy_outside + scale_b * b.policy_outside
    return Summary(policy, shift, square, a.target + b.target, kept, ratio, reference, outside, top, beyond)


def log_normaliser(own: Moments) -> Rows:
    """log sum_k e^{z_k}."""
    return own.maximum + jnp.log(own.total)


def surprise(outside: Rows | None, total: Rows) -> Rows | None:
    """-log(1 - outside / total) [nats]: +inf where everything is outside."""
    return None if outside is None else -jnp.log1p(-lax.min(outside / total, jnp.ones_like(total)))


def divergence(own: Moments, other: Moments, missing: Rows | None) -> Rows:
    """KL(own || other) [nats] from the moments of own; `missing` is -log of the other's mass on own's support."""
    assert own.centre is not None
    assert own.spread is not None
    own_log, other_log = log_normaliser(own), log_normaliser(other)
    direct = own.centre - (own_log - other_log)
    refined = jnp.log1p(own.spread / own.total)
    if missing is not None:
        refined = refined + missing
    # The direct form is right to a rounding of the log-normalisers, so it serves from 1 nat up. The refined one is
    # right to its own rounding, unless an exponential overflowed or a weight underflowed on the way: then the two
    # differ by more than a rounding, or it is NaN.
    small = (direct < 1) & _agree(direct, refined, own_log, other_log)
    return jnp.where(small, refined, lax.max(direct, jnp.zeros_like(direct)))


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
