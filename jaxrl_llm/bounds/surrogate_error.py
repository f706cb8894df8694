"""How far the surrogate can be from the truth: every bound of Trust Region Masking, as printed and with sharp
constants.

The surrogate is L'(pi) = E_mu[R sum_t (rho_t - 1)], rho_t = pi(y_t|c_t) / mu(y_t|c_t), and the bounds are on

    |Error|,   Error = J(pi) - J(mu) - L'(pi),   for rewards in [0, 1]; multiply by the span of the rewards otherwise.

Source: Li et al. 2025, "Trust Region Masking", arXiv 2512.23075. Letters: T horizon, delta = max_kl, eps = max_tv,
D_KL = sequence_kl, D_TV = sequence_tv, Dbar_t = mean_tv_t. See `inputs.BoundInputs`.

Departures from the paper. (1) The printed surrogate E_mu[A sum_t rho_t] with a baseline is off by the constant
T (J(mu) - b); L' is what its proofs analyse (errata F2.1). (2) Every constant can be halved, because a reward in [0, 1]
is within 1/2 of 1/2 and a shift of R does not change Error (errata F2.2); those of the linear and the mixed bounds can
be lowered further (errata F2.17). The `_sharp` functions have the lower constants. (3) `sequence_kl` and `average_only`
are not in the paper, which states that the average is not enough (errata F2.4). (4) Where pi can draw tokens that mu
cannot, as after top-p sampling, only the bounds of `WITHOUT_COVERAGE` hold (errata F2.18). Proofs: docs/theory.md.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array
from jaxtyping import Bool
from jaxtyping import Float
from jaxtyping import Int
from jaxtyping import ScalarLike

from jaxrl_llm.bounds.inputs import BoundInputs
from jaxrl_llm.bounds.inputs import safe_sqrt


def _capped(x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    return jnp.minimum(x, jnp.ones((), x.dtype))


def _tokens_before(inputs: BoundInputs) -> Float[Array, " T"]:
    return jnp.arange(inputs.horizon, dtype=inputs.max_kl.dtype)  # t - 1


def _tokens_after(inputs: BoundInputs) -> Float[Array, " T"]:
    return _tokens_before(inputs)[::-1]  # T - t


def _kl_of(tokens: Float[Array, " T"], inputs: BoundInputs) -> Float[Array, " T"]:
    # delta for each of so many tokens: 0 for none of them, also where delta is infinite.
    some = tokens > 0
    return jnp.where(some, jnp.where(some, tokens, 1) * inputs.max_kl, 0)


def classical_sharp(inputs: BoundInputs) -> Float[Array, ""]:
    """T (T - 1) eps^2: the bound of TRPO for T tokens, half of the printed one."""
    return inputs.horizon * (inputs.horizon - 1) * inputs.max_tv * inputs.max_tv


def classical_printed(inputs: BoundInputs) -> Float[Array, ""]:
    """2 T (T - 1) eps^2 (<= T (T - 1) delta)."""
    return 2 * classical_sharp(inputs)


def coupling_sharp(inputs: BoundInputs) -> Float[Array, ""]:
    """2 min(1, eps) sum_t min(1, (t - 1) eps)."""
    shift = _capped(_tokens_before(inputs) * inputs.max_tv)
    return 2 * _capped(inputs.max_tv) * jnp.sum(shift)


def coupling_printed(inputs: BoundInputs) -> Float[Array, ""]:
    """4 min(1, eps) sum_t min(1, (t - 1) eps): the classical bound while T eps <= 1, at most 4 T eps beyond."""
    return 2 * coupling_sharp(inputs)


def _pinsker_shift(inputs: BoundInputs) -> Float[Array, ""]:
    # sum_t of the largest TV between the laws of the first t - 1 tokens, by the chain rule of KL and Pinsker.
    return jnp.sum(_capped(safe_sqrt(_kl_of(_tokens_before(inputs), inputs) / 2)))


def pinsker_marginal_kl_sharp(inputs: BoundInputs) -> Float[Array, ""]:
    """2 min(1, sqrt(delta/2)) sum_t min(1, sqrt((t - 1) delta/2)), at most (2/3) T^(3/2) delta."""
    return 2 * _capped(safe_sqrt(inputs.max_kl / 2)) * _pinsker_shift(inputs)


def pinsker_marginal_kl_printed(inputs: BoundInputs) -> Float[Array, ""]:
    """4 min(1, sqrt(delta/2)) sum_t min(1, sqrt((t - 1) delta/2))."""
    return 2 * pinsker_marginal_kl_sharp(inputs)


def pinsker_marginal_kl_closed_form(inputs: BoundInputs) -> Float[Array, ""]:
    """(4/3) T^(3/2) delta: an upper bound on the printed sum, by sum_{k<T} sqrt(k) < (2/3) T^(3/2) (errata F2.11)."""
    return 4 / 3 * inputs.horizon**1.5 * inputs.max_kl


def pinsker_marginal_tv_sharp(inputs: BoundInputs) -> Float[Array, ""]:
    """2 min(1, eps) sum_t min(1, sqrt((t - 1) delta/2))."""
    return 2 * _capped(inputs.max_tv) * _pinsker_shift(inputs)


def pinsker_marginal_tv_printed(inputs: BoundInputs) -> Float[Array, ""]:
    """4 min(1, eps) sum_t min(1, sqrt((t - 1) delta/2))."""
    return 2 * pinsker_marginal_tv_sharp(inputs)


def mixed_kl_sharp(inputs: BoundInputs) -> Float[Array, ""]:
    """min( T min(1, sqrt(delta/2)), sqrt(T delta D_KL) ): the printed form without its 4, and without sqrt(T).

    Both parts hold because `linear_sharp` and `sequence_kl_sharp` do: the first is never below the one, the second
    never below the other, so that it is never below the smaller of the two (it can be below the larger).
    """
    product = safe_sqrt(inputs.horizon * inputs.max_kl * inputs.sequence_kl)
    return jnp.minimum(inputs.horizon * _capped(safe_sqrt(inputs.max_kl / 2)), product)


def mixed_kl_printed(inputs: BoundInputs) -> Float[Array, ""]:
    """4 T min(1, sqrt(delta/2)) min(1, sqrt(D_KL/2)). Never below the adaptive bound (errata F2.3)."""
    token, sequence = _capped(safe_sqrt(inputs.max_kl / 2)), _capped(safe_sqrt(inputs.sequence_kl / 2))
    return 4 * inputs.horizon * token * sequence


def mixed_tv_sharp(inputs: BoundInputs) -> Float[Array, ""]:
    """min(1, eps) min( T, 2 (T - 1) D_TV ), attained at T = 2 in the limit of small steps.

    The law of the first context is the same under both policies, so that T - 1 positions are left; the cap is
    `linear_sharp`.
    """
    moved = 2 * (inputs.horizon - 1) * _capped(inputs.sequence_tv)
    return _capped(inputs.max_tv) * jnp.minimum(moved, jnp.asarray(inputs.horizon, moved.dtype))


def mixed_tv_printed(inputs: BoundInputs) -> Float[Array, ""]:
    """4 T min(1, eps) min(1, D_TV)."""
    return 4 * inputs.horizon * _capped(inputs.max_tv) * _capped(inputs.sequence_tv)


def adaptive_kl_sharp(inputs: BoundInputs) -> Float[Array, ""]:
    """2 sum_t Dbar_t min(1, sqrt((T - t) delta/2))."""
    return 2 * jnp.sum(inputs.mean_tv_t * _capped(safe_sqrt(_kl_of(_tokens_after(inputs), inputs) / 2)))


def adaptive_kl_printed(inputs: BoundInputs) -> Float[Array, ""]:
    """4 sum_t Dbar_t min(1, sqrt((T - t) delta/2)). The cap binds at early positions (errata F2.10)."""
    return 2 * adaptive_kl_sharp(inputs)


def adaptive_tv_sharp(inputs: BoundInputs) -> Float[Array, ""]:
    """2 sum_t Dbar_t min(1, (T - t) eps)."""
    return 2 * jnp.sum(inputs.mean_tv_t * _capped(_tokens_after(inputs) * inputs.max_tv))


def adaptive_tv_printed(inputs: BoundInputs) -> Float[Array, ""]:
    """4 sum_t Dbar_t min(1, (T - t) eps)."""
    return 2 * adaptive_tv_sharp(inputs)


def adaptive_sharp(inputs: BoundInputs) -> Float[Array, ""]:
    """2 sum_t Dbar_t min(1, (T - t) eps, sqrt((T - t) delta/2)); the branches cross at T - t = delta / (2 eps^2)."""
    after = _tokens_after(inputs)
    weight = jnp.minimum(after * inputs.max_tv, safe_sqrt(_kl_of(after, inputs) / 2))
    return 2 * jnp.sum(inputs.mean_tv_t * _capped(weight))


def adaptive_printed(inputs: BoundInputs) -> Float[Array, ""]:
    """4 sum_t Dbar_t min(1, (T - t) eps, sqrt((T - t) delta/2))."""
    return 2 * adaptive_sharp(inputs)


def linear_sharp(inputs: BoundInputs) -> Float[Array, ""]:
    """sum_t Dbar_t (<= T eps), attained: a quarter of the printed bound, from averages alone.

    Proof by induction over the tokens that are left (docs/theory.md). The adaptive bound with every weight at its cap
    has 2 sum_t Dbar_t.
    """
    return jnp.sum(inputs.mean_tv_t)


def linear_printed(inputs: BoundInputs) -> Float[Array, ""]:
    """4 sum_t Dbar_t (<= 4 T eps)."""
    return 4 * linear_sharp(inputs)


def sequence_kl_sharp(inputs: BoundInputs) -> Float[Array, ""]:
    """D_KL = KL(P^mu || P^pi) = sum_t E_{d_t} KL (<= T delta), in units of the span of the rewards; best constant.

    Proof: with W = prod_t rho_t, S = sum_t (rho_t - 1) and Phi = S - log W >= 0, W >= 1 + log W = 1 + S - Phi. As
    E_mu[W - 1 - S] = 0, |Error| = |E_mu[R (W - 1 - S)]| <= E_mu max(0, 1 + S - W) <= E_mu Phi = D_KL. It needs no
    maximum and is linear in the horizon, where the printed bounds grow like T^(3/2). Not in the paper (errata F2.17).
    Where pi can draw what mu cannot, E_mu[W - 1 - S] is not 0 and the bound still holds, times the span of the rewards
    and 0 (docs/theory.md, errata F2.18). It is infinite where mu can draw what pi cannot.
    """
    return inputs.sequence_kl


def average_only_sharp(inputs: BoundInputs) -> Float[Array, ""]:
    """D_TV + sum_t Dbar_t, at most `average_only_from_kl`; never below `linear_sharp`.

    Proof: |J(pi) - J(mu)| <= D_TV and |L'| <= sum_t Dbar_t. Not in the paper (errata F2.4).
    """
    return _capped(inputs.sequence_tv) + jnp.sum(inputs.mean_tv_t)


def average_only_from_kl(inputs: BoundInputs) -> Float[Array, ""]:
    """sqrt(2 T D_KL): what `average_only_sharp` is at most; an average KL of a per token gives T sqrt(2 a)."""
    return safe_sqrt(2 * inputs.horizon * inputs.sequence_kl)


PRINTED = {
    "classical": classical_printed,
    "coupling": coupling_printed,
    "pinsker_marginal_kl": pinsker_marginal_kl_printed,
    "pinsker_marginal_tv": pinsker_marginal_tv_printed,
    "mixed_kl": mixed_kl_printed,
    "mixed_tv": mixed_tv_printed,
    "adaptive_kl": adaptive_kl_printed,
    "adaptive_tv": adaptive_tv_printed,
    "adaptive": adaptive_printed,
    "linear": linear_printed,
}
"""The bounds with the constants of the paper, by name."""

SHARP = {
    "classical": classical_sharp,
    "coupling": coupling_sharp,
    "pinsker_marginal_kl": pinsker_marginal_kl_sharp,
    "pinsker_marginal_tv": pinsker_marginal_tv_sharp,
    "mixed_kl": mixed_kl_sharp,
    "mixed_tv": mixed_tv_sharp,
    "adaptive_kl": adaptive_kl_sharp,
    "adaptive_tv": adaptive_tv_sharp,
    "adaptive": adaptive_sharp,
    "linear": linear_sharp,
    "average_only": average_only_sharp,
    "sequence_kl": sequence_kl_sharp,
}
"""The bounds with the smallest constants that are proved here, by name, and two that the paper does not have."""

BOUND_NAMES = tuple(SHARP)
"""The order that `SurrogateErrorBounds.dominating` indexes."""

WITHOUT_COVERAGE = ("mixed_kl", "linear", "average_only", "sequence_kl")
"""The bounds that hold where pi can draw what mu cannot, times the span of the rewards and 0 together (their own span
where low <= 0 <= high). Each other one is broken by one token: mu never draws it, pi does with a small probability, and
it alone is rewarded."""

UNIFIED = ("pinsker_marginal_kl", "pinsker_marginal_tv", "mixed_kl", "mixed_tv", "coupling", "adaptive")
"""The bounds that the paper's unified bound B* is the minimum of."""


