"""The optimal token baseline: per-position baselines weighted by how much gradient a prefix has spent."""

import jax
import jax.numpy as jnp
from jaxtyping import Array
from jaxtyping import Bool
from jaxtyping import Float
from jaxtyping import Int

from jaxrl_llm.checks import require_dtype
from jaxrl_llm.checks import require_rank
from jaxrl_llm.checks import require_same_shape
from jaxrl_llm.masked import safe_divide
from jaxrl_llm.objectives.advantages import group_centred


def spent_gradient(
    log_prob: Float[Array, "B T"], collision: Float[Array, "B T"], response_mask: Bool[Array, "B T"]
) -> Float[Array, "B T"]:
    """W_t = sum_{j<=t} (1 - 2 pi_j + C_j): cumulative squared norm of the logit gradients of the sampled tokens.

    Each term is |e_a - p|^2, the squared norm of d log pi(a) / dz (arXiv 2506.12912). At the sampled policy it is never
    negative.

    Args:
        log_prob: of the sampled tokens [nats].
        collision: sum_k p_k^2 of each context [prob].
        response_mask: true at the tokens that the policy sampled.

    Returns:
        W_t, a constant to the gradient; outside the mask the last value before it.

    Raises:
        ValueError, TypeError: if the arrays are not [B, T] of one shape, floating, floating and boolean.
    """
    require_rank(2, "B T", log_prob=log_prob, collision=collision, response_mask=response_mask)
    require_same_shape(log_prob=log_prob, collision=collision, response_mask=response_mask)
    require_dtype("floating", log_prob=log_prob, collision=collision)
    require_dtype("boolean", response_mask=response_mask)
    zero = jnp.zeros((), log_prob.dtype)
    norm = jnp.where(response_mask, 1 - 2 * jnp.exp(jnp.where(response_mask, log_prob, zero)) + collision, zero)
    return jax.lax.stop_gradient(jnp.cumsum(norm, axis=1))


def optimal_token_baseline(
    rewards: Float[Array, " B"],
    log_prob: Float[Array, "B T"],
    collision: Float[Array, "B T"],
    response_mask: Bool[Array, "B T"],
    group_ids: Int[Array, " B"],
) -> Float[Array, "B T"]:
    """A_{i,t} = R_i - B_t,  B_t = sum_i R_i W_{i,t} / sum_i W_{i,t} over the sequences of the group that have a token
    at t.

    Source: verl's optimal token baseline, from the variance-minimising baseline E[R |score|^2] / E[|score|^2]. Columns
    are positions: responses of one group must start in the same column, as this project's batches do. The baseline
    contains the sequence itself, which adds a bias of order 1 / group size.

    Args:
        rewards: one per sequence.
        log_prob: of the sampled tokens [nats].
        collision: sum_k p_k^2 of each context [prob].
        response_mask: true at the tokens that the policy sampled.
        group_ids: equal for sequences that answer the same prompt.

    Returns:
        one advantage per token, 0 outside the mask and wherever no other sequence of the group has a token at that
        position.

    Raises:
        ValueError, TypeError: if ranks, shapes or dtypes do not fit.
    """
    require_rank(1, "B", rewards=rewards, group_ids=group_ids)
    require_dtype("floating", rewards=rewards)
    weight = jnp.where(response_mask, spent_gradient(log_prob, collision, response_mask), jnp.zeros((), log_prob.dtype))
    # Centred first: the baseline moves with a shift of the rewards, and equal rewards then give exactly zero.
    centred = group_centred(rewards, group_ids)
    rows = rewards.shape[0]
    segments = jnp.unique(group_ids, return_inverse=True, size=rows)[1]

    def of_group(x: Float[Array, "B T"]) -> Float[Array, "B T"]:
        return jax.ops.segment_sum(x, segments, num_segments=rows)[segments]

    baseline = safe_divide(of_group(weight * centred[:, None]), of_group(weight))
    present = of_group(response_mask.astype(weight.dtype))
    # Alone at its position a sequence is its own baseline; written out, because R W / W misses R by a rounding.
    compared = response_mask & (present > 1) & (of_group(weight) > 0)
    return jax.lax.stop_gradient(jnp.where(compared, centred[:, None] - baseline, jnp.zeros((), weight.dtype)))
