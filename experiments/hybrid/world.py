"""Tasks of `Rooms` as arrays, an imperfect teacher for each, and episodes of any policy.

A policy is a table of logits [H, S, A], one softmax for each step and state. It depends on the step because the optimum
does: with few turns left the teacher is followed where with many the reward still decides. Nothing else of the past
matters to the teacher, the world or the reward, so that the optimum over all policies is one of these tables, and a gap
to it is due to the gradient and not to the class of policies.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxrl_llm.environments.worlds import Rooms
from jaxrl_llm.environments.worlds.rooms import RoomsState
from jaxrl_llm.tabular import TabularMdp
from jaxrl_llm.typing import Array
from jaxrl_llm.typing import Bool
from jaxrl_llm.typing import Float
from jaxrl_llm.typing import Int
from jaxrl_llm.typing import PRNGKey


class Task(NamedTuple):
    """One task, or several along a leading axis of all leaves.

    Attributes:
        mdp: where actions lead, and the reward.
        teacher: logits of the teacher [H, S, A].
        running: false in the state in which an episode is over: no action is taken there.
    """

    mdp: TabularMdp
    teacher: Float[Array, "*tasks H S A"]
    running: Bool[Array, "*tasks S"]


class Episodes(NamedTuple):
    """Episodes of a policy: states that were met, actions, rewards, and which steps were taken before the end."""

    states: Int[Array, "B H"]
    actions: Int[Array, "B H"]
    rewards: Float[Array, "B H"]
    mask: Bool[Array, "B H"]


def _favourites(rooms: Rooms, seed: int, generator: np.random.Generator, wrong: float) -> Int[np.ndarray, " S"]:
    """The action that the teacher prefers in each state: the expert's, but for a share of the states any other one."""
    count, actions = rooms.count, len(rooms.actions)
    begin, _ = rooms.reset(jnp.array([seed]))
    states = jnp.arange(2 * count)
    task = (jnp.full(2 * count, target[0]) for target in (begin.key_room, begin.door_room))
    right = np.asarray(rooms.expert(RoomsState(states % count, states >= count, *task)))
    other = (right + generator.integers(1, actions, size=right.shape)) % actions
    chosen = np.where(generator.random(right.shape) < wrong, other, right)
    return np.append(chosen, 0)


def make_tasks(rooms: Rooms, *, count: int, sharpness: float, wrong: float, seed: int) -> Task:
    """Some tasks of a map, each with a teacher that is hesitant and, in some states, mistaken.

    Args:
        rooms: the map.
        count: tasks; drawn among those of the map without repetition.
        sharpness: how far the logit of the preferred action is above all others. [nats]
        wrong: share of the states in which a wrong action is preferred.
        seed: which tasks, and which states.

    Raises:
        ValueError: the map has fewer tasks.
    """
    if count > rooms.tasks:
        raise ValueError(f"count is {count}; the map {rooms.name} has {rooms.tasks} tasks.")
    generator = np.random.default_rng(seed)
    chosen = generator.choice(rooms.tasks, size=count, replace=False)
    made = []
    for number in chosen:
        mdp = rooms.mdp(int(number))
        horizon, states, actions = mdp.rewards.shape
        favourites = _favourites(rooms, int(number), generator, wrong)
        teacher = jnp.broadcast_to(sharpness * jax.nn.one_hot(favourites, actions), (horizon, states, actions))
        made.append(Task(mdp, teacher, jnp.arange(states) < states - 1))
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *made)


def play(policy: Float[Array, "H S A"], task: Task, key: PRNGKey, *, episodes: int) -> Episodes:
    """Episodes of a policy in one task."""
    moves = jnp.log(task.mdp.transitions)

    def step(state: Array, known: tuple[Array, Array, Array, Array]) -> tuple[Array, Episodes]:
        logits, move, reward, key = known
        act_key, move_key = jax.random.split(key)
        action = jax.random.categorical(act_key, logits[state])
        after = jax.random.categorical(move_key, move[state, action])
        return after, Episodes(state, action, reward[state, action], task.running[state])

    first_key, key = jax.random.split(key)
    first = jax.random.categorical(first_key, jnp.log(task.mdp.initial), shape=(episodes,))
    keys = jax.random.split(key, policy.shape[0])
    _, met = jax.lax.scan(step, first, (policy, moves, task.mdp.rewards, keys))
    return jax.tree.map(lambda leaf: jnp.swapaxes(leaf, 0, 1), met)
