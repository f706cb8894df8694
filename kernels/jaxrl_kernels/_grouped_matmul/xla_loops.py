"""The grouped product on a CPU: a loop over the groups, and in it one over blocks of rows.

A block is read where it lies and its product written where it belongs, so nothing is padded, gathered or scattered, and
what is copied of rows and weights stays in the caches. The rows that are left of a group after its whole blocks go
through the lowest block that holds them. Empty groups cost a comparison.
"""

from functools import partial

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array
from jaxtyping import Float
from jaxtyping import Int

from jaxrl_kernels._token_statistics.blocks import accumulator
from jaxrl_kernels._token_statistics.blocks import matmul
from jaxrl_kernels._token_statistics.blocks import vary_together

HEIGHTS = (16, 32, 64, 96, 128)
"""Rows of a block; whole blocks have the last. Forward and backward in CPU time, timed on a busy Xeon at N = 16384, D =
256, F = 128 of 32 groups: a last height of 256 takes 6 % longer, one of 512 15 % (a block outgrows the caches), and
powers of two alone 5 %."""

Rows = Float[Array, "N _"]


def _heights(rows: int) -> list[int]:
    return sorted({min(height, rows) for height in HEIGHTS})


def _rest(rows: Array, heights: list[int]) -> Array:
    """Which height holds this many rows, from 1 on; 0 where there are none."""
    return jnp.sum(rows > jnp.array([0, *heights[:-1]], jnp.int32), dtype=jnp.int32)


def _slice(x: Array, start: Array, height: int) -> Array:
    return lax.dynamic_slice_in_dim(x, start, height)


def _inside(start: Array, height: int, first: Array, end: Array) -> Array:
    """[height, 1]: whether the rows from `start` on lie in [first, end)."""
    index = start + jnp.arange(height, dtype=jnp.int32)[:, None]
    return (index >= first) & (index < end)


def products(x: Rows, weights: Float[Array, "E _ _"], sizes: Int[Array, " E"], *, transposed: bool) -> Rows:
    """As `xla.products`."""
    rows, dtype = x.shape[0], accumulator(x.dtype)
    heights, ends = _heights(rows), jnp.cumsum(sizes)
    whole = heights[-1]

    def block(start: Array, height: int, weight: Array) -> Array:
        return matmul(_slice(x, start, height), weight, (1, int(transposed)), dtype).astype(x.dtype)

    def fill(out: Array, group: Array) -> Array:
        weight = lax.dynamic_index_in_dim(weights, group, keepdims=False)
        end = ends[group]
        first = end - sizes[group]
        count = sizes[group] // whole

        def body(index: Array, out: Array) -> Array:
            start = first + index * whole
            return lax.dynamic_update_slice_in_dim(out, block(start, whole, weight), start, 0)

        def rest(height: int, out: Array) -> Array:
            # Near the end of the array the block begins earlier, on rows that are there already.
            start = jnp.minimum(first + count * whole, rows - height)
            inside = _inside(start, height, first + count * whole, end)
            both = jnp.where(inside, block(start, height, weight), _slice(out, start, height))
            return lax.dynamic_update_slice_in_dim(out, both, start, 0)

        out = lax.fori_loop(0, count, body, out)
        which = _rest(sizes[group] - count * whole, heights)
        return lax.switch(which, [lambda out: out, *(partial(rest, height) for height in heights)], out)

    def step(group: Array, out: Array) -> Array:
        return lax.cond(sizes[group] > 0, fill, lambda out, _: out, out, group)

    empty = jnp.zeros((rows, weights.shape[1 if transposed else 2]), x.dtype)
    return lax.fori_loop(0, weights.shape[0], step, vary_together((empty, x))[0])


def weight_gradient(x: Rows, dy: Rows, sizes: Int[Array, " E"]) -> Float[Array, "E _ _"]:
    """As `xla.weight_gradient`."""
    rows, dtype = x.shape[0], accumulator(x.dtype)
    heights, ends = _heights(rows), jnp.cumsum(sizes)
    whole = heights[-1]

    def group(_, given: tuple[Array, Array]) -> tuple[None, Array]:
        size, end = given
        first, count = end - size, size // whole

        def body(index: Array, total: Array) -> Array:
            start = first + index * whole
            return total + matmul(_slice(x, start, whole), _slice(dy, start, whole), (0, 0), dtype)

        def rest(height: int) -> Array:
            start = jnp.minimum(first + count * whole, rows - height)
            inside = _inside(start, height, first + count * whole, end)
            # Both are cleared of other groups' rows: these may hold NaN, and 0 * NaN is NaN.
            left, right = (jnp.where(inside, _slice(z, start, height), jnp.zeros((), z.dtype)) for z in (x, dy))
            return matmul(left, right, (0, 0), dtype)

        def nothing() -> Array:
            return vary_together((jnp.zeros((x.shape[1], dy.shape[1]), dtype), x))[0]

        which = _rest(size - count * whole, heights)
        total = lax.switch(which, [nothing, *(partial(rest, height) for height in heights)])
        return None, lax.fori_loop(0, count, body, total).astype(x.dtype)

    return lax.scan(group, None, (sizes, ends))[1]
