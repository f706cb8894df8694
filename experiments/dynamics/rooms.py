"""Two agents that learn the same rooms by policy gradient: a table of logits, and a small transformer.

The table reads the state of the world and has a row of logits for each, so that the logits are its parameters. The
transformer reads the episode so far, and has imitated shortest solutions for some steps before.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from experiments.dynamics.learner import Batch
from experiments.dynamics.learner import Learner
from jaxrl_llm import categorical
from jaxrl_llm.environments.worlds import Rooms
from jaxrl_llm.environments.worlds.rooms import RoomsState
from jaxrl_llm.masked import masked_mean
from jaxrl_llm.models.config import TransformerConfig
from jaxrl_llm.models.transformer import Transformer
from jaxrl_llm.objectives.advantages import group_normalised
from jaxrl_llm.rollouts import SamplingSettings
from jaxrl_llm.rollouts.play import Alphabet
from jaxrl_llm.rollouts.play import Turns
from jaxrl_llm.rollouts.play import episode_width
from jaxrl_llm.rollouts.play import expert_turns
from jaxrl_llm.rollouts.play import make_play
from jaxrl_llm.typing import Array
from jaxrl_llm.typing import Float
from jaxrl_llm.typing import Int
from jaxrl_llm.typing import PRNGKey
from jaxrl_llm.typing import PyTree

EMBEDDING_SCALE = 50.0
IMITATION_RATE = 3e-3
"""Step size of Adam before reinforcement learning."""


def _batch(texts: PyTree, actions: Array, mask: Array, rewards: Float[Array, " B"], group_size: int) -> Batch:
    groups = jnp.arange(len(rewards)) // group_size
    return Batch(texts, actions, mask, group_normalised(rewards, groups), jnp.mean(rewards))


def _tasks(world: Rooms, key: PRNGKey, count: int) -> Int[Array, " count"]:
    return jax.random.choice(key, world.tasks, (count,), replace=False)


def table_learner(world: Rooms, *, tasks: int, group_size: int) -> Learner:
    """A table with a row for each (has the key, room, room to reach next), all zero at first.

    Args:
        world: where it acts.
        tasks: per batch.
        group_size: episodes of each task.
    """

    def row(state: RoomsState) -> Int[Array, " B"]:
        target = jnp.where(state.has_key, state.door_room, state.key_room)
        return (state.has_key * world.count + state.room) * world.count + target

    def sample(table: Array, fixed: None, key: PRNGKey) -> Batch:
        task_key, key = jax.random.split(key)
        start = world.reset(jnp.repeat(_tasks(world, task_key, tasks), group_size))[0]

        def turn(carry: tuple[RoomsState, Array], key: PRNGKey):
            state, done = carry
            rows = row(state)
            action = jax.random.categorical(key, table[rows])
            after, answer = world.step(state, action)
            # A row that is done stands still.
            after = jax.tree.map(lambda new, old: jnp.where(done, old, new), after, state)
            earned = jnp.where(done, 0.0, answer.reward)
            return (after, done | answer.done), (rows, action, ~done, earned)

        begin = start, jnp.zeros(tasks * group_size, bool)
        _, (rows, actions, acted, earned) = jax.lax.scan(turn, begin, jax.random.split(key, world.turns))
        return _batch(rows.T, actions.T, acted.T, jnp.sum(earned, axis=0), group_size)

    return Learner(
        init=lambda key: (jnp.zeros((2 * world.count**2, len(world.actions))), None),
        sample=sample,
        logits=lambda table, fixed, rows: table[rows],
    )


class _Agent:
    """What the functions of the transformer share."""

    def __init__(
        self, world: Rooms, *, tasks: int, group_size: int, width: int, layers: int, imitation_steps: int
    ) -> None:
        self.world, self.tasks, self.group_size, self.imitation_steps = world, tasks, group_size, imitation_steps
        symbols, actions = len(world.symbols), len(world.actions)
        self.pad = symbols + actions
        # One token for each symbol and action: the kernel of a context is a matrix as small as that.
        self.letters = Alphabet(np.arange(symbols), symbols + np.arange(actions))
        self.config = TransformerConfig(
            vocab_size=self.pad + 1,
            hidden_size=width,
            num_layers=layers,
            num_heads=2,
            num_kv_heads=2,
            head_dim=width // 2,
            intermediate_size=3 * width,
            max_positions=episode_width(world),
            tie_embeddings=False,
        )
        self.graphdef = nnx.graphdef(nnx.eval_shape(lambda: Transformer(self.config, rngs=nnx.Rngs(0))))
        self.play = make_play(
            self.graphdef,
            world,
            self.letters,
            group_size=group_size,
            sampling=SamplingSettings(),
            pad_id=self.pad,
        )

        turns = expert_turns(world, self.letters, jnp.arange(world.tasks), self.pad)
        prompt = jnp.asarray(self.letters.symbols)[world.reset(jnp.arange(world.tasks))[1]]
        self.expert = self.text(prompt, turns), turns.actions.T, turns.acted.T

    def text(self, prompt: Int[Array, "B P"], turns: Turns) -> Int[Array, "B T"]:
        """Prompt, then an action and what the world answered, turn by turn; nothing reads what follows the end."""
        each = jnp.concatenate([turns.actions[:, :, None], turns.observations], axis=2).swapaxes(0, 1)
        whole = jnp.concatenate([prompt, each.reshape(len(prompt), -1)], axis=1)
        return whole[:, : -self.world.observation_length]

    def logits(self, state: PyTree, fixed: None, text: Int[Array, "B T"]) -> Float[Array, "B K V"]:
        """Of every turn's action: predicted by the token before it."""
        model = nnx.merge(self.graphdef, state)
        before = self.world.prompt_length - 1
        return model.logits(model(text)[:, before :: 1 + self.world.observation_length])[:, : self.world.turns]

    def init(self, key: PRNGKey) -> tuple[PyTree, None]:
        """A policy that has imitated the expert for some steps, each on as many tasks as a batch has episodes."""
        init_key, key = jax.random.split(key)
        model, optimizer = Transformer(self.config, rngs=nnx.Rngs(init_key)), optax.adam(IMITATION_RATE)
        # Entries near 1: the norm in front of the first layer would make the gradient of small ones large, and plain
        # gradient steps would move nothing else.
        model.embedding[...] = EMBEDDING_SCALE * model.embedding[...]
        state = nnx.state(model)

        def imitate(carry: tuple[PyTree, PyTree], key: PRNGKey) -> tuple[tuple[PyTree, PyTree], None]:
            chosen = _tasks(self.world, key, min(self.world.tasks, self.tasks * self.group_size))
            text, actions, acted = (part[chosen] for part in self.expert)

            def loss(state: PyTree) -> Array:
                return -masked_mean(categorical.log_prob(self.logits(state, None, text), actions), acted)

            state, opt_state = carry
            changes, opt_state = optimizer.update(jax.grad(loss)(state), opt_state)
            return (optax.apply_updates(state, changes), opt_state), None

        start, keys = (state, optimizer.init(state)), jax.random.split(key, self.imitation_steps)
        return jax.lax.scan(imitate, start, keys)[0][0], None

    def sample(self, state: PyTree, fixed: None, key: PRNGKey) -> Batch:
        """Groups of episodes of some tasks."""
        task_key, key = jax.random.split(key)
        prompt, turns = self.play(state, _tasks(self.world, task_key, self.tasks), key, 0, jnp.arange(self.tasks))
        rewards = jnp.sum(turns.rewards, axis=0)
        return _batch(self.text(prompt, turns), turns.actions.T, turns.acted.T, rewards, self.group_size)


def transformer_learner(
    world: Rooms, *, tasks: int, group_size: int, width: int, layers: int, imitation_steps: int
) -> Learner:
    """A decoder with a token for each symbol and action of the world.

    Args:
        world: where it acts.
        tasks: per batch.
        group_size: episodes of each task.
        width: of the model, a multiple of 4.
        layers: of the model.
        imitation_steps: updates on shortest solutions before reinforcement learning.

    Raises:
        ValueError: for a width that no such model has.
    """
    if width < 4 or width % 4:
        raise ValueError(f"width is {width}; it must be a multiple of 4.")
    own = _Agent(world, tasks=tasks, group_size=group_size, width=width, layers=layers, imitation_steps=imitation_steps)
    return Learner(own.init, own.sample, own.logits)
