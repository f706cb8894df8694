"""Exploration in float64: the rank-one update against its printed form, and the identities that the theory uses."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_llm.exploration import Gaussian
from jaxrl_llm.exploration import Hypermodel
from jaxrl_llm.exploration import hypermodel_update
from jaxrl_llm.exploration import indices
from jaxrl_llm.exploration import posterior_update
from jaxrl_llm.exploration.gaussian import hypermodel_update_inverse_form

D, M, T, NOISE = 4, 3, 12, 0.7


def prior(rng):
    root = rng.normal(size=(D, D))
    covariance = root @ root.T / D + 0.3 * np.eye(D)
    return Hypermodel(
        Gaussian(jnp.asarray(rng.normal(size=D)), jnp.asarray(covariance)), jnp.asarray(rng.normal(size=(D, M)))
    )


def data(rng, rounds=T):
    shapes = ((rounds, D), (rounds,), (rounds, M))
    return tuple(jnp.asarray(rng.normal(size=shape)) for shape in shapes)


def walk(update, model, features, rewards, perturbations):
    for x, y, z in zip(features, rewards, perturbations, strict=True):
        model = update(model, x, y, z, noise_scale=NOISE)
    return model


def test_the_rank_one_form_is_the_printed_form():
    rng = np.random.default_rng(0)
    start, rows = prior(rng), data(rng)
    ours, printed = (walk(update, start, *rows) for update in (hypermodel_update, hypermodel_update_inverse_form))
    for left, right in zip(jax.tree.leaves(ours), jax.tree.leaves(printed), strict=True):
        np.testing.assert_allclose(left, right, rtol=1e-10, atol=1e-10)


def test_the_posterior_is_the_batch_regression():
    rng = np.random.default_rng(1)
    start, (x, y, _) = prior(rng), data(rng)
    posterior = start.posterior
    for row, reward in zip(x, y, strict=True):
        posterior = posterior_update(posterior, row, reward, noise_scale=NOISE)
    precision = np.linalg.inv(start.posterior.covariance) + x.T @ x / NOISE**2
    mean = np.linalg.solve(
        precision, np.linalg.solve(start.posterior.covariance, start.posterior.mean) + x.T @ y / NOISE**2
    )
    np.testing.assert_allclose(posterior.covariance, np.linalg.inv(precision), rtol=1e-9)
    np.testing.assert_allclose(posterior.mean, mean, rtol=1e-9)


def test_the_factor_unrolls_and_each_column_is_a_ridge_regression():
    """Sigma_t^-1 A_t = Sigma_0^-1 A_0 + sum x z^T / sigma; column m minimises |sigma z_m - X theta|^2 + the prior."""
    rng = np.random.default_rng(2)
    start, (x, y, z) = prior(rng), data(rng)
    end = walk(hypermodel_update, start, x, y, z)
    unrolled = np.linalg.solve(start.posterior.covariance, start.factor) + x.T @ z / NOISE
    np.testing.assert_allclose(np.linalg.solve(end.posterior.covariance, end.factor), unrolled, rtol=1e-9)

    def loss(theta, column):
        off = theta - start.factor[:, column]
        fit = jnp.sum(jnp.square(NOISE * z[:, column] - x @ theta)) / NOISE**2
        return fit + off @ jnp.linalg.solve(start.posterior.covariance, off)

    for column in range(M):
        np.testing.assert_allclose(jax.grad(loss)(end.factor[:, column], column), 0, atol=1e-9)


@pytest.mark.parametrize("law", [indices.CUBE, indices.COORDINATE, indices.SPARSE, indices.SPARSE_CONSISTENT])
def test_the_factor_tracks_the_covariance_on_average(law):
    """E A_t A_t^T = Sigma_t, exactly, over every sequence of three perturbations, for fixed features."""
    rng = np.random.default_rng(3)
    start, (x, y, _) = prior(rng), data(rng, 3)
    # Rows of a factor with A_0 A_0^T = Sigma_0 need M >= d; a square root padded with zeros will do.
    size = D + 1
    root = np.linalg.cholesky(start.posterior.covariance)
    start = start._replace(factor=jnp.asarray(np.pad(root, ((0, 0), (0, 1)))))
    support = np.unique(law.update_set(size), axis=0) / np.sqrt(size)
    every = jnp.asarray(list(itertools.product(support, repeat=3)))
    factors = jax.jit(jax.vmap(lambda z: walk(hypermodel_update, start, x, y, z).factor))(every)
    expected = walk(hypermodel_update, start, x, y, every[0]).posterior.covariance
    np.testing.assert_allclose(jnp.mean(factors @ factors.transpose(0, 2, 1), axis=0), expected, rtol=1e-9, atol=1e-10)


def test_one_hot_perturbations_do_not_track_it():
    """e_i is not centred: its cross terms add |sum of x| / M."""
    rng = np.random.default_rng(4)
    start, (x, y, _) = prior(rng), data(rng, 3)
    start = start._replace(factor=jnp.linalg.cholesky(start.posterior.covariance))
    every = jnp.asarray(list(itertools.product(np.eye(D), repeat=3)))
    factors = jax.vmap(lambda z: walk(hypermodel_update, start, x, y, z).factor)(every)
    expected = walk(hypermodel_update, start, x, y, every[0]).posterior.covariance
    assert np.abs(jnp.mean(factors @ factors.transpose(0, 2, 1), axis=0) - expected).max() > 0.01


@pytest.mark.parametrize("law", [indices.GAUSSIAN, indices.SPHERE], ids=lambda law: law.name)
def test_the_continuous_laws_track_it_too(law):
    rng = np.random.default_rng(5)
    start, (x, y, _) = prior(rng), data(rng, 3)
    start = start._replace(factor=jnp.asarray(np.pad(np.linalg.cholesky(start.posterior.covariance), ((0, 0), (0, 1)))))
    draws = law.perturbation(jax.random.key(0), (50_000, 3, D + 1))
    factors = jax.jit(jax.vmap(lambda z: walk(hypermodel_update, start, x, y, z).factor))(draws)
    expected = walk(hypermodel_update, start, x, y, draws[0]).posterior.covariance
    np.testing.assert_allclose(jnp.mean(factors @ factors.transpose(0, 2, 1), axis=0), expected, atol=0.01)


@pytest.mark.parametrize("law", [indices.CUBE, indices.COORDINATE, indices.SPARSE], ids=lambda law: law.name)
def test_the_index_loss_separates_mean_and_factor(law):
    """E_xi (f(x, xi) - y - sigma <xi, z>)^2 = (<mu, x> - y)^2 + |A^T x - sigma z|^2 over the whole update set."""
    rng = np.random.default_rng(6)
    start, (x, y, z) = prior(rng), data(rng, 1)
    xi = law.update_set(M)
    error = x[0] @ start.posterior.mean - y[0] + xi @ (start.factor.T @ x[0]) - NOISE * xi @ z[0]
    expected = (x[0] @ start.posterior.mean - y[0]) ** 2 + np.sum((start.factor.T @ x[0] - NOISE * z[0]) ** 2)
    np.testing.assert_allclose(np.mean(error**2), expected, rtol=1e-12)


def test_in_a_multi_armed_bandit_the_factor_has_its_closed_form():
    """Features e_a: m_a = (m_0 / s^2 + sum z / sigma) / (1 / s^2 + N_a / sigma^2)."""
    rng = np.random.default_rng(7)
    arms = rng.integers(0, D, T)
    _, y, z = data(rng)
    scale = 1.3
    start = Hypermodel(Gaussian(jnp.zeros(D), scale**2 * jnp.eye(D)), jnp.asarray(rng.normal(size=(D, M))))
    end = walk(hypermodel_update, start, jnp.eye(D)[arms], y, z)
    for arm in range(D):
        here = np.asarray(z)[arms == arm]
        expected = (start.factor[arm] / scale**2 + here.sum(0) / NOISE) / (1 / scale**2 + len(here) / NOISE**2)
        np.testing.assert_allclose(end.factor[arm], expected, rtol=1e-10)
