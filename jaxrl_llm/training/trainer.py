"""The device side of a training step: sample, score, update, compare. Each is compiled once."""

import contextlib
import dataclasses
import math
from collections.abc import Sequence
from typing import Any
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec

from jaxrl_llm.models.lora import merge_lora
from jaxrl_llm.models.sharding import shard
from jaxrl_llm.models.trainable import combine
from jaxrl_llm.objectives import Recipe
from jaxrl_llm.objectives import sequence_advantages
from jaxrl_llm.objectives.ratios import LOG_RATIO_LIMIT
from jaxrl_llm.rollouts import Rollout
from jaxrl_llm.rollouts import SamplingSettings
from jaxrl_llm.rollouts import make_generate
from jaxrl_llm.training.finite import Finite
from jaxrl_llm.training.finite import find_finite
from jaxrl_llm.training.finite import finite_states
from jaxrl_llm.training.finite import without_broken_rows
from jaxrl_llm.training.minibatches import Minibatch
from jaxrl_llm.training.minibatches import plan_minibatches
from jaxrl_llm.training.optimizer import make_optimizer
from jaxrl_llm.training.packing import Layout
from jaxrl_llm.training.packing import choose_slots
from jaxrl_llm.training.packing import pack
from jaxrl_llm.training.policy import head_copy
from jaxrl_llm.training.policy import split_policy
from jaxrl_llm.training.scoring import Scorer
from jaxrl_llm.training.scoring import Scores
from jaxrl_llm.training.scoring import Shift
from jaxrl_llm.training.settings import Parts
from jaxrl_llm.training.settings import TrainSettings
from jaxrl_llm.training.state import TrainState
from jaxrl_llm.training.step import Heads
from jaxrl_llm.training.step import Update
from jaxrl_llm.training.step import UpdateBatch
from jaxrl_llm.training.step import needs_exact_kl
from jaxrl_llm.training.step import needs_reference
from jaxrl_llm.typing import Array
from jaxrl_llm.typing import Bool
from jaxrl_llm.typing import Float
from jaxrl_llm.typing import PyTree
from jaxrl_llm.typing import SumCount

SAMPLING, ORDER, NOISE = 0, 1, 2
"""What the run's key is folded with for the uses of random numbers on the device."""


class Prepared(NamedTuple):
    """A rollout batch ready for its optimiser steps.

    batch, heads: for `Update`; the response mask is false throughout rollouts that are not finite. plan: its
    minibatches. kept: which prompts take part. entropy: of the policy before the update at each sampled context [nats].
    finite: which rollouts are sound.
    """

    batch: UpdateBatch
    heads: Heads
    plan: list[Minibatch]
    kept: np.ndarray
    entropy: Float[np.ndarray, "B R"]
    finite: Finite


def knows_sampler(parts: Parts, sampling: SamplingSettings) -> bool:
    """Whether the trainer computes the whole law of the sampler: its weights make it, perturbed ones too; a perturbed
    cache, perturbed logits, and a truncated or pruned vocabulary are not in it.
    """
    engine = parts.perturbation
    return engine.cache is None and engine.logits is None and not sampling.truncated


def _sampling(recipe: Recipe, sampling: SamplingSettings) -> SamplingSettings:
    """How answers are sampled: a recipe that prunes has its sampler prune too, on the safe set of its own logits.

    Raises:
        ValueError: the sampler is to be truncated in another way.
    """
    if recipe.log_min_p is None:
        return sampling
    if sampling.truncated:
        raise ValueError(
            f"recipe {recipe.name!r} prunes to the safe set at log_min_p = {recipe.log_min_p}, and its sampler with "
            f"it; top_k = {sampling.top_k}, top_p = {sampling.top_p} and min_p = {sampling.min_p} must be None."
        )
    return dataclasses.replace(sampling, min_p=math.exp(recipe.log_min_p))


def _refuse_unknown_law(parts: Parts, sampling: SamplingSettings) -> None:
    """The exact masks need the whole law of the sampler.

    Raises:
        ValueError: a mask by exact KL, and a sampler whose law the trainer does not have.
    """
    if needs_exact_kl(parts.recipe) and not knows_sampler(parts, sampling):
        raise ValueError(
            f"recipe {parts.recipe.name!r} masks by the exact KL(behaviour || current), which the trainer computes for "
            "perturbations of the weights only, without truncation or pruning; perturb the weights, sample from the "
            "whole vocabulary, or use a recipe with one of the sampled masks."
        )


def _above_clamp(log_prob_old: Float[Array, "*shape"], log_prob_behaviour: Float[Array, "*shape"]):
    """log pi_old; where the old policy prunes the token (-inf), so far below the sampler's that the ratio, 0, is at its
    clamp.
    """
    return jnp.where(jnp.isneginf(log_prob_old), log_prob_behaviour - LOG_RATIO_LIMIT, log_prob_old)


