"""Training of a pruned policy (dynamic vocabulary pruning): sampler, scorer and update see the same safe sets."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_llm import categorical
from jaxrl_llm.objectives import get_recipe
from jaxrl_llm.objectives.ratios import LOG_RATIO_LIMIT
from jaxrl_llm.rollouts import SamplingSettings
from jaxrl_llm.training import train
from jaxrl_llm.training.text.trainer import Trainer

LOG_MIN_P = -0.3


def pruning(**changes):
    return dataclasses.replace(get_recipe("dvp"), log_min_p=LOG_MIN_P, **changes)


@pytest.fixture(scope="module")
def made(tiny_run):
    return tiny_run.make_trainer(tiny_run.make_parts(pruning()))


@pytest.fixture(scope="module")
def trainer(made) -> Trainer:
    return made[0]


@pytest.fixture(scope="module")
def sampled(made, tiny_run):
    trainer, collector = made
    state = trainer.initial_state()
    rewards = np.linspace(0, 1, 64, dtype=np.float32)
    experience = tiny_run.with_outcomes(tiny_run.collected(trainer, collector, state), rewards)
    return state, experience, rewards


def logits_of(trainer: Trainer, params, rollout):
    """[64, V]: of the one response token of each rollout."""
    model = trainer.policy.model(params, trainer.frozen)
    tokens, mask = jnp.asarray(rollout.tokens), jnp.asarray(rollout.token_mask)
    return model.logits(model(tokens, mask)[:, trainer.shape.prompt_length - 1 : -1])[:, 0]


def pruned_log_probs(logits):
    return categorical.log_probs(categorical.restrict(logits, categorical.safe_set(logits, log_min_p=LOG_MIN_P)))


def taken(log_probs, rollout):
    return jnp.take_along_axis(log_probs, jnp.asarray(rollout.tokens)[:, -1:], axis=-1)[:, 0]


def test_sampler_and_scorer_have_the_same_pruned_policy(trainer, sampled):
    state, experience, _ = sampled
    rollout = experience.trajectories
    logits = logits_of(trainer, state.params, rollout)
    expected = taken(pruned_log_probs(logits), rollout)
    assert np.min(expected - taken(jax.nn.log_softmax(logits), rollout)) > 0.1, "pruning must matter here"
    np.testing.assert_allclose(np.asarray(rollout.log_prob_behaviour)[:, -1], expected, atol=2e-5)
    prepared = trainer.prepare(state, 0, experience)
    np.testing.assert_allclose(prepared.batch.log_prob_old.reshape(-1), expected, atol=2e-5)
    entropy = categorical.entropy(categorical.restrict(logits, categorical.safe_set(logits, log_min_p=LOG_MIN_P)))
    np.testing.assert_allclose(prepared.entropy[:, 0], entropy, atol=2e-5)


def test_the_gradient_is_that_of_the_pruned_policy(trainer, sampled):
    """REINFORCE on the renormalised policy, written out with logits; tokens that the new policy prunes have none."""
    state, experience, rewards = sampled
    rollout = experience.trajectories
    prepared = trainer.prepare(state, 0, experience)
    params = jax.tree.map(
        lambda leaf: leaf + 0.05 * jax.random.normal(jax.random.key(leaf.size), leaf.shape), state.params
    )
    log_prob = taken(pruned_log_probs(logits_of(trainer, params, rollout)), rollout)
    kept = jnp.isfinite(log_prob)
    assert 0 < int(kept.sum()) < len(kept), "some sampled tokens must leave the safe set"
    grouped = rewards.reshape(8, 8)
    advantages = jnp.asarray((grouped - (grouped.sum(1, keepdims=True) - grouped) / 7).reshape(-1))

    def loss(params, *, prune: bool):
        logits = logits_of(trainer, params, rollout)
        log_prob = taken(pruned_log_probs(logits) if prune else jax.nn.log_softmax(logits), rollout)
        return -jnp.sum(jnp.where(kept, advantages * jnp.where(kept, log_prob, 0), 0)) / len(kept)

    expected = jax.grad(loss)(params, prune=True)
    whole = jax.grad(loss)(params, prune=False)
    rows = jnp.arange(prepared.batch.rows.tokens.shape[0])[None]
    got, terms = trainer.update.gradient(params, trainer.frozen, prepared.batch, prepared.heads, rows, 1)
    largest = max(float(jnp.max(jnp.abs(leaf))) for leaf in jax.tree.leaves(expected))

    def apart(one, other):
        return max(float(jnp.max(jnp.abs(a - b))) for a, b in zip(*map(jax.tree.leaves, (one, other)), strict=True))

    assert apart(got, expected) < 2e-5 * largest
    assert apart(expected, whole) > 0.01 * largest, "the gradient of the whole policy must differ"
    weight, count = terms.metrics["weight_zero"]
    assert float(weight / count) == pytest.approx(float(1 - kept.mean()))


def test_a_token_that_the_old_policy_prunes_keeps_its_rollout(trainer, sampled, tiny_run):
    """Sampler and scorer may differ at the edge of the set: the token's weight is 0 to the clamp, nothing breaks."""
    state, experience, rewards = sampled
    rollout = experience.trajectories
    logits = np.asarray(logits_of(trainer, state.params, rollout))
    tokens = np.array(rollout.tokens)
    tokens[3, -1] = np.argmin(logits[3])
    prepared = trainer.prepare(state, 0, tiny_run.with_outcomes(experience, rewards, tokens=tokens))
    assert prepared.finite.dropped == 0
    ratio = np.asarray(prepared.batch.log_prob_old - prepared.batch.log_prob_behaviour).reshape(-1)
    assert ratio[3] == pytest.approx(-LOG_RATIO_LIMIT, abs=1e-4)
    assert np.abs(np.delete(ratio, 3)).max() < 1e-4


