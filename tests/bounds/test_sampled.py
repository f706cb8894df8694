"""Estimates from sampled responses: exact on an enumerated law, clustered standard errors, masks."""

import itertools

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest

from jaxrl_llm.bounds import clustered_mean
from jaxrl_llm.bounds import sampled_gain
from jaxrl_llm.bounds import sampled_sequence_tv
from jaxrl_llm.bounds import sampled_sequence_tv_one_sided
from jaxrl_llm.bounds import sampled_surrogate_error
from jaxrl_llm.bounds import sampled_surrogate_gain
from jaxrl_llm.bounds import sampled_worst_surrogate_error

# The hand fixture: T = 2, V = 2, mu uniform, pi (0.6, 0.4) at the root, (0.7, 0.3) after 0, (0.5, 0.5) after 1; R = 1
# for 00 alone. Every sequence has probability 1/4 under mu, so the four of them are an exact sample.
SEQUENCES = list(itertools.product((0, 1), repeat=2))
PI = {(): (0.6, 0.4), (0,): (0.7, 0.3), (1,): (0.5, 0.5)}
LOG_RATIO = jnp.array([[np.log(PI[s[:t]][s[t]] / 0.5) for t in range(2)] for s in SEQUENCES], jnp.float32)
REWARDS = jnp.array([1.0, 0.0, 0.0, 0.0])
ALL = jnp.ones((4, 2), bool)


def test_hand_fixture():
    np.testing.assert_allclose(sampled_surrogate_error(LOG_RATIO, ALL, REWARDS).value, 0.02, rtol=1e-5)
    np.testing.assert_allclose(sampled_surrogate_gain(LOG_RATIO, ALL, REWARDS).value, 0.15, rtol=1e-5)
    np.testing.assert_allclose(sampled_gain(LOG_RATIO, ALL, REWARDS).value, 0.42 - 0.25, rtol=1e-5)
    np.testing.assert_allclose(sampled_sequence_tv(LOG_RATIO, ALL).value, 0.17, rtol=1e-5)
    np.testing.assert_allclose(sampled_sequence_tv_one_sided(LOG_RATIO, ALL).value, 0.17, rtol=1e-5)
    # X = (rho_1 - 1)(rho_2 - 1) is .08 on 00, -.08 on 01 and 0 elsewhere.
    np.testing.assert_allclose(sampled_worst_surrogate_error(LOG_RATIO, ALL).value, 0.02, rtol=1e-5)
    # Over an exact sample the baseline does not matter.
    for estimator in (sampled_surrogate_error, sampled_surrogate_gain, sampled_gain):
        moved = estimator(LOG_RATIO, ALL, REWARDS, baseline=0.7).value
        np.testing.assert_allclose(moved, estimator(LOG_RATIO, ALL, REWARDS).value, atol=1e-6)


def test_a_baseline_is_subtracted_from_every_reward():
    rows = jnp.array([0, 2, 3])  # not an exact sample: the baseline moves the estimate
    few, rewards = (LOG_RATIO[rows], ALL[rows]), REWARDS[rows]
    for estimator in (sampled_surrogate_error, sampled_surrogate_gain, sampled_gain):
        value = float(estimator(*few, rewards, baseline=0.7).value)
        np.testing.assert_allclose(value, estimator(*few, rewards - 0.7).value, rtol=1e-5)
        assert abs(value - float(estimator(*few, rewards).value)) > 1e-3


def test_gain_is_surrogate_plus_error_sample_by_sample(key):
    log_ratio = 0.2 * jax.random.normal(key, (9, 12))
    mask = jax.random.bernoulli(key, 0.7, (9, 12))
    rewards = jax.random.uniform(key, (9,))
    for row in range(9):
        one = (log_ratio[row : row + 1], mask[row : row + 1], rewards[row : row + 1])
        total = sampled_surrogate_gain(*one).value + sampled_surrogate_error(*one).value
        np.testing.assert_allclose(sampled_gain(*one).value, total, rtol=1e-4, atol=1e-6)
    # The published ratio form, term by term; with the suffix product of the wrong side it must differ.
    ratio = np.exp(np.where(mask, log_ratio, 0.0).astype(np.float64))
    after = np.array([[row[t + 1 :].prod() for t in range(12)] for row in ratio])
    before = np.array([[row[:t].prod() for t in range(12)] for row in ratio])
    expected = -np.mean(np.asarray(rewards) * ((ratio - 1) * (1 - after)).sum(1))
    wrong = -np.mean(np.asarray(rewards) * ((ratio - 1) * (before - 1)).sum(1))
    value = float(sampled_surrogate_error(log_ratio, mask, rewards).value)
    np.testing.assert_allclose(value, expected, rtol=1e-4)
    assert abs(value + expected) > 0.1 * abs(expected)
    assert abs(value - wrong) > 0.1 * abs(expected)


