"""Agents at one context a round: the exact linear agent against dense regression, and what a run returns."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jaxtyping import Array

from jaxrl_llm.exploration import ContextualBandit
from jaxrl_llm.exploration import Learning
from jaxrl_llm.exploration import hypermodel
from jaxrl_llm.exploration import independent_hyperagent
from jaxrl_llm.exploration import independent_linear
from jaxrl_llm.exploration import mlp
from jaxrl_llm.exploration import neural_hyperagent
from jaxrl_llm.exploration import play_contexts
from jaxrl_llm.exploration import rows_of

ACTIONS, CONTEXTS, WIDTH, NOISE = 2, 12, 3, 0.5


class Posts(NamedTuple):
    """Contexts in a circle; rewards are linear in the features of the context."""

    inputs: Array
    mean_rewards: Array

    def arrivals(self, key: Array, rounds: int) -> Array:
        return jnp.arange(rounds) % CONTEXTS

    def reward(self, key: Array, context: Array, action: Array) -> Array:
        return self.mean_rewards[context, action] + NOISE * jax.random.normal(key)


@pytest.fixture
def table() -> Array:
    return jax.random.normal(jax.random.key(1), (CONTEXTS, WIDTH))


@pytest.fixture
def posts(table: Array) -> Posts:
    return Posts(jnp.arange(CONTEXTS), table @ jax.random.normal(jax.random.key(2), (WIDTH, ACTIONS)))


def test_linear_agents_keep_the_posterior_of_each_action(posts: Posts, table: Array, key: Array) -> None:
    agent = independent_linear(rows_of(table), outputs=ACTIONS, prior_scale=2.0, noise_scale=NOISE)
    state, chosen, rewards = agent.init(key), [], []
    for number in range(20):
        context, action = number % CONTEXTS, number % 3 % ACTIONS
        reward = posts.reward(jax.random.key(number), jnp.asarray(context), jnp.asarray(action))
        state = agent.update(state, key, jnp.asarray(context), jnp.asarray(action), reward)
        chosen.append((context, action))
        rewards.append(float(reward))
    for action in range(ACTIONS):
        rows = [number for number, (_, one) in enumerate(chosen) if one == action]
        features = np.asarray(table, np.float64)[[chosen[row][0] for row in rows]]
        precision = features.T @ features / NOISE**2 + np.eye(WIDTH) / 4
        covariance = np.linalg.inv(precision)
        mean = covariance @ features.T @ np.array(rewards)[rows] / NOISE**2
        np.testing.assert_allclose(state.covariance[action], covariance, atol=1e-5)
        np.testing.assert_allclose(state.mean[action], mean, atol=1e-4)


def test_choices_are_as_frequent_as_the_posterior_says(table: Array, key: Array) -> None:
    """Two independent Gaussian values: action 1 is chosen with probability Phi(gap / root of summed variances)."""
    agent = independent_linear(rows_of(table), outputs=ACTIONS, noise_scale=NOISE, inflation=1.5)
    state = agent.init(key)
    for action, reward in ((0, 0.2), (1, 0.9), (1, 0.7)):
        state = agent.update(state, key, jnp.asarray(3), jnp.asarray(action), jnp.asarray(reward))
    phi = table[5]
    means = state.mean @ phi
    variance = sum(float(phi @ covariance @ phi) for covariance in state.covariance)
    expected = float(jax.scipy.stats.norm.cdf((means[1] - means[0]) / (1.5 * variance**0.5)))
    keys = jax.random.split(key, 20_000)
    share = float(jnp.mean(jax.vmap(lambda one: agent.act(state, one, jnp.array([5])))(keys)))
    assert 0.1 < expected < 0.9
    assert abs(share - expected) < 0.015
    greedy = independent_linear(rows_of(table), outputs=ACTIONS, noise_scale=NOISE, inflation=0.0)
    assert greedy.act(state, key, jnp.array([5])) == int(means[1] > means[0])


def test_a_run_is_exact_about_regret_and_learns(posts: Posts, table: Array, key: Array) -> None:
    assert isinstance(posts, ContextualBandit)
    agent = independent_linear(rows_of(table), outputs=ACTIONS, noise_scale=NOISE)
    run = jax.jit(lambda one: play_contexts(agent, posts, one, rounds=240))(key)
    best = posts.mean_rewards.max(1)[run.contexts]
    got = posts.mean_rewards[run.contexts, run.actions]
    np.testing.assert_allclose(run.regrets, best - got, atol=1e-6)
    assert run.regrets[120:].sum() < 0.2 * np.abs(posts.mean_rewards[:, 0] - posts.mean_rewards[:, 1]).mean() * 120


def test_neural_agents_play_numbered_contexts(posts: Posts, table: Array, key: Array) -> None:
    model = hypermodel(rows_of(table), index_dimension=4, outputs=ACTIONS, first_mean="zeros")
    learning = Learning(optax.sgd(0.05), noise_scale=NOISE, batch=16, capacity=300, start=4, every=2)
    agent = neural_hyperagent(model, learning)
    runs = jax.jit(jax.vmap(lambda one: play_contexts(agent, posts, one, rounds=300)))(jax.random.split(key, 3))
    assert runs.state.replay.data.inputs.dtype == jnp.int32
    early, late = runs.regrets[:, :60].mean(), runs.regrets[:, -60:].mean()
    assert late < 0.5 * early


def test_the_incremental_hypermodel_has_the_posterior_and_its_spread(table: Array, key: Array) -> None:
    """Same data: the mean is the exact posterior's, and A A^T averages to its covariance (over the stored indices)."""
    exact = independent_linear(rows_of(table), outputs=ACTIONS, prior_scale=2.0, noise_scale=NOISE)
    agent = independent_hyperagent(
        rows_of(table), outputs=ACTIONS, index_dimension=4, prior_scale=2.0, noise_scale=NOISE
    )

    def after(one: Array):
        first, second = exact.init(one), agent.init(one)
        for number, step in enumerate(jax.random.split(one, 9)):
            datum = (jnp.asarray(number), jnp.asarray(number % 3 % ACTIONS), jnp.asarray(0.1 * number))
            first, second = exact.update(first, step, *datum), agent.update(second, step, *datum)
        return first, second

    first, second = jax.jit(jax.vmap(after))(jax.random.split(key, 3000))
    np.testing.assert_allclose(second.posterior.mean, first.mean, atol=1e-5)
    np.testing.assert_allclose(second.posterior.covariance, first.covariance, atol=1e-5)
    spread = jnp.mean(second.factor @ second.factor.swapaxes(-1, -2), axis=0)
    scale = float(jnp.abs(first.covariance[0]).max())
    np.testing.assert_allclose(spread, first.covariance[0], atol=0.06 * scale)
    assert np.abs(spread - 2 * first.covariance[0]).max() > 0.5 * scale


def test_agents_for_another_number_of_actions_are_refused(posts: Posts, table: Array, key: Array) -> None:
    agent = independent_linear(rows_of(table), outputs=3)
    with pytest.raises(ValueError, match="agent has 3 outputs; the bandit has 2 actions"):
        play_contexts(agent, posts, key, rounds=3)
    with pytest.raises(ValueError, match="rounds is 0"):
        play_contexts(agent, posts, key, rounds=0)
    with pytest.raises(ValueError, match="index_dimension is 0"):
        independent_hyperagent(rows_of(table), outputs=2, index_dimension=0)
    with pytest.raises(ValueError, match="it must have 2 axes"):
        rows_of(table[0])
    for make in (independent_linear, functools.partial(independent_hyperagent, index_dimension=2)):
        with pytest.raises(ValueError, match="features have 60 parameters; an exact linear agent needs features"):
            make(mlp(5, (10,)), outputs=2)
    with pytest.raises(ValueError, match="inflation is -1"):
        independent_linear(rows_of(table), outputs=2, inflation=-1.0)
    with pytest.raises(ValueError, match="prior_scale is 0"):
        independent_linear(rows_of(table), outputs=2, prior_scale=0.0)
