"""Actor-critics in games that are written in JAX: playing, learning and all seeds in one compiled program."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from jaxrl_llm import categorical
from jaxrl_llm.environments.pixels.protocol import ArrayGame
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
from jaxrl_llm.typing import Bool
from jaxrl_llm.typing import Float
from jaxrl_llm.typing import Int
from jaxrl_llm.typing import PRNGKey
from jaxrl_llm.typing import PyTree


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Playing:
    """B games that are being played.

    Attributes:
        games: their states.
        shown: [B, *shape] what they show.
        began: true where a game begins.
        memory: of the LSTM.
        earned: rewards of each so far.
    """

    games: PyTree
    shown: Any
    began: Bool[Array, " B"]
    memory: Memory
    earned: Float[Array, " B"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ControlState:
    """All arrays of a run, of one seed or of many: a run goes on from them to the last bit.

    Attributes:
        iteration: batches learned from.
        key: root of all random numbers; it stays as it is.
        learning: parameters and optimiser.
        before: parameters with which the last batch was played; none where nothing is measured.
        playing: the games.
        replay: the last batches.
    """

    iteration: Int[Array, ""]
    key: PRNGKey
    learning: Learning
    before: PyTree
    playing: Playing
    replay: Replay


class GameTrainer:
    """One game and one way to learn it; compiled once for all seeds together."""

    def __init__(self, game: ArrayGame, settings: ControlSettings) -> None:
        """Nothing is compiled yet.

        Raises:
            ValueError: the network does not fit what the game shows.
        """
        self.game, self.settings = game, settings
        self.learner = Learner(game.observation_shape, len(game.actions), settings)
        self._update = self.learner.update
        if jax.default_backend() == "cpu":
            # Many small matrices at once take a CPU twice as long as one after the other.
            self._update = jax.custom_batching.sequential_vmap(self._update)
        self._init = jax.jit(jax.vmap(self._begin))
        whole = jax.vmap(self._play_to_the_end, in_axes=(0, None, None))
        self._whole = jax.jit(whole, static_argnums=2)
        self._run = jax.jit(jax.vmap(self._iterate, in_axes=(0, None)), static_argnums=1, donate_argnums=0)

    @property
    def measures(self) -> tuple[str, ...]:
        """The names of the metrics."""
        state = jax.eval_shape(self._init, jnp.zeros(1, jnp.uint32))
        return tuple(jax.eval_shape(lambda state: self._run(state, 1)[1], state))

    def init(self, seeds: Int[Array, " S"]) -> ControlState:
        """The state before the first iteration, of every seed."""
        return self._init(seeds)

    def run(self, state: ControlState, iterations: int) -> tuple[ControlState, Metrics]:
        """So many iterations; the state that is given is used up.

        Returns:
            the state, and the metrics [S, iterations]; `returns` is the sum and `ended` the number of the games that
            ended in an iteration.
        """
        return self._run(state, iterations)

    def play_whole(self, learning: Learning, key: PRNGKey, *, limit: int) -> Float[Array, "S B"]:
        """Returns of whole games that the policies play as they are, B of each, the first that each begins.

        Args:
            learning: of every seed.
            key: of the games and the draws, the same for every seed.
            limit: steps after which a game that goes on is counted with what it has earned.
        """
        return self._whole(learning.params, key, limit)

    def _play_to_the_end(self, params: PyTree, key: PRNGKey, limit: int) -> Float[Array, " B"]:
        playing = self._new_games(key)
        running, total = jnp.ones(self.settings.games, bool), jnp.zeros(self.settings.games)

        def step(carry: Any) -> Any:
            number, playing, running, total = carry
            playing, (column, _) = self._step(params, playing, jax.random.fold_in(key, number))
            total = total + jnp.where(running, column["reward"], 0.0)
            return number + 1, playing, running & ~playing.began, total

        def go_on(carry: Any) -> Array:
            return jnp.any(carry[2]) & (carry[0] < limit)

        return jax.lax.while_loop(go_on, step, (jnp.ones((), jnp.int32), playing, running, total))[3]

    def _new_games(self, key: PRNGKey) -> Playing:
        count = self.settings.games
        states, shown = jax.vmap(self.game.reset)(jax.random.split(key, count))
        return Playing(states, shown, jnp.ones(count, bool), self.learner.memory(count), jnp.zeros(count, jnp.float32))

    def _begin(self, seed: Int[Array, ""]) -> ControlState:
        key = jax.random.key(seed)
        weights, games = jax.random.split(jax.random.fold_in(key, 0))
        learning, playing = self.learner.init(weights), self._new_games(games)
        rollout = jax.eval_shape(lambda: self._play(learning.params, playing, key)[1])
        before = jax.tree.map(jnp.copy, learning.params) if self.settings.measured else ()
        replay = empty_replay(rollout, self.settings.replay)
        return ControlState(jnp.zeros((), jnp.int32), key, learning, before, playing, replay)

    def _iterate(self, state: ControlState, iterations: int) -> tuple[ControlState, Metrics]:
        def step(state: ControlState, _: None) -> tuple[ControlState, Metrics]:
            keys = jax.random.split(jax.random.fold_in(state.key, state.iteration + 1))
            params = state.learning.params
            playing, rollout, metrics = self._play(params, state.playing, keys[0])
            if self.settings.measured:
                metrics |= self.learner.measure(params, state.before, rollout)
            replay = remember(state.replay, rollout)
            learning, learned = self._update(state.learning, replay, keys[1])
            before = params if self.settings.measured else ()
            state = ControlState(state.iteration + 1, state.key, learning, before, playing, replay)
            return state, metrics | learned

        return jax.lax.scan(step, state, None, length=iterations)

    def _play(self, params: PyTree, playing: Playing, key: PRNGKey) -> tuple[Playing, Rollout, Metrics]:
        """A batch: T steps of every game."""
        memory, keys = playing.memory, jax.random.split(key, self.settings.steps)
        playing, (columns, ended) = jax.lax.scan(functools.partial(self._step, params), playing, keys)
        columns = jax.tree.map(lambda leaf: jnp.swapaxes(leaf, 0, 1), columns)
        for name, last in (("shown", playing.shown), ("began", playing.began)):
            columns[name] = jnp.concatenate([columns[name], last[:, None]], axis=1)
        returns, count = (jnp.sum(values) for values in ended)
        return playing, Rollout(**columns, memory=memory), {"returns": returns, "ended": count}

    def _step(self, params: PyTree, playing: Playing, key: PRNGKey) -> tuple[Playing, Any]:
        """One step of every game: the games after it; what is learned from, with returns and number of the games that
        ended."""
        act_key, step_key = jax.random.split(key)
        logits, memory = self.learner.act(params, playing.shown, playing.began, playing.memory)
        action = jax.random.categorical(act_key, logits)
        keys = jax.random.split(step_key, self.settings.games)
        games, answer = jax.vmap(self.game.step)(keys, playing.games, action)
        over, earned = answer.terminated | answer.truncated, playing.earned + answer.reward
        column = {
            "shown": playing.shown,
            "began": playing.began,
            "action": action,
            "log_prob": categorical.log_prob(logits, action),
            "reward": answer.reward,
            "discount": jnp.where(over, 0.0, self.settings.discount),
            "cut": answer.truncated & ~answer.terminated,
            "real": jnp.ones_like(over),
        }
        after = Playing(games, answer.observation, over, memory, jnp.where(over, 0.0, earned))
        return after, (column, (jnp.sum(jnp.where(over, earned, 0.0)), jnp.sum(over).astype(jnp.float32)))