class SurrogateErrorBounds(NamedTuple):
    """Every bound on |J(pi) - J(mu) - L'(pi)|, in units of reward. A pytree of arrays.

    Attributes:
        printed: name -> bound with the paper's constant.
        sharp: name -> bound with the smallest constant that is proved.
        unified_printed: B* of the paper, the minimum over `UNIFIED`.
        unified_sharp: the minimum over all of `sharp`.
        dominating: index into `BOUND_NAMES` of the smallest sharp bound.
        threshold: a bound at or above it says nothing (see `trivial_error_bound`).
        vacuous: unified_sharp >= threshold.
        vacuous_each: name -> the same for each sharp bound.
    """

    printed: dict[str, Float[Array, ""]]
    sharp: dict[str, Float[Array, ""]]
    unified_printed: Float[Array, ""]
    unified_sharp: Float[Array, ""]
    dominating: Int[Array, ""]
    threshold: Float[Array, ""]
    vacuous: Bool[Array, ""]
    vacuous_each: dict[str, Bool[Array, ""]]


def trivial_error_bound(
    *, reward_range: tuple[ScalarLike, ScalarLike], mean_reward: ScalarLike, surrogate_gain: ScalarLike
) -> Float[Array, ""]:
    """max( J(mu) + L' - low, high - J(mu) - L' ): what |Error| is at most because J(pi) lies in [low, high].

    It is exact: the interval J(mu) + L' -+ B excludes a value in [low, high] if and only if B is below it. So a bound
    is vacuous, given what was measured, if and only if it is not below this number. It is never below half the span,
    and at L' = 0 never above the span.

    Args:
        reward_range: (low, high), between which every reward lies.
        mean_reward: J(mu).
        surrogate_gain: L'(pi).

    Returns:
        the trivial bound, in units of reward.
    """
    low, high = reward_range
    predicted = jnp.asarray(mean_reward) + surrogate_gain
    return jnp.maximum(predicted - low, high - predicted)