def test_a_run_has_no_bounds_of_policies_that_did_not_sample(tiny_run, tmp_path):
    settings = dataclasses.replace(tiny_run.SETTINGS, steps=1, sampling=SamplingSettings(temperature=0.8))
    for recipe, expected in ((pruning(), False), (get_recipe("dapo"), True)):
        folder = tmp_path / recipe.name
        assert train(tiny_run.make_parts(recipe), settings, folder).finished
        metrics = json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])
        assert metrics["shift/kl_mean"] > 0
        assert any(name.startswith("bounds/") for name in metrics) == expected
        assert ("shift/sequence_tv_sampled" in metrics) == expected


def test_samplers_that_do_not_fit_are_refused(tiny_run):
    nucleus = dataclasses.replace(tiny_run.SETTINGS, sampling=SamplingSettings(top_p=0.9))
    with pytest.raises(ValueError, match=r"recipe 'dvp' prunes .* top_p = 0\.9 and min_p = None must be None"):
        tiny_run.make_trainer(tiny_run.make_parts(pruning()), nucleus)
    for parts, settings in (
        (tiny_run.make_parts("trm"), nucleus),
        (tiny_run.make_parts(dataclasses.replace(get_recipe("trm"), log_min_p=-3.0)), tiny_run.SETTINGS),
    ):
        with pytest.raises(ValueError, match=r"masks by the exact KL\(behaviour \|\| current\), .* without truncation"):
            tiny_run.make_trainer(parts, settings)
    whole = dataclasses.replace(tiny_run.SETTINGS, sampling=SamplingSettings(top_p=1.0, min_p=0.0))
    assert tiny_run.make_trainer(tiny_run.make_parts("trm"), whole)[0].law.known
    assert not tiny_run.make_trainer(tiny_run.make_parts("dapo"), nucleus)[0].law.known
    with pytest.raises(ValueError, match=r"log_min_p of recipe 'dvp' is 0\.5; it must be a finite number of at most 0"):
        dataclasses.replace(get_recipe("dvp"), log_min_p=0.5)
