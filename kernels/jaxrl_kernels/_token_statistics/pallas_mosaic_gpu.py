"""token_statistics forward as a Mosaic GPU kernel (Hopper, jax 0.11 or newer): logits live in the accumulators of the
tensor cores and never reach memory. Backward a second kernel makes the gradient of wide blocks of logits the same way,
and XLA the two products with it.

mosaic_gpu_tiles.py and mosaic_gpu_sweep.py hold the kernels; what a tile contributes, how contributions join, and the
gradient are the functions of streaming.py and closed_form.py.

Precision: bfloat16 products accumulate in float32. The tensor cores have no float32 product (theirs would be TF32, with
11 bits), so float32 operands are cut into three bfloat16 parts that hold all 24 bits, and six of the nine products of
parts are summed, the small ones first: what is left out is below 2^-24 of a term. That costs six times the work.

The kernel reads bfloat16 heads in place, [D, V] and [V, D] alike, if they consist of whole tiles of shared memory: the
second axis divisible by 64, the first by 8. Other heads are copied block by block of the vocabulary; hidden states are
copied as a whole.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from jaxrl_kernels import _dispatch
from jaxrl_kernels._token_statistics import xla
from jaxrl_kernels._token_statistics.blocks import ACCELERATOR_BLOCK_BYTES
from jaxrl_kernels._token_statistics.blocks import Layout
from jaxrl_kernels._token_statistics.blocks import Logits
from jaxrl_kernels._token_statistics.blocks import fold
from jaxrl_kernels._token_statistics.closed_form import Constants
from jaxrl_kernels._token_statistics.closed_form import Variation
from jaxrl_kernels._token_statistics.closed_form import logit_gradient
from jaxrl_kernels._token_statistics.closed_form import variation
from jaxrl_kernels._token_statistics.elementary import across
from jaxrl_kernels._token_statistics.mosaic_gpu_sweep import SLICE
from jaxrl_kernels._token_statistics.mosaic_gpu_sweep import gradient
from jaxrl_kernels._token_statistics.mosaic_gpu_sweep import sweep
from jaxrl_kernels._token_statistics.mosaic_gpu_tiles import ROWS
from jaxrl_kernels._token_statistics.mosaic_gpu_tiles import STEP
from jaxrl_kernels._token_statistics.mosaic_gpu_tiles import TILES
from jaxrl_kernels._token_statistics.mosaic_gpu_tiles import Case
from jaxrl_kernels._token_statistics.mosaic_gpu_tiles import Head
from jaxrl_kernels._token_statistics.mosaic_gpu_tiles import padded_rows
from jaxrl_kernels._token_statistics.streaming import Summary
from jaxrl_kernels._token_statistics.streaming import combine
from jaxrl_kernels._token_statistics.streaming import summarise
from jaxrl_kernels._token_statistics.types import Reference
from jaxrl_kernels._token_statistics.types import ReferenceLogits
from jaxrl_kernels._token_statistics.vjp import Engine
from jaxrl_kernels._token_statistics.vjp import Plan
from jaxrl_kernels._token_statistics.vjp import live_rows
from jaxrl_kernels._token_statistics.vjp import without_idle_reference

COPIED = 2048
"""Columns per block of a head that the kernel cannot read in place."""

PARTS = 3
"""bfloat16 numbers that add up to a float32."""

PRODUCTS = ((0, 2), (2, 0), (1, 1), (0, 1), (1, 0), (0, 0))
"""(part of the hidden states, part of the head) whose products are summed, in this order."""


def preferred(logits: Logits) -> bool:
    """Whether this is what runs by default on one Hopper GPU: bfloat16 heads that are read in place.

    On an H200 it is then a seventh faster than "xla" forward, and 8 % forward and backward. float32, at six products
    for one, is slower.
    """
    return not isinstance(logits.reference, ReferenceLogits) and _in_place(_pairs(logits))


def columns(op: str, block: int | None, rows: int, width: int, vocabulary: int, dtypes: tuple[Any, ...]) -> int:
    """Columns of a block of the backward pass for a given `block` argument; raise on what the kernel cannot do."""
    del width
    if _dispatch.VERSION < _dispatch.NEEDS:
        raise NotImplementedError(
            f"{op}: implementation 'pallas_mosaic_gpu' needs jax 0.11 or newer, not {jax.__version__}; choose 'xla'."
        )
    refused = [dtype for dtype in dtypes if dtype not in (jnp.bfloat16, jnp.float32)]
    if refused:
        raise NotImplementedError(
            f"{op}: implementation 'pallas_mosaic_gpu' takes bfloat16 and float32 arrays, not {refused[0]}; choose "
            f"'xla'."
        )
    if block is None:
        widest = TILES[1][0]
        block = max(widest, ACCELERATOR_BLOCK_BYTES // (max(rows, 1) * 4) // widest * widest)
    elif block < 1 or block % STEP:
        raise ValueError(
            f"{op}: block must be a multiple of {STEP} columns for implementation 'pallas_mosaic_gpu', not {block}."
        )
    return min(block, vocabulary)


def _pairs(logits: Logits) -> list[Head]:
    pairs = [Head(logits.hidden, logits.head)]
    if logits.reference is None:
        return pairs
    if not isinstance(logits.reference, Reference):
        raise NotImplementedError(
            "implementation 'pallas_mosaic_gpu' compares with a reference's hidden states and head; for its logits "
            "choose 'xla'."
        )
    return [*pairs, Head(*logits.reference)]


def _padded(x: Array, axis: int | None = None) -> Array:
    """x filled up with zeros to whole tiles of shared memory, 8 by 64, and to whole steps along `axis`."""
    padding = [(0, -x.shape[0] % (STEP if axis == 0 else 8)), (0, -x.shape[1] % STEP)]
    return jnp.pad(x, padding) if any(after for _, after in padding) else x


def _parts(x: Array, axis: int, count: int) -> Array:
    """bfloat16 parts of x side by side along `axis`, each filled up with zeros to whole steps."""
    rest, parts = _padded(x.astype(jnp.float32), axis), []
    for _ in range(count):
        # A mere cast there and back is something XLA may leave out, and with it the next part.
        part = lax.reduce_precision(rest, 8, 7)
        parts.append(part.astype(jnp.bfloat16))
        rest = rest - part
    return jnp.concatenate(parts, axis)


def _in_place(pairs: list[Head]) -> bool:
    """Whether the kernel reads these heads where they are."""
    narrow = all(x.dtype == jnp.bfloat16 for pair in pairs for x in pair)
    return narrow and all(pair.head.shape[0] % 8 == 0 and pair.head.shape[1] % STEP == 0 for pair in pairs)


def _with_inverse(rows: dict, logits: Logits) -> dict:
    inverse = logits.inverse_temperature
    if inverse is not None:
        inverse = jnp.broadcast_to(inverse, (logits.hidden.shape[0], 1))[:, 0]
    return rows | {"inverse": inverse}


def _swept(plan: Plan, logits: Logits, targets: Array, rows: Any, tile: Callable, join: Callable) -> Any:
    """Fold tile(z, z_ref, targets, start, row constants) over the vocabulary with `join`."""
    rows = _with_inverse(rows, logits)
    z, count = jax.ShapeDtypeStruct((ROWS, SLICE), jnp.float32), logits.hidden.shape[0]
    row, token = (jax.ShapeDtypeStruct((ROWS,), dtype) for dtype in (jnp.float32, jnp.int32))
    z_ref = None if logits.reference is None else z
    like = jax.eval_shape(lambda *x: tile(*x[:3], 0, x[3]), z, z_ref, token, jax.tree.map(lambda _: row, rows))
    if count == 0:
        return jax.tree.map(lambda _: jnp.zeros((0,), jnp.float32), like)
    axis, pairs, targets = plan.layout.vocabulary_axis, _pairs(logits), targets.astype(jnp.int32)
    widths = tuple(pair.hidden.shape[1] for pair in pairs)
    if _in_place(pairs):
        case = Case(axis, plan.layout.vocabulary, count, widths, ((0, 0),), plan.soft_cap)
        heads = [Head(_padded(pair.hidden), pair.head) for pair in pairs]
        return sweep(case, heads, targets, rows, tile, join, like)
    narrow = all(x.dtype == jnp.bfloat16 for pair in pairs for x in pair)
    parts, products = (1, ((0, 0),)) if narrow else (PARTS, PRODUCTS)
    hidden = [_parts(pair.hidden, 1, parts) for pair in pairs]

    def step(start: int | Array, size: int):
        blocks = [lax.dynamic_slice_in_dim(pair.head, start, size, axis=axis) for pair in pairs]
        heads = [_parts(block, 1 - axis, parts) for block in blocks]
        case = Case(axis, size, count, widths, products, plan.soft_cap)
        return sweep(case, [Head(*x) for x in zip(hidden, heads, strict=True)], targets - start, rows, tile, join, like)

    return fold(Layout(axis, plan.layout.vocabulary, min(COPIED, plan.layout.vocabulary)), step, join)


def summary(plan: Plan, logits: Logits, targets: Array, wanted: tuple[str, ...], floor: Array | None) -> Summary:
    """Summary of the whole vocabulary, in one sweep."""

    def tile(z, z_ref, targets, start, given) -> Summary:
        return summarise(z, z_ref, targets, start, wanted, given["floor"], in_kernel=True)

    return _swept(plan, logits, targets, {"floor": floor}, tile, combine)


def total_variation(plan: Plan, logits: Logits, constants: Constants) -> Variation:
    """The sums that need both normalisers first, in a sweep of their own."""

    def tile(z, z_ref, _targets, _start, given) -> Variation:
        return variation(z, z_ref, given["constants"])

    def join(a: Variation, b: Variation) -> Variation:
        return jax.tree.map(jnp.add, a, b)

    targets = jnp.zeros(logits.hidden.shape[:1], jnp.int32)
    return _swept(plan, logits, targets, {"constants": constants}, tile, join)


def backward(
    plan: Plan,
    logits: Logits,
    targets: Array,
    constants: Constants,
    cotangent: dict[str, Array],
    *,
    head_gradient: bool,
) -> tuple[Array, Array | None]:
    """Cotangents of hidden and (if asked for) head: a kernel makes the gradient of a block of logits from the products
    in its accumulators, XLA the two products with it.

    With a reference XLA makes all of it: the kernel's narrower tiles of two heads were 16 % slower on an H200.
    """
    logits = without_idle_reference(logits, cotangent)
    count, own = logits.hidden.shape[0], Head(logits.hidden, logits.head)
    if count == 0 or logits.reference is not None or not _in_place([own]):
        return xla.backward(plan, logits, targets, constants, cotangent, head_gradient=head_gradient)
    axis, targets, cap = plan.layout.vocabulary_axis, targets.astype(jnp.int32), plan.soft_cap
    live = live_rows(constants, cotangent)
    rows = {"constants": constants, "cotangent": cotangent, "live": live.astype(jnp.float32)}
    rows = _with_inverse(rows, logits)

    def tile(z, _, targets, start, given) -> Array:
        g = logit_gradient(z, None, targets, start, given["constants"], given["cotangent"])
        inverse = given["inverse"]
        if cap is not None:
            capped = z if inverse is None else z / across(inverse, z)
            g = g * (1 - (capped / cap) * (capped / cap))
        g = g if inverse is None else g * across(inverse, g)
        return jnp.where(across(given["live"], g) > 0, g, jnp.zeros_like(g))

    hidden = _padded(own.hidden)

    def block_gradient(start: int | Array, size: int) -> Array:
        case = Case(axis, size, count, own.hidden.shape[1:], ((0, 0),), cap)
        block = lax.dynamic_slice_in_dim(own.head, start, size, axis=axis)
        return gradient(case, [Head(hidden, block)], targets - start, rows, tile)

    finite = jnp.where(live[:, None], own.hidden, jnp.zeros((), own.hidden.dtype))
    filled = jnp.pad(finite, ((0, padded_rows(count) - count), (0, 0)))
    d_hidden, d_head = xla.pulled_back(
        plan, filled, own.head, block_gradient, logits.dtype, head_gradient=head_gradient
    )
    return d_hidden[:count], d_head


ENGINE = Engine(columns, summary, total_variation, backward)
