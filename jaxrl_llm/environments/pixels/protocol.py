"""What a game is: it is reset, takes one of a few actions, shows an array, and starts again by itself when it is over.

An `ArrayGame` is written in JAX, one game at a time and pure: many of them, the policy that plays and the update that
learns are one compiled program. `HostGames` are many games of a simulator outside JAX.
"""

from typing import Any
from typing import NamedTuple
from typing import Protocol

import numpy as np

from jaxrl_llm.typing import Array
from jaxrl_llm.typing import Bool
from jaxrl_llm.typing import Float
from jaxrl_llm.typing import Int
from jaxrl_llm.typing import PRNGKey


class Answer(NamedTuple):
    """What an `ArrayGame` answers to an action.

    observation: shown next, bool or floating: of a new game if this one is over. reward: of this step. terminated: the
    game is over, and nothing follows. truncated: it was cut off at its step limit, and more would have followed.
    """

    observation: Float[Array, "*shape"]
    reward: Float[Array, ""]
    terminated: Bool[Array, ""]
    truncated: Bool[Array, ""]


class ArrayGame(Protocol):
    """One game; `reset` and `step` are pure, and can be compiled and mapped over many."""

    @property
    def name(self) -> str:
        """Of the game with what its rules depend on: two games of one name are the same."""
        ...

    @property
    def actions(self) -> tuple[str, ...]:
        """The name of each action, by its index."""
        ...

    @property
    def observation_shape(self) -> tuple[int, ...]:
        """Of what is shown: height, width and channels, or a vector."""
        ...

    def reset(self, key: PRNGKey) -> tuple[Any, Float[Array, "*shape"]]:
        """A new game, and what it shows."""
        ...

    def step(self, key: PRNGKey, state: Any, action: Int[Array, ""]) -> tuple[Any, Answer]:
        """The game after an action, and what it answers; a game that ends begins again."""
        ...


class HostAnswer(NamedTuple):
    """What N games on the host answer to an action each.

    observation: what each shows next, in bytes (uint8); after a game has ended this is its last picture, and the step
    after that shows the first one of a new game, whatever the action was. reward: of this step. terminated, truncated:
    as in `Answer`; where a game is learnt life by life, a lost life is `terminated` too, and the same game goes on.
    real: false where the step did nothing but begin a new game: its action was not taken. scores: of the games that
    ended in this step or were cut off, by the game's own count, whatever `reward` is; NaN elsewhere.
    """

    observation: np.ndarray
    reward: np.ndarray
    terminated: np.ndarray
    truncated: np.ndarray
    real: np.ndarray
    scores: np.ndarray


class HostGames(Protocol):
    """N games of a simulator outside JAX, stepped together; they are deterministic given their seed and the actions."""

    @property
    def name(self) -> str:
        """Of the game with what its rules depend on."""
        ...

    @property
    def actions(self) -> tuple[str, ...]:
        """The name of each action, by its index."""
        ...

    @property
    def observation_shape(self) -> tuple[int, ...]:
        """Of what one game shows."""
        ...

    @property
    def count(self) -> int:
        """N, how many are played at once."""
        ...

    def reset(self, seed: int) -> np.ndarray:
        """Begin N new games; what each shows, [N, *observation_shape]."""
        ...

    def step(self, actions: np.ndarray) -> HostAnswer:
        """Take an action, an index, in each."""
        ...

    def close(self) -> None:
        """Let go of the simulator."""
        ...
