"""MinAtar: five games of Atari on boards of 10 x 10, from gymnax, with the sticky actions of the original.

Source: Young and Tian 2019 (arXiv 1903.03176). Differences from the original, which are gymnax's: an episode is cut
off after 1,000 steps (Freeway's end is such a cut too, after 2,500, where it is a rule of the original); the actions
are those that a game has a use for, where the original offers six to all. As in the original the last action is
repeated with probability 0.1, which gymnax leaves out, and games become harder with time where they do there.
"""

import difflib
from typing import Any
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxrl_llm.environments.pixels.protocol import Answer
from jaxrl_llm.typing import Array
from jaxrl_llm.typing import Bool
from jaxrl_llm.typing import Int
from jaxrl_llm.typing import PRNGKey

GAMES = {
    "asterix": "Asterix-MinAtar",
    "breakout": "Breakout-MinAtar",
    "freeway": "Freeway-MinAtar",
    "seaquest": "Seaquest-MinAtar",
    "space_invaders": "SpaceInvaders-MinAtar",
}
"""gymnax's names of the games."""
ACTIONS = ("noop", "left", "up", "right", "down", "fire")
"""The six actions of the original, by its numbers."""


class StickyState(NamedTuple):
    """A game with what stickiness needs to know.

    game: gymnax's state. action: the last one that was taken.
    """

    game: Any
    action: Int[Array, ""]


class MinAtar:
    """One of MinAtar's games; see `ArrayGame`."""

    def __init__(self, game: str = "breakout", *, sticky: float = 0.1) -> None:
        """A game by its name.

        Args:
            game: one of `GAMES`.
            sticky: how probable it is that the last action is taken again, whatever is chosen [prob].

        Raises:
            ValueError: there is no such game, or `sticky` is no probability below 1.
            ImportError: gymnax is not installed.
        """
        if game not in GAMES:
            near = difflib.get_close_matches(game, GAMES, n=1, cutoff=0.4)
            hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(GAMES)}."
            raise ValueError(f"game is {game!r}, which MinAtar does not have; {hint}")
        if not 0 <= sticky < 1:
            raise ValueError(f"sticky is {sticky}; it must be a probability below 1.")
        self._game, self._sticky = game, sticky
        self._env, self._params = _make(GAMES[game])
        self._actions = tuple(ACTIONS[number] for number in np.asarray(self._env.action_set).tolist())

    @property
    def name(self) -> str:
        """The game with what its rules depend on."""
        return f"minatar_{self._game}_sticky_{self._sticky:g}_{'_'.join(self.actions)}"

    @property
    def actions(self) -> tuple[str, ...]:
        """Those that the game has a use for."""
        return self._actions

    @property
    def observation_shape(self) -> tuple[int, ...]:
        """10 x 10 squares and a channel for each kind of thing."""
        return tuple(self._env.obs_shape)

    def reset(self, key: PRNGKey) -> tuple[StickyState, Bool[Array, "H W C"]]:
        """A new game, and what it shows."""
        observation, game = self._env.reset_env(key, self._params)
        return _strong(StickyState(game, jnp.zeros((), jnp.int32))), observation != 0

    def step(self, key: PRNGKey, state: StickyState, action: Int[Array, ""]) -> tuple[StickyState, Answer]:
        """The game after an action, and what it answers; a game that ends begins again."""
        sticky_key, step_key, reset_key = jax.random.split(key, 3)
        again = jax.random.bernoulli(sticky_key, self._sticky)
        action = jnp.where(again, state.action, action).astype(jnp.int32)
        shown, game, reward, terminated, _ = self._env.step_env(step_key, state.game, action, self._params)
        cut = self._env.is_truncated(game, self._params)
        begun, first = self.reset(reset_key)
        over = terminated | cut
        after = jax.tree.map(lambda new, old: jnp.where(over, new, old), begun, _strong(StickyState(game, action)))
        answer = Answer(
            observation=jnp.where(over, first, shown != 0),
            reward=jnp.asarray(reward, jnp.float32),
            terminated=terminated,
            truncated=cut & ~terminated,
        )
        return after, answer


def _strong(state: StickyState) -> StickyState:
    """The state without the weak types of Python's numbers, with which a program would be compiled twice."""
    return jax.tree.map(lambda leaf: jax.lax.convert_element_type(leaf, jnp.asarray(leaf).dtype), state)


def _make(name: str) -> tuple[Any, Any]:
    """The environment of gymnax, and its parameters.

    Raises:
        ImportError: gymnax, or a package that it needs and does not name, is not installed.
    """
    try:
        import gymnax
    except ImportError as error:
        raise ImportError(
            f"MinAtar's games need gymnax and six ({error.name or error}); run: pip install 'jaxrl_llm[control]'",
            name=error.name,
        ) from error
    return gymnax.make(name)
