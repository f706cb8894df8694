"""Actor-critics in games outside JAX: the games are played in a thread while the update learns from the batch before.

A batch is played by the policy from before the iteration that runs meanwhile, whatever takes longer, so a run is the
same each time; the ratios of the objective know it. After a checkpoint the games begin anew, played by the policy as it
is: what simulators hold cannot be saved.
"""

import dataclasses
import itertools
from collections.abc import Callable
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxrl_llm import categorical
from jaxrl_llm.environments.pixels.protocol import HostGames
from jaxrl_llm.training.control.learner import Learner
from jaxrl_llm.training.control.learner import Learning
from jaxrl_llm.training.control.learner import Metrics
from jaxrl_llm.training.control.networks import Memory
from jaxrl_llm.training.control.rollouts import Replay
from jaxrl_llm.training.control.rollouts import Rollout
from jaxrl_llm.training.control.rollouts import empty_replay
from jaxrl_llm.training.control.rollouts import remember
from jaxrl_llm.training.control.settings import ControlSettings
from jaxrl_llm.typing import Array
from jaxrl_llm.typing import Int
from jaxrl_llm.typing import PRNGKey
from jaxrl_llm.typing import PyTree

MEASURED = ("occupancy_divergence", "occupancy_tv", "surprise", "surprise_before")
"""Metrics that compare a policy with the one before: NaN where there is none, after a start."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class HostState:
    """All arrays of a run: it goes on from them to the last bit, with new games.

    Attributes:
        iteration: batches learned from.
        key: root of all random numbers; it stays as it is.
        learning: parameters and optimiser.
        before: parameters with which the last batch was played.
        replay: the last batches.
    """

    iteration: Int[Array, ""]
    key: PRNGKey
    learning: Learning
    before: PyTree
    replay: Replay


class _Played(NamedTuple):
    """A batch, with the parameters that played it, and the scores of the games that ended."""

    rollout: Rollout
    params: PyTree
    scores: np.ndarray


class HostTrainer:
    """Games on the host and one way to learn them, of one seed."""

    def __init__(self, game: HostGames, settings: ControlSettings) -> None:
        """Nothing is played yet.

        Args:
            game: the games, as many as `settings.games`.
            settings: the numbers.

        Raises:
            ValueError: there are more games or fewer, or the network does not fit what they show.
        """
        if game.count != settings.games:
            raise ValueError(f"games is {settings.games}, and {game.count} are played at once; they must be as many.")
        self.game, self.settings = game, settings
        self.learner = Learner(game.observation_shape, len(game.actions), settings)
        self._act = jax.jit(self._acted)
        # The thread that plays reads the parameters meanwhile: only the replay is given away.
        self._learn = jax.jit(self._learned, donate_argnums=1)

    @property
    def measures(self) -> tuple[str, ...]:
        """The names of the metrics."""
        state = jax.eval_shape(self._begin, jnp.zeros((), jnp.uint32))
        now = (state.iteration, state.key, state.learning, state.before)
        made = jax.eval_shape(self._learned, now, state.replay, self._shapes(), state.before)
        return ("returns", "ended", *made[2])

    def init(self, seeds: Int[Array, " 1"]) -> HostState:
        """The state before the first iteration.

        Raises:
            ValueError: there is more than one seed.
        """
        if seeds.shape != (1,):
            raise ValueError(f"there are {seeds.size} seeds; games on the host are learned by one at a time.")
        return jax.jit(self._begin)(seeds[0])

    def run(self, state: HostState, iterations: int) -> tuple[HostState, Mapping[str, np.ndarray]]:
        """So many iterations, in new games; the replay of the state that is given is used up.

        Returns:
            the state, and the metrics [1, iterations]; `returns` is the sum of the scores and `ended` the number of
            the games that ended in an iteration.
        """
        player, rows = _Player(self, state), []
        learning, replay, before, first = state.learning, state.replay, state.before, int(state.iteration)
        with ThreadPoolExecutor(1) as thread:
            coming = thread.submit(player.play, learning.params, first)
            for number in range(first, first + iterations):
                played = coming.result()
                if number + 1 < first + iterations:
                    coming = thread.submit(player.play, learning.params, number + 1)
                now = (jnp.asarray(number, jnp.int32), state.key, learning, before)
                learning, replay, metrics = self._learn(now, replay, played.rollout, played.params)
                before = played.params
                # One policy plays the first two batches: there is none before it to be measured against.
                unknown = dict.fromkeys(MEASURED, np.nan) if number < first + 2 and self.settings.measured else {}
                ended = {"returns": played.scores.sum(), "ended": len(played.scores)}
                rows.append(jax.device_get(metrics) | unknown | ended)
        metrics = {name: np.array([[row[name] for row in rows]], np.float32) for name in rows[0]}
        return HostState(jnp.asarray(first + iterations, jnp.int32), state.key, learning, before, replay), metrics

    def policy(self, params: PyTree, key: PRNGKey) -> Callable[[np.ndarray], np.ndarray]:
        """What plays one game: its observation [1, *shape] to an action [1], drawn from the policy.

        Args:
            params: of the network.
            key: of the draws.
        """
        memory, steps = self.learner.memory(1), itertools.count()

        def act(shown: np.ndarray) -> np.ndarray:
            nonlocal memory
            step = next(steps)
            began = np.array([step == 0])
            action, _, memory = self._act(params, shown, began, memory, jax.random.fold_in(key, step))
            return np.asarray(action)

        return act

    def _begin(self, seed: Int[Array, ""]) -> HostState:
        key = jax.random.key(seed)
        learning = self.learner.init(jax.random.fold_in(key, 0))
        before = jax.tree.map(jnp.copy, learning.params)
        replay = empty_replay(self._shapes(), self.settings.replay)
        return HostState(jnp.zeros((), jnp.int32), key, learning, before, replay)

    def _shapes(self) -> Rollout:
        """Of a batch."""
        settings, shape = self.settings, jax.ShapeDtypeStruct
        batch = (settings.games, settings.steps)
        kinds = {"action": jnp.int32, "log_prob": jnp.float32, "reward": jnp.float32, "discount": jnp.float32}
        arrays: dict[str, Any] = {
            name: shape(batch, kind) for name, kind in (kinds | {"cut": bool, "real": bool}).items()
        }
        longer = (batch[0], batch[1] + 1)
        arrays["shown"] = shape((*longer, *self.game.observation_shape), jnp.uint8)
        arrays["began"] = shape(longer, bool)
        arrays["memory"] = jax.eval_shape(lambda: self.learner.memory(batch[0]))
        return Rollout(**arrays)

    def _acted(self, params: PyTree, shown: Any, began: Array, memory: Memory, key: PRNGKey) -> tuple[Any, Any, Memory]:
        """Actions, their log-probabilities, and what is remembered."""
        logits, memory = self.learner.act(params, shown, began, memory)
        action = jax.random.categorical(key, logits)
        return action.astype(jnp.int32), categorical.log_prob(logits, action), memory

    def _learned(
        self, now: tuple[Any, PRNGKey, Learning, PyTree], replay: Replay, rollout: Rollout, params: PyTree
    ) -> tuple[Learning, Replay, Metrics]:
        """One iteration's updates; `params` played the batch, and the last of `now` the batch before."""
        iteration, key, learning, before = now
        metrics = self.learner.measure(params, before, rollout) if self.settings.measured else {}
        replay = remember(replay, rollout)
        key = jax.random.fold_in(jax.random.fold_in(key, 1), iteration)
        learning, learned = self.learner.update(learning, replay, key)
        return learning, replay, metrics | learned


