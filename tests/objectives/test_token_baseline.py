import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_llm.objectives.token_baseline import optimal_token_baseline
from jaxrl_llm.objectives.token_baseline import own_token_baseline
from jaxrl_llm.objectives.token_baseline import spent_gradient

MASK = jnp.array([[1, 1, 1], [1, 1, 0], [1, 0, 0], [1, 1, 1]], bool)
P = np.array([[0.5, 0.2, 0.9], [0.1, 0.6, 0.5], [0.3, 0.5, 0.5], [0.4, 0.4, 0.4]], np.float32)
C = np.array([[0.4, 0.3, 0.815], [0.2, 0.5, 0.5], [0.3, 0.5, 0.5], [0.35, 0.35, 0.35]], np.float32)
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


def test_the_own_baseline_by_hand():
    norm = 1 - 2 * P + C
    advantages = np.asarray(own_token_baseline(jnp.array(REWARDS), jnp.log(P), jnp.array(C), MASK, IDS))
    for column, rows in ((0, 3), (1, 2)):
        baseline = (REWARDS[:rows] * norm[:rows, column]).sum() / norm[:rows, column].sum()
        np.testing.assert_allclose(advantages[:rows, column], REWARDS[:rows] - baseline, atol=1e-5)
    cumulated = np.asarray(optimal_token_baseline(jnp.array(REWARDS), jnp.log(P), jnp.array(C), MASK, IDS))
    np.testing.assert_allclose(cumulated[:, 0], advantages[:, 0], atol=1e-5)
    assert np.abs(cumulated[:2, 1] - advantages[:2, 1]).max() > 0.01


def test_rewards_of_another_batch_are_refused(without_type_hook):
    with pytest.raises(ValueError, match=r"log_prob is .* and rewards is .* their axes B must be equal"):
        optimal_token_baseline(jnp.array(REWARDS[:3]), jnp.log(P), jnp.array(C), MASK, IDS[:3])


def test_is_a_constant_to_the_gradient():
    def through(log_prob):
        baseline = optimal_token_baseline(jnp.array(REWARDS), log_prob, jnp.array(C), MASK, IDS)
        return jnp.sum(jnp.square(baseline)) + jnp.sum(spent_gradient(log_prob, jnp.array(C), MASK))

    np.testing.assert_array_equal(jax.grad(through)(jnp.log(P)), np.zeros((4, 3)))


def test_equal_rewards_give_exactly_zero():
    value = optimal_token_baseline(jnp.full(4, 0.1), jnp.log(P), jnp.array(C), MASK, IDS)
    np.testing.assert_array_equal(value, np.zeros((4, 3)))


@pytest.mark.parametrize("baseline", [optimal_token_baseline, own_token_baseline])
@pytest.mark.parametrize("log_odds", [6.0, 9.0, 12.0, 14.0])
def test_confident_policies_in_float32_keep_their_advantages(baseline, log_odds):
    """1 - 2 p + C is below the rounding of C there: its sign was random and the advantages were 0."""
    z = np.zeros((4, 3, 8))
    z[..., 0] = log_odds + 0.3 * np.arange(4)[:, None] + 0.1 * np.arange(3)
    log_p = z - np.log(np.exp(z).sum(-1, keepdims=True))
    p = np.exp(log_p)
    rewards, mask, ids = np.array([1.0, 0.0, 3.0, -1.0]), np.ones((4, 3), bool), np.zeros(4, int)
    norm = (1 - p[..., 0]) ** 2 + (p[..., 1:] ** 2).sum(-1)
    if baseline is optimal_token_baseline:
        norm = norm.cumsum(1)
    expected = rewards[:, None] - (rewards[:, None] * norm).sum(0) / norm.sum(0)
    single = [jnp.asarray(x, jnp.float32) for x in (log_p[..., 0], (p**2).sum(-1))]
    found = baseline(jnp.asarray(rewards, jnp.float32), *single, jnp.asarray(mask), jnp.asarray(ids))
    assert np.abs(found).min() > 0.05
    # Within the factor of 2 by which the weights may be off, the baseline is a weighted mean of the same rewards.
    assert np.abs(found - expected).max() < 0.35
    spent = spent_gradient(*single, jnp.asarray(mask))
    truth = ((1 - p[..., 0]) ** 2 + (p[..., 1:] ** 2).sum(-1)).cumsum(1)
    assert np.all(spent / truth > 0.85)
    assert np.all(spent / truth < 2)
