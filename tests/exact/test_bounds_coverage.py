"""What holds, and what is missing, where the policy can draw tokens that its sampler cannot (errata F2.18, F2.20)."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_llm import bounds
from jaxrl_llm.bounds import sampled
from jaxrl_llm.bounds.surrogate_error import SHARP
from jaxrl_llm.bounds.surrogate_error import WITHOUT_COVERAGE
from jaxrl_llm.objectives import divergences
from jaxrl_llm.objectives import masks
from jaxrl_llm.objectives import pruning
from theory_checks import token_trees as trees

MISSING = 0.02
RANGES = ((0.0, 1.0), (-1.0, 0.0), (-1.0, 2.0), (-3.0, -2.0), (1.0, 3.0), (-0.5, 0.0))


def log(*rows):
    return jnp.log(jnp.array(rows))


@functools.cache
def worlds(number=10, vocabulary=3, horizon=3):
    """Policies where mu lacks a token in about half of its contexts; rewards in [0, 1]."""
    rng, made = np.random.default_rng(11), []
    for _ in range(number):
        sizes = [vocabulary**t for t in range(horizon)]
        mu = [jnp.asarray(rng.normal(size=(n, vocabulary))) for n in sizes]
        pi = [z + rng.choice([0.03, 0.3, 2.0]) * jnp.asarray(rng.normal(size=z.shape)) for z in mu]
        lost = [
            (rng.uniform(size=len(z)) < 0.5)[:, None] & (np.arange(vocabulary) == rng.integers(vocabulary)) for z in mu
        ]
        mu = [jnp.where(x, -jnp.inf, z) for x, z in zip(lost, mu, strict=True)]
        made.append((pi, mu, jnp.asarray(rng.uniform(size=vocabulary**horizon) ** rng.choice([0.1, 1.0, 10.0]))))
    return made


@functools.cache
def measured():
    return [measure(pi, mu) for pi, mu, _ in worlds()]


def measure(pi, mu):
    """Laws, S = sum_t (rho_t - 1) on mu's responses, and the inputs of the bounds, all by enumeration."""
    reached = jnp.exp(trees.sequence_log_probs(mu))
    ratios = jnp.where(reached[:, None] > 0, jnp.exp(trees.token_log_ratios(pi, mu)), 1.0)
    law_pi = jnp.exp(trees.sequence_log_probs(pi))
    _, kl, tv = trees.divergences(pi, mu)
    at = [jnp.exp(x) for x in trees.prefix_log_probs(mu)[:-1]]
    mean_kl = sum(jnp.sum(jnp.where(p > 0, p * jnp.where(p > 0, k, 0), 0)) for p, k in zip(at, kl, strict=True))
    inputs = bounds.BoundInputs(
        max_kl=jnp.max(jnp.concatenate(kl)),
        max_tv=jnp.max(jnp.concatenate(tv)),
        sequence_kl=mean_kl,
        sequence_tv=jnp.sum(jnp.abs(law_pi - reached)) / 2,
        mean_tv_t=jnp.stack([jnp.sum(p * x) for p, x in zip(at, tv, strict=True)]),
    )
    return reached, law_pi, ratios, inputs


@pytest.mark.parametrize("reward_range", RANGES)
def test_what_holds_for_rewards_that_start_anywhere(reward_range):
    low, high = reward_range
    tight = 0.0
    for (_, _, unit), (law_mu, law_pi, ratios, inputs) in zip(worlds(), measured(), strict=True):
        found = bounds.surrogate_error_bounds(inputs, reward_range=reward_range, mu_covers_pi=False)
        for rewards in (low + (high - low) * unit, jnp.full_like(unit, low), jnp.full_like(unit, high)):
            surrogate = jnp.sum(law_mu * rewards * jnp.sum(ratios - 1, axis=1))
            error = abs(float(jnp.sum((law_pi - law_mu) * rewards) - surrogate))
            for name in WITHOUT_COVERAGE:
                assert error <= found.sharp[name] + 1e-12, name
            tight = max(tight, error / float(found.sharp["linear"]))
        assert np.isfinite(found.unified_sharp)
        assert all(np.isinf(found.sharp[name]) for name in SHARP if name not in WITHOUT_COVERAGE)
        if low <= 0 <= high:
            np.testing.assert_allclose(found.sharp["linear"], (high - low) * jnp.sum(inputs.mean_tv_t))
    assert tight > 0.3, tight


