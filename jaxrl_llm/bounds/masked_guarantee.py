"""What can be certified when some contexts are outside the trust region: the guarantee of Trust Region Masking,
repaired.

The paper rejects sequences that visit a context with KL(mu || pi) > delta and states the bound B*(delta) for what is
left. That does not follow (errata F2.7): the bound is on the full surrogate and needs KL <= delta at all contexts. What
does follow concerns pi~, the policy that equals pi on the contexts G with KL <= delta and mu elsewhere:

    J(pi) - J(mu) >= L'(pi~) - B(pi~) - span P_pi(hit),      P_pi(hit) <= P_mu(hit) + TV(P^{pi~}, P^mu),

hit = "the response visits a context outside G". Proof: pi and pi~ agree until the first exit from G, so they can be
coupled to differ only after it, |J(pi) - J(pi~)| <= span P_pi(hit), and hit has the same probability under both; every
bound of `surrogate_error` applies to pi~, whose largest KL is at most delta.

L'(pi~) masks tokens by their context, not sequences: E_mu[R sum_t 1[c_t in G](rho_t - 1)].

A context with a small KL(mu || pi) may still be one where pi can draw a token that mu cannot. There pi~ is not covered
by mu: L'(pi~) then depends on where the rewards start, and B must be one of `surrogate_error.WITHOUT_COVERAGE` with the
span of the rewards and 0 (errata F2.20).
"""

import jax.numpy as jnp
from jaxtyping import Array
from jaxtyping import Bool
from jaxtyping import Float
from jaxtyping import Int
from jaxtyping import ScalarLike

from jaxrl_llm.bounds.inputs import BoundInputs
from jaxrl_llm.bounds.inputs import bound_inputs_from_tokens
from jaxrl_llm.bounds.sampled import LOG_RATIO_LIMIT
from jaxrl_llm.bounds.sampled import Estimate
from jaxrl_llm.bounds.sampled import clustered_mean
from jaxrl_llm.bounds.sampled import sampled_surrogate_gain
from jaxrl_llm.checks import checked
from jaxrl_llm.checks import require_dtype
from jaxrl_llm.checks import require_rank
from jaxrl_llm.checks import require_same_shape


@checked
def context_mask(
    kl_t: Float[Array, "B T"], response_mask: Bool[Array, "B T"], *, threshold: ScalarLike
) -> Bool[Array, "B T"]:
    """True at response tokens whose context is in G: KL(mu || pi) <= threshold there. A NaN is outside.

    Args:
        kl_t: exact KL of the context of each token [nats].
        response_mask: true at the tokens that mu sampled.
        threshold: delta [nats].

    Returns:
        one bool per token, false outside the response.

    Raises:
        ValueError, TypeError: if the arrays are not [B, T] of one shape, floating and boolean.
    """
    require_rank(2, "B T", kl_t=kl_t, response_mask=response_mask)
    require_same_shape(kl_t=kl_t, response_mask=response_mask)
    require_dtype("floating", kl_t=kl_t)
    require_dtype("boolean", response_mask=response_mask)
    return response_mask & (kl_t <= threshold)


@checked
def sampled_hit_probability(
    kl_t: Float[Array, "B T"],
    response_mask: Bool[Array, "B T"],
    *,
    threshold: ScalarLike,
    group_ids: Int[Array, " B"] | None = None,
) -> Estimate:
    """P_mu(hit): the share of responses of mu that visit a context with KL > threshold.

    Args, Raises as `context_mask`; group_ids cluster the standard error.

    Returns:
        the estimate [prob].
    """
    outside = response_mask & ~context_mask(kl_t, response_mask, threshold=threshold)
    hit = jnp.any(outside, axis=1).astype(kl_t.dtype)
    return clustered_mean(hit, jnp.any(response_mask, axis=1), group_ids)


