"""Logit noise in float64: the exact range, where the first-order law fails and by how much, and the bias of sampled
tokens.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_llm.bounds import mismatch

V, CASES = 6, 20_000
NOISES = [0.01, 0.1, 0.5, 1.0, 2.0]


def log_softmax(z):
    z = z - z.max(-1, keepdims=True)
    return z - np.log(np.exp(z).sum(-1, keepdims=True))


def cases(noise, seed=0):
    rng = np.random.default_rng(seed)
    z = rng.normal(size=(CASES, V)) * np.array([0.3, 1.0, 3.0, 8.0])[np.arange(CASES) % 4, None]
    # Uniform noise, and the signs that are the worst for token 0.
    e = noise * rng.uniform(-1, 1, (CASES, V))
    worst = np.where(np.arange(V) == 0, -1.0, 1.0) * noise * rng.choice([-1, 1], (CASES, 1))
    e = np.where(np.arange(CASES)[:, None] % 2 == 0, e, worst)
    before, after = log_softmax(z), log_softmax(z + e)
    return jnp.asarray(before), jnp.asarray(after), jnp.asarray((after - before)[:, 0])


@pytest.mark.parametrize("noise", NOISES)
def test_the_exact_range_holds_and_both_ends_are_attained(noise):
    before, _, change = cases(noise)
    low, high = mismatch.log_prob_change_range(jnp.exp(before[:, 0]), max_noise=noise)
    assert bool(jnp.all((low - 1e-12 <= change) & (change <= high + 1e-12)))
    assert float(jnp.min(change - low)) < 1e-12
    assert float(jnp.min(high - change)) < 1e-12
    # With the exponents' signs exchanged the range would be empty.
    assert bool(jnp.all(low < high))


@pytest.mark.parametrize("noise", NOISES)
def test_the_printed_law_is_broken_downwards_only_and_by_the_stated_factor(noise):
    before, _, change = cases(noise)
    resolved = before[:, 0] < -1e-7  # nearer to 1 the printed bound is a difference of rounding errors
    before, change = before[resolved], change[resolved]
    printed = mismatch.first_order_log_prob_change(jnp.exp(before[:, 0]), max_noise=noise)
    assert bool(jnp.all(change <= printed + 1e-12))
    ratio = -change / printed
    worst = float(mismatch.first_order_violation(jnp.asarray(noise)))
    assert 1.0 < float(jnp.max(ratio)) <= worst * (1 + 1e-8)
    np.testing.assert_allclose(float(jnp.max(ratio)), worst, rtol=2e-3)


def test_figures_of_the_violation():
    expected = {0.01: 1.010, 0.1: 1.107, 0.5: 1.718, 1.0: 3.195, 2.0: 13.40}
    for noise, value in expected.items():
        np.testing.assert_allclose(mismatch.first_order_violation(jnp.asarray(noise)), value, atol=5e-3)
    # Fixture: p = 0.9, e = (-0.5, +0.5).
    change = np.log(0.9 * np.exp(-0.5) / (0.9 * np.exp(-0.5) + 0.1 * np.exp(0.5))) - np.log(0.9)
    np.testing.assert_allclose(change, -0.158565, atol=1e-6)
    np.testing.assert_allclose(mismatch.first_order_log_prob_change(jnp.asarray(0.9), max_noise=0.5), 0.1, rtol=1e-12)


@pytest.mark.parametrize("noise", NOISES)
def test_the_corrected_forms_hold(noise):
    before, after, change = cases(noise)
    p, q = jnp.exp(before[:, 0]), jnp.exp(after[:, 0])
    two_sided = mismatch.two_sided_log_prob_change(p, q, max_noise=noise)
    uniform = mismatch.uniform_log_prob_change(p, max_noise=noise)
    assert bool(jnp.all(jnp.abs(change) <= two_sided + 1e-12))
    assert bool(jnp.all(jnp.abs(change) <= uniform + 1e-12))
    assert float(jnp.max(jnp.abs(change) / uniform)) > 0.999
    if noise == 0.01:  # an equality to first order
        assert float(jnp.max(jnp.abs(change) / two_sided)) > 0.99
    # The maximum of the two probabilities in place of the minimum is the wrong theorem.
    wrong = 2 * noise * (1 - jnp.maximum(p, q))
    assert bool(jnp.any(jnp.abs(change) > wrong + 1e-9))


@pytest.mark.parametrize("noise", NOISES)
def test_divergences_of_a_context(noise):
    before, after, _ = cases(noise)
    kl = jnp.sum(jnp.exp(before) * (before - after), axis=1)
    back = jnp.sum(jnp.exp(after) * (after - before), axis=1)
    tv = jnp.sum(jnp.abs(jnp.exp(before) - jnp.exp(after)), axis=1) / 2
    assert bool(jnp.all(jnp.maximum(kl, back) <= mismatch.kl_from_noise(jnp.asarray(noise)) + 1e-12))
    assert bool(jnp.all(tv <= mismatch.tv_from_noise(jnp.asarray(noise)) + 1e-12))
    # TV is attained by p = sigmoid(-e) moved up; KL comes within a factor for small noise at p = 1/2.
    p = 1 / (1 + np.exp(noise))
    q = p * np.exp(noise) / (p * np.exp(noise) + (1 - p) * np.exp(-noise))
    np.testing.assert_allclose(q - p, mismatch.tv_from_noise(jnp.asarray(noise)), rtol=1e-12)
    half = np.log(np.cosh(noise))  # KL((1/2, 1/2) || softmax(+-e))
    assert 0.25 * noise**2 / 2 < half <= noise**2 / 2


def test_sequences_add_up():
    before, after, change = cases(0.3)
    p, q, d = (x[:, 0].reshape(-1, 8) if x.ndim == 2 else x.reshape(-1, 8) for x in (before, after, change))
    mask = jnp.asarray(np.random.default_rng(1).random(p.shape) < 0.7)
    bound = mismatch.sequence_log_prob_change(jnp.exp(p), jnp.exp(q), mask, max_noise=0.3)
    total = jnp.abs(jnp.sum(jnp.where(mask, d, 0.0), axis=1))
    assert bool(jnp.all(total <= bound + 1e-12))


def test_bias_and_variance_under_gaussian_noise():
    p = np.array([0.657, 0.242, 0.089, 0.0114, 0.0006])
    collision, s = (p**2).sum(), 0.2
    rng = np.random.default_rng(7)
    noise = rng.normal(size=(400_000, 5)) * s
    noise = np.concatenate([noise, -noise])  # antithetic: first order cancels
    after = log_softmax(np.log(p) + noise)
    change, weight = after - np.log(p), np.exp(after)
    measured = (weight * change).sum(0) / weight.sum(0)
    bias = mismatch.gaussian_sampled_bias(jnp.asarray(p), jnp.asarray(np.full(5, collision)), scale=s)
    np.testing.assert_allclose(bias, [-0.0027, 0.0305, 0.0428, 0.0489, 0.0498], atol=1e-4)
    np.testing.assert_allclose(measured, bias, atol=1.2e-3)
    variance = mismatch.gaussian_log_prob_variance(jnp.asarray(p), jnp.asarray(np.full(5, collision)), scale=s)
    np.testing.assert_allclose(change.var(0), variance, rtol=0.05)
    kl = (weight * change).sum(1).mean()
    expected = mismatch.gaussian_expected_kl(jnp.asarray(collision), scale=s)
    np.testing.assert_allclose(kl, expected, rtol=0.05)
    np.testing.assert_allclose((p * np.asarray(bias)).sum(), expected, rtol=1e-9)
    # Flat below one per cent: the extreme tail is not singled out (errata F3.2).
    tail = mismatch.gaussian_sampled_bias(jnp.asarray([1e-2, 1e-6]), jnp.asarray([collision, collision]), scale=s)
    assert abs(float(tail[0] / tail[1]) - 1) < 0.02


def test_the_factor_of_the_violation_starts_at_one():
    e = jnp.array([0.0, 1e-300, 1e-9, 1e-3, 0.5])
    value, slope = jax.vmap(jax.value_and_grad(mismatch.first_order_violation))(e)
    np.testing.assert_allclose(value[:3], 1 + e[:3], rtol=1e-14)
    np.testing.assert_allclose(value[3:], np.expm1(2 * e[3:]) / (2 * e[3:]), rtol=1e-14)
    assert slope[0] == 1
    assert np.isfinite(slope).all()


@pytest.mark.parametrize("p", [0.0, 1e-9, 0.3, 1 - 1e-12, 1.0])
def test_noise_whose_exponential_overflows_has_the_bound_of_its_limit(p):
    for e in (0.2, 0.49999, 0.5, 0.50001, 3.0, 500.0, 1e5):
        low, high = mismatch.log_prob_change_range(jnp.array(p), max_noise=e)
        exact = np.logaddexp(np.log(p) if p else -np.inf, (np.log1p(-p) if p < 1 else -np.inf) + 2 * e)
        np.testing.assert_allclose(-low, exact, rtol=1e-12, atol=1e-15)
        np.testing.assert_array_equal(mismatch.uniform_log_prob_change(jnp.array(p), max_noise=e), -low)
        exact = np.logaddexp(np.log(p) if p else -np.inf, (np.log1p(-p) if p < 1 else -np.inf) - 2 * e)
        np.testing.assert_allclose(high, -exact, rtol=1e-12, atol=1e-15)
        assert 0 <= high <= 2 * e * (1 + 1e-15)
        assert -low <= 2 * e * (1 + 1e-15)
