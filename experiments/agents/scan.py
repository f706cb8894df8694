"""Train agents in a world of many turns: all seeds at once, all steps in one loop, one program for all arms.

As `experiments.lab.train` does for answers of one turn. What differs between arms is the number of the recipe: world,
tasks, start and random numbers are the same, so that arms are paired by seed. Advantages and losses are those of
training (`jaxrl_llm.objectives`); here are the loop and what is measured of it.
"""

import dataclasses
from collections.abc import Callable
from collections.abc import Mapping
from collections.abc import Sequence
from typing import Any
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from jaxrl_llm import categorical
from jaxrl_llm.bounds import logit_dynamics
from jaxrl_llm.checks import present
from jaxrl_llm.environments.worlds import ArrayWorld
from jaxrl_llm.environments.worlds import Panel
from jaxrl_llm.masked import masked_mean
from jaxrl_llm.masked import masked_sum
from jaxrl_llm.masked import safe_divide
from jaxrl_llm.models import Transformer
from jaxrl_llm.models import TransformerConfig
from jaxrl_llm.objectives import Recipe
from jaxrl_llm.objectives import SignalInputs
from jaxrl_llm.objectives import advantages_of
from jaxrl_llm.objectives.advantages import group_normalised
from jaxrl_llm.objectives.advantages import informative_groups
from jaxrl_llm.rollouts import SamplingSettings
from jaxrl_llm.rollouts.play import Alphabet
from jaxrl_llm.rollouts.play import Turns
from jaxrl_llm.rollouts.play import action_columns
from jaxrl_llm.rollouts.play import as_trajectories
from jaxrl_llm.rollouts.play import episode_width
from jaxrl_llm.rollouts.play import expert_turns
from jaxrl_llm.rollouts.play import make_play
from jaxrl_llm.testing import Batch
from jaxrl_llm.training.text.objective import Extras
from jaxrl_llm.training.text.objective import recipe_objective
from jaxrl_llm.trajectory import Trajectories
from jaxrl_llm.typing import Array
from jaxrl_llm.typing import Bool
from jaxrl_llm.typing import Float
from jaxrl_llm.typing import Int
from jaxrl_llm.typing import PRNGKey
from jaxrl_llm.typing import PyTree

PAD = 0
"""Token after the end; it is a symbol too, as nothing reads it."""
BINS = 8
"""Bins of entropy, of one width, from certainty to the uniform choice of an action; what is above is in the last."""
KINDS = ("move", "take", "open", "none")
"""Kinds of actions in `Rooms`; the last are tokens that are no action."""


@dataclasses.dataclass(frozen=True)
class Sizes:
    """How agents are made and trained.

    Attributes:
        width: of the model, a multiple of 16.
        layers: of the model.
        imitation_steps: updates on episodes of the expert before reinforcement learning.
        imitation_rate: step size of Adam for them.
        tasks: tasks per batch.
        group_size: episodes per task.
        rounds: times that the policy is measured.
        every: batches between two measurements.
        updates: updates per batch.
        learning_rate: step size of Adam.
        samples: episodes per task when measured.
    """

    width: int
    layers: int
    imitation_steps: int
    imitation_rate: float
    tasks: int
    group_size: int
    rounds: int
    every: int
    updates: int
    learning_rate: float
    samples: int


class Episodes(NamedTuple):
    """A batch of episodes as the update reads it: what the model reads, and the chosen tokens in K columns."""

    rows: Trajectories
    tokens: Int[Array, "B K"]
    mask: Bool[Array, "B K"]


