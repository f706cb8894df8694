"""The grouped product as one batched product: every group is filled up to whole blocks of rows.

For platforms whose `ragged_dot` is dense and on which a loop of unknown length is slow. Blocks hold the mean number of
rows of a group, so there are at most twice as many blocks as groups, and as much memory for copies of the weights.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array
from jaxtyping import Bool
from jaxtyping import Float
from jaxtyping import Int

from jaxrl_kernels._token_statistics.blocks import accumulator

STEP = 16
"""Blocks have a multiple of this many rows, as tensor cores like them."""

Rows = Float[Array, "N _"]


class Plan(NamedTuple):
    """Which rows a block holds: its group, the row of each place and whether there is one, the place of each row."""

    group: Int[Array, " blocks"]
    row: Int[Array, "blocks height"]
    filled: Bool[Array, "blocks height"]
    place: Int[Array, " N"]


def _group(ends: Array, index: Array) -> Array:
    """The group that each index lies in; beyond the last group, that one."""
    found = jnp.searchsorted(ends, index, side="right", method="compare_all")
    return jnp.minimum(found.astype(jnp.int32), ends.shape[0] - 1)


def _plan(rows: int, sizes: Array) -> Plan:
    groups = sizes.shape[0]
    height = -(-rows // (groups * STEP)) * STEP
    count = rows // height + groups
    ends, last = jnp.cumsum(sizes), jnp.cumsum(-(-sizes // height))
    # Blocks and rows beyond the last group are masked.
    block = jnp.arange(count, dtype=jnp.int32)
    group = _group(last, block)
    before = last - -(-sizes // height)
    row = (ends - sizes)[group] + (block - before[group]) * height
    row = row[:, None] + jnp.arange(height, dtype=jnp.int32)[None, :]
    filled = row < ends[group][:, None]
    index = jnp.arange(rows, dtype=jnp.int32)
    of_row = _group(ends, index)
    place = before[of_row] * height + index - (ends - sizes)[of_row]
    return Plan(group, jnp.minimum(row, rows - 1), filled, jnp.minimum(place, count * height - 1))


def _gathered(x: Array, plan: Plan) -> Array:
    return jnp.where(plan.filled[:, :, None], x[plan.row], jnp.zeros((), x.dtype))


def _batched(x: Array, y: Array, contract: tuple[int, int]) -> Array:
    precision = lax.Precision.DEFAULT if x.dtype in (jnp.bfloat16, jnp.float16) else lax.Precision.HIGHEST
    dimensions = (((contract[0],), (contract[1],)), ((0,), (0,)))
    return lax.dot_general(x, y, dimensions, precision=precision, preferred_element_type=accumulator(x.dtype))


def products(x: Rows, weights: Float[Array, "E _ _"], sizes: Int[Array, " E"], *, transposed: bool) -> Rows:
    """As `xla.products`."""
    plan = _plan(x.shape[0], sizes)
    blocks = _batched(_gathered(x, plan), weights[plan.group], (2, 2 if transposed else 1)).astype(x.dtype)
    out = blocks.reshape(-1, blocks.shape[2])[plan.place]
    inside = jnp.arange(x.shape[0], dtype=jnp.int32) < jnp.sum(sizes, dtype=jnp.int32)
    return jnp.where(inside[:, None], out, jnp.zeros((), x.dtype))


def weight_gradient(x: Rows, dy: Rows, sizes: Int[Array, " E"]) -> Float[Array, "E _ _"]:
    """As `xla.weight_gradient`."""
    plan = _plan(x.shape[0], sizes)
    blocks = _batched(_gathered(x, plan), _gathered(dy, plan), (1, 1))
    total = jax.ops.segment_sum(blocks, plan.group, sizes.shape[0], indices_are_sorted=True)
    return total.astype(x.dtype)
