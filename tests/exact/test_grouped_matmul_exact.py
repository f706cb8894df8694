"""In float64 the loops, and the blocks that GPUs take, agree with NumPy to rounding."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_kernels import grouped_matmul
from jaxrl_kernels._grouped_matmul import xla_blocks


def blocks(x, weights, sizes):
    return xla_blocks.products(x, weights, sizes, transposed=False)


@pytest.mark.parametrize("product", [grouped_matmul, blocks])
def test_products(product):
    rng = np.random.default_rng(0)
    x, weights = rng.standard_normal((140, 9)), rng.standard_normal((3, 9, 5))
    wanted = np.concatenate([x[:131] @ weights[0], x[131:138] @ weights[2], np.zeros((2, 5))])
    found = jax.jit(product)(jnp.asarray(x), jnp.asarray(weights), jnp.array([131, 0, 7], jnp.int32))
    assert found.dtype == jnp.float64
    assert np.max(np.abs(found - wanted)) < 1e-13
