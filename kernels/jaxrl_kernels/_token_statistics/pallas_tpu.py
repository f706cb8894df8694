"""token_statistics as Mosaic TPU kernels: logits live in VMEM, one tile of rows and columns at a time.

Four kernels share one way of making a tile of logits: the summary of the vocabulary (rows outer, columns inner, the
summary carried in its output block), the sums of the total variation, the cotangent of the hidden states (rows outer)
and that of the head (columns outer). Both backward kernels compute the logits again. What a tile contributes and what
its gradient is are the functions of streaming.py and closed_form.py, so the kernels hold no formula of their own.

A tile may stick out of the arrays, and what is read there is undefined: columns beyond the vocabulary get a logit that
no weight survives, rows beyond the last write nowhere and, where they would be summed over, count as rows without a
cotangent.
"""

import math
from collections.abc import Callable
from typing import Any
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array

from jaxrl_kernels._token_statistics.blocks import Logits
from jaxrl_kernels._token_statistics.blocks import matmul
from jaxrl_kernels._token_statistics.closed_form import Constants
from jaxrl_kernels._token_statistics.closed_form import Variation
from jaxrl_kernels._token_statistics.closed_form import logit_gradient
from jaxrl_kernels._token_statistics.closed_form import variation
from jaxrl_kernels._token_statistics.elementary import across
from jaxrl_kernels._token_statistics.streaming import Summary
from jaxrl_kernels._token_statistics.streaming import combine
from jaxrl_kernels._token_statistics.streaming import summarise
from jaxrl_kernels._token_statistics.types import Reference
from jaxrl_kernels._token_statistics.types import ReferenceLogits
from jaxrl_kernels._token_statistics.vjp import Engine
from jaxrl_kernels._token_statistics.vjp import Plan
from jaxrl_kernels._token_statistics.vjp import live_rows
from jaxrl_kernels._token_statistics.vjp import without_idle_reference

LANES = 128
"""Columns of a TPU vector register; tiles of columns are multiples of it."""

NOTHING = -1e30
"""Logit of a column beyond the vocabulary: e^(NOTHING - m) is 0, and nothing that multiplies it is infinite."""

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


def columns(op: str, block: int | None, rows: int, vocabulary: int, dtypes: tuple[Any, ...]) -> int:
    """Columns of a tile for a given `block` argument (0: to be chosen); raise on what the kernels cannot do."""
    del rows
    refused = [dtype for dtype in dtypes if dtype not in (jnp.bfloat16, jnp.float32, jnp.float64)]
    if refused:
        raise NotImplementedError(
            f"{op}: implementation 'pallas_tpu' takes bfloat16 and float32 arrays, not {refused[0]}; choose 'xla'."
        )
    if block is not None and (block < 1 or block % LANES):
        raise ValueError(
            f"{op}: block must be a multiple of {LANES} columns for implementation 'pallas_tpu', not {block}."
        )
    return 0 if block is None else min(block, math.ceil(vocabulary / LANES) * LANES)


def _case(plan: Plan, logits: Logits, accumulated: str) -> Case:
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


def _call(case: Case, kernel: Callable, operands: Operands, *, by_rows: bool, out, products: int, name: str) -> Array:
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
    size = case.count * case.vocabulary
    with_head = isinstance(reference, Reference)
    depth = operands.hidden.shape[1] + (reference.hidden.shape[1] if with_head else 0)
    again = case.row_tiles if by_rows else 1
    head_bytes = operands.head.nbytes + (reference.head.nbytes if with_head else 0)
    head_bytes += reference.logits.nbytes // again if isinstance(reference, ReferenceLogits) else 0
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
        cost_estimate=pl.CostEstimate(
            flops=2 * size * (depth + products * operands.hidden.shape[1]),
            transcendentals=(1 if reference is None else 4) * size,
            bytes_accessed=again * head_bytes + (1 if by_rows else case.column_tiles) * operands.hidden.nbytes,
        ),
        name=f"token_statistics_{name}",
    )(operands)


def _shaped(like: Array, shape: tuple[int, ...], dtype) -> jax.ShapeDtypeStruct:
    """Shape of an output that varies over the same mesh axes as `like` inside a shard_map."""
    return jax.ShapeDtypeStruct(shape, dtype, manual_axis_type=jax.typeof(like).manual_axis_type)


def _pack(rows: Any, dtype) -> Array | None:
    leaves = [leaf.astype(dtype) for leaf in jax.tree.leaves(rows)]
    return jnp.stack(leaves, axis=1) if leaves else None


