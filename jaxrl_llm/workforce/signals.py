"""Advantages of the actors of a team: one baseline per task, given to the tokens of whom it is to teach."""

from collections.abc import Callable

import jax.numpy as jnp

from jaxrl_llm.checks import checked
from jaxrl_llm.objectives import SignalInputs
from jaxrl_llm.objectives.advantages import group_centred
from jaxrl_llm.typing import Array
from jaxrl_llm.typing import Float
from jaxrl_llm.typing import Int


@checked
def actor_advantages(
    rewards: Float[Array, " B"], group_ids: Int[Array, " B"], actor_ids: Int[Array, "B R"], *, actor: int
) -> Float[Array, "B R"]:
    """A_{i,t} = 1[actor of token t is `actor`] (R_i - mean of R over the records of the same task).

    The team has one outcome, so all its actors have one baseline; what differs is whose tokens it is given to.
    Derived: with the other actors frozen they are part of the environment, and this is the group baseline of Dr.GRPO
    (Liu et al. 2025, arXiv 2503.20783) for the one that learns. The paper trains its planner offline (arXiv 2505.23885,
    section 4) and has no such signal.

    Args:
        rewards: outcome of each record.
        group_ids: equal for records of one task.
        actor_ids: who chose each token; -1 outside.
        actor: who learns.

    Returns:
        one advantage per token, in units of reward; 0 at the tokens of others and where all records of a task earned
        the same.

    Raises:
        ValueError, TypeError: for other ranks, shapes or dtypes.
    """
    centred = group_centred(rewards, group_ids)
    return jnp.where(actor_ids == actor, centred[:, None], jnp.zeros((), rewards.dtype))


def actor_signal(actor: int) -> Callable[[SignalInputs], Float[Array, "B R"]]:
    """`actor_advantages` as a signal of training.

    Args:
        actor: number of the one who learns; see `rows.actor_names`.
    """

    def advantages(inputs: SignalInputs) -> Float[Array, "B R"]:
        return actor_advantages(inputs.rewards, inputs.group_ids, inputs.actor_ids, actor=actor)

    return advantages


planner_advantages = actor_signal(0)
"""The signal that teaches the planner alone."""
