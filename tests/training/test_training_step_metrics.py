"""The numbers of a step against plain numpy, with directions and signs that a flip would break."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxrl_llm.models import trainable
from jaxrl_llm.models.config import tiny
from jaxrl_llm.models.transformer import Transformer
from jaxrl_llm.rollouts.collect import Experience
from jaxrl_llm.training.text.diagnostics import mismatch_metrics
from jaxrl_llm.training.text.layout import Grid
from jaxrl_llm.training.text.layout import pack
from jaxrl_llm.training.text.policy import split_policy
from jaxrl_llm.training.text.scoring import Scorer
from jaxrl_llm.training.text.scoring import Shift
from jaxrl_llm.training.text.step_metrics import group_metrics
from jaxrl_llm.training.text.step_metrics import sequence_metrics
from jaxrl_llm.training.text.step_metrics import shift_metrics
from jaxrl_llm.training.text.step_metrics import staleness_metrics
from jaxrl_llm.training.text.step_metrics import update_metrics
from jaxrl_llm.training.text.update import Heads
from jaxrl_llm.training.text.update import UpdateBatch
from jaxrl_llm.trajectory import single_step

MASK = np.array([[True, True, False], [True, False, False], [True, True, True]])


def test_mismatch_of_trainer_and_sampler():
    rng = np.random.default_rng(0)
    old, behaviour = rng.uniform(-3, -0.1, (2, 3, 3)).astype(np.float32)
    behaviour[~MASK] = np.nan  # padding must not be looked at
    values = mismatch_metrics(jnp.asarray(old), jnp.asarray(behaviour), jnp.asarray(MASK))
    o, b = old[MASK].astype(np.float64), behaviour[MASK].astype(np.float64)
    ratio = np.exp(o - b)
    rows = [(old[i][MASK[i]].mean(), behaviour[i][MASK[i]].mean()) for i in range(3)]
    training, rollout = np.array(rows, np.float64).T
    sequence = np.array([np.exp((old[i] - behaviour[i])[MASK[i]].sum()) for i in range(3)], np.float64)
    apart = np.abs(np.exp(o) - np.exp(b))
    expected = {
        "rollout_corr/kl": np.mean(b - o),
        "rollout_corr/k3_kl": np.mean(ratio - 1 - np.log(ratio)),
        "rollout_corr/training_ppl": np.mean(np.exp(-training)),
        "rollout_corr/rollout_ppl": np.mean(np.exp(-rollout)),
        "rollout_corr/log_ppl_diff": np.mean(rollout - training),
        "rollout_corr/log_ppl_abs_diff": np.mean(np.abs(rollout - training)),
        "rollout_corr/log_ppl_diff_max": np.max(rollout - training),
        "rollout_corr/log_ppl_diff_min": np.min(rollout - training),
        "rollout_corr/chi2_token": np.mean(ratio**2) - 1,
        "rollout_corr/chi2_seq": np.mean(sequence**2) - 1,
        "rollout_corr/log_ratio_abs_max": np.max(np.abs(o - b)),
        "training/rollout_probs_diff_mean": apart.mean(),
        "training/rollout_probs_diff_max": apart.max(),
        "training/rollout_probs_diff_std": apart.std(),
    }
    assert values.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_allclose(values[name], value, rtol=1e-5, err_msg=name)


def test_shift_is_the_new_policy_against_the_old_one():
    """Directions, checked with whole distributions: kl is KL(old || new) and the ratio is new over old."""
    model = Transformer(tiny(), rngs=nnx.Rngs(0))
    policy, params, frozen = split_policy(model, trainable.full())
    new = jax.tree.map(lambda leaf: leaf + 0.03 * jax.random.normal(jax.random.key(leaf.size), leaf.shape), params)
    tokens = np.random.default_rng(0).integers(0, 64, (4, 5)).astype(np.int32)
    packed = pack(tokens, np.ones_like(tokens, bool), np.arange(4), Grid(2, 1, 3))
    rows = jax.tree.map(jnp.asarray, packed)
    scorer = Scorer(policy, temperature=0.7)
    scores = scorer.score(params, frozen, rows)
    mask, zeros = jnp.ones((4, 1, 3), bool), jnp.zeros((4, 1, 3))
    batch = UpdateBatch(
        rows=rows,
        response_mask=mask,
        group_ids=jnp.arange(4)[:, None],
        step_ids=jnp.zeros((4, 1, 3), jnp.int32),
        rewards=zeros[..., 0],
        advantages=zeros,
        log_prob_behaviour=zeros,
        log_prob_old=scores.log_prob,
        hidden_old=scores.hidden,
        trunk=scores.trunk,
    )
    shift = jax.tree.map(lambda leaf: leaf[:, 0], scorer.shift(new, frozen, batch, Heads(old=model.head()[0])))

    def distribution(params):
        model = policy.model(params, frozen)
        return np.asarray(jax.nn.log_softmax(model.logits(model(jnp.asarray(tokens))[:, 1:-1]) / 0.7), np.float64)

    p, q = distribution(new), distribution(params)
    taken = np.take_along_axis(p - q, tokens[:, 2:, None], axis=-1)[..., 0]
    forward, reverse = np.sum(np.exp(q) * (q - p), -1), np.sum(np.exp(p) * (p - q), -1)
    assert np.max(np.abs(forward - reverse)) > 1e-3 * np.max(forward), "the two directions must differ here"
    np.testing.assert_allclose(shift.log_ratio, taken, atol=2e-5)
    np.testing.assert_allclose(shift.kl, forward, atol=1e-5)
    np.testing.assert_allclose(shift.kl_reverse, reverse, atol=1e-5)
    np.testing.assert_allclose(shift.total_variation, np.abs(np.exp(p) - np.exp(q)).sum(-1) / 2, atol=1e-5)


def test_bounds_and_sampled_error_of_a_shift():
    rng = np.random.default_rng(3)
    log_ratio = (0.1 * rng.normal(size=(3, 3))).astype(np.float32)
    kl, tv = rng.uniform(0, 0.01, (2, 3, 3)).astype(np.float32)
    kl[~MASK] = tv[~MASK] = 9.0
    rewards = np.array([0.0, 2.0, 1.0], np.float32)
    shift = Shift(*map(jnp.asarray, (log_ratio, kl, kl / 2, tv)))
    values = shift_metrics(
        shift, jnp.asarray(MASK), jnp.asarray(rewards), jnp.array([0, 1, 2]), reward_range=(0.0, 2.0)
    )
    ratio = np.where(MASK, np.exp(log_ratio), 1.0).astype(np.float64)
    after = np.array([[np.prod(row[t + 1 :]) for t in range(3)] for row in ratio])
    error = np.mean((rewards - 1) * np.sum((ratio - 1) * (after - 1), axis=1))
    mean_tv = np.where(MASK, tv, 0).mean(axis=0)
    delta, eps = kl[MASK].max(), tv[MASK].max()
    left = np.arange(3)[::-1]
    adaptive = 2 * 2 * np.sum(mean_tv * np.minimum(1, np.minimum(left * eps, np.sqrt(left * delta / 2))))
    expected = {
        "shift/kl_mean": kl[MASK].mean(),
        "shift/kl_max": delta,
        "shift/kl_reverse_mean": kl[MASK].mean() / 2,
        "shift/tv_mean": tv[MASK].mean(),
        "shift/tv_max": eps,
        "shift/sequence_kl": np.where(MASK, kl, 0).sum() / 3,
        "bounds/error": error,
        "bounds/surrogate_gain": np.mean((rewards - 1) * np.sum(ratio - 1, axis=1)),
        "bounds/gain": np.mean((rewards - 1) * (np.prod(ratio, axis=1) - 1)),
        "bounds/sharp/adaptive": adaptive,
        "bounds/printed/adaptive": 2 * adaptive,
        "bounds/sharp/classical": 2 * 3 * 2 * eps**2,
        "shift/sequence_tv_sampled": np.mean(np.abs(np.prod(ratio, axis=1) - 1)) / 2,
    }
    for name, value in expected.items():
        np.testing.assert_allclose(values[name], value, rtol=1e-4, atol=1e-8, err_msg=name)
    gap = values["bounds/gain"] - values["bounds/surrogate_gain"]
    np.testing.assert_allclose(gap, values["bounds/error"], atol=1e-6)
    assert values["bounds/unified_sharp"] == min(value for name, value in values.items() if "bounds/sharp/" in name)
    assert values["bounds/vacuous"] == (values["bounds/unified_sharp"] >= values["bounds/threshold"])
    wide = shift_metrics(
        shift._replace(kl=shift.kl + 5, total_variation=shift.total_variation + 0.9),
        jnp.asarray(MASK),
        jnp.asarray(rewards),
        jnp.array([0, 1, 2]),
        reward_range=(0.0, 2.0),
    )
    assert wide["bounds/vacuous"] == 1


def test_samples_of_another_policy_bound_nothing():
    kl, tv = np.random.default_rng(4).uniform(0, 0.01, (2, 3, 3)).astype(np.float32)
    shift = Shift(*map(jnp.asarray, (kl, kl, kl / 2, tv)))
    arrays = (shift, jnp.asarray(MASK), jnp.ones(3), jnp.arange(3))
    values = shift_metrics(*arrays, reward_range=(0.0, 2.0), sampled_by_mu=False)
    np.testing.assert_allclose(values["shift/kl_max"], kl[MASK].max(), rtol=1e-6)
    assert {name.split("/")[0] for name in values} == {"shift"}
    assert not {"shift/sequence_kl", "shift/sequence_tv_sampled"} & set(values)


def test_optimiser_steps_are_added_before_they_are_divided():
    steps = [
        {"loss": (6.0, 2.0), "rejected_sequences": (1.0, 4.0), "skipped": (0.0, 1.0), "grad_norm": (3.0, 1.0)},
        {"loss": (1.0, 5.0), "rejected_sequences": (0.0, 4.0), "skipped": (0.0, 1.0), "grad_norm": (1.0, 1.0)},
        {"loss": (0.0, 0.0), "rejected_sequences": (0.0, 0.0), "skipped": (1.0, 1.0), "grad_norm": (np.inf, 1.0)},
    ]
    values = update_metrics(steps)
    assert values["actor/loss"] == pytest.approx(1.0)
    assert values["actor/acceptance"] == pytest.approx(7 / 8)
    assert values["actor/skipped"] == 1.0
    assert values["actor/optimizer_steps"] == 3.0
    assert update_metrics([]) == {"actor/optimizer_steps": 0.0, "actor/skipped": 0.0}


def test_rewards_lengths_and_groups():
    outcomes, real = np.array([0.0, 0.75, 1.0]), np.concatenate([np.ones((3, 2), bool), MASK], axis=1)
    chosen = np.concatenate([np.zeros((3, 2), bool), MASK], axis=1)
    trajectories = single_step(
        np.ones((3, 5), np.int32),
        real,
        chosen,
        group_ids=np.arange(3),
        outcomes=outcomes,
        ended=np.array([True, False, True]),
        version=4,
    )
    per_row = {"task/lenient": outcomes > 0.5, "task/strict": outcomes == 1}
    experience = Experience(trajectories, per_row=per_row)
    advantages = np.where(MASK, np.array([[1.0], [-1.0], [0.5]]), 9.0)
    values = sequence_metrics(experience, advantages, MASK, np.ones(3, bool))
    assert values["critic/rewards/mean"] == pytest.approx(1.75 / 3)
    assert values["critic/advantages/mean"] == pytest.approx(0.5 / 3)
    assert staleness_metrics(experience, MASK, 6) == {"rollout/staleness": 2.0, "rollout/staleness_max": 2.0}
    assert (values["task/lenient"], values["task/strict"]) == (pytest.approx(2 / 3), pytest.approx(1 / 3))
    assert (values["response_length/mean"], values["response_length/max"], values["response_length/min"]) == (2, 3, 1)
    assert values["response_length/clip_ratio"] == pytest.approx(1 / 3)
    rewards, kept = np.array([1.0, 1.0, 0.0, 1.0, 0.0, 0.0]), np.array([False, True, False])
    groups = group_metrics(rewards, kept, np.ones(6, bool))
    assert groups == {"groups/equal_rewards": 2.0, "groups/used": 1.0, "groups/total": 3.0}
