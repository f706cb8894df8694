"""What it costs to optimise the policy on a pruned vocabulary: the bias of dynamic vocabulary pruning.

pi_S is pi renormalised on its safe set in every context, Z(c) = pi(safe set | c) the kept mass, J_S the expected reward
under pi_S.

    |J - J_S| <= span TV(P^pi, P^{pi_S}),   TV = 1 - E_{pi_S}[prod_t Z(c_t)]  exactly
              <= span E_{pi_S}[sum_t (1 - Z(c_t))]  <=  span T (1 - min Z).

The first inequality is attained by the indicator of the responses that stay inside. Source: "Taming the Tail" (arXiv
2512.23087) claims a bounded bias; these statements are derived. A factor 2 in front is not needed (errata F3.4).
"""

import math

import jax.numpy as jnp
from jaxtyping import Array
from jaxtyping import Bool
from jaxtyping import Float
from jaxtyping import Int
from jaxtyping import ScalarLike

from jaxrl_llm.bounds.sampled import Estimate
from jaxrl_llm.bounds.sampled import clustered_mean
from jaxrl_llm.checks import checked
from jaxrl_llm.checks import require_dtype
from jaxrl_llm.checks import require_numbers
from jaxrl_llm.checks import require_rank
from jaxrl_llm.checks import require_same_shape
from jaxrl_llm.masked import masked_sum

ROUNDING = 1e-4
"""By how much a sum of probabilities in float32 over a large vocabulary may exceed 1."""


def _check(kept_mass_t: Float[Array, "B T"], response_mask: Bool[Array, "B T"]) -> Bool[Array, " B"]:
    require_rank(2, "B T", kept_mass_t=kept_mass_t, response_mask=response_mask)
    require_same_shape(kept_mass_t=kept_mass_t, response_mask=response_mask)
    require_dtype("floating", kept_mass_t=kept_mass_t)
    require_dtype("boolean", response_mask=response_mask)
    return jnp.any(response_mask, axis=1)


@checked
def context_total_variation(kept_mass: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """TV(pi, pi_S) = 1 - Z in one context [prob]; 0 where the sum Z was rounded above 1."""
    return jnp.maximum(1 - kept_mass, jnp.zeros((), kept_mass.dtype))


@checked
def sampled_total_variation(
    kept_mass_t: Float[Array, "B T"], response_mask: Bool[Array, "B T"], *, group_ids: Int[Array, " B"] | None = None
) -> Estimate:
    """Unbiased estimate of TV(P^pi, P^{pi_S}) = 1 - E_{pi_S}[prod_t Z(c_t)], from responses that pi_S sampled.

    It is also the probability that a response of pi contains a token outside its safe set.

    Args:
        kept_mass_t: Z of the context of each token [prob].
        response_mask: true at the tokens that pi_S sampled.
        group_ids: equal for sequences that answer the same prompt; they cluster the standard error.

    Returns:
        the estimate [prob]; times the span of the rewards it bounds |J - J_S|.

    Raises:
        ValueError, TypeError: if the arrays are not [B, T] of one shape, floating and boolean.
    """
    real = _check(kept_mass_t, response_mask)
    # log1p(-(1 - Z)) keeps the digits of a mass near 1.
    pruned = context_total_variation(kept_mass_t)
    log_kept = jnp.log1p(-jnp.where(response_mask, pruned, jnp.zeros((), pruned.dtype)))
    return clustered_mean(-jnp.expm1(jnp.sum(log_kept, axis=1)), real, group_ids)


@checked
def sampled_bias_bound(
    kept_mass_t: Float[Array, "B T"],
    response_mask: Bool[Array, "B T"],
    *,
    reward_range: tuple[ScalarLike, ScalarLike] = (0.0, 1.0),
    group_ids: Int[Array, " B"] | None = None,
) -> Estimate:
    """span E_{pi_S}[sum_t (1 - Z(c_t))]: a data-dependent bound on |J - J_S|, informative at LLM scale.

    The span times `sampled_total_variation` is never above it, and bounds the same.

    Args:
        kept_mass_t: Z of the context of each token [prob].
        response_mask: true at the tokens that pi_S sampled.
        reward_range: (low, high), between which every reward lies.
        group_ids: equal for sequences that answer the same prompt; they cluster the standard error.

    Returns:
        the estimate, in units of reward.

    Raises:
        ValueError, TypeError: if the arrays are not [B, T] of one shape, floating and boolean.
    """
    real = _check(kept_mass_t, response_mask)
    low, high = reward_range
    span = jnp.asarray(high, kept_mass_t.dtype) - low
    return clustered_mean(
        span * masked_sum(context_total_variation(kept_mass_t), response_mask, axis=1), real, group_ids
    )


def worst_case_pruned_mass(*, log_min_p: ScalarLike, vocabulary: int) -> Float[Array, ""]:
    """1 - Z <= (V - 1) r / (1 + (V - 1) r), r = exp(log_min_p): what min-p can remove in the worst context [prob].

    Attained by one token of mass Z and all others just below r Z. At V = 151,936 and log_min_p = -13 it is 0.256 per
    token, so the worst-case bias of a response is vacuous; use `sampled_bias_bound`.

    Args:
        log_min_p: log of the threshold relative to the most likely token [nats], <= 0.
        vocabulary: V.

    Returns:
        the largest pruned mass of one context [prob].
    """
    require_numbers(-math.inf, 0, log_min_p=log_min_p)
    require_numbers(1, math.inf, vocabulary=vocabulary)
    others = (vocabulary - 1) * jnp.exp(jnp.asarray(log_min_p, jnp.result_type(float)))
    return others / (1 + others)


def worst_case_bias_bound(
    *, smallest_kept_mass: ScalarLike, horizon: int, reward_range: tuple[ScalarLike, ScalarLike] = (0.0, 1.0)
) -> Float[Array, ""]:
    """span min(1, T (1 - min Z)): the bound on |J - J_S| that needs the smallest kept mass over all contexts.

    Args:
        smallest_kept_mass: min Z over reachable contexts [prob]; a sum that was rounded above 1 counts as 1.
        horizon: T [tokens].
        reward_range: (low, high), between which every reward lies.

    Returns:
        the bound, in units of reward; equal to the span where it is vacuous, never negative.

    Raises:
        ValueError: for numbers that are no mass: below 0, or above 1 by more than `ROUNDING`.
    """
    require_numbers(0, 1 + ROUNDING, smallest_kept_mass=smallest_kept_mass)
    require_numbers(1, math.inf, horizon=horizon)
    low, high = reward_range
    span = jnp.asarray(high, jnp.result_type(float)) - low
    leaves = horizon * context_total_variation(jnp.asarray(smallest_kept_mass, span.dtype))
    return span * jnp.minimum(leaves, jnp.ones((), span.dtype))