class AgentScan:
    """One world and several recipes: compiled once, whichever recipe is trained."""

    def __init__(self, world: ArrayWorld, panels: tuple[Panel, Panel], recipes: Sequence[Recipe], sizes: Sizes) -> None:
        """Nothing is compiled yet.

        Args:
            world: where the agents act.
            panels: tasks to train on, and to measure on.
            recipes: the arms; each must have an advantage that needs no critic.
            sizes: the numbers.
        """
        self._world, self._sizes, self._recipes = world, sizes, tuple(recipes)
        self._train_tasks, self._measured = (jnp.asarray(panel.seeds) for panel in panels)
        symbols, actions = len(world.symbols), len(world.actions)
        self._letters = Alphabet(np.arange(symbols), symbols + np.arange(actions))
        self._config = TransformerConfig(
            vocab_size=symbols + actions,
            hidden_size=sizes.width,
            num_layers=sizes.layers,
            num_heads=sizes.width // 16,
            num_kv_heads=sizes.width // 16,
            head_dim=16,
            intermediate_size=3 * sizes.width,
            max_positions=episode_width(world),
        )
        self._graphdef = nnx.graphdef(nnx.eval_shape(lambda: Transformer(self._config, rngs=nnx.Rngs(0))))
        self._optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(sizes.learning_rate))
        self._losses = [_loss_of(recipe) for recipe in self._recipes]
        self._signals = [_signal_of(recipe) for recipe in self._recipes]
        self._regularised = jnp.array([recipe.kl_coefficient > 0 for recipe in self._recipes])
        self._columns = action_columns(world)
        self._sampled, self._greedy, self._train_play = (
            self._player(sizes.samples, 1.0),
            self._player(1, 0.0),
            self._player(sizes.group_size, 1.0),
        )
        self._start = jax.jit(jax.vmap(self._imitated))
        self._run = jax.jit(jax.vmap(self._trained, in_axes=(0, 0, None)))

    def start(self, seeds: int, key: PRNGKey) -> tuple[PyTree, dict[str, Array]]:
        """The policies after imitation, one per seed, and what is measured of them."""
        return self._start(jax.random.split(key, seeds))

    def train(self, name: str, policies: PyTree, key: PRNGKey) -> Mapping[str, Array]:
        """What is measured of an arm: `[seeds, rounds, every]` of each batch, `[seeds, rounds, ..]` after each round.

        Args:
            name: of the recipe.
            policies: of `start`.
            key: the same for arms that are compared.
        """
        seeds = jax.tree.leaves(policies)[0].shape[0]
        number = [recipe.name for recipe in self._recipes].index(name)
        return self._run(policies, jax.random.split(key, seeds), jnp.asarray(number))

    def _player(self, group_size: int, temperature: float) -> Any:
        sampling = SamplingSettings(temperature=temperature)
        options = {"group_size": group_size, "sampling": sampling, "pad_id": PAD}
        return make_play(self._graphdef, self._world, self._letters, **options)

    # Imitation

    def _imitated(self, key: PRNGKey) -> tuple[PyTree, dict[str, Array]]:
        state = nnx.state(Transformer(self._config, rngs=nnx.Rngs(key)))
        optimizer = optax.adam(self._sizes.imitation_rate)
        count = self._sizes.tasks * self._sizes.group_size

        def loss(state: PyTree, episodes: Episodes) -> Array:
            log_prob = categorical.log_prob(self._logits(state, episodes.rows), episodes.tokens)
            return -masked_mean(log_prob, episodes.mask)

        def imitate(carry: tuple[PyTree, PyTree], index: Array) -> tuple[tuple[PyTree, PyTree], None]:
            state, opt_state = carry
            tasks = jax.random.choice(jax.random.fold_in(key, index), self._train_tasks, (count,))
            prompt = jnp.asarray(self._letters.symbols)[self._world.reset(tasks)[1]]
            turns = expert_turns(self._world, self._letters, tasks, PAD)
            changes, opt_state = optimizer.update(jax.grad(loss)(state, self._episodes(prompt, turns)), opt_state)
            return (optax.apply_updates(state, changes), opt_state), None

        carry = (state, optimizer.init(state))
        (state, _), _ = jax.lax.scan(imitate, carry, jnp.arange(self._sizes.imitation_steps))
        return state, self._measure(state, jax.random.fold_in(key, self._sizes.imitation_steps))

    # Reinforcement learning

    def _trained(self, policy: PyTree, key: PRNGKey, arm: Array) -> dict[str, Array]:
        def batch(carry: PyTree, index: Array) -> tuple[PyTree, dict[str, Array]]:
            return self._step(carry, jax.random.fold_in(key, index), arm, policy)

        def one_round(carry: PyTree, number: Array) -> tuple[PyTree, dict[str, Array]]:
            numbers = number * self._sizes.every + jnp.arange(self._sizes.every)
            carry, metrics = jax.lax.scan(batch, carry, numbers)
            # A key that no batch has.
            measured = self._measure(carry[0], jax.random.fold_in(key, -1 - number))
            return carry, metrics | measured

        carry = (policy, self._optimizer.init(policy))
        return jax.lax.scan(one_round, carry, jnp.arange(self._sizes.rounds))[1]

    def _step(self, carry: Any, key: PRNGKey, arm: Array, start: PyTree) -> tuple[Any, dict[str, Array]]:
        """Episodes of some tasks, their advantages, and the updates on them."""
        sizes, (state, opt_state) = self._sizes, carry
        task_key, play_key = jax.random.split(key)
        tasks = jax.random.choice(task_key, self._train_tasks, (sizes.tasks,), replace=False)
        prompt, turns = self._train_play(state, tasks, play_key, 0, jnp.arange(sizes.tasks))
        episodes = self._episodes(prompt, turns)
        logits = self._logits(state, episodes.rows)
        signal = _signal_inputs(episodes, turns, logits)
        advantages = jax.lax.switch(arm, self._signals, signal)
        # The policy before reinforcement learning, where the arm has a KL term.
        log_prob_ref = jax.lax.cond(
            self._regularised[arm],
            lambda: self._log_prob(start, episodes),
            lambda: jnp.zeros(episodes.mask.shape, logits.dtype),
        )

        def loss(state: PyTree) -> Array:
            batch = _batch_of(episodes, signal, advantages, self._log_prob(state, episodes), log_prob_ref)
            return jax.lax.switch(arm, self._losses, batch)

        def update(carry: Any, _: None) -> tuple[Any, Array]:
            state, opt_state = carry
            gradient = jax.grad(loss)(state)
            changes, opt_state = self._optimizer.update(gradient, opt_state, state)
            return (optax.apply_updates(state, changes), opt_state), optax.tree.norm(gradient)

        carry, norms = jax.lax.scan(update, (state, opt_state), length=sizes.updates)
        metrics = self._metrics(episodes, turns, signal, logits, advantages) | {"grad_norm": norms[0]}
        return carry, jax.tree.map(lambda x: x.astype(jnp.float32), metrics)

    def _metrics(
        self, episodes: Episodes, turns: Turns, signal: SignalInputs, logits: Array, advantages: Array
    ) -> dict[str, Array]:
        """Of one batch, before its update."""
        mask, entropy, collision = signal.response_mask, present(signal.entropy), present(signal.collision)
        kinds = self._kinds(episodes.tokens)
        informative = informative_groups(signal.rewards, signal.group_ids)
        plain = group_normalised(signal.rewards, signal.group_ids)[:, None]
        # Size of the intended logit update per unit of advantage.
        size = jnp.sqrt(logit_dynamics.squared_update_norm(jnp.exp(present(signal.log_prob_old)), collision))
        last = mask & (signal.step_ids == jnp.sum(mask, axis=1, keepdims=True) - 1)
        found = {
            "reward": jnp.mean(signal.rewards),
            "turns": jnp.mean(jnp.sum(mask, axis=1)),
            "valid": masked_mean(turns.valid.T.astype(jnp.float32), mask),
            "entropy": masked_mean(entropy, mask),
            "informative": jnp.mean(informative.astype(jnp.float32)),
            "last_step": masked_mean(advantages, last) - masked_mean(advantages, mask & ~last),
            "scaled_mean": masked_mean(advantages, mask),
        }
        for number, kind in enumerate(KINDS):
            found[f"entropy_{kind}"] = masked_mean(entropy, mask & (kinds == number))
        # By the entropy of the context: how large the intended updates are, with the plain advantage and the arm's own.
        edges = jnp.log(len(self._world.actions)) * jnp.arange(1, BINS) / BINS
        counted = mask & informative[:, None]
        inside = (jnp.searchsorted(edges, entropy)[:, :, None] == jnp.arange(BINS)) & counted[:, :, None]
        of_bins = {"count": jnp.ones_like(size), "plain": jnp.abs(plain) * size, "arm": jnp.abs(advantages) * size}
        for name, values in of_bins.items():
            found[f"bin_{name}"] = masked_sum(jnp.broadcast_to(values[:, :, None], inside.shape), inside, axis=(0, 1))
        return found

    def _kinds(self, tokens: Int[Array, "B K"]) -> Int[Array, "B K"]:
        action = tokens - len(self._world.symbols)
        moves = len(self._world.actions) - 2
        return jnp.where(action < 0, 3, jnp.where(action < moves, 0, action - moves + 1))

    # Measuring

    def _measure(self, state: PyTree, key: PRNGKey) -> dict[str, Array]:
        """Of every task of the measuring panel: sampled episodes and a greedy one; and of the policy's first action."""
        tasks, order = self._measured, jnp.arange(len(self._measured))
        _, sampled = self._sampled(state, tasks, key, 0, order)
        _, greedy = self._greedy(state, tasks, key, 0, order)
        solved = (jnp.sum(sampled.rewards, axis=0) > 0).reshape(len(tasks), -1).astype(jnp.float32)
        acted = sampled.acted
        prompt = jnp.asarray(self._letters.symbols)[self._world.reset(tasks)[1]]
        model = nnx.merge(self._graphdef, state)
        first = model.logits(model(prompt)[:, -1])
        mixed = jax.scipy.special.logsumexp(categorical.log_probs(first), axis=0) - jnp.log(len(tasks))
        return {
            "solved": jnp.mean(solved, axis=1),
            "solved_once": jnp.max(solved, axis=1),
            "solved_greedy": jnp.sum(greedy.rewards, axis=0),
            "measured_turns": jnp.mean(jnp.sum(acted, axis=0).astype(jnp.float32)),
            "measured_valid": masked_mean(sampled.valid.astype(jnp.float32), acted),
            # I(task; first action): 0 where the policy begins every task alike, however random it is.
            "mutual_information": categorical.entropy(mixed) - jnp.mean(categorical.entropy(first)),
        }

    # The model on episodes

    def _episodes(self, prompt: Array, turns: Turns) -> Episodes:
        groups = jnp.arange(len(prompt)) // self._sizes.group_size
        rows = as_trajectories(prompt, turns, group_ids=groups, version=0, recorded=False)
        return Episodes(rows, turns.actions.T, turns.acted.T)

    def _logits(self, state: PyTree, rows: Trajectories) -> Float[Array, "B K V"]:
        model = nnx.merge(self._graphdef, state)
        return model.logits(model(rows.tokens, rows.token_mask)[:, self._columns - 1])

    def _log_prob(self, state: PyTree, episodes: Episodes) -> Float[Array, "B K"]:
        log_prob = categorical.log_prob(self._logits(state, episodes.rows), episodes.tokens)
        return jnp.where(episodes.mask, log_prob, 0.0)