def test_the_mixed_kl_bound_is_above_the_smaller_of_two_and_not_above_both():
    found = []
    for pi, mu in (([0.999, 0.001], [0.5, 0.5]), ([0.51, 0.49], [0.5, 0.5])):
        inputs = trees.bound_inputs([log(pi)], [log(mu)])
        mixed, linear, kl = (float(SHARP[name](inputs)) for name in ("mixed_kl", "linear", "sequence_kl"))
        assert mixed >= min(linear, kl) - 1e-12
        found.append(mixed < max(linear, kl))
    assert found == [True, True]


def one_token():
    """mu = (1, 0), pi = (0.98, 0.02), one token, one response of mu."""
    return jnp.log(jnp.array([[1 - MISSING]])), jnp.ones((1, 1), bool)


def test_a_gain_that_is_not_there_is_not_certified():
    log_ratio, mask = one_token()
    gain = sampled.sampled_surrogate_gain(log_ratio, mask, jnp.array([-3.0])).value
    np.testing.assert_allclose(gain, 0.06)  # and J(pi) - J(mu) is 0: every reward is -3
    given = {"context_masked_gain": gain, "error_bound": MISSING, "hit_probability": 0.0, "sequence_tv": MISSING}
    covered = bounds.masked_gain_lower_bound(**given, reward_range=(-3.0, -2.0))
    np.testing.assert_allclose(covered, 0.02, atol=1e-12)  # what coverage would prove
    wide = bounds.masked_gain_lower_bound(**given, reward_range=(-3.0, -2.0), mu_covers_pi=False)
    np.testing.assert_allclose(wide, -MISSING, atol=1e-12)
    # Rewards that start at 0 lose nothing by it.
    for covers in (True, False):
        value = bounds.masked_gain_lower_bound(**given, reward_range=(0.0, 1.0), mu_covers_pi=covers)
        np.testing.assert_allclose(value, gain - 2 * MISSING, atol=1e-12)


