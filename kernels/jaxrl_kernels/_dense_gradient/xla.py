"""The dense gradient in portable XLA: a few rows at a time on CPU, all at once on accelerators.

On CPU a chunk of rows stays in the caches from the first sum to the gradient; accelerators fuse the sums into loops
over the whole arrays, and rows or columns may lie on several of them.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array
from jaxtyping import Float

from jaxrl_kernels._dense_gradient import streaming
from jaxrl_kernels._dense_gradient.streaming import State
from jaxrl_kernels._token_statistics.blocks import vary_together

CHUNK_BYTES = 2**21
"""Size of one chunk of logits in the accumulator's dtype. Timed on two busy CPU cores: half of it is as fast, a quarter
of it 30 % slower."""


def chunk_rows(rows: int, vocabulary: int, itemsize: int) -> int:
    """Rows to take at a time on this platform."""
    if jax.default_backend() != "cpu":
        return max(rows, 1)
    return min(rows, max(2, CHUNK_BYTES // (vocabulary * itemsize) // 2 * 2))  # even: two cores share a chunk


def _state(z: Array, z_ref: Array) -> tuple[State, Array]:
    """State of whole rows, as [n, 1], and the weights."""
    start = vary_together((streaming.initial((z.shape[0], 1), z.dtype), z))[0]
    if jax.default_backend() != "cpu":
        return streaming.absorb(start, z, z_ref)
    # A row sum reads its operands through cheap arithmetic for free, but arithmetic that two sums share is written out
    # as a whole chunk and read back; behind the barrier each has its own.
    return streaming.absorb(start, z, z_ref, lambda *arrays: lax.optimization_barrier(arrays))


def _chunks(rows: int, size: int) -> Array:
    # The last chunk overlaps the one before when sizes do not fit: the rows in both are made twice and are the same.
    count = -(-rows // size)
    return jnp.minimum(jnp.arange(count, dtype=jnp.int32) * size, rows - size)


def state(z: Float[Array, "N V"], z_ref: Float[Array, "N V"], dtype) -> State:
    """The sums of every row, as [N] arrays."""
    rows, vocabulary = z.shape
    size = chunk_rows(rows, vocabulary, dtype.itemsize)
    if size >= rows:
        return jax.tree.map(lambda x: x[:, 0], _state(z.astype(dtype), z_ref.astype(dtype))[0])

    def body(whole: State, start: Array) -> tuple[State, None]:
        part, _ = _state(*(lax.dynamic_slice_in_dim(x, start, size).astype(dtype) for x in (z, z_ref)))
        return jax.tree.map(lambda a, b: lax.dynamic_update_slice_in_dim(a, b[:, 0], start, 0), whole, part), None

    empty = vary_together((streaming.initial((rows,), dtype), z))[0]
    return lax.scan(body, empty, _chunks(rows, size))[0]


def gradient(
    z: Float[Array, "N V"],
    z_ref: Float[Array, "N V"],
    maximum: Float[Array, " N"],
    factor: Float[Array, " N"],
    centre: Float[Array, " N"],
) -> Float[Array, "N V"]:
    """The gradient from the sums of every row, in the dtype of z."""
    maximum, factor, centre = (x[:, None] for x in (maximum, factor, centre))
    wide, wide_ref = z.astype(factor.dtype), z_ref.astype(factor.dtype)
    weights = streaming.weights_of(wide, maximum)
    return streaming.gradient(weights, wide, wide_ref, factor, centre).astype(z.dtype)


def kl_and_gradient(
    z: Float[Array, "N V"], z_ref: Float[Array, "N V"], weights: Float[Array, " N"]
) -> tuple[Float[Array, " N"], Float[Array, "N V"]]:
    """KL of each row and weights * dKL/dz, while the logits of a chunk are near."""
    rows, vocabulary = z.shape
    dtype = weights.dtype
    size = chunk_rows(rows, vocabulary, dtype.itemsize)

    def chunk(z: Array, z_ref: Array, weights: Array) -> tuple[Array, Array]:
        wide, wide_ref, column = z.astype(dtype), z_ref.astype(dtype), weights[:, None]
        sums, exponentials = _state(wide, wide_ref)
        factor = streaming.factor(column, sums.total, sums.centre)
        value = streaming.gradient(exponentials, wide, wide_ref, factor, sums.centre)
        return streaming.divergence(sums)[:, 0], value.astype(z.dtype)

    if size >= rows:
        return chunk(z, z_ref, weights)

    def body(whole: tuple[Array, Array], start: Array) -> tuple[tuple[Array, Array], None]:
        part = chunk(*(lax.dynamic_slice_in_dim(x, start, size) for x in (z, z_ref, weights)))
        put = [lax.dynamic_update_slice_in_dim(a, b, start, 0) for a, b in zip(whole, part, strict=True)]
        return (put[0], put[1]), None

    empty = vary_together((jnp.zeros((rows,), dtype), jnp.zeros_like(z), z))[:2]
    return lax.scan(body, empty, _chunks(rows, size))[0]
