"""The device side of a training step: score, signal, update, compare. Each is compiled once per shape."""

import contextlib
import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxrl_llm.models.sharding import shard
from jaxrl_llm.models.trainable import combine
from jaxrl_llm.objectives.ratios import LOG_RATIO_LIMIT
from jaxrl_llm.rollouts.collect import NOBODYS_LAW
from jaxrl_llm.rollouts.collect import BatchShape
from jaxrl_llm.rollouts.collect import Experience
from jaxrl_llm.rollouts.collect import Law
from jaxrl_llm.rollouts.collect import PolicySnapshot
from jaxrl_llm.rollouts.collect.samplers import spread
from jaxrl_llm.training.run.optimizer import learning_rate_schedule
from jaxrl_llm.training.run.optimizer import make_optimizer
from jaxrl_llm.training.run.state import TrainState
from jaxrl_llm.training.text.critic import Critic
from jaxrl_llm.training.text.finite import Finite
from jaxrl_llm.training.text.finite import find_finite
from jaxrl_llm.training.text.finite import finite_at
from jaxrl_llm.training.text.finite import finite_states
from jaxrl_llm.training.text.finite import without_broken_rows
from jaxrl_llm.training.text.fitting import stale_sentence
from jaxrl_llm.training.text.further import require_further
from jaxrl_llm.training.text.layout import Arrangement
from jaxrl_llm.training.text.layout import Grid
from jaxrl_llm.training.text.layout import arrange
from jaxrl_llm.training.text.layout import choose_slots
from jaxrl_llm.training.text.objective import get_objective
from jaxrl_llm.training.text.policy import head_copy
from jaxrl_llm.training.text.policy import require_positions
from jaxrl_llm.training.text.policy import require_vocabulary
from jaxrl_llm.training.text.policy import split_policy
from jaxrl_llm.training.text.prepared import Prepared
from jaxrl_llm.training.text.prepared import deal
from jaxrl_llm.training.text.prepared import group_rows
from jaxrl_llm.training.text.prepared import recorded_selections
from jaxrl_llm.training.text.prepared import router_flips
from jaxrl_llm.training.text.reference import FrozenPolicy
from jaxrl_llm.training.text.reference import InitialPolicy
from jaxrl_llm.training.text.reference import Teacher
from jaxrl_llm.training.text.routers import require_routers
from jaxrl_llm.training.text.routers import router_biases
from jaxrl_llm.training.text.routers import with_router_bias
from jaxrl_llm.training.text.scoring import Scorer
from jaxrl_llm.training.text.scoring import Scores
from jaxrl_llm.training.text.scoring import Shift
from jaxrl_llm.training.text.settings import Parts
from jaxrl_llm.training.text.settings import TrainSettings
from jaxrl_llm.training.text.signals import NO_SIGNAL
from jaxrl_llm.training.text.signals import OF_REFERENCE
from jaxrl_llm.training.text.signals import choose_signal
from jaxrl_llm.training.text.signals import refuse_unrecorded
from jaxrl_llm.training.text.signals import sound_advantages
from jaxrl_llm.training.text.update import Heads
from jaxrl_llm.training.text.update import Update
from jaxrl_llm.training.text.update import UpdateBatch
from jaxrl_llm.trajectory import Actions
from jaxrl_llm.typing import Array
from jaxrl_llm.typing import Bool
from jaxrl_llm.typing import Float
from jaxrl_llm.typing import SumCount

ORDER = 1
"""What the run's key is folded with for the order of minibatches."""


def _above_clamp(log_prob_old: Float[Array, "*shape"], log_prob_behaviour: Float[Array, "*shape"]):
    """log pi_old; where the old policy prunes the token (-inf), so far below the sampler's that the ratio, 0, is at its
    clamp.
    """
    return jnp.where(jnp.isneginf(log_prob_old), log_prob_behaviour - LOG_RATIO_LIMIT, log_prob_old)


