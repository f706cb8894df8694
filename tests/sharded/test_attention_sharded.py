"""A kernel that the compiler cannot split runs on each device's rows and heads."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_llm.models.attention import Visibility
from jaxrl_llm.models.attention.dense import grouped_query_attention
from jaxrl_llm.models.attention.over_devices import on_each_device
from jaxrl_llm.models.sharding import make_mesh


@pytest.mark.parametrize("rows", [4, 3])
def test_values_and_gradients_are_those_of_one_device(rows):
    """Three rows are no multiple of the devices: all of them compute all rows."""
    keys, shapes = jax.random.split(jax.random.key(0), 3), ((rows, 6, 4, 8), (rows, 2, 6, 8), (rows, 2, 6, 8))
    arrays = [jax.random.normal(key, shape) for key, shape in zip(keys, shapes, strict=True)]
    segments = jnp.broadcast_to(jnp.arange(6) // 3, (rows, 6))
    visibility = Visibility(jnp.arange(6) >= jnp.arange(rows)[:, None], segments)
    held = []

    def kernel(query, key, value, visibility):
        held.append(query.shape)
        return grouped_query_attention(query, key, value, visibility.dense())

    def loss(*arrays):
        mixed = on_each_device(kernel, *arrays, visibility)
        return jnp.sum(jnp.sin(mixed), where=visibility.real[:, :, None, None])

    step = jax.jit(jax.value_and_grad(loss, (0, 1, 2)))
    expected = step(*arrays)
    with jax.set_mesh(make_mesh(fsdp=2, expert=2, tensor=2)):
        got = step(*arrays)
    assert held == [(rows, 6, 4, 8), (1 if rows == 4 else 3, 6, 2, 8)]
    for one, other in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=1e-5)
