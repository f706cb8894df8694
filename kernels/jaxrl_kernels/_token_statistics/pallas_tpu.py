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

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jaxtyping import Array

from jaxrl_kernels._token_statistics.blocks import Logits
from jaxrl_kernels._token_statistics.blocks import matmul
from jaxrl_kernels._token_statistics.closed_form import Constants
from jaxrl_kernels._token_statistics.closed_form import Variation
from jaxrl_kernels._token_statistics.closed_form import logit_gradient
from jaxrl_kernels._token_statistics.closed_form import variation
from jaxrl_kernels._token_statistics.elementary import across
from jaxrl_kernels._token_statistics.mosaic_tpu_tiles import LANES
from jaxrl_kernels._token_statistics.mosaic_tpu_tiles import ZERO
from jaxrl_kernels._token_statistics.mosaic_tpu_tiles import Case
from jaxrl_kernels._token_statistics.mosaic_tpu_tiles import Operands
from jaxrl_kernels._token_statistics.mosaic_tpu_tiles import call
from jaxrl_kernels._token_statistics.mosaic_tpu_tiles import choose
from jaxrl_kernels._token_statistics.streaming import NOTHING
from jaxrl_kernels._token_statistics.streaming import Summary
from jaxrl_kernels._token_statistics.streaming import combine
from jaxrl_kernels._token_statistics.streaming import summarise
from jaxrl_kernels._token_statistics.types import ReferenceLogits
from jaxrl_kernels._token_statistics.vjp import Engine
from jaxrl_kernels._token_statistics.vjp import Plan
from jaxrl_kernels._token_statistics.vjp import live_rows
from jaxrl_kernels._token_statistics.vjp import without_idle_reference


def columns(op: str, block: int | None, rows: int, width: int, vocabulary: int, dtypes: tuple[Any, ...]) -> int:
    """Columns of a tile for a given `block` argument (0: to be chosen); raise on what the kernels cannot do."""
    del rows, width
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


def _pack(rows: Any, dtype) -> Array | None:
    """The numbers of each row side by side, `[N, fields]`; None where there are none."""
    leaves = [leaf.astype(dtype) for leaf in jax.tree.leaves(rows)]
    if not leaves:
        return None
    # Not a stack: its operands, `[N, 1]`, are padded to 128 lanes, and XLA writes some of them out at that size.
    field = lax.broadcasted_iota(jnp.int32, (len(leaves[0]), len(leaves)), 1)
    block = jnp.zeros(field.shape, dtype)
    for k, leaf in enumerate(leaves):
        block = jnp.where(field == k, leaf[:, None], block)
    return block


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
    packed = call(case, kernel, _operands(logits, targets, rows), by_rows=True, out=where, products=0, name=name)
    return _unpack(like, packed)


def summary(plan: Plan, logits: Logits, targets: Array, wanted: tuple[str, ...], floor: Array | None) -> Summary:
    """Summary of the whole vocabulary, in one sweep."""
    case = choose(plan, logits, "nothing")
    rows = {"floor": floor, "inverse": _scales(logits)}

    def tile(z, z_ref, targets, start, given) -> Summary:
        return summarise(z, z_ref, targets, start, wanted, given.get("floor"), in_kernel=True, sparse=logits.sparse)

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
    case = choose(plan, logits, "nothing")
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
    live = live_rows(constants, cotangent)
    rows = {"constants": constants, "cotangent": cotangent, "inverse": _scales(logits), "live": live}
    operands = _operands(logits, targets, rows)
    d_hidden = _hidden_cotangent(choose(plan, logits, "hidden"), operands, rows)
    return d_hidden, _head_cotangent(choose(plan, logits, "head"), operands, rows) if head_gradient else None


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
    return call(case, kernel, operands, by_rows=True, out=out, products=1, name="hidden_cotangent")


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
    return call(case, kernel, operands, by_rows=False, out=out, products=1, name="head_cotangent")


ENGINE = Engine(columns, summary, total_variation, backward)