@checked
def sampled_context_masked_gain(
    log_ratio_t: Float[Array, "B T"],
    kl_t: Float[Array, "B T"],
    response_mask: Bool[Array, "B T"],
    rewards: Float[Array, " B"],
    *,
    threshold: ScalarLike,
    group_ids: Int[Array, " B"] | None = None,
    baseline: ScalarLike = 0.0,
    limit: ScalarLike = LOG_RATIO_LIMIT,
) -> Estimate:
    """L'(pi~) = E_mu[ R sum_t 1[c_t in G](rho_t - 1) ], the surrogate that the repaired guarantee certifies.

    Unlike the sequence-masked surrogate it does not depend on a baseline where mu can sample whatever pi can: given its
    context every term has mean zero. Otherwise it has mean -(what pi has and mu cannot draw), each unit of baseline
    adds the sum of that over the tokens, and only baseline 0 estimates L'(pi~) (errata F2.20).

    Args:
        log_ratio_t: log pi - log mu of the sampled tokens [nats].
        kl_t: exact KL(mu || pi) of the context of each token [nats].
        response_mask: true at the tokens that mu sampled.
        rewards: one per sequence.
        threshold: delta [nats].
        group_ids: equal for sequences that answer the same prompt.
        baseline: subtracted from every reward.
        limit: clamp of the log-ratio [nats].

    Returns:
        the estimate, in units of reward.

    Raises:
        ValueError, TypeError: if ranks, shapes or dtypes do not fit.
    """
    inside = context_mask(kl_t, response_mask, threshold=threshold)
    masked = jnp.where(inside, log_ratio_t, jnp.zeros((), log_ratio_t.dtype))
    return sampled_surrogate_gain(masked, response_mask, rewards, group_ids=group_ids, baseline=baseline, limit=limit)


@checked
def context_masked_inputs(
    kl_t: Float[Array, "B T"],
    tv_t: Float[Array, "B T"],
    response_mask: Bool[Array, "B T"],
    *,
    threshold: ScalarLike,
    horizon: int,
) -> BoundInputs:
    """`bound_inputs_from_tokens` of pi~: no divergence outside G.

    By construction max_kl <= threshold, and max_kl = threshold holds at every context of pi~, visited or not (max_tv
    then is sqrt(threshold / 2) by Pinsker). Bounds that read maxima alone (classical, coupling, Pinsker-marginal)
    become certificates by setting the two; those that read means stay estimates.
    """
    inside = context_mask(kl_t, response_mask, threshold=threshold)
    zero = jnp.zeros((), kl_t.dtype)
    return bound_inputs_from_tokens(
        jnp.where(inside, kl_t, zero), jnp.where(inside, tv_t, zero), response_mask, horizon=horizon
    )


def masked_gain_lower_bound(
    *,
    context_masked_gain: ScalarLike,
    error_bound: ScalarLike,
    hit_probability: ScalarLike,
    sequence_tv: ScalarLike,
    reward_range: tuple[ScalarLike, ScalarLike] = (0.0, 1.0),
    mu_covers_pi: Bool[Array, ""] | bool = True,
) -> Float[Array, ""]:
    """L'(pi~) - B(pi~) - span min(1, P_mu(hit) + TV(P^{pi~}, P^mu)): what J(pi) - J(mu) is at least.

    Args:
        context_masked_gain: L'(pi~).
        error_bound: any bound of `surrogate_error` for the inputs of pi~, in units of reward; without coverage one of
            `surrogate_error.WITHOUT_COVERAGE`.
        hit_probability: P_mu(hit) [prob].
        sequence_tv: TV between the laws of whole responses under pi~ and mu [prob].
        reward_range: (low, high), between which every reward lies.
        mu_covers_pi: whether mu can sample every token that pi can, in every context. Where it is false, error_bound is
            widened from the span of the rewards to that of the rewards and 0: with rewards of -3 and a policy that
            moved 0.02 to a token of which mu knows nothing, L' - B would certify a gain of 0.04 where there is none
            (errata F2.20). One that is that wide already is widened again, which is safe.

    Returns:
        the lower bound, in units of reward. With estimates in place of expectations it is an estimate.
    """
    low, high = reward_range
    span = jnp.asarray(high, jnp.result_type(float)) - low
    from_zero = jnp.maximum(jnp.asarray(high, span.dtype), 0) - jnp.minimum(jnp.asarray(low, span.dtype), 0)
    error = jnp.asarray(error_bound, span.dtype)
    error = jnp.where(mu_covers_pi, error, error * (from_zero / span))
    leaves = jnp.minimum(jnp.asarray(hit_probability, span.dtype) + sequence_tv, jnp.ones((), span.dtype))
    return jnp.asarray(context_masked_gain, span.dtype) - error - span * leaves
