"""Posterior sampling and tabular HyperAgent in float64: fixtures, closed forms, and the theory's width."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_llm.bounds import regret
from jaxrl_llm.exploration import Episode
from jaxrl_llm.exploration import Gaussian
from jaxrl_llm.exploration import dirichlet
from jaxrl_llm.exploration import gaussian_surrogate
from jaxrl_llm.exploration import tabular_hyperagent
from jaxrl_llm.exploration import ucrl_vtr
from jaxrl_llm.tabular import LinearMixture


def met(states, actions, rewards=None):
    actions = jnp.asarray(actions)
    return Episode(jnp.asarray(states), actions, jnp.zeros(len(actions)) if rewards is None else jnp.asarray(rewards))


def test_the_dirichlet_fixture():
    """alpha = (.7, 1.3, 2, .5), V = (0, 1, 3, 2): variance .24206510, expected after one observation .19805326."""
    values = np.array([0.0, 1, 3, 2])
    posterior = dirichlet(jnp.broadcast_to(jnp.asarray([0.7, 1.3, 2.0, 0.5])[None, None, None], (1, 4, 1, 4)))

    def variance(state):
        mean = np.asarray(posterior.mean(state)[0, 0, 0])
        return (mean @ values**2 - (mean @ values) ** 2) / (float(state[0, 0, 0].sum()) + 1)

    start = posterior.init()
    after = [variance(posterior.update(start, met([0, end], [0]), jnp.zeros((2, 4)))) for end in range(4)]
    np.testing.assert_allclose(variance(start), 0.24206510, atol=5e-9)
    np.testing.assert_allclose(np.asarray(posterior.mean(start)[0, 0, 0]) @ after, 0.19805326, atol=5e-9)


def mixture(rng, states=3, actions=2, horizon=3, dimension=2):
    kernels = rng.dirichlet(np.ones(states), (dimension, states, actions))
    rewards = rng.uniform(size=(horizon, states, actions))
    return LinearMixture(jnp.asarray(kernels), jnp.asarray(rewards), jnp.asarray(np.eye(states)[0]))


def test_regressions_are_ridge_regressions():
    """Sequential updates of both equal the solution of their normal equations after all episodes."""
    rng = np.random.default_rng(0)
    world, horizon, size = mixture(rng), 3, 2
    prior = Gaussian(jnp.full((horizon, size), 0.5), jnp.asarray(np.broadcast_to([[0.3, 0.1], [0.1, 0.2]], (3, 2, 2))))
    surrogate, agent = gaussian_surrogate(world, prior), ucrl_vtr(world, ridge=0.7)
    key = jax.random.key(0)
    state, regression = surrogate.init(), agent.init(key)
    rows = [[] for _ in range(horizon)]
    for _ in range(6):
        values = jnp.asarray(np.vstack([rng.uniform(size=(horizon, 3)), np.zeros((1, 3))]))
        episode = met(rng.integers(0, 3, horizon + 1), rng.integers(0, 2, horizon))
        state = surrogate.update(state, episode, values)
        plan = agent.act(regression, key)._replace(values=values)
        regression = agent.update(regression, key, plan, episode)
        for h in range(horizon):
            row = np.asarray(world.kernels)[:, int(episode.states[h]), int(episode.actions[h])] @ np.asarray(
                values[h + 1]
            )
            rows[h].append((row, float(values[h + 1, int(episode.states[h + 1])])))
    for h, largest in enumerate((2.0, 1.0)):
        x, y = np.array([row for row, _ in rows[h]]), np.array([target for _, target in rows[h]])
        precision = np.linalg.inv(prior.covariance[h]) + x.T @ x / (largest**2 / 4)
        covariance = np.linalg.inv(precision)
        mean = covariance @ (np.linalg.inv(prior.covariance[h]) @ prior.mean[h] + x.T @ y / (largest**2 / 4))
        np.testing.assert_allclose(state.covariance[h], covariance, atol=1e-12)
        np.testing.assert_allclose(state.mean[h], mean, atol=1e-12)
        gram = 0.7 * np.eye(size) + x.T @ x / largest**2
        np.testing.assert_allclose(regression.inverse[h], np.linalg.inv(gram), atol=1e-12)
        np.testing.assert_allclose(regression.moment[h], x.T @ y / largest**2, atol=1e-12)
        np.testing.assert_allclose(regression.log_determinant[h], np.linalg.slogdet(gram / 0.7)[1], atol=1e-12)
    # The last step has no value after it and learns nothing.
    np.testing.assert_allclose(state.covariance[2], prior.covariance[2], atol=1e-15)


def test_the_tabular_spread_is_the_limit_of_gradient_descent():
    """m = (sigma sum z + beta sigma_0 z_0) / (N + beta) is what training on the perturbed loss tends to."""
    sigma, sigma_0, visits = 0.3, 0.8, 5
    agent = tabular_hyperagent(
        horizon=1, states=1, actions=1, index_dimension=4, noise_scale=sigma, prior_scale=sigma_0, prior_mean=0.4
    )
    beta = sigma**2 / sigma_0**2
    key = jax.random.key(3)
    state = agent.init(key)
    first = state.perturbations[0, 0, 0] / (beta * sigma_0)
    stored = []
    for number in range(visits):
        before = state.perturbations
        plan = agent.act(state, key)
        state = agent.update(state, jax.random.fold_in(key, number), plan, met([0, 0], [0], [0.5]))
        stored.append((state.perturbations - before)[0, 0, 0] / sigma)
    stored = jnp.stack(stored)
    np.testing.assert_allclose(jnp.linalg.norm(stored, axis=1), 1, rtol=1e-12)
    np.testing.assert_allclose(jnp.linalg.norm(first), 1, rtol=1e-12)

    def loss(parameters):
        mean, spread = parameters
        fit = jnp.sum(jnp.square(0.5 - mean)) * visits + jnp.sum(jnp.square(sigma * stored - spread[None, :]))
        return fit + beta * (jnp.square(mean - 0.4) + jnp.sum(jnp.square(spread - sigma_0 * first)))

    parameters = (jnp.asarray(0.0), jnp.zeros(4))
    for _ in range(400):
        step = jax.grad(loss)(parameters)
        parameters = jax.tree.map(lambda value, slope: value - 0.05 * slope, parameters, step)
    np.testing.assert_allclose(parameters[1], state.perturbations[0, 0, 0] / (visits + beta), atol=1e-10)
    quiet = agent.act(state._replace(perturbations=0 * state.perturbations), key).action_values[0, 0, 0]
    np.testing.assert_allclose(parameters[0], quiet, atol=1e-10)
    spread = agent.act(state, key).action_values[0, 0, 0] - quiet
    index = jax.random.normal(key, (1, 1, 4))[0, 0]
    np.testing.assert_allclose(spread, index @ parameters[1], atol=1e-10)


def test_the_width_covers_adaptive_data():
    """Self-normalised bound: over 400 adaptive walks the ellipsoid fails less often than promised, and is not idle."""
    rng = np.random.default_rng(1)
    walks, rounds, failure = 400, 60, 0.1
    theta = np.array([0.8, 0.3])
    gram, moment = np.broadcast_to(np.eye(2), (walks, 2, 2)).copy(), np.zeros((walks, 2))
    share = np.zeros(walks)
    for _ in range(rounds):
        estimate = np.linalg.solve(gram, moment[:, :, None])[:, :, 0]
        # Adaptive: look where the estimate is wrong in one direction.
        x = np.where((estimate[:, :1] > theta[0]), [[1.0, 0.0]], [[0.3, 0.7]])
        y = (rng.random(walks) < x @ theta).astype(float)
        gram += x[:, :, None] * x[:, None, :]
        moment += x * y[:, None]
        error = np.linalg.solve(gram, moment[:, :, None])[:, :, 0] - theta
        distance = np.sqrt(np.einsum("wi,wij,wj->w", error, gram, error))
        width = regret.self_normalised_width(
            jnp.asarray(np.linalg.slogdet(gram)[1]), failure=failure, parameter_norm=float(np.linalg.norm(theta))
        )
        share = np.maximum(share, distance / np.asarray(width))
    assert (share > 1).mean() <= failure
    assert share.max() > 0.5
    np.testing.assert_allclose(
        regret.self_normalised_width(jnp.asarray(2.0), failure=0.1, ridge=4.0, parameter_norm=3.0),
        np.sqrt(2 - 2 * np.log(0.1)) / 2 + 6,
        rtol=1e-12,
    )


def test_the_sharp_bound_vanishes_with_the_prior_and_needs_its_rank():
    gamma = jnp.asarray(np.stack([np.diag([0.3, 0.1, 0.0]), np.diag([0.2, 0.05, 0.0]), np.eye(3)]))
    for rank in (2, 3):
        at = jnp.asarray(
            [float(regret.psrl_bayes_regret_sharp(c * gamma, rank=rank, episodes=100.0)) for c in (1.0, 1e-2, 1e-6)]
        )
        assert at[2] < 0.01 * at[0]
    # The printed form keeps sqrt(d K) however little there is to learn.
    assert regret.psrl_bayes_regret(1e-6 * gamma, episodes=100.0) > 3 * np.sqrt(300)
    first, second = (regret.psrl_bayes_regret_sharp(gamma, rank=r, episodes=100.0) for r in (2, 3))
    np.testing.assert_allclose(second / first, np.sqrt(3 / 2), rtol=1e-12)
    by_hand = min((np.log1p(0.3 / e) + np.log1p(0.1 / e)) / 4 + e * 100 for e in 0.01 * np.geomspace(1e-3, 1e3, 4001))
    np.testing.assert_allclose(regret.psrl_potential_sharp(gamma, episodes=100.0)[0], by_hand, rtol=2e-3)
    np.testing.assert_allclose(
        regret.psrl_potential_at(gamma, eps=0.01, episodes=100.0), regret.psrl_potential(gamma, episodes=100.0)
    )
    with pytest.raises(ValueError, match="rank is 4; it must be at least 1 and at most the dimension 3"):
        regret.psrl_bayes_regret_sharp(gamma, rank=4, episodes=1.0)
