"""The grouped product in plain jax.numpy with plain autodiff: every group's product for every row. The oracle."""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array
from jaxtyping import Float
from jaxtyping import Int


def products(x: Float[Array, "N D"], weights: Float[Array, "E D F"], sizes: Int[Array, " E"], dtype) -> Array:
    """sum_e 1[i in e] x_i w_e, one group after the other."""
    ends = jnp.cumsum(sizes)
    index = jnp.arange(x.shape[0], dtype=jnp.int32)[:, None]
    total = jnp.zeros((x.shape[0], weights.shape[2]), dtype)
    for group in range(weights.shape[0]):
        inside = (index >= ends[group] - sizes[group]) & (index < ends[group])
        # Rows of other groups, and their cotangents, are replaced and not multiplied by 0: they may hold NaN.
        rows = jnp.where(inside, x.astype(dtype), jnp.zeros((), dtype))
        product = jnp.matmul(rows, weights[group].astype(dtype), precision=lax.Precision.HIGHEST)
        total += jnp.where(inside, product, jnp.zeros((), dtype))
    return total
