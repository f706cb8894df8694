"""In float64 both ops agree with the definitions, and their closed-form gradients with autodiff, to rounding."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_kernels import token_loss
from jaxrl_kernels import token_statistics
from tests.kernels import head_oracle as oracle

IMPLEMENTATIONS = ("reference", "xla")


@partial(jax.jit, static_argnames=("axis", "implementation", "log_min_p"))
def value_and_gradient(arrays, targets, cotangents, axis, implementation, log_min_p):
    def total(hidden, head):
        values = token_statistics(
            hidden,
            head,
            targets,
            reference=oracle.reference(arrays),
            vocabulary_axis=axis,
            temperature=0.7,
            log_min_p=log_min_p,
            implementation=implementation,
            block=64,
        )
        return oracle.weighted(values, cotangents), values

    (_, values), gradients = jax.value_and_grad(total, (0, 1), has_aux=True)(*arrays[:2])
    return values, gradients


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("axis", [1, 0])
@pytest.mark.parametrize("log_min_p", [None, -2.0])
def test_statistics_and_gradients(implementation, axis, log_min_p):
    names = tuple(name for name in oracle.NUMBERS if log_min_p is None or name != "kl_reverse")
    for scale in (0.1, 1.0, 30.0):
        inputs = oracle.make_inputs(scale=scale, near=0.3 * scale, axis=axis)
        cotangents = oracle.draw_cotangents(7, tuple(name for name in oracle.WITH_GRADIENT if name in names))
        arrays = inputs.arrays(jnp.float64)
        given = {name: jnp.asarray(value) for name, value in cotangents.items()}
        values, gradients = value_and_gradient(arrays, inputs.tokens, given, axis, implementation, log_min_p)
        wanted = oracle.expected(inputs, temperature=0.7, log_min_p=log_min_p)
        for name in names:
            assert getattr(values, name).dtype == jnp.float64
            assert oracle.error(getattr(values, name), getattr(wanted, name)) < 1e-12 * max(scale, 1.0), (name, scale)
        for value, right in zip(gradients, oracle.expected_gradient(inputs, cotangents, 0.7, log_min_p), strict=True):
            assert oracle.error(value, right) < 1e-11 * max(scale, 1.0), scale


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("name", oracle.WITH_GRADIENT)
def test_each_gradient_alone(implementation, name):
    inputs = oracle.make_inputs(near=0.3)
    cotangents = oracle.draw_cotangents(7, (name,))
    given = {key: jnp.asarray(value) for key, value in cotangents.items()}
    _, gradients = value_and_gradient(inputs.arrays(jnp.float64), inputs.tokens, given, 1, implementation, None)
    for value, right in zip(gradients, oracle.expected_gradient(inputs, cotangents, 0.7), strict=True):
        assert oracle.error(value, right) < 1e-12


def test_rows_of_the_logit_gradient_sum_to_zero():
    """A shift of all logits changes no statistic: with a head row of ones on a unit that is off, its gradient is the
    row sum of dz."""
    inputs = oracle.make_inputs()
    shifted = inputs._replace(
        hidden=np.hstack([inputs.hidden, np.zeros((7, 1))]), head=np.vstack([inputs.head, np.ones((1, 301))]),
        hidden_ref=np.hstack([inputs.hidden_ref, np.zeros((7, 1))]),
        head_ref=np.vstack([inputs.head_ref, np.zeros((1, 301))]),
    )  # fmt: skip
    given = {name: jnp.asarray(value) for name, value in oracle.draw_cotangents(7).items()}
    _, (d_hidden, _) = value_and_gradient(shifted.arrays(jnp.float64), shifted.tokens, given, 1, "xla", None)
    assert jnp.abs(d_hidden[:, :12]).max() > 0.1
    np.testing.assert_allclose(d_hidden[:, 12], 0, atol=1e-14)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_token_loss(implementation):
    inputs = oracle.make_inputs(rows=11, near=0.3)
    arrays = inputs.arrays(jnp.float64)
    rng = np.random.default_rng(0)
    old, advantage = (jnp.asarray(rng.standard_normal(11)) for _ in range(2))
    old = old * 0.2 + jnp.asarray(oracle.expected(inputs).log_prob)

    def loss(s, old, advantage):
        ratio = jnp.exp(s.log_prob - old)
        clipped = jnp.minimum(ratio * advantage, jnp.clip(ratio, 0.8, 1.2) * advantage)
        return -clipped + s.kl**2 + jnp.sqrt(s.kl_reverse) - s.entropy * s.collision + s.total_variation**3

    def by_loss(hidden, head):
        return token_loss(
            hidden,
            head,
            inputs.tokens,
            loss,
            old,
            advantage,
            reference=oracle.reference(arrays),
            implementation=implementation,
            block=64,
        )[0]

    def by_definition(hidden, head):
        moved = inputs._replace(hidden=hidden, head=head)
        return jnp.sum(loss(oracle.definitions(*oracle._logits(moved, 1.0), inputs.tokens), old, advantage))

    value, gradients = jax.jit(jax.value_and_grad(by_loss, (0, 1)))(*arrays[:2])
    right, wanted = jax.value_and_grad(by_definition, (0, 1))(*arrays[:2])
    assert abs(value - right) < 1e-13 * abs(right)
    for one, other in zip(gradients, wanted, strict=True):
        assert oracle.error(one, other) < 1e-12