class Trainer:
    """The compiled functions of a run and the parameters that never change."""

    def __init__(self, parts: Parts, settings: TrainSettings, end_ids: Sequence[int]) -> None:
        """Split the model, place it on its devices, and prepare what is compiled at first use."""
        if parts.recipe.advantage == "given":
            raise ValueError(f"recipe {parts.recipe.name!r} needs a value function, which this loop does not train.")
        sampling = _sampling(parts.recipe, settings.sampling)
        _refuse_unknown_law(parts, sampling)
        self.knows_sampler = knows_sampler(parts, sampling)
        self.parts, self.settings, self.end_ids = parts, settings, tuple(end_ids)
        config, update = parts.model.config, settings.update
        self.policy, initial, frozen = split_policy(parts.model, parts.trainable)
        if parts.mesh is not None:
            initial, frozen = shard(initial, parts.mesh), shard(frozen, parts.mesh)
        self._initial, self.frozen = initial, frozen
        slots = settings.group_size if update.share_prompts else 1
        if update.share_prompts:
            slots = choose_slots(config, settings.prompt_length, settings.response_length, settings.group_size)
        self.layout = Layout(settings.prompt_length, slots, settings.response_length)
        self.optimizer = make_optimizer(settings.optimizer, settings.optimizer_steps)
        temperature = sampling.temperature
        engine = parts.perturbation
        merged = self.policy.graphdef if engine.weights is None else nnx.graphdef(merge_lora(parts.model))
        self.generate = make_generate(
            merged,
            max_new_tokens=settings.response_length,
            group_size=settings.group_size,
            sampling=sampling,
            eos_id=self.end_ids,
            pad_id=parts.tokenizer.pad_id,
            decode_dtype=parts.decode_dtype,
            perturb_logits=engine.logits,
            cache_rounding=engine.cache,
        )
        self._engine_state = jax.jit(self._perturb_weights)
        self.update = Update(self.policy, parts.recipe, self.optimizer, temperature=temperature, remat=update.remat)
        self.scorer = Scorer(
            self.policy, temperature=temperature, rows=update.score_rows, log_min_p=parts.recipe.log_min_p
        )
        self._advantages = jax.jit(lambda rewards, ids: sequence_advantages(parts.recipe, rewards, ids))
        # A copy, as the first update takes the buffers of the initial parameters over.
        self._reference = jax.tree.map(jnp.copy, initial) if needs_reference(parts.recipe) else None

    def devices(self) -> contextlib.AbstractContextManager[Any]:
        """Context in which everything here must run: the mesh, where there is one."""
        return contextlib.nullcontext() if self.parts.mesh is None else jax.set_mesh(self.parts.mesh)

    def initial_state(self) -> TrainState:
        """The state before the first step; the first update donates the buffers of the model that was given."""
        state = TrainState.create(self._initial, self.optimizer, self.settings.seed)
        return state if self.parts.mesh is None else shard(state, self.parts.mesh)

    def identity(self) -> Any:
        """The parameters a checkpoint does not hold but depends on: the frozen ones, and the reference policy's."""
        return {"frozen": self.frozen, "reference": self._reference}

    def model_state(self, state: TrainState) -> nnx.State:
        """All parameters as one state, as `make_generate` takes it; valid until the next update."""
        return combine(state.params, self.frozen)

    def sample(self, state: TrainState, index: int, prompts: Sequence[str]) -> Rollout:
        """Sample answers to the prompts of step number `index` (0 is the first); arrays on the host.

        Raises:
            ValueError: a prompt is longer than `prompt_length`.
        """
        try:
            tokens, mask = self.parts.tokenizer.encode_batch(prompts, length=self.settings.prompt_length)
        except ValueError as error:
            raise ValueError(f"prompt_length is {self.settings.prompt_length}, which does not do: {error}") from error
        key = jax.random.fold_in(state.key, SAMPLING)
        arguments = (self._place(jnp.asarray(tokens)), self._place(jnp.asarray(mask)), key, index)
        perturbed = self.parts.perturbation.weights is not None
        weights = self._engine_state(state.params, self.frozen) if perturbed else self.model_state(state)
        # Noise of its own for every step: the weights that a real engine rounds are others after each update.
        noise_key = jax.random.fold_in(jax.random.fold_in(state.key, NOISE), index)
        rollout = self.generate(weights, *arguments, jnp.arange(len(prompts)), noise_key=noise_key)
        return jax.device_get(rollout)

    def _perturb_weights(self, params: PyTree, frozen: PyTree) -> PyTree:
        perturb = self.parts.perturbation.weights
        assert perturb is not None
        return perturb(nnx.state(merge_lora(self.policy.model(params, frozen))))

    def ended(self, rollout: Rollout) -> Bool[np.ndarray, " B"]:
        """Which answers came to their end before the width did."""
        width = self.settings.prompt_length
        tokens, mask = np.asarray(rollout.tokens)[:, width:], np.asarray(rollout.response_mask)[:, width:]
        return (np.isin(tokens, self.end_ids) & mask).any(axis=1)

    def prepare(self, state: TrainState, index: int, rollout: Rollout, rewards: Float[np.ndarray, " B"]) -> Prepared:
        """Score the rollout under the present policy, compute advantages and deal out the minibatches."""
        layout, update = self.layout, self.settings.update
        shape = (len(rewards) // layout.slots, layout.slots, layout.response_length)

        def rows(array: Any) -> Any:
            return self._place(jnp.asarray(np.asarray(array)[:, layout.prompt_length :].reshape(shape)))

        packed = self._place(pack(rollout.tokens, rollout.token_mask, rollout.group_ids, layout))
        targets = rows(rollout.tokens)
        scores = self.scorer.score(state.params, self.frozen, packed, targets)
        behaviour = rows(rollout.log_prob_behaviour)
        if self.parts.recipe.log_min_p is not None:
            scores = dataclasses.replace(scores, log_prob=_above_clamp(scores.log_prob, behaviour))
        states = finite_states(scores.hidden)
        finite = self._find_finite(rollout, scores, states, rewards)
        advantages = self._finite_advantages(rewards, np.asarray(rollout.group_ids), finite)
        batch = UpdateBatch(
            packed=packed,
            targets=targets,
            response_mask=rows(np.asarray(rollout.response_mask) & finite.rows[:, None]),
            advantages=self._place(jnp.asarray(advantages.reshape(shape[:2]))),
            log_prob_behaviour=behaviour,
            log_prob_old=scores.log_prob,
            hidden_old=scores.hidden,
            trunk=scores.trunk,
        )
        heads = Heads(old=head_copy(self.policy, self.policy.model(state.params, self.frozen)))
        if self.parts.perturbation.weights is not None:
            hidden, head = self.scorer.behaviour(self.parts.perturbation.weights, state.params, self.frozen, packed)
            batch = dataclasses.replace(batch, hidden_behaviour=hidden)
            heads = dataclasses.replace(heads, behaviour=head)
        if self._reference is not None:
            reference = self.scorer.score(self._reference, self.frozen, packed, targets, scores.trunk)
            exact = self.parts.recipe.kl_estimator == "exact"
            hidden_ref = reference.hidden if exact else None
            batch = dataclasses.replace(batch, log_prob_ref=reference.log_prob, hidden_ref=hidden_ref)
            # Never donated, so the reference's own head can be used as it lies.
            model = self.policy.model(self._reference, self.frozen)
            heads = dataclasses.replace(heads, ref=model.head()[0] if exact and self.policy.trains_head else None)
        if states.any() and not states.all():
            batch = self._place(without_broken_rows(batch, states))
        per_prompt = np.abs(advantages).reshape(self.settings.prompts, -1)
        kept = (per_prompt > 0).any(axis=1) | (not update.skip_equal_groups)
        key = jax.random.fold_in(jax.random.fold_in(state.key, ORDER), index)
        rows_per_prompt = self.settings.group_size // layout.slots
        plan = plan_minibatches(key, kept, rows_per_prompt=rows_per_prompt, settings=update)
        entropy = np.asarray(scores.entropy).reshape(-1, layout.response_length)
        return Prepared(batch, heads, plan, kept, entropy, finite)

    def _find_finite(self, rollout: Rollout, scores: Scores, states: np.ndarray, rewards: np.ndarray) -> Finite:
        width = self.layout.prompt_length
        old = np.where(states[:, None, None], np.asarray(scores.log_prob), np.nan)
        old = old.reshape(-1, self.layout.response_length)
        behaviour, mask = (np.asarray(x)[:, width:] for x in (rollout.log_prob_behaviour, rollout.response_mask))
        return find_finite(behaviour, old, mask, rewards)

    def _finite_advantages(self, rewards: np.ndarray, group_ids: np.ndarray, finite: Finite) -> np.ndarray:
        """Advantages among the sound rollouts; 0 for the others, which are compared with nothing."""
        advantages = np.zeros(len(rewards), np.float32)
        sound = finite.rows
        if sound.any():
            advantages[sound] = self._advantages(jnp.asarray(rewards[sound]), jnp.asarray(group_ids[sound]))
        return advantages

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
        """The policy now against the one before the update, on the sampled contexts."""
        return self.scorer.shift(state.params, self.frozen, prepared.batch, prepared.heads)

    def _place(self, tree: Any) -> Any:
        """Spread the rows of a batch over the devices; rows that do not divide evenly stay whole."""
        mesh = self.parts.mesh
        if mesh is None:
            return tree
        parts = mesh.shape["data"] * mesh.shape["fsdp"]

        def place(leaf: Any) -> Any:
            axes = (("data", "fsdp"),) if leaf.shape[0] % parts == 0 else ()
            return jax.device_put(leaf, NamedSharding(mesh, PartitionSpec(*axes)))

        return jax.tree.map(place, tree)