def _unpack(like: Any, block: Any) -> Any:
    leaves, structure = jax.tree.flatten(like)
    return jax.tree.unflatten(structure, [block[:, k] for k in range(len(leaves))])


def _operands(logits: Logits, targets: Array, rows: Any) -> Operands:
    return Operands(
        logits.hidden, logits.head, logits.reference, targets.astype(jnp.int32)[:, None], _pack(rows, logits.dtype)
    )


def _scales(logits: Logits) -> Array | None:
    inverse = logits.inverse_temperature
    return None if inverse is None else jnp.broadcast_to(inverse, (logits.hidden.shape[0], 1))[:, 0]


def _tile(case: Case, operands: Operands, inverse, j) -> tuple[Array, Array | None]:
    """Logits of one tile, those beyond the vocabulary without weight."""
    shape = (case.rows, case.columns)

    def logits(hidden, head) -> Array:
        z = matmul(hidden[...], head[...], (1, 1 - case.axis), case.dtype)
        if case.soft_cap is not None:
            z = case.soft_cap * jnp.tanh(z / case.soft_cap)
        return finished(z)

    def finished(z: Array) -> Array:
        if inverse is not None:
            z = z * across(inverse, z)
        if case.ragged:
            beyond = lax.broadcasted_iota(jnp.int32, shape, 1) >= case.vocabulary - j * case.columns
            z = jnp.where(beyond, jnp.asarray(NOTHING, case.dtype), z)
        return z

    z = logits(operands.hidden, operands.head)
    if isinstance(operands.reference, ReferenceLogits):
        return z, finished(operands.reference.logits[...].astype(case.dtype))
    return z, None if operands.reference is None else logits(*operands.reference)


def _carried(
    case: Case, like: Any, logits: Logits, targets: Array, rows: Any, tile: Callable, join: Callable, name: str
):
    """Fold tile(z, z_ref, targets, start, row constants) over the columns with `join`; `like` is the result's tree."""
    fields = len(jax.tree.leaves(like))

    def kernel(operands: Operands, out) -> None:
        j = pl.program_id(1)
        given = {} if operands.rows is None else _unpack(rows, operands.rows)
        z, z_ref = _tile(case, operands, given.get("inverse"), j)
        part = tile(z, z_ref, operands.targets[:, 0], j * case.columns, given)

        def write(state) -> None:
            for k, leaf in enumerate(jax.tree.leaves(state)):
                out[:, k : k + 1] = leaf[:, None]

        @pl.when(j == 0)
        def _first() -> None:
            write(part)

        @pl.when(j > 0)
        def _next() -> None:
            write(join(_unpack(like, out), part))

    where = ((case.count, fields), (case.rows, fields), lambda i, j: (i, ZERO), case.dtype, False)
    packed = _call(case, kernel, _operands(logits, targets, rows), by_rows=True, out=where, products=0, name=name)
    return _unpack(like, packed)


def summary(plan: Plan, logits: Logits, targets: Array, wanted: tuple[str, ...], floor: Array | None) -> Summary:
    """Summary of the whole vocabulary, in one sweep."""
    case = _case(plan, logits, "nothing")
    rows = {"floor": floor, "inverse": _scales(logits)}

    def tile(z, z_ref, targets, start, given) -> Summary:
        return summarise(z, z_ref, targets, start, wanted, given.get("floor"), in_kernel=True)

    block = jax.ShapeDtypeStruct((case.rows, case.columns), case.dtype)
    row = jax.ShapeDtypeStruct((case.rows,), case.dtype)
    like = jax.eval_shape(
        lambda z, z_ref, targets, given: tile(z, z_ref, targets, 0, given),
        block,
        None if logits.reference is None else block,
        jax.ShapeDtypeStruct((case.rows,), jnp.int32),
        {name: None if value is None else row for name, value in rows.items()},
    )
    return _carried(case, like, logits, targets, rows, tile, combine, "summary")


def total_variation(plan: Plan, logits: Logits, constants: Constants) -> Variation:
    """The sums that need both normalisers first, in a sweep of their own."""
    case = _case(plan, logits, "nothing")
    rows = {"constants": constants, "inverse": _scales(logits)}

    def tile(z, z_ref, _targets, _start, given) -> Variation:
        return variation(z, z_ref, given["constants"])

    def join(a: Variation, b: Variation) -> Variation:
        return jax.tree.map(jnp.add, a, b)

    targets = jnp.zeros(logits.hidden.shape[:1], jnp.int32)
    return _carried(case, Variation(*"ab"), logits, targets, rows, tile, join, "total_variation")  # pyright: ignore


