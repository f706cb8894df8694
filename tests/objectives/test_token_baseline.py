import jax
import jax.numpy as jnp
import numpy as np

from jaxrl_llm.objectives.token_baseline import optimal_token_baseline
from jaxrl_llm.objectives.token_baseline import spent_gradient

MASK = jnp.array([[1, 1, 1], [1, 1, 0], [1, 0, 0], [1, 1, 1]], bool)
P = np.array([[0.5, 0.2, 0.9], [0.1, 0.6, 0.5], [0.3, 0.5, 0.5], [0.4, 0.4, 0.4]], np.float32)
C = np.array([[0.4, 0.3, 0.85], [0.2, 0.5, 0.5], [0.3, 0.5, 0.5], [0.35, 0.35, 0.35]], np.float32)
REWARDS = np.array([1.0, 0.0, 0.5, 0.7], np.float32)
IDS = jnp.array([3, 3, 3, 8])


def test_spent_gradient_accumulates_squared_norms():
    value = np.asarray(spent_gradient(jnp.log(P), jnp.array(C), MASK))
    expected = np.cumsum(np.where(MASK, 1 - 2 * P + C, 0.0), axis=1)
    np.testing.assert_allclose(value, expected, rtol=1e-5)


def test_baseline_by_hand():
    w = np.cumsum(1 - 2 * P + C, axis=1)
    advantages = np.asarray(
        optimal_token_baseline(jnp.array(REWARDS), jnp.where(MASK, jnp.log(P), jnp.nan), jnp.array(C), MASK, IDS)
    )
    first = (REWARDS[:3] * w[:3, 0]).sum() / w[:3, 0].sum()
    second = (REWARDS[:2] * w[:2, 1]).sum() / w[:2, 1].sum()
    expected = np.zeros((4, 3))
    expected[:3, 0] = REWARDS[:3] - first
    expected[:2, 1] = REWARDS[:2] - second
    # Position 2 of row 0 and all of row 3 have nothing to be compared with.
    np.testing.assert_allclose(advantages, expected, atol=1e-5)
    unweighted = REWARDS[:3] - REWARDS[:3].mean()
    assert np.abs(advantages[:3, 0] - unweighted).max() > 0.02


def test_is_a_constant_to_the_gradient():
    def through(log_prob):
        baseline = optimal_token_baseline(jnp.array(REWARDS), log_prob, jnp.array(C), MASK, IDS)
        return jnp.sum(jnp.square(baseline)) + jnp.sum(spent_gradient(log_prob, jnp.array(C), MASK))

    np.testing.assert_array_equal(jax.grad(through)(jnp.log(P)), np.zeros((4, 3)))


def test_equal_rewards_give_exactly_zero():
    value = optimal_token_baseline(jnp.full(4, 0.1), jnp.log(P), jnp.array(C), MASK, IDS)
    np.testing.assert_array_equal(value, np.zeros((4, 3)))
