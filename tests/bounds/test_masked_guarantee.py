import jax.numpy as jnp
import numpy as np

from jaxrl_llm.bounds import context_mask
from jaxrl_llm.bounds import context_masked_inputs
from jaxrl_llm.bounds import masked_gain_lower_bound
from jaxrl_llm.bounds import sampled_context_masked_gain
from jaxrl_llm.bounds import sampled_hit_probability

KL = jnp.array([[jnp.nan, 0.01, 0.5], [0.02, 0.01, jnp.nan], [0.3, 0.01, 0.01], [0.01, jnp.nan, 0.0]])
MASK = jnp.array([[0, 1, 1], [1, 1, 0], [1, 1, 1], [1, 1, 1]], bool)
LOG = jnp.array([[9.0, 0.1, 0.7], [0.2, -0.1, 9.0], [0.9, 0.3, -0.2], [0.1, 0.5, 0.4]])
REWARDS = jnp.array([1.0, 0.0, 2.0, -1.0])
INSIDE = np.array([[0, 1, 0], [1, 1, 0], [0, 1, 1], [1, 0, 1]], bool)


def test_contexts_inside():
    np.testing.assert_array_equal(context_mask(KL, MASK, threshold=0.1), INSIDE)


def test_hit_probability_counts_sequences():
    estimate = sampled_hit_probability(KL, MASK, threshold=0.1)
    np.testing.assert_allclose(estimate.value, 3 / 4)


def test_gain_sums_inside_tokens_only():
    expected = (np.asarray(REWARDS) * np.where(INSIDE, np.expm1(np.asarray(LOG)), 0.0).sum(1)).mean()
    estimate = sampled_context_masked_gain(LOG, KL, MASK, REWARDS, threshold=0.1)
    np.testing.assert_allclose(estimate.value, expected, rtol=1e-5)


def test_inputs_have_no_divergence_outside():
    inputs = context_masked_inputs(KL, KL / 2, MASK, threshold=0.1, horizon=3)
    np.testing.assert_allclose(inputs.max_kl, 0.02)
    np.testing.assert_allclose(inputs.max_tv, 0.01)
    np.testing.assert_allclose(inputs.sequence_kl, (0.01 + 0.03 + 0.02 + 0.01) / 4, rtol=1e-6)


def test_lower_bound_and_its_cap():
    value = masked_gain_lower_bound(
        context_masked_gain=0.5, error_bound=0.1, hit_probability=0.02, sequence_tv=0.03, reward_range=(-1.0, 1.0)
    )
    np.testing.assert_allclose(value, 0.5 - 0.1 - 2 * 0.05, rtol=1e-6)
    value = masked_gain_lower_bound(context_masked_gain=0.0, error_bound=0.0, hit_probability=0.9, sequence_tv=0.9)
    np.testing.assert_allclose(value, -1.0)