def _gradient_tile(case: Case, operands: Operands, given: dict, i, j) -> Array:
    """Gradient of one tile of logits, in the dtype of the hidden states; zero for rows without a cotangent."""
    z, z_ref = _tile(case, operands, given.get("inverse"), j)
    g = logit_gradient(z, z_ref, operands.targets[:, 0], j * case.columns, given["constants"], given["cotangent"])
    inverse = None if given.get("inverse") is None else across(given["inverse"], g)
    if case.soft_cap is not None:
        capped = z if inverse is None else z / inverse
        g = g * (1 - jnp.square(capped / case.soft_cap))
    if inverse is not None:
        g = g * inverse
    keep = _live(case, given, g, i)
    if case.ragged:
        column = lax.broadcasted_iota(jnp.int32, g.shape, 1)
        keep = keep & (column < case.vocabulary - j * case.columns)
    return jnp.where(keep, g, jnp.zeros((), g.dtype)).astype(operands.hidden.dtype)


def _live(case: Case, given: dict, like: Array, i) -> Array:
    """Where a block with the rows of tile i belongs to rows that exist and have a cotangent."""
    live = across(given["live"], like) > 0
    if case.count % case.rows:
        live = live & (lax.broadcasted_iota(jnp.int32, like.shape, 0) < case.count - i * case.rows)
    return live


def _summed(kernel_step: Callable, inner: int, steps: int) -> Callable:
    """A kernel that adds kernel_step(operands) over the inner grid dimension."""

    def kernel(operands: Operands, out, total) -> None:
        step = pl.program_id(inner)

        @pl.when(step == 0)
        def _clear() -> None:
            total[...] = jnp.zeros(total.shape, total.dtype)

        total[...] += kernel_step(operands)

        @pl.when(step == steps - 1)
        def _write() -> None:
            out[...] = total[...].astype(out.dtype)

    return kernel


def backward(
    plan: Plan,
    logits: Logits,
    targets: Array,
    constants: Constants,
    cotangent: dict[str, Array],
    *,
    head_gradient: bool,
) -> tuple[Array, Array | None]:
    """Cotangents of hidden and (if asked for) head."""
    logits = without_idle_reference(logits, cotangent)
    rows = {
        "constants": constants, "cotangent": cotangent, "inverse": _scales(logits), "live": live_rows(cotangent)
    }  # fmt: skip
    operands = _operands(logits, targets, rows)
    d_hidden = _hidden_cotangent(_case(plan, logits, "hidden"), operands, rows)
    return d_hidden, _head_cotangent(_case(plan, logits, "head"), operands, rows) if head_gradient else None


def _hidden_cotangent(case: Case, operands: Operands, rows: dict) -> Array:
    def step(refs: Operands) -> Array:
        i, j = pl.program_id(0), pl.program_id(1)
        g = _gradient_tile(case, refs, _unpack(rows, refs.rows), i, j)
        head = refs.head[...]
        if case.ragged:
            # g is zero beyond the vocabulary, but zero times what happens to lie there need not be.
            column = lax.broadcasted_iota(jnp.int32, head.shape, case.axis)
            head = jnp.where(column < case.vocabulary - j * case.columns, head, jnp.zeros((), head.dtype))
        return matmul(g, head, (1, case.axis), case.dtype)

    width = operands.hidden.shape[1]
    out = ((case.count, width), (case.rows, width), lambda i, j: (i, ZERO), operands.hidden.dtype, True)
    kernel = _summed(step, 1, case.column_tiles)
    return _call(case, kernel, operands, by_rows=True, out=out, products=1, name="hidden_cotangent")


def _head_cotangent(case: Case, operands: Operands, rows: dict) -> Array:
    def step(refs: Operands) -> Array:
        i, j = pl.program_id(1), pl.program_id(0)
        given = _unpack(rows, refs.rows)
        g = _gradient_tile(case, refs, given, i, j)
        hidden = refs.hidden[...].astype(case.dtype)
        hidden = jnp.where(_live(case, given, hidden, i), hidden, jnp.zeros((), hidden.dtype)).astype(g.dtype)
        return matmul(hidden, g, (0, 0), case.dtype) if case.axis == 1 else matmul(g, hidden, (0, 0), case.dtype)

    shape = operands.head.shape
    if case.axis == 1:
        out = (shape, (shape[0], case.columns), lambda i, j: (ZERO, j), operands.head.dtype, True)
    else:
        out = (shape, (case.columns, shape[1]), lambda i, j: (j, ZERO), operands.head.dtype, True)
    kernel = _summed(step, 1, case.row_tiles)
    return _call(case, kernel, operands, by_rows=False, out=out, products=1, name="head_cotangent")


ENGINE = Engine(columns, summary, total_variation, backward)
