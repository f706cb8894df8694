"""Losses of a value function, and how much of its targets it explains."""

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
from jaxrl_llm.masked import masked_sum_count

Pair = tuple[Float[Array, ""], Float[Array, ""]]


def _check(response_mask: Bool[Array, "B T"], **arrays: Float[Array, "B T"]) -> None:
    require_rank(2, "B T", response_mask=response_mask, **arrays)
    require_same_shape(response_mask=response_mask, **arrays)
    require_dtype("floating", **arrays)
    require_dtype("boolean", response_mask=response_mask)


@checked
def squared_value_loss(
    values: Float[Array, "B T"], targets: Float[Array, "B T"], response_mask: Bool[Array, "B T"]
) -> Pair:
    """sum of (V_t - G_t)^2 / 2 over the response tokens, and their number.

    Args:
        values: V of the context of each token, with its gradient [units of reward].
        targets: G, what it should be; a constant to the gradient.
        response_mask: true at the tokens that the policy sampled.

    Returns:
        (sum, count) over tokens.

    Raises:
        ValueError, TypeError: if the arrays are not [B, T] of one shape, floating, floating and boolean.
    """
    _check(response_mask, values=values, targets=targets)
    # Before any arithmetic: 0 times what stands outside the mask would be NaN in the gradient, where that is none.
    value, goal = (jnp.where(response_mask, x, jnp.zeros((), x.dtype)) for x in (values, targets))
    return masked_sum_count(jnp.square(value - jax.lax.stop_gradient(goal)) / 2, response_mask)


@checked
def clipped_value_loss(
    values: Float[Array, "B T"],
    targets: Float[Array, "B T"],
    response_mask: Bool[Array, "B T"],
    values_old: Float[Array, "B T"],
    *,
    clip: ScalarLike,
) -> Pair:
    """sum of max( (V - G)^2, (V_old + clip(V - V_old, -c, c) - G)^2 ) / 2, and the number of response tokens.

    The larger of the two: a value that moved more than c towards its target has no gradient, one that moved away has.
    Source: the value clipping of PPO's released code (openai/baselines ppo2), which its paper does not state.

    Args:
        values, targets, response_mask: as for `squared_value_loss`.
        values_old: V before the update; a constant.
        clip: c [units of reward].

    Returns:
        (sum, count) over tokens.

    Raises:
        ValueError, TypeError: if the arrays are not [B, T] of one shape, floating, floating, boolean and floating.
    """
    _check(response_mask, values=values, targets=targets, values_old=values_old)
    zero = jnp.zeros((), values.dtype)
    value = jnp.where(response_mask, values, zero)
    goal, old = (jax.lax.stop_gradient(jnp.where(response_mask, x, zero)) for x in (targets, values_old))
    near = old + jnp.clip(value - old, jnp.negative(clip), clip)
    worse = jnp.maximum(jnp.square(value - goal), jnp.square(near - goal))
    return masked_sum_count(worse / 2, response_mask)


@checked
def explained_variance_sums(
    values: Float[Array, "B T"], targets: Float[Array, "B T"], response_mask: Bool[Array, "B T"]
) -> dict[str, Pair]:
    """The (sum, count) pairs of G, G^2, G - V and (G - V)^2, from which `explained_variance` is made after they were
    added up over micro-batches and shards; constants to the gradient.
    """
    _check(response_mask, values=values, targets=targets)
    zero = jnp.zeros((), values.dtype)
    goal, value = (jax.lax.stop_gradient(jnp.where(response_mask, x, zero)) for x in (targets, values))
    error = goal - value
    moments = {"target": goal, "target_squared": goal**2, "error": error, "error_squared": error**2}
    return {name: masked_sum_count(x, response_mask) for name, x in moments.items()}


def explained_variance(means: dict[str, float]) -> float:
    """1 - Var(G - V) / Var(G) from the means of `explained_variance_sums`: 1 is perfect, 0 what a constant reaches,
    below 0 worse than that; 0 where the targets are all equal.
    """
    variance = means["target_squared"] - means["target"] ** 2
    unexplained = means["error_squared"] - means["error"] ** 2
    # A variance below the rounding of its two terms is that of equal targets.
    return 1 - unexplained / variance if variance > 1e-7 * means["target_squared"] else 0.0
