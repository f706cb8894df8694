"""Discounted worlds in which one batch is reused: a chain, random chains, and random MDPs of two kinds."""

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from jaxrl_llm.typing import Array
from jaxrl_llm.typing import Float


class World(NamedTuple):
    """A discounted MDP and the policy whose batch is reused; a leading axis where there are many of them.

    Attributes:
        transitions: P(s'|s, a).
        rewards: r(s, a), at most 1 and at least 0.
        initial: law of the first state.
        old: logits of the old policy.
    """

    transitions: Float[Array, "S A S"]
    rewards: Float[Array, "S A"]
    initial: Float[Array, " S"]
    old: Float[Array, "S A"]


FAMILIES = {
    "chain": "the chain",
    "chains": "random chains",
    "sparse": "sparse random MDPs",
    "dense": "dense random MDPs",
}
"""Kinds of worlds, in words."""

RANDOM = tuple(name for name in FAMILIES if name != "chain")
"""Kinds of which there are many."""

ACTIONS = 2

BRANCHES = 2
"""States that an action of a sparse world can lead to."""


def _world(*arrays: np.ndarray) -> World:
    """In the precision of the moment."""
    return World(*(jnp.asarray(array) for array in arrays))


def _forward(states: int) -> np.ndarray:
    """Where each state leads: the first action stays, the second goes to the next state, the last of them stays."""
    here = np.eye(states)
    return np.stack([here, here[np.minimum(np.arange(states) + 1, states - 1)]], axis=1)


def the_chain(states: int) -> World:
    """One chain: the reward falls from state to state and is 1 at the last; the old policy mostly stays."""
    distance = np.arange(states)
    per_state = np.where(distance == states - 1, 1.0, 0.1 - 0.16 * distance / states)
    rewards = np.repeat(per_state[:, None], ACTIONS, axis=1)
    old = np.tile([1.0, 0.0], (states, 1))
    return _world(*(one[None] for one in (_forward(states), rewards, _first(states), old)))


def _first(states: int) -> np.ndarray:
    return np.eye(states)[0]


def draw(family: str, *, states: int, count: int, generator: np.random.Generator) -> World:
    """Random worlds of a kind; all begin in the first state and have two actions.

    In a chain going on fails with a probability of up to a half, the rewards of all states but the last are up to 0.1,
    and the old policy stays more often than it goes on. An action of a sparse MDP leads to two states, of a dense one
    to all; there rewards are uniform and the logits of the old policy normal.
    """
    initial = np.tile(_first(states), (count, 1))
    if family == "chains":
        success = generator.uniform(0.5, 1.0, size=(count, 1, 1, 1))
        sure = _forward(states)
        transitions = success * sure + (1 - success) * sure[:, :1]
        per_state = 0.1 * generator.uniform(size=(count, states))
        per_state[:, -1] = 1.0
        old = 0.5 * generator.normal(size=(count, states, ACTIONS)) + np.array([1.0, 0.0])
        return _world(transitions, np.repeat(per_state[..., None], ACTIONS, axis=2), initial, old)
    shape = (count, states, ACTIONS)
    if family == "dense":
        transitions = generator.dirichlet(np.ones(states), shape)
    else:
        order = np.argsort(generator.uniform(size=(*shape, states)), axis=-1)
        weights = np.zeros((*shape, states))
        np.put_along_axis(weights, order[..., :BRANCHES], generator.dirichlet(np.ones(BRANCHES), shape), axis=-1)
        transitions = weights
    return _world(transitions, generator.uniform(size=shape), initial, generator.normal(size=shape))