def _signal_inputs(episodes: Episodes, turns: Turns, logits: Float[Array, "B K V"]) -> SignalInputs:
    """The episodes as signals read them: a step is a turn, and has one token."""
    mask, fixed = episodes.mask, jax.lax.stop_gradient(logits)
    rewards_t = turns.rewards.T
    turn = jnp.broadcast_to(jnp.arange(mask.shape[1]), mask.shape)
    return SignalInputs(
        response_mask=mask,
        rewards=jnp.sum(rewards_t, axis=1),
        rewards_t=rewards_t,
        group_ids=jnp.asarray(episodes.rows.group_ids),
        step_ids=jnp.where(mask, turn, -1),
        actor_ids=jnp.where(mask, 0, -1),
        ended=turns.done,
        steps=mask.shape[1],
        log_prob_old=jnp.where(mask, categorical.log_prob(fixed, episodes.tokens), 0.0),
        entropy=categorical.entropy(fixed),
        collision=categorical.collision(fixed),
    )


def _signal_of(recipe: Recipe) -> Callable[[SignalInputs], Float[Array, "B K"]]:
    def signal(inputs: SignalInputs) -> Array:
        found = advantages_of(recipe, inputs)
        spread = jnp.broadcast_to(found[:, None] if found.ndim == 1 else found, inputs.response_mask.shape)
        return jnp.where(inputs.response_mask, spread, 0.0)

    return signal


def _loss_of(recipe: Recipe) -> Callable[[Batch], Array]:
    objective = recipe_objective(recipe)
    return lambda batch: safe_divide(*objective.loss(batch, Extras(1.0, None)).loss)


def _batch_of(
    episodes: Episodes, signal: SignalInputs, advantages: Array, log_prob: Array, log_prob_ref: Array
) -> Batch:
    """The episodes as objectives read them."""
    fields: dict[str, Any] = dict.fromkeys(Batch._fields) | {
        "tokens": episodes.tokens,
        "response_mask": episodes.mask,
        "group_ids": signal.group_ids,
        "rewards": signal.rewards,
        "advantages": advantages,
        "log_prob": log_prob,
        "log_prob_old": signal.log_prob_old,
        "log_prob_behaviour": signal.log_prob_old,
        "log_prob_ref": log_prob_ref,
        "step_ids": signal.step_ids,
    }
    return Batch(**fields)
