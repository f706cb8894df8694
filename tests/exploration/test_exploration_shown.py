"""Bandits that show some of their actions, and those whose rewards are not linear."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_llm.environments import BernoulliBandit
from jaxrl_llm.environments import GaussianBandit
from jaxrl_llm.environments import neural_bandit
from jaxrl_llm.environments import quadratic_bandit
from jaxrl_llm.environments import vector_quadratic_bandit
from jaxrl_llm.exploration import greedy
from jaxrl_llm.exploration import play_shown

FEATURES = jnp.eye(4)
MEANS = jnp.asarray([0.0, 0.3, 0.6, 1.0])


def shown_by(bandit, key, *, rounds=400, shown=2):
    return jax.jit(lambda k: play_shown(greedy(4), bandit, k, rounds=rounds, shown=shown))(key)


def test_regret_is_against_the_best_of_what_is_shown(key):
    played = shown_by(GaussianBandit(FEATURES, MEANS, 0.1), key)
    regrets, chosen = np.asarray(played.regrets, np.float64), np.asarray(MEANS)[played.actions]
    # A regret plus the chosen mean is the mean of the best action shown: one of the means.
    best = regrets + chosen
    assert np.abs(best[:, None] - np.asarray(MEANS)).min(1).max() < 1e-6
    # The best of two of four actions, uniformly chosen: 0.3, 0.6, 1.0 with probabilities 1/6, 2/6, 3/6.
    np.testing.assert_allclose(
        [np.mean(np.isclose(best, m)) for m in (0.3, 0.6, 1.0)], [1 / 6, 2 / 6, 3 / 6], atol=0.08
    )
    assert regrets[-50:].mean() < 0.02


def test_what_is_shown_and_the_noise_do_not_depend_on_the_agent(key):
    bandit = GaussianBandit(FEATURES, MEANS, 0.1)
    best = []
    for scale in (1.0, 1e-3):
        played = play_shown(greedy(4, prior_scale=scale), bandit, key, rounds=40, shown=2)
        best.append(np.asarray(played.regrets) + np.asarray(MEANS)[played.actions])
    np.testing.assert_allclose(best[0], best[1], atol=1e-6)


def test_bernoulli_rewards_are_ones_as_often_as_their_means(key):
    bandit = BernoulliBandit(FEATURES, MEANS)
    noise = bandit.draw_noise(key, 4000)
    for mean in np.asarray(MEANS):
        rewards = np.asarray(bandit.observe(jnp.asarray(mean), noise))
        assert set(rewards) <= {0.0, 1.0}
        np.testing.assert_allclose(rewards.mean(), mean, atol=0.03)


def test_means_are_their_formulas(key):
    _, parameter_key = jax.random.split(key)
    bandit = quadratic_bandit(key, dimension=6, actions=5)
    theta = np.asarray(jax.random.normal(parameter_key, (6, 6)))
    x = np.asarray(bandit.features)
    np.testing.assert_allclose(np.linalg.norm(x, axis=1), 1, rtol=1e-5)
    np.testing.assert_allclose(bandit.mean_rewards, 1e-2 * np.einsum("xi,ij,kj,xk->x", x, theta, theta, x), rtol=1e-4)
    bandit = vector_quadratic_bandit(key, dimension=6, actions=500)
    np.testing.assert_allclose(bandit.mean_rewards.mean(), 10 / 6, rtol=0.15)
    # One direction explains all of it: the quadratic form has rank one.
    rows, columns = np.triu_indices(6)
    x = np.asarray(bandit.features)
    form, *_ = np.linalg.lstsq(x[:, rows] * x[:, columns], np.asarray(bandit.mean_rewards), rcond=None)
    matrix = np.zeros((6, 6))
    matrix[rows, columns] = form / np.where(rows == columns, 1, 2)
    values = np.linalg.eigvalsh(matrix + np.triu(matrix, 1).T)
    np.testing.assert_allclose(values, [0, 0, 0, 0, 0, 10], atol=1e-3)
    warm, cold = (neural_bandit(key, dimension=6, actions=50, temperature=t).mean_rewards for t in (0.2, 0.1))
    odds = [np.log(np.asarray(p, np.float64) / (1 - np.asarray(p, np.float64))) for p in (warm, cold)]
    kept = np.abs(odds[1]) < 8
    np.testing.assert_allclose(odds[1][kept], 2 * odds[0][kept], rtol=0.01, atol=1e-3)


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda: quadratic_bandit(jax.random.key(0), noise_scale=0.0), "noise_scale is 0.0; it must be a positive"),
        (lambda: vector_quadratic_bandit(jax.random.key(0), actions=0), "actions is 0; it must be at least 1"),
        (lambda: neural_bandit(jax.random.key(0), temperature=-1.0), "temperature is -1.0; it must be a positive"),
        (
            lambda: shown_by(GaussianBandit(FEATURES, MEANS, 0.1), jax.random.key(0), shown=5),
            "shown is 5; it must be between 1 and the 4 actions",
        ),
        (
            lambda: play_shown(greedy(3), GaussianBandit(FEATURES, MEANS, 0.1), jax.random.key(0), rounds=2, shown=2),
            "features has width 4; the agent was made for dimension 3",
        ),
    ],
)
def test_a_mistake_is_answered_in_a_sentence(call, sentence):
    with pytest.raises(ValueError, match=sentence):
        call()
