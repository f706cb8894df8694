"""Trust Region Masking: which sequences may contribute to the gradient.

Every test returns one bool per sequence, true where the sequence is accepted, and is a constant to the gradient. A
statistic that is NaN or infinite, of either sign, rejects. An empty row is accepted (it contributes nothing anyway).

Source: TRM (Li et al. 2025, arXiv 2512.23075). The exact tests need KL(mu || pi) per context from full distributions,
mu the policy that sampled. The sampled tests see the sampled token only: they miss contexts whose distribution moved on
other tokens (errata F2.15), and no bound applies to them. Accepting a sequence says something about the contexts it
visited, not about all reachable contexts (errata F2.7).
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array
from jaxtyping import Bool
from jaxtyping import Float
from jaxtyping import ScalarLike

from jaxrl_llm.checks import checked
from jaxrl_llm.checks import require_dtype
from jaxrl_llm.checks import require_rank
from jaxrl_llm.checks import require_same_shape
from jaxrl_llm.masked import masked_count
from jaxrl_llm.masked import masked_max
from jaxrl_llm.masked import masked_mean
from jaxrl_llm.masked import masked_min
from jaxrl_llm.masked import masked_sum
from jaxrl_llm.objectives.divergences import k2
from jaxrl_llm.objectives.divergences import k3


def _constant(x: Float[Array, "B T"], response_mask: Bool[Array, "B T"], name: str) -> Float[Array, "B T"]:
    require_rank(2, "B T", **{name: x}, response_mask=response_mask)
    require_same_shape(**{name: x}, response_mask=response_mask)
    require_dtype("floating", **{name: x})
    require_dtype("boolean", response_mask=response_mask)
    return jax.lax.stop_gradient(x)


def _bounded_below(x: Float[Array, "B T"], response_mask: Bool[Array, "B T"]) -> Bool[Array, " B"]:
    # No divergence is -inf: where it stands, something else broke.
    return masked_min(x, response_mask, axis=1) > -jnp.inf


@checked
def accept_by_maximum(
    kl_t: Float[Array, "B T"], response_mask: Bool[Array, "B T"], *, threshold: ScalarLike
) -> Bool[Array, " B"]:
    """TRM-Max: accept a sequence if max_t KL(mu(.|c_t) || pi(.|c_t)) <= threshold over its response tokens.

    Args:
        kl_t: exact KL of each context [nats], or any other per-token divergence.
        response_mask: true at the tokens that the policy sampled.
        threshold: called delta in the paper [nats].

    Returns:
        true for accepted sequences.

    Raises:
        ValueError, TypeError: if the arrays are not [B, T] of one shape, floating and boolean.
    """
    kl_t = _constant(kl_t, response_mask, "kl_t")
    return (masked_max(kl_t, response_mask, axis=1) <= threshold) & _bounded_below(kl_t, response_mask)


@checked
def accept_by_average(
    kl_t: Float[Array, "B T"], response_mask: Bool[Array, "B T"], *, threshold: ScalarLike
) -> Bool[Array, " B"]:
    """TRM-Avg: accept a sequence if the mean over its response tokens of KL(mu(.|c_t) || pi(.|c_t)) is <= threshold.

    Args and Raises as `accept_by_maximum`.
    """
    kl_t = _constant(kl_t, response_mask, "kl_t")
    return (masked_mean(kl_t, response_mask, axis=1) <= threshold) & _bounded_below(kl_t, response_mask)


@checked
def accept_by_both(
    kl_t: Float[Array, "B T"],
    response_mask: Bool[Array, "B T"],
    *,
    maximum: ScalarLike,
    average: ScalarLike,
) -> Bool[Array, " B"]:
    """TRM with both tests: the largest KL is <= `maximum` and the mean KL is <= `average` [nats]."""
    by_maximum = accept_by_maximum(kl_t, response_mask, threshold=maximum)
    return by_maximum & accept_by_average(kl_t, response_mask, threshold=average)


@checked
def accept_by_sampled_maximum(
    log_ratio_t: Float[Array, "B T"], response_mask: Bool[Array, "B T"], *, threshold: ScalarLike
) -> Bool[Array, " B"]:
    """The maximum test from sampled log-probs alone: max_t k2 <= threshold, k2 = (log pi - log mu)^2 / 2.

    k2 treats a ratio and its inverse alike (k3 does not), which is why the maximum uses it. A threshold of 0.05 accepts
    ratios in [0.729, 1.372].

    Args:
        log_ratio_t: log pi - log mu of the sampled tokens [nats].
        response_mask: true at the tokens that the policy sampled.
        threshold: in the units of k2 [nats].

    Returns:
        true for accepted sequences.

    Raises:
        ValueError, TypeError: if the arrays are not [B, T] of one shape, floating and boolean.
    """
    fixed = _constant(log_ratio_t, response_mask, "log_ratio_t")
    return accept_by_maximum(k2(-fixed), response_mask, threshold=threshold)


@checked
def accept_by_sampled_average(
    log_ratio_t: Float[Array, "B T"], response_mask: Bool[Array, "B T"], *, threshold: ScalarLike
) -> Bool[Array, " B"]:
    """The average test from sampled log-probs alone: mean_t k3 <= threshold, k3 = rho - 1 - log rho, an unbiased
    estimate of KL(mu || pi) where mu can draw whatever pi can.

    Of a truncated sampler it estimates KL(mu || pi) less the mass of pi that mu cannot draw, and accepts too much:
    0.036 for 0.236 nats at mu = (0.7, 0.3, 0), pi = (0.5, 0.3, 0.2) (errata F2.20). Use an exact test there.

    Args and Raises as `accept_by_sampled_maximum`.
    """
    fixed = _constant(log_ratio_t, response_mask, "log_ratio_t")
    return accept_by_average(k3(-fixed), response_mask, threshold=threshold)


@checked
def accept_by_sampled_both(
    log_ratio_t: Float[Array, "B T"],
    response_mask: Bool[Array, "B T"],
    *,
    maximum: ScalarLike,
    average: ScalarLike,
) -> Bool[Array, " B"]:
    """Both sampled tests: max_t k2 <= `maximum` and mean_t k3 <= `average`."""
    by_maximum = accept_by_sampled_maximum(log_ratio_t, response_mask, threshold=maximum)
    return by_maximum & accept_by_sampled_average(log_ratio_t, response_mask, threshold=average)


@checked
def accept_by_ratio_deviation(
    ratio_t: Float[Array, "B T"], response_mask: Bool[Array, "B T"], *, threshold: ScalarLike
) -> Bool[Array, " B"]:
    """SER: accept if the mean over response tokens of |rho_t - 1| is <= threshold (length-neutral; the paper suggests
    0.03 to 0.10).
    """
    return accept_by_average(
        jnp.abs(_constant(ratio_t, response_mask, "ratio_t") - 1), response_mask, threshold=threshold
    )


@checked
def accept_by_weighted_ratio_deviation(
    ratio_t: Float[Array, "B T"],
    response_mask: Bool[Array, "B T"],
    weights_t: Float[Array, " T"],
    *,
    threshold: ScalarLike,
) -> Bool[Array, " B"]:
    """LN-TRM: accept if sum_t |rho_t - 1| w_t / sum_t w_t <= threshold, both sums over the response tokens.

    The weights must belong to a fixed horizon, for instance w_t = min(1, (T - t) eps) with T the longest allowed
    response: with the realised length in their place the inequality behind the test fails, because the capped weights
    are concave in the length (errata F2.12).

    Args:
        ratio_t: rho_t = pi / mu of the sampled tokens.
        response_mask: true at the tokens that the policy sampled.
        weights_t: weight of each column, >= 0.
        threshold: called delta_W in the paper.

    Returns:
        true for accepted sequences.

    Raises:
        ValueError, TypeError: if the arrays are not [B, T], [B, T] and [T].
    """
    deviation = jnp.abs(_constant(ratio_t, response_mask, "ratio_t") - 1)
    require_rank(1, "T", weights_t=weights_t)
    weights = jnp.broadcast_to(weights_t[None, :], deviation.shape)
    # Multiplied out, so that an empty row compares 0 <= 0.
    total = masked_sum(deviation * weights, response_mask, axis=1)
    return total <= threshold * masked_sum(weights, response_mask, axis=1)


@checked
def rejected_sequences(
    accepted: Bool[Array, " B"], response_mask: Bool[Array, "B T"]
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """(number of rejected sequences, number of sequences); rows without a response token are not sequences."""
    real = jnp.any(response_mask, axis=1)
    ones = jnp.ones(accepted.shape, jnp.result_type(float))
    return masked_sum(ones, real & ~accepted), masked_count(ones, real)


@checked
def rejected_tokens(
    accepted: Bool[Array, " B"], response_mask: Bool[Array, "B T"]
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """(response tokens in rejected sequences, response tokens): the rejected mass, which exceeds the rejected share
    when long sequences fail.
    """
    ones = jnp.ones(response_mask.shape, jnp.result_type(float))
    return masked_sum(ones, response_mask & ~accepted[:, None]), masked_count(ones, response_mask)
