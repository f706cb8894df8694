"""Importance ratios between two policies, per token and per sequence.

Every ratio is exp of a log-ratio, and every log-ratio is clamped to [-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT] before the
exponential (20 nats: a ratio between 2e-9 and 5e8), so that one broken token cannot overflow float32. Beyond the clamp
the gradient is 0. `policy_loss` reports how often it binds. Masked tokens have log-ratio 0 and ratio 1, whatever the
arrays hold there.
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
from jaxrl_llm.masked import masked_mean
from jaxrl_llm.masked import masked_sum

LOG_RATIO_LIMIT = 20.0


def _check_log_ratio(log_ratio_t: Float[Array, "B T"], response_mask: Bool[Array, "B T"]) -> None:
    require_rank(2, "B T", log_ratio_t=log_ratio_t, response_mask=response_mask)
    require_same_shape(log_ratio_t=log_ratio_t, response_mask=response_mask)
    require_dtype("floating", log_ratio_t=log_ratio_t)
    require_dtype("boolean", response_mask=response_mask)


@checked
def token_log_ratio(
    log_prob: Float[Array, "B T"], log_prob_other: Float[Array, "B T"], response_mask: Bool[Array, "B T"]
) -> Float[Array, "B T"]:
    """log pi(y_t|c_t) - log pi_other(y_t|c_t) [nats] per token; 0 outside the mask.

    Args:
        log_prob: of the policy in the numerator.
        log_prob_other: of the policy in the denominator; a constant to the gradient.
        response_mask: true at the tokens that the policy sampled.

    Returns:
        the log-ratio, not clamped.

    Raises:
        ValueError, TypeError: if the arrays are not [B, T] of one shape, floating, floating and boolean.
    """
    require_rank(2, "B T", log_prob=log_prob, log_prob_other=log_prob_other, response_mask=response_mask)
    require_same_shape(log_prob=log_prob, log_prob_other=log_prob_other, response_mask=response_mask)
    require_dtype("floating", log_prob=log_prob, log_prob_other=log_prob_other)
    require_dtype("boolean", response_mask=response_mask)
    # Both operands are cleaned before the subtraction, so that -inf - -inf at padding makes no NaN in the gradient.
    zero = jnp.zeros((), log_prob.dtype)
    other = jax.lax.stop_gradient(log_prob_other)
    return jnp.where(response_mask, log_prob, zero) - jnp.where(response_mask, other, zero)


@checked
def ratio_from_log(log_ratio: Float[Array, "*shape"], *, limit: ScalarLike = LOG_RATIO_LIMIT) -> Float[Array, "*shape"]:
    """exp of the log-ratio clamped to [-limit, limit] nats."""
    return jnp.exp(jnp.clip(log_ratio, jnp.negative(limit), limit))


@checked
def token_ratio(
    log_ratio_t: Float[Array, "B T"], response_mask: Bool[Array, "B T"], *, limit: ScalarLike = LOG_RATIO_LIMIT
) -> Float[Array, "B T"]:
    """rho_t = pi(y_t|c_t) / pi_other(y_t|c_t) per token, log-ratio clamped; 1 outside the mask.

    Source: PPO (Schulman et al. 2017, arXiv 1707.06347, eq. 6).
    """
    _check_log_ratio(log_ratio_t, response_mask)
    return ratio_from_log(jnp.where(response_mask, log_ratio_t, jnp.zeros((), log_ratio_t.dtype)), limit=limit)


@checked
def sequence_log_ratio(log_ratio_t: Float[Array, "B T"], response_mask: Bool[Array, "B T"]) -> Float[Array, " B"]:
    """log of the sequence likelihood ratio: the sum of the token log-ratios [nats], not clamped."""
    _check_log_ratio(log_ratio_t, response_mask)
    return masked_sum(log_ratio_t, response_mask, axis=1)


@checked
def sequence_ratio(
    log_ratio_t: Float[Array, "B T"], response_mask: Bool[Array, "B T"], *, limit: ScalarLike = LOG_RATIO_LIMIT
) -> Float[Array, " B"]:
    """prod_t rho_t per sequence: the ratio of the likelihoods of the whole response, its logarithm clamped."""
    return ratio_from_log(sequence_log_ratio(log_ratio_t, response_mask), limit=limit)


@checked
def geometric_ratio(
    log_ratio_t: Float[Array, "B T"], response_mask: Bool[Array, "B T"], *, limit: ScalarLike = LOG_RATIO_LIMIT
) -> Float[Array, " B"]:
    """s = (prod_t rho_t)^(1/length) = exp(mean_t log rho_t) per sequence.

    Source: GSPO (Zheng et al. 2025, arXiv 2507.18071, eq. 7). The gradient flows through every token of the sequence.

    Args:
        log_ratio_t: per-token log-ratio [nats].
        response_mask: true at the tokens that the policy sampled.
        limit: clamp of the mean log-ratio [nats].

    Returns:
        one ratio per sequence; 1 for an empty row.

    Raises:
        ValueError, TypeError: if the arrays are not [B, T] of one shape, floating and boolean.
    """
    _check_log_ratio(log_ratio_t, response_mask)
    return ratio_from_log(masked_mean(log_ratio_t, response_mask, axis=1), limit=limit)


@checked
def geometric_token_ratio(
    log_ratio_t: Float[Array, "B T"], response_mask: Bool[Array, "B T"], *, limit: ScalarLike = LOG_RATIO_LIMIT
) -> Float[Array, "B T"]:
    """s_t = stop(s) rho_t / stop(rho_t): the value of GSPO's sequence ratio at each token, the gradient through that
    token only.

    Source: GSPO-token (Zheng et al. 2025, arXiv 2507.18071, eq. 14). With one advantage per sequence and the mean over
    its tokens, its loss and gradient equal GSPO's; with per-token advantages it is the form that makes sense.

    Returns:
        [B, T]; 1 outside the mask.
    """
    _check_log_ratio(log_ratio_t, response_mask)
    value = jax.lax.stop_gradient(geometric_ratio(log_ratio_t, response_mask, limit=limit))
    own = jnp.where(response_mask, log_ratio_t, jnp.zeros((), log_ratio_t.dtype))
    one = jnp.exp(own - jax.lax.stop_gradient(own))
    return jnp.where(response_mask, value[:, None] * one, jnp.ones((), own.dtype))
