"""What a world of many turns is: a task is shown, the policy acts, the world answers, until the end or the last turn.

An `ArrayWorld` is written in JAX and knows no tokenizer: it speaks in symbols, whose tokens the collector looks up. So
a batch of episodes is one compiled program together with the policy that acts in it.
"""

from typing import Any
from typing import NamedTuple
from typing import Protocol

import jax
import jax.numpy as jnp
import numpy as np

from jaxrl_llm.typing import Array
from jaxrl_llm.typing import Bool
from jaxrl_llm.typing import Float
from jaxrl_llm.typing import Int

NO_ACTION = -1
"""What a token that is none of the world's actions stands for."""


class Answer(NamedTuple):
    """What the world answers to one action of every row.

    observation: symbols that are shown next. reward: of this step. done: whether the episode is over. valid: whether
    the action could be taken; one that could not leaves the state as it is, and the observation says so.
    """

    observation: Int[Array, "B O"]
    reward: Float[Array, " B"]
    done: Bool[Array, " B"]
    valid: Bool[Array, " B"]


class ArrayWorld(Protocol):
    """A deterministic world of B rows at once; `reset` and `step` are pure, and can be compiled."""

    @property
    def name(self) -> str:
        """Of the world with its map: two worlds of one name are the same."""
        ...

    @property
    def symbols(self) -> tuple[str, ...]:
        """The symbols that prompts and observations are written in, by their index."""
        ...

    @property
    def actions(self) -> tuple[str, ...]:
        """The symbol of each action, by its index."""
        ...

    @property
    def tasks(self) -> int:
        """Tasks that there are: seeds are 0 .. tasks - 1."""
        ...

    @property
    def turns(self) -> int:
        """Actions after which an episode is cut off."""
        ...

    @property
    def prompt_length(self) -> int:
        """P, symbols that show a task and its first state."""
        ...

    @property
    def observation_length(self) -> int:
        """O, symbols of an observation."""
        ...

    def reset(self, seeds: Int[Array, " B"]) -> tuple[Any, Int[Array, "B P"]]:
        """The first states of these tasks, and what is shown of them."""
        ...

    def step(self, state: Any, action: Int[Array, " B"]) -> tuple[Any, Answer]:
        """The next states and the answers; `NO_ACTION` is an action that cannot be taken."""
        ...

    def expert(self, state: Any) -> Int[Array, " B"]:
        """An action of a shortest solution."""
        ...


def check_world(world: ArrayWorld, *, seeds: int = 64) -> None:
    """Hold a world to what every world promises, on its first tasks.

    Args:
        world: the world.
        seeds: tasks that are tried.

    Raises:
        ValueError: naming the promise that is broken.
    """
    count = min(seeds, world.tasks)
    if count < 1 or world.turns < 1:
        raise ValueError(f"{world.name} has {world.tasks} tasks and {world.turns} turns; it must have one of each.")
    if len({*world.symbols}) < len(world.symbols) or len({*world.actions}) < len(world.actions):
        raise ValueError(f"{world.name} has a symbol or an action twice.")
    state, prompt = world.reset(jnp.arange(count))
    _check_symbols(world, "prompt", prompt, world.prompt_length)
    refused, answer = world.step(state, jnp.full(count, NO_ACTION))
    _check_symbols(world, "observation", answer.observation, world.observation_length)
    if bool(np.any(answer.valid)) or bool(np.any(answer.done)) or bool(np.any(answer.reward != 0)):
        raise ValueError(f"{world.name} takes an action that is none of its own.")
    unchanged = jax.tree.map(lambda one, other: bool(np.array_equal(one, other)), state, refused)
    if not all(jax.tree.leaves(unchanged)):
        raise ValueError(f"{world.name} changes its state by an action that it refuses.")
    done, earned = np.zeros(count, bool), np.zeros(count)
    for _ in range(world.turns):
        state, answer = world.step(state, world.expert(state))
        earned += np.where(done, 0, answer.reward)
        done |= np.asarray(answer.done)
    if not done.all() or (earned <= 0).any():
        seed = int(np.argmin(done & (earned > 0)))
        raise ValueError(f"the expert of {world.name} does not solve task {seed} within {world.turns} turns.")


def _check_symbols(world: ArrayWorld, what: str, shown: Int[Array, "B X"], length: int) -> None:
    if shown.ndim != 2 or shown.shape[1] != length:
        raise ValueError(f"the {what} of {world.name} has shape {shown.shape}; it must have {length} columns.")
    if int(shown.min()) < 0 or int(shown.max()) >= len(world.symbols):
        raise ValueError(f"the {what} of {world.name} has symbols outside 0 .. {len(world.symbols) - 1}.")