@pytest.mark.parametrize("reward_range", RANGES)
def test_the_certificate_holds_without_coverage(reward_range):
    low, high = reward_range
    threshold = 0.2
    for pi, mu, unit in worlds():
        _, kl, _ = trees.divergences(pi, mu)
        inside = [k <= threshold for k in kl]
        mixed = [jnp.where(g[:, None], p, m) for g, p, m in zip(inside, pi, mu, strict=True)]
        law_mu, _, ratios, inputs = measure(mixed, mu)
        law_pi = jnp.exp(trees.sequence_log_probs(pi))
        at = [jnp.repeat(~g, len(unit) // len(g)) for g in inside]
        hit = jnp.sum(jnp.where(jnp.any(jnp.stack(at), axis=0), law_mu, 0))
        for rewards in (low + (high - low) * unit, jnp.full_like(unit, low), jnp.full_like(unit, high)):
            certified = bounds.masked_gain_lower_bound(
                context_masked_gain=jnp.sum(law_mu * rewards * jnp.sum(ratios - 1, axis=1)),
                error_bound=(high - low) * SHARP["sequence_kl"](inputs),
                hit_probability=hit,
                sequence_tv=inputs.sequence_tv,
                reward_range=reward_range,
                mu_covers_pi=False,
            )
            assert certified <= jnp.sum((law_pi - law_mu) * rewards) + 1e-12


def test_what_is_missing_is_what_mu_cannot_draw():
    mu, pi, ref = jnp.array([0.7, 0.3, 0.0]), jnp.array([0.5, 0.3, 0.2]), jnp.array([0.2, 0.3, 0.5])
    drawn, missing = mu[:2], float(pi[2])
    ratio = pi[:2] / drawn
    kl = float(jnp.sum(drawn * -jnp.log(ratio)))
    k3 = float(jnp.sum(drawn * divergences.k3(-jnp.log(ratio))))
    np.testing.assert_allclose([kl, k3], [0.2355, 0.0355], atol=1e-4)
    np.testing.assert_allclose(k3, kl - missing)
    # Ten tokens in mu's own proportions: the exact test rejects them, the sampled one does not.
    log_ratio = jnp.log(jnp.repeat(ratio, jnp.array([7, 3])))[None]
    every = jnp.ones(log_ratio.shape, bool)
    assert masks.accept_by_sampled_average(log_ratio, every, threshold=0.1)[0]
    assert not masks.accept_by_average(jnp.full(log_ratio.shape, kl), every, threshold=0.1)[0]

    def weighted_k1(z, tokens):
        p = jax.nn.softmax(z)
        value = divergences.importance_weighted_k1(p / jnp.where(tokens, mu, 1.0), jnp.log(p) - jnp.log(ref))
        return jnp.sum(jnp.where(tokens, mu * value, 0.0))

    def exact(z):
        p = jax.nn.softmax(z)
        return jnp.sum(p * (jnp.log(p) - jnp.log(ref)))

    value, slope = jax.value_and_grad(weighted_k1)(jnp.log(pi), mu > 0)
    truth, true_slope = jax.value_and_grad(exact)(jnp.log(pi))
    np.testing.assert_allclose(truth - value, missing * np.log(0.2 / 0.5))
    assert value > 0 > truth - value
    assert np.abs(slope - true_slope).max() > 0.01

    log_ratio, mask = one_token()
    rewards, weights = jnp.array([-3.0]), jnp.zeros(1)
    for b in (0.0, 2.0):
        gains = (
            sampled.sampled_surrogate_gain(log_ratio, mask, rewards, baseline=b),
            bounds.sampled_context_masked_gain(
                log_ratio, jnp.full((1, 1), 0.01), mask, rewards, threshold=0.1, baseline=b
            ),
        )
        for gain in gains:
            np.testing.assert_allclose(gain.value, (3 + b) * MISSING)
    # T = 1: the Error for the reward 1 of the token that mu cannot draw is its mass, and these see nothing of it.
    assert sampled.sampled_worst_surrogate_error(log_ratio, mask).value == 0
    assert sampled.sampled_weighted_deviation(log_ratio, mask, weights).value == 0
    np.testing.assert_allclose(sampled.sampled_sequence_tv(log_ratio, mask).value, MISSING / 2)
    np.testing.assert_allclose(sampled.sampled_sequence_tv_one_sided(log_ratio, mask).value, MISSING)


def test_token_weights_leave_the_contexts_to_the_sampler():
    """errata F3.6: pi and mu differ at the root only; the worth of the second token is 1 after token 0."""
    pi, mu = jnp.array([0.5, 0.5]), jnp.array([0.8, 0.2])
    log_pi, log_mu = (jnp.stack([jnp.log(p), jnp.log(jnp.full(2, 0.5))], axis=1) for p in (pi, mu))
    every, worth = jnp.ones((2, 2), bool), jnp.array([1.0, 0.0])
    for cap, first in ((jnp.inf, [0.625, 2.5]), (2.0, [0.625, 2.0])):
        by_token = pruning.pruned_token_weights(log_pi, log_mu, every, every, cap=cap)
        np.testing.assert_allclose(by_token[:, 0], first)
        np.testing.assert_allclose(jnp.sum(mu * by_token[:, 1] * worth), 0.8)
    by_sequence = pruning.pruned_sequence_weights(log_pi, log_mu, every, every, cap=jnp.inf)
    np.testing.assert_allclose(jnp.sum(mu * by_sequence * worth), 0.5)