class _Player:
    """Plays batch after batch, and knows where each game stands."""

    def __init__(self, trainer: HostTrainer, state: HostState) -> None:
        self._trainer, self._key = trainer, jax.random.fold_in(state.key, 2)
        # A seed of their own after each checkpoint, or the same games would be begun again and again.
        seed = jax.random.bits(jax.random.fold_in(jax.random.fold_in(self._key, 0), state.iteration), (), jnp.uint32)
        self._shown = trainer.game.reset(int(seed) & 0x7FFFFFFF)
        if self._shown.dtype != np.uint8:
            raise ValueError(f"{trainer.game.name} shows arrays of {self._shown.dtype}; games on the host show bytes.")
        self._began = np.ones(trainer.settings.games, bool)
        self._memory = trainer.learner.memory(trainer.settings.games)

    def play(self, params: PyTree, iteration: int) -> _Played:
        """A batch: T steps of every game."""
        trainer, settings = self._trainer, self._trainer.settings
        key, memory = jax.random.fold_in(jax.random.fold_in(self._key, 1), iteration), self._memory
        columns: dict[str, list[np.ndarray]] = {name: [] for name in Rollout._fields if name != "memory"}
        scores = []
        for step in range(settings.steps):
            now = jax.random.fold_in(key, step)
            action, log_prob, self._memory = trainer._act(params, self._shown, self._began, self._memory, now)
            answer = trainer.game.step(np.asarray(action))
            over = answer.terminated | answer.truncated
            column = {
                "shown": self._shown,
                "began": self._began,
                "action": np.asarray(action),
                "log_prob": np.asarray(log_prob),
                "reward": answer.reward.astype(np.float32),
                "discount": np.where(over, 0.0, settings.discount).astype(np.float32),
                "cut": answer.truncated & ~answer.terminated,
                "real": answer.real,
            }
            for name, values in column.items():
                columns[name].append(values)
            scores.append(answer.scores[~np.isnan(answer.scores)])
            # What follows a step that took no action is the first picture of a new game.
            self._shown, self._began = answer.observation, ~answer.real
        columns["shown"].append(self._shown)
        columns["began"].append(self._began)
        stacked: dict[str, Any] = {name: np.stack(values, axis=1) for name, values in columns.items()}
        return _Played(Rollout(**stacked, memory=memory), params, np.concatenate(scores))