def test_small_ratios_do_not_cancel():
    # Error is of second order: 1e-4 per token gives about 1e-8 per pair of tokens, lost if sums of ratios were
    # subtracted.
    log_ratio = jnp.full((2, 3), 1e-4)
    value = sampled_surrogate_error(log_ratio, jnp.ones((2, 3), bool), jnp.ones(2)).value
    one = np.expm1(1e-4)
    np.testing.assert_allclose(value, one * (np.expm1(2e-4) + np.expm1(1e-4)), rtol=1e-5)


def test_masked_tokens_and_padding_rows_do_not_count(key):
    log_ratio = 0.3 * jax.random.normal(key, (4, 6))
    mask = jnp.array([[1, 1, 0, 1, 0, 0], [0, 1, 1, 1, 1, 0], [1, 0, 0, 0, 0, 0], [0, 0, 0, 0, 0, 0]], bool)
    rewards = jnp.array([1.0, 0.5, 0.2, 9.0])
    dirty = jnp.where(mask, log_ratio, jnp.nan)
    for estimator in (sampled_surrogate_error, sampled_surrogate_gain, sampled_gain):
        full = estimator(dirty, mask, rewards)
        packed = jnp.array(
            [[*np.asarray(log_ratio[i])[np.asarray(mask[i])], *np.zeros(6 - int(mask[i].sum()))] for i in range(3)]
        )
        short = jnp.arange(6)[None, :] < mask[:3].sum(1)[:, None]
        alone = estimator(packed, short, rewards[:3])
        np.testing.assert_allclose(full.value, alone.value, rtol=1e-5)
        np.testing.assert_allclose(full.standard_error, alone.standard_error, rtol=1e-5)


def test_standard_error_is_that_of_group_means_for_equal_groups(key):
    values = jax.random.normal(key, (12,))
    groups = jnp.array([7, 7, 7, 3, 3, 3, 9, 9, 9, 1, 1, 1])
    estimate = clustered_mean(values, jnp.ones(12, bool), groups)
    means = np.asarray(values).reshape(4, 3).mean(1)
    np.testing.assert_allclose(estimate.standard_error, means.std(ddof=1) / 2, rtol=1e-5)
    alone = clustered_mean(values, jnp.ones(12, bool))
    np.testing.assert_allclose(alone.standard_error, np.asarray(values).std(ddof=1) / np.sqrt(12), rtol=1e-5)


def test_standard_error_covers_at_its_nominal_rate():
    # 400 experiments of 24 groups of 4 that share a group effect: +-2 standard errors should hold the mean in about 95
    # %.
    def experiment(key):
        group, own = jax.random.split(key)
        values = jnp.repeat(jax.random.normal(group, (24,)), 4) + jax.random.normal(own, (96,))
        honest = clustered_mean(values, jnp.ones(96, bool), jnp.repeat(jnp.arange(24), 4))
        naive = clustered_mean(values, jnp.ones(96, bool))
        return jnp.abs(honest.value) < 2 * honest.standard_error, jnp.abs(naive.value) < 2 * naive.standard_error

    honest, naive = jax.jit(jax.vmap(experiment))(jax.random.split(jax.random.key(5), 400))
    assert 0.91 < np.mean(honest) < 0.98
    assert np.mean(naive) < 0.88  # ignoring the groups is too sure of itself


def test_one_group_knows_no_standard_error():
    estimate = sampled_gain(LOG_RATIO, ALL, REWARDS, group_ids=jnp.zeros(4, int))
    assert np.isinf(estimate.standard_error)


def test_broken_tokens_stay_finite():
    log_ratio = jnp.array([[300.0, -400.0, 200.0]])
    for estimator in (sampled_surrogate_error, sampled_surrogate_gain, sampled_gain):
        assert np.isfinite(estimator(log_ratio, jnp.ones((1, 3), bool), jnp.ones(1)).value)


@pytest.fixture
def without_type_hook():
    """Users run without the run-time type checks of the tests; what they see then is ours."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


def test_bad_input_is_a_sentence(without_type_hook):
    with pytest.raises(ValueError, match=r"rewards is .* and log_ratio_t is .* their axes B must be equal"):
        sampled_gain(LOG_RATIO, ALL, jnp.ones(3))
    with pytest.raises(ValueError, match=r"log_ratio_t is float32\[2\]; it must have 2 axes \[B T\]"):
        sampled_gain(LOG_RATIO[0], ALL, REWARDS)
    with pytest.raises(TypeError, match=r"rewards is int32\[4\]; its dtype must be floating"):
        sampled_gain(LOG_RATIO, ALL, REWARDS.astype(int))
