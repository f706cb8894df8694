"""Tiles of the Mosaic TPU kernels: how large they are, what each reads, and the call over all of them."""

import math
from collections.abc import Callable
from typing import Any
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array

from jaxrl_kernels._token_statistics.blocks import Logits
from jaxrl_kernels._token_statistics.types import Reference
from jaxrl_kernels._token_statistics.types import ReferenceLogits
from jaxrl_kernels._token_statistics.vjp import Plan

LANES = 128
"""Columns of a TPU vector register; tiles of columns are multiples of it."""

TILES = ((256, 512), (256, 256), (128, 256), (128, 128))
"""(rows, columns) to choose from, the largest that fits. Not measured: 256 rows per pass over the head keep the matrix
unit of v5e and v5p busier than their memory; wider tiles compile for minutes."""

TILE_BYTES = 32 * 2**20
"""What the blocks and intermediate tiles of one kernel may take together."""

VMEM_BYTES = 60 * 2**20
"""Limit given to the compiler, under the 64 MiB of the smallest vector memory among v5p, v5e, v6e and 7x."""

ZERO = np.int32(0)  # an index map that returns a plain 0 makes an int64 under jax_enable_x64, which Mosaic refuses


class Operands(NamedTuple):
    """What every kernel reads; arrays outside, references inside."""

    hidden: Any
    head: Any
    reference: Reference | ReferenceLogits | None
    targets: Any  # [N, 1]
    rows: Any  # [N, K] row constants, or None


class Case(NamedTuple):
    """Static description of one kernel call."""

    axis: int
    vocabulary: int
    count: int  # rows
    rows: int  # of a tile
    columns: int  # of a tile
    dtype: Any
    soft_cap: float | None

    @property
    def row_tiles(self) -> int:
        return math.ceil(self.count / self.rows)

    @property
    def column_tiles(self) -> int:
        return math.ceil(self.vocabulary / self.columns)

    @property
    def ragged(self) -> bool:
        """Whether the last tile of columns sticks out of the vocabulary."""
        return self.vocabulary % self.columns != 0


def choose(plan: Plan, logits: Logits, accumulated: str) -> Case:
    """The largest tiles that fit; `accumulated` names what the kernel sums besides logits: nothing, hidden or head."""
    axis, vocabulary, fixed = plan.layout
    heads = [(logits.hidden, logits.head)]
    if isinstance(logits.reference, Reference):
        heads.append((logits.reference.hidden, logits.reference.head))
    itemsize = jnp.dtype(logits.dtype).itemsize
    count, width = logits.hidden.shape
    summed = width * (itemsize + 2 * logits.hidden.dtype.itemsize)

    def taken(rows: int, columns: int) -> int:
        # Inputs and outputs are double-buffered.
        read = sum(2 * x.shape[1] * (rows * x.dtype.itemsize + columns * w.dtype.itemsize) for x, w in heads)
        extra = {"nothing": 0, "hidden": rows * summed, "head": columns * summed}[accumulated]
        return read + extra + 12 * rows * columns * itemsize

    height = max(16, math.ceil(count / 16) * 16)
    choices = [(min(r, height), min(c, math.ceil(vocabulary / LANES) * LANES)) for r, c in TILES]
    if fixed:
        choices = [(rows, fixed) for rows, _ in choices]
    rows, columns = next((choice for choice in choices if taken(*choice) <= TILE_BYTES), choices[-1])
    return Case(axis, vocabulary, count, rows, columns, logits.dtype, plan.soft_cap)


def call(case: Case, kernel: Callable, operands: Operands, *, by_rows: bool, out, products: int, name: str) -> Array:
    """Run `kernel(operands, out[, sum])` over all tiles; `out` is (shape, block shape, block index, dtype, summed)."""
    shape, block, at_tile, dtype, summed = out
    if case.count == 0:
        return jnp.zeros(shape, dtype)

    def spec(block: tuple[int, int], index: Callable) -> pl.BlockSpec:
        return pl.BlockSpec(block, (lambda i, j: index(i, j)) if by_rows else (lambda j, i: index(i, j)))

    def rows_of(x: Array) -> pl.BlockSpec:
        return spec((case.rows, x.shape[1]), lambda i, j: (i, ZERO))

    def columns_of(w: Array) -> pl.BlockSpec:
        if case.axis == 1:
            return spec((w.shape[0], case.columns), lambda i, j: (ZERO, j))
        return spec((case.columns, w.shape[1]), lambda i, j: (j, ZERO))

    reference = operands.reference
    other: Any = reference and Reference(rows_of(reference[0]), columns_of(reference[-1]))  # pyright: ignore
    if isinstance(reference, ReferenceLogits):
        other = ReferenceLogits(spec((case.rows, case.columns), lambda i, j: (i, j)))  # pyright: ignore
    specs = Operands(
        rows_of(operands.hidden),
        columns_of(operands.head),
        other,
        rows_of(operands.targets),
        None if operands.rows is None else rows_of(operands.rows),
    )
    grid = (case.row_tiles, case.column_tiles) if by_rows else (case.column_tiles, case.row_tiles)
    return pl.pallas_call(
        kernel,
        grid=grid,
        in_specs=(specs,),
        out_specs=spec(block, at_tile),
        out_shape=_shaped(operands.hidden, shape, dtype),
        scratch_shapes=(pltpu.VMEM(block, case.dtype),) if summed else (),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=VMEM_BYTES
        ),
        cost_estimate=_cost(case, operands, by_rows, products),
        name=f"token_statistics_{name}",
    )(operands)


def _cost(case: Case, operands: Operands, by_rows: bool, products: int) -> pl.CostEstimate:
    """Work and traffic of a call, for XLA's scheduler."""
    size, reference, width = case.count * case.vocabulary, operands.reference, operands.hidden.shape[1]
    depth, head_bytes, fixed_bytes = width, operands.head.nbytes, 0
    if isinstance(reference, Reference):
        depth += reference.hidden.shape[1]
        head_bytes += reference.head.nbytes
    elif reference is not None:
        fixed_bytes = reference.logits.nbytes
    sweeps = (case.row_tiles, 1) if by_rows else (1, case.column_tiles)
    return pl.CostEstimate(
        flops=2 * size * (depth + products * width),
        transcendentals=(1 if reference is None else 4) * size,
        bytes_accessed=sweeps[0] * head_bytes + sweeps[1] * operands.hidden.nbytes + fixed_bytes,
    )


def _shaped(like: Array, shape: tuple[int, ...], dtype) -> jax.ShapeDtypeStruct:
    """Shape of an output that varies over the same mesh axes as `like` inside a shard_map."""
    return jax.ShapeDtypeStruct(shape, dtype, manual_axis_type=jax.typeof(like).manual_axis_type)
