"""Neural losses in float64: the expectation over the index, and where it is smallest for a linear model."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_llm.exploration import Data
from jaxrl_llm.exploration import Gaussian
from jaxrl_llm.exploration import Hypermodel
from jaxrl_llm.exploration import given_features
from jaxrl_llm.exploration import hypermodel
from jaxrl_llm.exploration import hypermodel_update
from jaxrl_llm.exploration import index_loss
from jaxrl_llm.exploration import indices
from jaxrl_llm.exploration import mlp
from jaxrl_llm.exploration import separated_loss
from jaxrl_llm.exploration.heads import OutputLayer
from jaxrl_llm.exploration.index_losses import squared_norm

D, M, OUT, B, NOISE = 3, 4, 2, 6, 0.7


def data(rng):
    return Data(
        jnp.asarray(rng.normal(size=(B, D))),
        jnp.asarray(rng.integers(0, OUT, B)),
        jnp.asarray(rng.normal(size=B)),
        jnp.asarray(rng.normal(size=(B, M))),
    )


def model():
    return hypermodel(mlp(D, (5,)), index_dimension=M, prior_features=mlp(D, (4,)), outputs=OUT, posterior_scale=0.6)


def both(law):
    """Loss and gradient over the update set, and of the separated loss."""
    rows, head = data(np.random.default_rng(0)), model()
    trained, prior = head.init(jax.random.key(0))
    over = jnp.asarray(law.update_set(M))[None]

    def over_indices(t):
        return jnp.sum(index_loss(head, t, prior, rows, over, noise_scale=NOISE))

    def separated(t):
        return jnp.sum(separated_loss(head.parts, t, prior, rows, noise_scale=NOISE))

    return jax.value_and_grad(over_indices)(trained), jax.value_and_grad(separated)(trained)


@pytest.mark.parametrize("law", [indices.CUBE, indices.COORDINATE, indices.SPARSE], ids=lambda law: law.name)
def test_the_loss_over_an_isotropic_update_set_is_the_separated_one_and_so_is_its_gradient(law):
    enumerated, separated = both(law)
    for left, right in zip(jax.tree.leaves(enumerated), jax.tree.leaves(separated), strict=True):
        np.testing.assert_allclose(left, right, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("law", [indices.ONE_HOT, indices.SPARSE_CONSISTENT], ids=lambda law: law.name)
def test_over_the_others_it_is_not(law):
    (enumerated, _), (separated, _) = both(law)
    assert abs(enumerated - separated) > 0.01 * separated


@pytest.mark.parametrize("law", [indices.GAUSSIAN, indices.SPHERE], ids=lambda law: law.name)
def test_fresh_draws_of_the_continuous_laws_estimate_it(law):
    rows, head = data(np.random.default_rng(0)), model()
    trained, prior = head.init(jax.random.key(0))
    over = law.reference(jax.random.key(1), (B, 40_000, M))
    estimate = index_loss(head, trained, prior, rows, over, noise_scale=NOISE)
    exact = separated_loss(head.parts, trained, prior, rows, noise_scale=NOISE)
    np.testing.assert_allclose(estimate, exact, rtol=0.05)
    wrong = separated_loss(head.parts, trained, prior, rows, noise_scale=-NOISE)
    assert np.abs(estimate / wrong - 1).max() > 0.1


def test_with_the_features_held_only_the_mean_trains_them():
    rows, head = data(np.random.default_rng(0)), model()
    trained, prior = head.init(jax.random.key(0))
    free, held = (
        jax.grad(lambda t, p=parts: jnp.sum(separated_loss(p, t, prior, rows, noise_scale=NOISE)))(trained)
        for parts in (head.parts, head.held_parts)
    )

    def mean_only(t):
        mean, _ = head.parts(t, prior, rows.inputs)
        return jnp.sum(jnp.square(mean[jnp.arange(B), rows.outputs] - rows.rewards))

    for left, right in zip(jax.tree.leaves(held[0]), jax.tree.leaves(jax.grad(mean_only)(trained)[0]), strict=True):
        np.testing.assert_allclose(left, right, rtol=1e-11, atol=1e-12)
    for left, right in zip(free[1], held[1], strict=True):
        np.testing.assert_allclose(left, right, rtol=1e-11)
    assert any(np.abs(a - b).max() > 0.01 for a, b in zip(free[0][0], held[0][0], strict=True))


def test_the_minimiser_of_a_linear_model_is_posterior_mean_and_factor():
    """sum of losses + sigma^2 / s^2 (|mu|^2 + |A - A_0|^2): its minimum is (mu_t, A_t) of the incremental update."""
    rng = np.random.default_rng(1)
    rows, scale = data(rng)._replace(outputs=jnp.zeros(B, int)), 1.3
    head = hypermodel(given_features(D), index_dimension=M, prior_features=given_features(D))
    _, (_, prior_layer) = head.init(jax.random.key(2))
    # f^P = <A_0 xi, x> is the prior function, and the trained part A - A_0 starts, and is drawn to, 0.
    start = Hypermodel(Gaussian(jnp.zeros(D), scale**2 * jnp.eye(D)), scale * prior_layer.factor[0])
    end = start
    for x, y, z in zip(rows.inputs, rows.rewards, rows.perturbations, strict=True):
        end = hypermodel_update(end, x, y, z, noise_scale=NOISE)
    fixed = ((), OutputLayer(start.factor[None], jnp.zeros((1, D))))
    over = jnp.asarray(indices.COORDINATE.update_set(M))[None]

    def objective(layer):
        losses = index_loss(head, ((), layer), fixed, rows, over, noise_scale=NOISE)
        return jnp.sum(losses) + NOISE**2 / scale**2 * squared_norm(layer)

    best = OutputLayer((end.factor - start.factor)[None], end.posterior.mean[None])
    for leaf in jax.tree.leaves(jax.grad(objective)(best)):
        np.testing.assert_allclose(leaf, 0, atol=1e-10)
    assert all(jnp.abs(leaf).max() > 0.01 for leaf in jax.tree.leaves(jax.grad(objective)(start_layer(best))))


def start_layer(layer):
    return jax.tree.map(jnp.zeros_like, layer)
