"""One baseline per task, for the tokens of one actor."""

import jax.numpy as jnp
import numpy as np

from jaxrl_llm.objectives import get_recipe
from jaxrl_llm.training.text.signals import user_signal
from jaxrl_llm.workforce import actor_advantages
from jaxrl_llm.workforce import planner_advantages

REWARDS = [1.0, 0.0, 0.5, 1.0, 1.0]
GROUPS = [0, 0, 0, 1, 1]
ACTORS = [[0, 0, 2], [0, -1, -1], [2, 0, 0], [0, 2, -1], [0, 0, 0]]


def expected(actor: int) -> np.ndarray:
    """Token by token, in float64."""
    table = np.zeros((5, 3))
    for row in range(5):
        mates = [REWARDS[other] for other in range(5) if GROUPS[other] == GROUPS[row]]
        for column in range(3):
            if ACTORS[row][column] == actor:
                table[row, column] = REWARDS[row] - sum(mates) / len(mates)
    return table


def test_advantages_are_those_of_the_group_at_the_actors_tokens() -> None:
    arguments = (jnp.asarray(REWARDS), jnp.asarray(GROUPS), jnp.asarray(ACTORS))
    for actor in (0, 2):
        np.testing.assert_allclose(actor_advantages(*arguments, actor=actor), expected(actor), atol=1e-6)
    assert (expected(0) != expected(2)).any()


def test_it_is_a_signal_of_training_that_reads_rewards() -> None:
    signal = user_signal(planner_advantages, get_recipe("reinforce"))
    assert signal.reads_rewards