class Trainer:
    """The compiled functions of a run and the parameters that never change."""

    def __init__(self, parts: Parts, settings: TrainSettings, shape: BatchShape, law: Law = NOBODYS_LAW) -> None:
        """Split the model, place it on its devices, and prepare what is compiled at first use.

        Args:
            parts: the policy and what it is trained by.
            settings: the numbers.
            shape: of every batch of experience.
            law: what is known of the distribution that sampled it.

        Raises:
            ValueError, TypeError: the parts do not fit each other.
        """
        self.parts, self.settings, self.shape, self.law = parts, settings, shape, law
        self.objective = get_objective(parts.objective, parts.recipe)
        self.signal = choose_signal(parts.signal, parts.recipe, self.objective)
        self.stale = stale_sentence(
            self.objective, self.signal, settings, recipe=parts.recipe if parts.objective is None else None
        )
        self._refuse_unknown_law()
        require_positions(parts.model, shape.width, "policy")
        require_vocabulary(parts.tokenizer, parts.model)
        self.policy, initial, frozen = split_policy(parts.model, parts.trainable)
        if parts.mesh is not None:
            initial, frozen = shard(initial, parts.mesh), shard(frozen, parts.mesh)
        self._initial, self.frozen = initial, frozen
        self._grid = self._fixed_grid()
        update, temperature = settings.update, settings.sampling.temperature
        require_routers(update, initial)
        require_further(update, initial)
        self.optimizer = make_optimizer(settings.optimizer, settings.optimizer_steps)
        if router_biases(initial):
            self.optimizer = with_router_bias(self.optimizer, rate=update.router_bias_rate)
        self._rate = learning_rate_schedule(settings.optimizer, settings.optimizer_steps)
        self.critic = Critic(settings.critic, parts.model) if "values" in self.signal.needs else None
        if self.critic is not None and self.signal.targets is None:
            raise ValueError(f"the signal {self.signal.name!r} reads values and has no targets for a critic.")
        self.update = Update(
            self.policy,
            self.objective,
            self.optimizer,
            critic=self.critic,
            temperature=temperature,
            settings=update,
        )
        self.scorer = Scorer(
            self.policy,
            temperature=temperature,
            rows=update.score_rows,
            log_min_p=self.objective.log_min_p,
            collision="collision" in self.signal.needs,
            choices=update.router_replay != "off",
        )
        self._values = None if self.critic is None else self.scorer.in_chunks(self.critic.values)
        self.reference = self._reference()

    @property
    def _keeps_old(self) -> bool:
        # A sampler with weights of its own is compared with in the place of the old policy.
        compares = self.settings.update.bounds_every or self.settings.episodes_every
        return self.law.weights is None and bool(compares or "kl_t" in self.objective.needs)

    def _refuse_unknown_law(self) -> None:
        """The exact divergence from the policy that sampled needs its whole law.

        Raises:
            ValueError: an objective that reads it, and a sampler whose law the trainer does not have.
        """
        if "kl_t" in self.objective.needs and not self.law.known:
            raise ValueError(
                f"recipe {self.objective.name!r} masks by the exact KL(behaviour || current), which the trainer "
                "computes for perturbations of the weights only, without truncation or pruning, and for batches that "
                "the present policy sampled, not for those of a file or a collector, sampled ahead or replayed; "
                "perturb the weights, sample from the whole vocabulary, leave out ahead and replay, or use a recipe "
                "with one of the sampled masks."
            )

    def _fixed_grid(self) -> Grid | None:
        prompt, group = self.shape.prompt_length, self.shape.group_size
        if prompt is None:
            return None
        shares = self.settings.update.share_prompts
        slots = choose_slots(self.parts.model.config, prompt, self.shape.actions, group) if shares else 1
        return Grid(prompt, slots, self.shape.actions)

    def _reference(self) -> FrozenPolicy | None:
        if not (self.objective.reads_reference or self.signal.needs.intersection(OF_REFERENCE)):
            return None
        if self.objective.log_min_p is not None:
            raise ValueError(
                f"recipe {self.objective.name!r} prunes the policy and compares it with a reference, which has mass "
                "where the policy has none; leave out log_min_p or the terms of the reference."
            )
        if self.parts.teacher is not None:
            return Teacher(self.parts.teacher, self.parts.model, self.settings, self.shape.width, self.parts.mesh)
        # A copy, as the first update takes the buffers of the initial parameters over.
        return InitialPolicy(jax.tree.map(jnp.copy, self._initial), self.frozen, self.policy, self.scorer)

    def devices(self) -> contextlib.AbstractContextManager[Any]:
        """Context in which everything here must run: the mesh, where there is one."""
        return contextlib.nullcontext() if self.parts.mesh is None else jax.set_mesh(self.parts.mesh)

    def initial_state(self) -> TrainState:
        """The state before the first step; the first update donates the buffers of the model that was given."""
        critic = ((), ()) if self.critic is None else self.critic.initial(self.parts.model)
        state = TrainState.create(self._initial, self.optimizer, self.settings.seed, critic)
        return state if self.parts.mesh is None else shard(state, self.parts.mesh)

    def identity(self) -> Any:
        """The parameters a checkpoint does not hold but depends on: the frozen ones, and the reference policy's."""
        return {"frozen": self.frozen, "reference": None if self.reference is None else self.reference.params}

    def model_state(self, state: TrainState) -> nnx.State:
        """All parameters as one state, as `make_generate` takes it; valid until the next update."""
        return combine(state.params, self.frozen)

    def snapshot(self, state: TrainState) -> PolicySnapshot:
        """The policy as collectors see it; valid until the next update."""
        return PolicySnapshot(self.policy.graphdef, self.model_state(state), int(np.asarray(state.updates)))

    def prepare(self, state: TrainState, index: int, experience: Experience) -> Prepared:
        """Score a batch under the present policy, compute its signal and deal out the minibatches of step `index`.

        Raises:
            ValueError: the experience lacks what objective or signal reads, or the signal fails.
        """
        trajectories = experience.trajectories
        actions = Actions.of(trajectories, width=self.shape.actions)
        if trajectories.log_prob_behaviour is None:
            refuse_unrecorded(self.objective, self.signal)
        arrangement = self.arrange(experience, actions)
        rows = arrangement.rows
        if self.settings.update.router_replay == "on":
            rows = dataclasses.replace(rows, selections=arrangement.of_tokens(recorded_selections(experience)))
        rows = self._place(rows)

        def placed(values: np.ndarray) -> Array:
            return self._place(jnp.asarray(arrangement.spread(values)))

        scores = self.scorer.score(state.params, self.frozen, rows)
        flips = router_flips(experience, arrangement, scores.choices)
        behaviour = None
        if trajectories.log_prob_behaviour is not None:
            behaviour = placed(actions.take(trajectories.log_prob_behaviour))
        if self.objective.log_min_p is not None and behaviour is not None:
            scores = dataclasses.replace(scores, log_prob=_above_clamp(scores.log_prob, behaviour))
        states = finite_states(scores.hidden)
        finite = self._find_finite(experience, actions, arrangement, scores, states)
        batch = UpdateBatch(
            rows=rows,
            response_mask=placed(actions.mask & finite.rows[:, None]),
            group_ids=self._place(jnp.asarray(group_rows(trajectories.group_ids, arrangement))),
            step_ids=placed(actions.take(trajectories.step_ids, fill=-1)),
            rewards=placed(np.where(finite.rows, trajectories.returns, 0).astype(np.float32)),
            advantages=jnp.zeros(()),
            log_prob_behaviour=behaviour,
            log_prob_old=scores.log_prob,
            hidden_old=scores.hidden if self._keeps_old else None,
            trunk=scores.trunk,
        )
        heads = Heads()
        if self._keeps_old:
            heads = Heads(old=head_copy(self.policy, self.policy.model(state.params, self.frozen)))
        batch, heads = self._with_behaviour(state, batch, heads)
        batch, heads = self._with_reference(batch, heads)
        scored = self._scored(state, arrangement, scores, batch, heads)
        each = self.objective.per_sequence
        signal = sound_advantages(self.signal, trajectories, actions, scored, finite.rows, per_sequence=each)
        advantages, weights, targets = signal
        # Every surrogate is homogeneous in its advantage, so a weight >= 0 of its loss can stand in it.
        batch = dataclasses.replace(batch, advantages=placed(advantages * weights))
        if targets is not None and scored["values"] is not None:
            batch = dataclasses.replace(batch, values_old=placed(scored["values"]), value_targets=placed(targets))
        counted = batch.response_mask
        if states.any() and not states.all():
            batch = self._place(without_broken_rows(batch, states))
        kept = self._kept(advantages * weights)
        order = jax.random.fold_in(jax.random.fold_in(state.key, ORDER), index)
        mask, plan = deal(order, batch, arrangement, kept, self.shape, self.settings.update)
        batch = dataclasses.replace(batch, response_mask=self._place(mask))
        entropy = arrangement.gather(scores.entropy)
        mask = actions.mask & finite.rows[:, None]
        return Prepared(arrangement, batch, heads, plan, kept, finite, mask, advantages, entropy, counted, flips)

    def arrange(self, experience: Experience, actions: Actions) -> Arrangement:
        """The rows in which the update reads a batch with these chosen tokens."""
        trajectories = experience.trajectories
        config, update = self.parts.model.config, self.settings.update
        rewards = np.asarray(trajectories.returns).reshape(self.shape.groups, -1)
        signal = (rewards.max(axis=1) > rewards.min(axis=1)) | (not self._skips)
        mesh = self.parts.mesh
        devices = 1 if mesh is None else mesh.shape["data"] * mesh.shape["fsdp"]
        return arrange(
            trajectories,
            actions,
            config,
            grid=self._grid,
            first=np.repeat(signal, self.shape.group_size),
            share_prompts=update.share_prompts,
            whole_groups=self.objective.compares_rows,
            # So that every optimiser step has rows of its own, and as many on every device.
            least_rows=update.minibatches,
            multiple=update.minibatches * devices,
        )

    @property
    def _skips(self) -> bool:
        # Only where advantages are the whole signal can a group without any be left out; a critic learns from it.
        reads = self.signal is not NO_SIGNAL and self.critic is None
        return self.settings.update.skip_equal_groups and reads

    def _find_finite(
        self,
        experience: Experience,
        actions: Actions,
        arrangement: Arrangement,
        scores: Scores,
        states: Bool[np.ndarray, " n"],
    ) -> Finite:
        old = arrangement.gather(np.where(states[:, None, None], np.asarray(scores.log_prob), np.nan))
        trajectories = experience.trajectories
        recorded = trajectories.log_prob_behaviour
        behaviour = None if recorded is None else actions.take(recorded)
        return find_finite(behaviour, old, actions.mask, np.asarray(trajectories.returns))

    def _with_behaviour(self, state: TrainState, batch: UpdateBatch, heads: Heads) -> tuple[UpdateBatch, Heads]:
        """States of the policy that sampled, where its weights are not the trainer's."""
        if self.law.weights is None:
            return batch, heads
        hidden, head = self.scorer.behaviour(self.law.weights, state.params, self.frozen, batch.rows)
        return dataclasses.replace(batch, hidden_behaviour=hidden), dataclasses.replace(heads, behaviour=head)

    def _with_reference(self, batch: UpdateBatch, heads: Heads) -> tuple[UpdateBatch, Heads]:
        """What the reference policy says of the chosen tokens, where anybody asks."""
        if self.reference is None:
            return batch, heads
        # Another policy's routers choose for themselves; so must the layers that are shared with it.
        rows = dataclasses.replace(batch.rows, selections=None)
        scores, head = self.reference.score(rows, batch.trunk if batch.rows.selections is None else None)
        exact = {"kl_ref_t", "kl_from_ref_t"}
        asked = exact.intersection(self.objective.needs | self.signal.needs)
        hidden = scores.hidden if asked else None
        batch = dataclasses.replace(batch, log_prob_ref=scores.log_prob, hidden_ref=hidden)
        return batch, dataclasses.replace(heads, ref=head if asked else None)

    def _scored(
        self, state: TrainState, arrangement: Arrangement, scores: Scores, batch: UpdateBatch, heads: Heads
    ) -> dict[str, np.ndarray | None]:
        """What models say of the chosen tokens, in the order of the batch, as signals read it."""
        found: dict[str, Array | None] = {"log_prob_old": scores.log_prob, "entropy": scores.entropy}
        found |= {"collision": scores.collision, "log_prob_ref": batch.log_prob_ref, "values": None}
        if "kl_ref_t" in self.signal.needs:
            assert batch.hidden_ref is not None
            arrays = (batch.rows, scores.hidden, batch.hidden_ref, heads.ref)
            found["kl_ref_t"] = self.scorer.divergence(state.params, self.frozen, *arrays)
        if self._values is not None:
            found["values"] = self._values(state.critic, scores.hidden, batch.rows)
        return {name: None if array is None else arrangement.gather(array) for name, array in found.items()}

    def _kept(self, advantages: Float[np.ndarray, "B R"]) -> Bool[np.ndarray, " groups"]:
        per_group = np.abs(advantages).reshape(self.shape.groups, -1)
        return (per_group > 0).any(axis=1) | (not self._skips)

    def improve(self, state: TrainState, prepared: Prepared) -> tuple[TrainState, list[dict[str, SumCount]]]:
        """Take the optimiser steps of one batch; the given state is donated. Returns the metrics of each step."""
        metrics = []
        for minibatch in prepared.plan:
            state, values = self.update(
                state, self.frozen, prepared.batch, prepared.heads, jnp.asarray(minibatch.rows), minibatch.used
            )
            metrics.append(values)
        jax.block_until_ready(state.params)
        return dataclasses.replace(state, step=state.step + 1), jax.device_get(metrics)

    def compare(self, state: TrainState, prepared: Prepared) -> Shift:
        """The policy now against the one before the update, on the contexts of the batch."""
        return self.scorer.shift(state.params, self.frozen, prepared.batch, prepared.heads)

    def scores_finite(self, state: TrainState, prepared: Prepared) -> bool:
        """Whether the policy now gives finite log-probs to the tokens of a batch; a pruned one has -inf."""
        scores = self.scorer.score(state.params, self.frozen, prepared.batch.rows)
        pruned = self.objective.log_min_p is not None
        log_prob = jnp.where(jnp.isneginf(scores.log_prob), 0, scores.log_prob) if pruned else scores.log_prob
        return finite_at(prepared.counted, log_prob, scores.entropy)

    def learning_rate(self, state: TrainState) -> float:
        """That of the next optimiser step."""
        return float(np.asarray(self._rate(state.updates)))

    def _place(self, tree: Any) -> Any:
        """Spread the rows of a batch over the devices; rows that do not divide evenly stay whole."""
        return jax.tree.map(lambda leaf: spread(jnp.asarray(leaf), self.parts.mesh), tree)
