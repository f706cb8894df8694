"""Bias of vocabulary pruning by exact enumeration, in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_llm import categorical
from jaxrl_llm.bounds import pruning
from theory_checks import token_trees as trees

V, T, WORLDS = 4, 4, 200
LOG_MIN_P = np.log(0.3)


def measure(pi, rewards):
    keep = [categorical.safe_set(z, log_min_p=LOG_MIN_P) for z in pi]
    pruned = [categorical.restrict(z, k) for z, k in zip(pi, keep, strict=True)]
    masses = [categorical.kept_mass(z, k) for z, k in zip(pi, keep, strict=True)]
    law, law_pruned = jnp.exp(trees.sequence_log_probs(pi)), jnp.exp(trees.sequence_log_probs(pruned))
    mass_t = jnp.stack([jnp.repeat(m, V ** (T - t)) for t, m in enumerate(masses)], axis=1)
    inside = law_pruned > 0
    every = jnp.ones_like(mass_t, bool)
    # Expectations under pi_S: rows in proportion to their probability.
    weights = law_pruned * law_pruned.size
    per_row = jax.vmap(lambda m: pruning.sampled_total_variation(m[None], jnp.ones((1, T), bool)).value)(mass_t)
    linear = jax.vmap(lambda m: pruning.sampled_bias_bound(m[None], jnp.ones((1, T), bool)).value)(mass_t)
    del every
    return {
        "bias": jnp.sum((law - law_pruned) * rewards),
        "indicator_bias": jnp.sum((law - law_pruned) * inside),
        "tv": jnp.sum(jnp.abs(law - law_pruned)) / 2,
        "leaves": jnp.sum(jnp.where(inside, 0.0, law)),
        "identity": jnp.mean(weights * per_row),
        "linear": jnp.mean(weights * linear),
        "worst": pruning.worst_case_bias_bound(smallest_kept_mass=jnp.min(jnp.concatenate(masses)), horizon=T),
        "smallest": jnp.min(jnp.concatenate(masses)),
    }


@pytest.fixture(scope="module")
def measured():
    rng = np.random.default_rng(2)
    pi, _, rewards = trees.draw(
        rng,
        worlds=WORLDS,
        vocabulary=V,
        horizon=T,
        noise=np.zeros(WORLDS),
        share=np.zeros(WORLDS),
        kind=np.arange(WORLDS) % 3,
    )
    pi = [1.5 * z for z in pi]
    return jax.device_get(jax.jit(jax.vmap(measure))(pi, rewards))


def test_total_variation_identity(measured):
    np.testing.assert_allclose(measured["identity"], measured["tv"], atol=1e-12)
    np.testing.assert_allclose(measured["leaves"], measured["tv"], atol=1e-12)
    assert measured["tv"].max() > 0.3


def test_chain_of_bounds(measured):
    assert np.all(np.abs(measured["bias"]) <= measured["tv"] + 1e-12)
    assert np.all(measured["tv"] <= measured["linear"] + 1e-12)
    assert np.all(np.minimum(measured["linear"], 1) <= measured["worst"] + 1e-12)


def test_the_first_bound_is_attained_and_needs_no_factor_two(measured):
    np.testing.assert_allclose(np.abs(measured["indicator_bias"]), measured["tv"], atol=1e-12)
    # Half of it would be broken.
    assert np.all(np.abs(measured["indicator_bias"]) > 0.5 * measured["tv"])


def test_tightness(measured):
    assert np.mean(measured["tv"] / measured["linear"]) > 0.6
    assert np.mean(measured["tv"] / measured["worst"]) < 0.6


def test_worst_case_of_min_p_is_attained_and_vacuous_at_scale():
    for log_min_p, expected in ((-13.0, 0.256), (-12.0, 0.483)):
        value = pruning.worst_case_pruned_mass(log_min_p=log_min_p, vocabulary=151_936)
        np.testing.assert_allclose(value, expected, atol=5e-4)
    # One token and V - 1 just below the threshold.
    r, vocabulary = 0.3, 6
    p = np.array([1.0] + [r * (1 - 1e-9)] * (vocabulary - 1))
    z = jnp.log(jnp.asarray(p / p.sum()))
    pruned = 1 - categorical.kept_mass(z, categorical.safe_set(z, log_min_p=np.log(r)))
    np.testing.assert_allclose(
        pruned, pruning.worst_case_pruned_mass(log_min_p=np.log(r), vocabulary=vocabulary), rtol=1e-6
    )


def test_a_mask_counts_sequences_and_scales_with_the_rewards():
    mass = jnp.asarray([[0.9, 0.5, 0.1], [0.8, 0.3, 0.2], [0.4, 0.4, 0.4]])
    mask = jnp.asarray([[1, 1, 0], [1, 0, 0], [0, 0, 0]], bool)
    estimate = pruning.sampled_total_variation(mass, mask)
    np.testing.assert_allclose(estimate.value, ((1 - 0.45) + 0.2) / 2, rtol=1e-12)
    bound = pruning.sampled_bias_bound(mass, mask, reward_range=(-1.0, 2.0))
    np.testing.assert_allclose(bound.value, 3 * (0.6 + 0.2) / 2, rtol=1e-12)
    worst = pruning.worst_case_bias_bound(smallest_kept_mass=0.99, horizon=20, reward_range=(-1.0, 2.0))
    np.testing.assert_allclose(worst, 3 * 0.2, rtol=1e-9)
    np.testing.assert_allclose(pruning.context_total_variation(mass), 1 - mass)


def test_a_mass_that_was_rounded_above_one_prunes_nothing():
    over = 1.0000004
    assert pruning.worst_case_bias_bound(smallest_kept_mass=over, horizon=8) == 0
    assert pruning.worst_case_bias_bound(smallest_kept_mass=jnp.array(over), horizon=8) == 0
    assert pruning.context_total_variation(jnp.array(over)) == 0
    mass, mask = jnp.full((2, 3), over), jnp.ones((2, 3), bool)
    assert pruning.sampled_total_variation(mass, mask).value == 0
    assert pruning.sampled_bias_bound(mass, mask).value == 0
    with pytest.raises(ValueError, match=r"smallest_kept_mass is 1\.01"):
        pruning.worst_case_bias_bound(smallest_kept_mass=1.01, horizon=8)
