"""Who samples for a collector: the compiled sampler with the policy's own weights, or another engine that gets them."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from dataclasses import replace
from typing import Any
from typing import Protocol

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec

from jaxrl_llm.models.lora import merge_lora
from jaxrl_llm.models.transformer import Transformer
from jaxrl_llm.rollouts.collect.protocol import PolicySnapshot
from jaxrl_llm.rollouts.engines import Engine
from jaxrl_llm.rollouts.generate import make_generate
from jaxrl_llm.rollouts.perturb import Perturbation
from jaxrl_llm.rollouts.perturb import WeightPerturbation
from jaxrl_llm.rollouts.perturb import with_router_rounding
from jaxrl_llm.rollouts.responses import Rollout
from jaxrl_llm.rollouts.sampling import SamplingSettings
from jaxrl_llm.typing import Array
from jaxrl_llm.typing import Bool
from jaxrl_llm.typing import Int
from jaxrl_llm.typing import PRNGKey

SAMPLING, NOISE = 0, 2
"""What the run's key is folded with for answers, and for the noise of a perturbed sampler."""


@dataclass(frozen=True)
class Law:
    """What the trainer can compute of the distribution that sampled.

    Attributes:
        known: whether it is the whole softmax of weights that the trainer has. A truncated or pruned vocabulary, a
            perturbed cache and perturbed logits or routers are not.
        weights: what the sampler does to the policy's weights; None where it has them as they are.
    """

    known: bool
    weights: WeightPerturbation | None = None


NOBODYS_LAW = Law(known=False)
"""Of experience that no policy of this run sampled as a whole: demonstrations, pairs, batches of several policies."""


class Sampler(Protocol):
    """Samples groups of answers to prompts."""

    law: Law
    repeatable: bool
    """Whether the same weights, prompts, key and step give the same answers, bit for bit."""
    own_device: bool
    """Whether it can sample while the trainer computes."""

    def sample(
        self,
        policy: PolicySnapshot,
        prompt_tokens: Int[np.ndarray, "N P"],
        prompt_mask: Bool[np.ndarray, "N P"],
        key: PRNGKey,
        step: int,
    ) -> Rollout:
        """Answers of this policy, row = prompt * G + sample; arrays on the host."""
        ...


def pruned_with_policy(sampling: SamplingSettings, log_min_p: float | None, name: str) -> SamplingSettings:
    """How answers are sampled: an objective that prunes the policy has its sampler prune too, each on the safe set of
    its own logits.

    Raises:
        ValueError: the sampler is to be truncated in another way.
    """
    if log_min_p is None:
        return sampling
    if sampling.truncated:
        raise ValueError(
            f"recipe {name!r} prunes to the safe set at log_min_p = {log_min_p}, and its sampler with "
            f"it; top_k = {sampling.top_k}, top_p = {sampling.top_p} and min_p = {sampling.min_p} must be None."
        )
    return replace(sampling, min_p=math.exp(log_min_p))


class PolicySampler:
    """The compiled sampler, with the policy's weights or perturbed ones, on the policy's own devices."""

    repeatable, own_device = True, False

    def __init__(
        self,
        model: Transformer,
        sampling: SamplingSettings,
        *,
        response_length: int,
        group_size: int,
        end_ids: Sequence[int],
        pad_id: int,
        decode_dtype: Any = None,
        perturbation: Perturbation | None = None,
        mesh: Mesh | None = None,
        record_selections: bool = False,
    ) -> None:
        """Nothing is compiled before the first batch.

        Args:
            model: for its structure; the weights come with each policy.
            sampling: temperature and truncation.
            response_length: most tokens of an answer.
            group_size: answers per prompt.
            end_ids: tokens that end an answer.
            pad_id: written after the end.
            decode_dtype: see `make_generate`.
            perturbation: what the sampler does differently from the model.
            mesh: devices that the prompts are spread over.
            record_selections: see `make_generate`.
        """
        perturbation = Perturbation() if perturbation is None else perturbation
        self.law = Law(
            known=perturbation == Perturbation(weights=perturbation.weights) and not sampling.truncated,
            weights=perturbation.weights,
        )
        self._mesh = mesh
        graphdef = nnx.graphdef(model)
        engine = model if perturbation.weights is None else merge_lora(model)
        if perturbation.router is not None:
            engine = with_router_rounding(engine, perturbation.router)
        self._generate = make_generate(
            nnx.graphdef(engine),
            max_new_tokens=response_length,
            group_size=group_size,
            sampling=sampling,
            eos_id=tuple(end_ids),
            pad_id=pad_id,
            decode_dtype=decode_dtype,
            perturb_logits=perturbation.logits,
            cache_rounding=perturbation.cache,
            record_selections=record_selections,
        )

        def perturbed(state: nnx.State) -> nnx.State:
            assert perturbation.weights is not None
            return perturbation.weights(nnx.state(merge_lora(nnx.merge(graphdef, state))))

        self._perturb = None if perturbation.weights is None else jax.jit(perturbed)

    def sample(
        self,
        policy: PolicySnapshot,
        prompt_tokens: Int[np.ndarray, "N P"],
        prompt_mask: Bool[np.ndarray, "N P"],
        key: PRNGKey,
        step: int,
    ) -> Rollout:
        """See `Sampler.sample`."""
        tokens, mask = (spread(jnp.asarray(array), self._mesh) for array in (prompt_tokens, prompt_mask))
        weights = policy.state if self._perturb is None else self._perturb(policy.state)
        # Noise of its own for every step: the weights that a real engine rounds are others after each update.
        noise_key = jax.random.fold_in(jax.random.fold_in(key, NOISE), step)
        order = jnp.arange(len(prompt_tokens))
        rollout = self._generate(
            weights, tokens, mask, jax.random.fold_in(key, SAMPLING), step, order, noise_key=noise_key
        )
        return jax.device_get(rollout)


class EngineSampler:
    """Another engine samples; it gets the weights whenever they are newer than those it has."""

    own_device = True

    def __init__(self, engine: Engine, law: Law, *, repeatable: bool = False) -> None:
        """Take the engine over; whoever made it stops it.

        Args:
            engine: samples as its own settings say.
            law: what the trainer can compute of its distribution.
            repeatable: whether it gives the same answers for the same request, bit for bit.
        """
        self._engine, self.law, self.repeatable = engine, law, repeatable
        self._version: int | None = None

    def sample(
        self,
        policy: PolicySnapshot,
        prompt_tokens: Int[np.ndarray, "N P"],
        prompt_mask: Bool[np.ndarray, "N P"],
        key: PRNGKey,
        step: int,
    ) -> Rollout:
        """See `Sampler.sample`.

        Raises:
            EngineError: the engine failed; what it finished is kept and a second call asks for the rest only.
        """
        if self._version != policy.version:
            self._engine.push_weights(policy.model())
            self._version = policy.version
        key = jax.random.fold_in(key, SAMPLING)
        return jax.device_get(self._engine.generate(prompt_tokens, prompt_mask, key, step))


def spread(array: Array, mesh: Mesh | None) -> Array:
    """The rows of an array over the devices; rows that do not divide evenly stay whole."""
    if mesh is None:
        return array
    parts = mesh.shape["data"] * mesh.shape["fsdp"]
    axes = (("data", "fsdp"),) if array.shape[0] % parts == 0 else ()
    return jax.device_put(array, NamedSharding(mesh, PartitionSpec(*axes)))
