"""Weights that correct for sampling from a policy other than the one that is trained: truncated and masked importance
weights.

All of them are functions of log w_t = log pi_old(y_t|c_t) - log mu(y_t|c_t), mu being the policy that sampled (another
precision, another engine, older parameters). All of them are constants to the gradient, and all return `[B, T]`
weights, 1 outside the mask. "Truncated" weights are capped, "masked" weights are set to 0 outside an interval. The
log-ratio is clamped as `ratios.LOG_RATIO_LIMIT` says, after summing over the sequence.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array
from jaxtyping import Bool
from jaxtyping import Float
from jaxtyping import ScalarLike

from jaxrl_llm.checks import checked
from jaxrl_llm.objectives.ratios import geometric_ratio
from jaxrl_llm.objectives.ratios import sequence_ratio
from jaxrl_llm.objectives.ratios import token_ratio


def _keep_inside(weight: Float[Array, "*shape"], low: ScalarLike, high: ScalarLike) -> Float[Array, "*shape"]:
    return jnp.where((weight >= low) & (weight <= high), weight, jnp.zeros((), weight.dtype))


def _spread(weight: Float[Array, " B"], response_mask: Bool[Array, "B T"]) -> Float[Array, "B T"]:
    return jnp.where(response_mask, weight[:, None], jnp.ones((), weight.dtype))


@checked
def token_truncated(
    log_ratio_t: Float[Array, "B T"], response_mask: Bool[Array, "B T"], *, cap: ScalarLike = 2.0
) -> Float[Array, "B T"]:
    """TIS: min(w_t, cap) per token.

    Source: Yao et al. 2025 ("Your efficient RL framework secretly brings you off-policy RL training"); Espeholt et al.
    2018, arXiv 1802.01561. The cap of 2 is the value public implementations use.
    """
    return jax.lax.stop_gradient(jnp.minimum(token_ratio(log_ratio_t, response_mask), cap))


@checked
def token_masked(
    log_ratio_t: Float[Array, "B T"],
    response_mask: Bool[Array, "B T"],
    *,
    low: ScalarLike = 0.5,
    high: ScalarLike = 5.0,
) -> Float[Array, "B T"]:
    """IcePop: w_t where low <= w_t <= high, else 0, per token.

    Source: IcePop (Ling team 2025; arXiv 2510.18855). The interval acts on the ratio w itself, not on its inverse
    (errata F2.14).
    """
    weight = _keep_inside(token_ratio(log_ratio_t, response_mask), low, high)
    return jax.lax.stop_gradient(jnp.where(response_mask, weight, jnp.ones((), weight.dtype)))


@checked
def sequence_truncated(
    log_ratio_t: Float[Array, "B T"], response_mask: Bool[Array, "B T"], *, cap: ScalarLike = 2.0
) -> Float[Array, "B T"]:
    """Sequence TIS: min(prod_t w_t, cap), one weight per sequence at all of its tokens."""
    weight = jnp.minimum(sequence_ratio(log_ratio_t, response_mask), cap)
    return jax.lax.stop_gradient(_spread(weight, response_mask))


@checked
def sequence_masked(
    log_ratio_t: Float[Array, "B T"],
    response_mask: Bool[Array, "B T"],
    *,
    low: ScalarLike = 0.0,
    high: ScalarLike = 2.0,
) -> Float[Array, "B T"]:
    """Sequence MIS: prod_t w_t where it lies in [low, high], else 0, one weight per sequence at all of its tokens."""
    weight = _keep_inside(sequence_ratio(log_ratio_t, response_mask), low, high)
    return jax.lax.stop_gradient(_spread(weight, response_mask))


@checked
def geometric_masked(
    log_ratio_t: Float[Array, "B T"],
    response_mask: Bool[Array, "B T"],
    *,
    low: ScalarLike = 0.99,
    high: ScalarLike = 1.01,
) -> Float[Array, "B T"]:
    """Geometric rejection: 1 where exp(mean_t log w_t) lies in [low, high], else 0, one value per sequence at all of
    its tokens.

    It accepts or rejects and carries no weight. Opposite deviations inside a sequence cancel in it, which makes it
    weaker than a maximum.
    """
    weight = geometric_ratio(log_ratio_t, response_mask)
    accepted = jnp.where((weight >= low) & (weight <= high), jnp.ones((), weight.dtype), jnp.zeros((), weight.dtype))
    return jax.lax.stop_gradient(_spread(accepted, response_mask))
