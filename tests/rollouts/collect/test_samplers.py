"""Who samples: the built-in sampler, and engines that get the weights when they are newer."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxrl_llm.rollouts import SamplingSettings
from jaxrl_llm.rollouts.collect import EngineSampler
from jaxrl_llm.rollouts.collect import Law
from jaxrl_llm.rollouts.collect import PolicySampler
from jaxrl_llm.rollouts.collect import PolicySnapshot
from jaxrl_llm.rollouts.collect.samplers import pruned_with_policy
from jaxrl_llm.rollouts.engines import EngineSettings
from jaxrl_llm.rollouts.engines import JaxEngine
from jaxrl_llm.rollouts.engines import LlamaCppEngine
from jaxrl_llm.rollouts.perturb import perturbation

KEY = jax.random.key(3)
FIELDS = ("tokens", "token_mask", "response_mask", "log_prob_behaviour", "group_ids")


@pytest.fixture(scope="module")
def parts(tiny_run):
    return tiny_run.make_parts()


@pytest.fixture(scope="module")
def prompts(parts):
    return parts.tokenizer.encode_batch(["1>", "2>"], length=3)


@pytest.fixture(scope="module")
def built_in(parts) -> PolicySampler:
    return PolicySampler(parts.model, SamplingSettings(), response_length=3, group_size=2, end_ids=(258,), pad_id=256)


def snapshot(parts, version: int, *, scale: float = 1.0) -> PolicySnapshot:
    graphdef, state = nnx.split(parts.model)
    return PolicySnapshot(graphdef, jax.tree.map(lambda leaf: leaf * jnp.asarray(scale, leaf.dtype), state), version)


def engine_settings() -> EngineSettings:
    return EngineSettings(max_new_tokens=3, group_size=2, eos_ids=(258,), pad_id=256)


def same(one, other) -> None:
    for name in FIELDS:
        np.testing.assert_array_equal(getattr(one, name), getattr(other, name), err_msg=name)


def test_the_built_in_sampler_repeats_itself_and_follows_the_weights(parts, prompts, built_in) -> None:
    assert built_in.repeatable
    assert not built_in.own_device
    first = built_in.sample(snapshot(parts, 0), *prompts, KEY, 5)
    same(first, built_in.sample(snapshot(parts, 3), *prompts, KEY, 5))
    other = built_in.sample(snapshot(parts, 0), *prompts, KEY, 6)
    changed = built_in.sample(snapshot(parts, 0, scale=3.0), *prompts, KEY, 5)
    assert (first.tokens != other.tokens).any()
    assert (first.log_prob_behaviour != changed.log_prob_behaviour).any()


def test_an_engine_samples_what_the_built_in_sampler_does(parts, prompts, built_in) -> None:
    sampler = EngineSampler(JaxEngine(parts.model, engine_settings()), Law(known=True))
    assert sampler.own_device
    for version, scale in ((0, 1.0), (1, 2.0)):
        policy = snapshot(parts, version, scale=scale)
        same(sampler.sample(policy, *prompts, KEY, version), built_in.sample(policy, *prompts, KEY, version))


def test_weights_are_pushed_when_they_are_newer_only(parts, prompts) -> None:
    pushed = []

    class Counted(JaxEngine):
        def push_weights(self, model) -> None:
            pushed.append(model)
            super().push_weights(model)

    sampler = EngineSampler(Counted(parts.model, engine_settings()), Law(known=True))
    for version in (0, 0, 1, 1, 2):
        sampler.sample(snapshot(parts, version), *prompts, KEY, 0)
    assert len(pushed) == 3


def test_an_engine_keeps_its_weights_when_training_takes_the_buffers_over(parts, prompts) -> None:
    """An update that is skipped donates the old buffers, and makes no newer version that would be pushed."""
    sampler = EngineSampler(JaxEngine(parts.model, engine_settings()), Law(known=True))
    policy = snapshot(parts, 0)
    before = sampler.sample(policy, *prompts, KEY, 0)
    for leaf in jax.tree.leaves(policy.state):
        leaf.delete()
    same(sampler.sample(snapshot(parts, 0), *prompts, KEY, 0), before)


def test_llama_cpp_behind_it_samples_with_the_pushed_weights(parts, prompts, built_in) -> None:
    with LlamaCppEngine(parts.model, engine_settings(), cache_dtype="F32", slots=1, context=16) as engine:
        sampler = EngineSampler(engine, Law(known=True))
        found = [sampler.sample(snapshot(parts, version, scale=1.0 + version), *prompts, KEY, 0) for version in (0, 1)]
        for version, rollout in enumerate(found):
            engine_like = JaxEngine(parts.model, engine_settings())
            engine_like.push_weights(snapshot(parts, 0, scale=1.0 + version).model())
            scores = engine_like.score(rollout.tokens, rollout.token_mask, response_width=3)
            mask = np.asarray(rollout.response_mask)[:, -3:]
            np.testing.assert_allclose(scores[mask], rollout.log_prob_behaviour[:, -3:][mask], atol=1e-3)
            np.testing.assert_array_equal(rollout.group_ids, [0, 0, 1, 1])


@pytest.mark.parametrize(
    ("name", "sampling", "known", "weights"),
    [
        ("none", SamplingSettings(), True, False),
        ("none", SamplingSettings(temperature=0.7), True, False),
        ("none", SamplingSettings(top_p=0.9), False, False),
        ("int8_weights", SamplingSettings(), True, True),
        ("fp8_cache", SamplingSettings(), False, False),
        ("gaussian_noise", SamplingSettings(), False, False),
    ],
)
def test_what_is_known_of_the_law(name, sampling, known, weights, parts) -> None:
    options = {"response_length": 1, "group_size": 1, "end_ids": (258,), "pad_id": 256}
    law = PolicySampler(parts.model, sampling, perturbation=perturbation(name), **options).law
    assert (law.known, law.weights is not None) == (known, weights)


def test_a_pruned_policy_has_its_sampler_prune_too() -> None:
    pruned = pruned_with_policy(SamplingSettings(), -2.0, "dvp")
    assert pruned.min_p == pytest.approx(np.exp(-2.0))
    assert pruned_with_policy(SamplingSettings(top_k=3), None, "grpo") == SamplingSettings(top_k=3)
    with pytest.raises(ValueError, match=r"recipe 'dvp' prunes to the safe set .* must be None"):
        pruned_with_policy(SamplingSettings(top_k=3), -2.0, "dvp")
