"""Advantages from rewards: what a sequence earned, measured against the right comparison.

Groups are defined by `group_ids` (any integers, in any order, of any sizes), never by a reshape. A group of one has
nothing to be compared with: its advantage is 0, by definition, in every function that compares within a group.
`jaxrl_llm.checks.require_batch_values` finds such groups before a run, and rewards that are NaN, which make the
advantages of their own group NaN. Advantages are constants to the gradient: they
depend on rewards only.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array
from jaxtyping import Bool
from jaxtyping import Float
from jaxtyping import Int
from jaxtyping import ScalarLike

from jaxrl_llm.checks import checked
from jaxrl_llm.checks import require_dtype
from jaxrl_llm.checks import require_rank
from jaxrl_llm.checks import require_same_shape
from jaxrl_llm.masked import safe_divide


def _check(rewards: Float[Array, " B"], group_ids: Int[Array, " B"] | None = None) -> None:
    require_rank(1, "B", rewards=rewards, group_ids=group_ids)
    require_dtype("floating", rewards=rewards)
    require_dtype("integer", group_ids=group_ids)
    require_same_shape(rewards=rewards, group_ids=group_ids)


def _segments(group_ids: Int[Array, " B"]) -> Int[Array, " B"]:
    # Arbitrary ids become 0..B-1, so that a segment sum with a static number of segments can serve every group.
    return jnp.unique(group_ids, return_inverse=True, size=group_ids.shape[0])[1]


def _group_sum(x: Float[Array, " B"], segments: Int[Array, " B"]) -> Float[Array, " B"]:
    return jax.ops.segment_sum(x, segments, num_segments=x.shape[0])[segments]


@checked
def group_size(rewards: Float[Array, " B"], group_ids: Int[Array, " B"]) -> Float[Array, " B"]:
    """Number of sequences in the group of each sequence, in the dtype of `rewards`."""
    _check(rewards, group_ids)
    return _group_sum(jnp.ones_like(rewards), _segments(group_ids))


@checked
def informative_groups(rewards: Float[Array, " B"], group_ids: Int[Array, " B"]) -> Bool[Array, " B"]:
    """True for the sequences of groups whose rewards are not all equal (the others carry no group-relative signal).

    This is the condition of DAPO's dynamic sampling (Yu et al. 2025, arXiv 2503.14476, eq. 11), without the resampling.

    Returns:
        one bool per sequence; sequences of one group share it.
    """
    _check(rewards, group_ids)
    segments = _segments(group_ids)
    high = jax.ops.segment_max(rewards, segments, num_segments=rewards.shape[0])[segments]
    low = jax.ops.segment_min(rewards, segments, num_segments=rewards.shape[0])[segments]
    # Not `high > low`: a reward that is NaN must show, in its own group, and not become an advantage of 0.
    return high != low


@checked
def group_centred(rewards: Float[Array, " B"], group_ids: Int[Array, " B"]) -> Float[Array, " B"]:
    """A_i = R_i - mean of the group of i.

    Source: Dr.GRPO (Liu et al. 2025, arXiv 2503.20783), which drops the division by the standard deviation.

    Args:
        rewards: one reward per sequence.
        group_ids: equal for sequences that answer the same prompt.

    Returns:
        one advantage per sequence, in units of reward; exactly 0 where all rewards of a group are equal, a group of one
        included.

    Raises:
        ValueError, TypeError: if the ranks, shapes or dtypes are not [B] floating and [B] integer.
    """
    informative = informative_groups(rewards, group_ids)
    segments = _segments(group_ids)
    mean = safe_divide(_group_sum(rewards, segments), _group_sum(jnp.ones_like(rewards), segments))
    # The mean of equal floats can miss them by one rounding; equal rewards must give zero, not that rounding.
    return jnp.where(informative, rewards - mean, jnp.zeros((), rewards.dtype))


@checked
def group_normalised(rewards: Float[Array, " B"], group_ids: Int[Array, " B"], *, ddof: int = 1) -> Float[Array, " B"]:
    """A_i = (R_i - mean of the group) / (standard deviation of the group, divisor n - ddof).

    Source: GRPO (Shao et al. 2024, arXiv 2402.03300, section 4.1.2). The paper does not state ddof; its public
    implementations use 1.

    Args:
        rewards: one reward per sequence.
        group_ids: equal for sequences that answer the same prompt.
        ddof: 1 divides the squared deviations by n - 1, 0 by n. The two differ by the factor sqrt(n / (n - 1)) in every
            advantage of a group of n.

    Returns:
        one advantage per sequence, without unit; exactly 0 where all rewards of a group are equal, a group of one
        included.

    Raises:
        ValueError, TypeError: for other ranks, shapes or dtypes, and for a ddof other than 0 or 1.

    Departures from the paper: no small constant is added to the standard deviation. Implementations add 1e-4 or 1e-6
    against a division by zero, which happens only where all rewards of a group are equal, and that case is found by
    comparing them.
    """
    if ddof not in (0, 1):
        raise ValueError(f"ddof is {ddof}; it must be 0 (divide by n) or 1 (divide by n - 1).")
    centred = group_centred(rewards, group_ids)
    segments = _segments(group_ids)
    size = _group_sum(jnp.ones_like(rewards), segments)
    squares = _group_sum(centred * centred, segments)
    positive = squares != 0  # true where it is NaN, which must show
    deviation = jnp.sqrt(jnp.where(positive, squares, jnp.ones((), rewards.dtype)) / jnp.maximum(size - ddof, 1))
    return jnp.where(positive, centred / deviation, jnp.zeros((), rewards.dtype))


@checked
def leave_one_out(rewards: Float[Array, " B"], group_ids: Int[Array, " B"]) -> Float[Array, " B"]:
    """A_i = R_i - mean of the other rewards of the group = n / (n - 1) (R_i - mean of the group).

    The baseline does not depend on the sequence it is subtracted from, so the policy gradient stays unbiased.
    Source: RLOO (Ahmadian et al. 2024, arXiv 2402.14740; Kool et al. 2019).

    Args:
        rewards: one reward per sequence.
        group_ids: equal for sequences that answer the same prompt.

    Returns:
        one advantage per sequence, in units of reward; 0 for a group of one, which has no other.

    Raises:
        ValueError, TypeError: if the ranks, shapes or dtypes are not [B] floating and [B] integer.
    """
    centred = group_centred(rewards, group_ids)
    size = group_size(rewards, group_ids)
    return centred * safe_divide(size, size - 1)


@checked
def batch_centred(rewards: Float[Array, " B"]) -> Float[Array, " B"]:
    """A_i = R_i - mean of the batch: REINFORCE with the batch mean as its baseline.

    The mean contains R_i itself, which shrinks the expected gradient by the factor 1 - 1/B and changes nothing else.

    Args:
        rewards: one reward per sequence.

    Returns:
        one advantage per sequence, in units of reward; exactly 0 where all rewards are equal.

    Raises:
        ValueError, TypeError: if rewards is not [B] floating.
    """
    return group_centred(rewards, jnp.zeros(rewards.shape, jnp.int32))


@checked
def batch_normalised(rewards: Float[Array, " B"], *, ddof: int = 1) -> Float[Array, " B"]:
    """A_i = (R_i - mean of the batch) / (standard deviation of the batch, divisor B - ddof).

    Source: REINFORCE++ (Hu 2025, arXiv 2501.03262), global advantage normalisation.

    Args:
        rewards: one reward per sequence.
        ddof: 1 divides the squared deviations by B - 1, 0 by B.

    Returns:
        one advantage per sequence, without unit; exactly 0 where all rewards are equal.

    Raises:
        ValueError, TypeError: if rewards is not [B] floating or ddof is not 0 or 1.

    Departures from the paper: its token-level KL penalty inside the reward is left out (add it to `rewards` or use a
    divergence term), and the mean and deviation are over sequences; some implementations take them over tokens, which
    weights long sequences more.
    """
    return group_normalised(rewards, jnp.zeros(rewards.shape, jnp.int32), ddof=ddof)


@checked
def group_centred_batch_normalised(
    rewards: Float[Array, " B"], group_ids: Int[Array, " B"], *, ddof: int = 1
) -> Float[Array, " B"]:
    """Centre within the group, then divide by the standard deviation of the centred rewards over the whole batch.

    Source: REINFORCE++ with group baseline (Hu 2025, arXiv 2501.03262).

    Args:
        rewards: one reward per sequence.
        group_ids: equal for sequences that answer the same prompt.
        ddof: 1 divides the squared deviations by B - 1, 0 by B.

    Returns:
        one advantage per sequence, without unit.

    Raises:
        ValueError, TypeError: for other ranks, shapes or dtypes, and for a ddof other than 0 or 1.
    """
    return batch_normalised(group_centred(rewards, group_ids), ddof=ddof)


@checked
def generalised_advantage_estimation(
    rewards_t: Float[Array, "B T"],
    values_t: Float[Array, "B T"],
    response_mask: Bool[Array, "B T"],
    *,
    discount: ScalarLike = 1.0,
    trace: ScalarLike = 1.0,
) -> tuple[Float[Array, "B T"], Float[Array, "B T"]]:
    """GAE: A_t = delta_t + discount trace A_{t+1}, delta_t = r_t + discount V_{t+1} - V_t, over the response tokens of
    each row.

    Source: Schulman et al. 2016, arXiv 1506.02438, eq. 16. V after the last response token is 0 (the response has
    ended). Tokens outside the mask (prompt, tool output, padding) are skipped: the next response token is the next
    step.

    Args:
        rewards_t: reward received for token t.
        values_t: value of the context in which token t was chosen, aligned to the token like every [B, T] array.
        response_mask: true at the tokens that the policy sampled.
        discount: usually called gamma.
        trace: usually called lambda; 1 gives Monte-Carlo returns minus the value.

    Returns:
        (advantages, returns), both 0 outside the mask; returns = advantages + values, the targets of the value
        function.

    Raises:
        ValueError, TypeError: if the three arrays are not [B, T] of one shape, floating, floating and boolean.
    """
    require_rank(2, "B T", rewards_t=rewards_t, values_t=values_t, response_mask=response_mask)
    require_same_shape(rewards_t=rewards_t, values_t=values_t, response_mask=response_mask)
    require_dtype("floating", rewards_t=rewards_t, values_t=values_t)
    require_dtype("boolean", response_mask=response_mask)

    def step(carry, column):
        next_advantage, next_value = carry
        reward, value, real = column
        advantage = reward + discount * next_value - value + discount * trace * next_advantage
        carry = (jnp.where(real, advantage, next_advantage), jnp.where(real, value, next_value))
        return carry, jnp.where(real, advantage, jnp.zeros((), advantage.dtype))

    zeros = jnp.zeros(rewards_t.shape[0], rewards_t.dtype)
    _, advantages = jax.lax.scan(step, (zeros, zeros), (rewards_t.T, values_t.T, response_mask.T), reverse=True)
    advantages = advantages.T
    returns = jnp.where(response_mask, advantages + values_t, jnp.zeros((), values_t.dtype))
    return advantages, returns
