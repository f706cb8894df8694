"""In float64 the closed form agrees with autodiff of the definition to rounding, through every formulation."""

import contextlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from jaxrl_kernels import dense_gradient
from jaxrl_kernels import dense_kl


def textbook(z, z_ref):
    log_p, log_q = jax.nn.log_softmax(z), jax.nn.log_softmax(z_ref)
    return jnp.sum(jnp.exp(log_p) * (log_p - log_q), axis=1)


@pytest.mark.parametrize("implementation", ["reference", "xla", "pallas_tpu"])
@pytest.mark.parametrize(("scale", "near"), [(1.0, None), (30.0, None), (2.0, 0.05)])
def test_autodiff_of_the_definition(implementation, scale, near):
    keys = jax.random.split(jax.random.key(3), 3)
    z = scale * jax.random.normal(keys[0], (9, 1100))
    noise = jax.random.normal(keys[1], z.shape)
    z_ref = scale * noise if near is None else z + near * noise + 1.0
    weights = jax.random.normal(keys[2], (9,))
    assert z.dtype == jnp.float64
    wanted = textbook(z, z_ref)
    slope = jax.grad(lambda z: jnp.sum(weights * textbook(z, z_ref)))(z)
    interpreter = pltpu.force_tpu_interpret_mode() if implementation == "pallas_tpu" else contextlib.nullcontext()
    with interpreter:
        kl, gradient = dense_gradient(z, z_ref, weights=weights, implementation=implementation)
        value, pull = jax.vjp(lambda z: dense_kl(z, z_ref, implementation=implementation), z)
        (pulled,) = pull(weights)
    for found in (kl, value):
        np.testing.assert_allclose(found, wanted, rtol=1e-12)
    for found in (gradient, pulled):
        assert np.max(np.abs(found - slope)) < 1e-13 * max(1.0, float(np.max(np.abs(slope))))
        assert np.max(np.abs(jnp.sum(found, axis=1))) < 1e-12
        assert np.max(np.abs(slope)) > 1e-3
