"""e^x - 1 and e^x - 1 - x without cancellation near zero, and rows set against blocks, in operations that XLA and both
Pallas backends lower: `jnp.expm1` and inserting a unit axis are not among those."""

import math

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array
from jaxtyping import Float
from jaxtyping import Shaped

NEAR = 0.5
"""Below this size the power series is used; above it the plain form has lost three bits at most."""


def series(x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """(e^x - 1 - x) / x^2 = sum_k x^k / (k + 2)! for |x| < NEAR, to a rounding."""
    terms = 9 if jnp.finfo(x.dtype).bits <= 32 else 15
    total = jnp.full_like(x, 1 / math.factorial(terms + 1))
    for k in range(terms - 2, -1, -1):
        total = total * x + 1 / math.factorial(k + 2)
    return total


def excess(x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """phi(x) = e^x - 1 - x >= 0, with a relative error of a few roundings everywhere."""
    return jnp.where(jnp.abs(x) < NEAR, x * x * series(x), (jnp.exp(x) - 1) - x)


def expm1(x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """e^x - 1, with a relative error of a few roundings everywhere."""
    return jnp.where(jnp.abs(x) < NEAR, x + x * x * series(x), jnp.exp(x) - 1)


def across(row_values: Shaped[Array, " N"], block: Float[Array, "N B"]) -> Shaped[Array, "N B"]:
    """The value of each row in every column of a block."""
    return lax.broadcast_in_dim(row_values, block.shape, (0,))