def _proved(
    bounds: dict[str, Float[Array, ""]],
    *,
    reward_range: tuple[ScalarLike, ScalarLike],
    mu_covers_pi: Bool[Array, ""] | bool,
) -> dict[str, Float[Array, ""]]:
    """The bounds in units of reward, infinity in the place of one that does not hold.

    Error is linear in R. With coverage that of a constant is 0, so that a span is all that counts. Without, L' depends
    on where the rewards start: max(R, 0) and max(-R, 0) start at 0, and their bounds add up to the span of [low, high]
    and 0.
    """
    low, high = (jnp.asarray(end, bounds["linear"].dtype) for end in reward_range)
    from_zero = jnp.maximum(high, jnp.zeros_like(high)) - jnp.minimum(low, jnp.zeros_like(low))
    factors = {
        name: jnp.where(mu_covers_pi, high - low, from_zero if name in WITHOUT_COVERAGE else jnp.inf) for name in bounds
    }
    # Where it does not hold a bound of 0 is infinite as well.
    return {name: jnp.where(jnp.isinf(x), jnp.inf, x * bounds[name]) for name, x in factors.items()}


def surrogate_error_bounds(
    inputs: BoundInputs,
    *,
    reward_range: tuple[ScalarLike, ScalarLike] = (0.0, 1.0),
    mean_reward: ScalarLike | None = None,
    surrogate_gain: ScalarLike | None = None,
    mu_covers_pi: Bool[Array, ""] | bool = True,
) -> SurrogateErrorBounds:
    """Every bound for these inputs, the smallest one, which one that is, and whether it says anything.

    Vacuous means: not below what holds trivially. With mean_reward and surrogate_gain, that is
    `trivial_error_bound`. Without them it is the span of the rewards: the smallest value that makes the bound useless
    for every J(mu) when L' = 0, and the point from which J(pi) > J(mu) can be concluded only if L' promises more than
    any policy can gain.

    Args:
        inputs: divergences between pi and mu.
        reward_range: (low, high), between which every reward lies.
        mean_reward: J(mu), if it was measured.
        surrogate_gain: L'(pi), if it was measured; both or none.
        mu_covers_pi: whether mu can sample every token that pi can, in every context. Softmax policies do; top-p, top-k
            and min-p samplers do not. Where it is false, bounds that do not hold then are infinite, and the others are
            times the span of the rewards and 0: more than their own span if 0 is not among them (errata F2.18).

    Returns:
        `SurrogateErrorBounds` in units of reward.

    Raises:
        ValueError: if the reward range is given in numbers and empty, or only one of the two measurements is given.
    """
    low, high = reward_range
    if isinstance(low, (int, float)) and isinstance(high, (int, float)) and not low < high:
        raise ValueError(f"reward_range is ({low}, {high}); its first number must be smaller than its second.")
    if (mean_reward is None) != (surrogate_gain is None):
        raise ValueError("mean_reward and surrogate_gain must be given together, or neither; one is None.")
    span = jnp.asarray(high, inputs.max_kl.dtype) - low
    printed, sharp = (
        _proved(
            {name: bound(inputs) for name, bound in all_.items()}, reward_range=reward_range, mu_covers_pi=mu_covers_pi
        )
        for all_ in (PRINTED, SHARP)
    )
    threshold = span
    if mean_reward is not None and surrogate_gain is not None:
        threshold = trivial_error_bound(
            reward_range=reward_range, mean_reward=mean_reward, surrogate_gain=surrogate_gain
        ).astype(span.dtype)
    stacked = jnp.stack([sharp[name] for name in BOUND_NAMES])
    smallest = jnp.min(stacked)
    return SurrogateErrorBounds(
        printed=printed,
        sharp=sharp,
        unified_printed=jnp.min(jnp.stack([printed[name] for name in UNIFIED])),
        unified_sharp=smallest,
        dominating=jnp.argmin(stacked),
        threshold=threshold,
        # Negated, so that a bound that is NaN counts as saying nothing.
        vacuous=~(smallest < threshold),
        vacuous_each={name: ~(sharp[name] < threshold) for name in BOUND_NAMES},
    )
