"""token_statistics by a scan over blocks of the vocabulary, closed-form VJP: portable XLA, no [N, V] array.

Forward: one sweep, one matrix product per head. Backward: the logits of each block are computed again, the gradient of
the block is closed form, and two more products give the cotangents of hidden states and head. Total variation needs
both normalisers first and costs a second sweep; `log_min_p` needs the largest logit first and costs one more product
with the policy's head.

Memory: a few blocks of logits (2 MiB each on CPU, 256 MiB on accelerators: blocks.py), and in the backward pass the
cotangent of the hidden states in the accumulator's type.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from jaxrl_kernels import tuned
from jaxrl_kernels._token_statistics.blocks import Logits
from jaxrl_kernels._token_statistics.blocks import accumulator
from jaxrl_kernels._token_statistics.blocks import block_size
from jaxrl_kernels._token_statistics.blocks import fold
from jaxrl_kernels._token_statistics.blocks import head_cotangent
from jaxrl_kernels._token_statistics.blocks import matmul
from jaxrl_kernels._token_statistics.blocks import promoted
from jaxrl_kernels._token_statistics.closed_form import Constants
from jaxrl_kernels._token_statistics.closed_form import Variation
from jaxrl_kernels._token_statistics.closed_form import logit_gradient
from jaxrl_kernels._token_statistics.closed_form import variation
from jaxrl_kernels._token_statistics.streaming import Summary
from jaxrl_kernels._token_statistics.streaming import combine
from jaxrl_kernels._token_statistics.streaming import summarise
from jaxrl_kernels._token_statistics.vjp import Engine
from jaxrl_kernels._token_statistics.vjp import Plan
from jaxrl_kernels._token_statistics.vjp import live_rows
from jaxrl_kernels._token_statistics.vjp import without_idle_reference


def columns(op: str, block: int | None, rows: int, width: int, vocabulary: int, dtypes: tuple[jnp.dtype, ...]) -> int:
    """Columns of a block for a given `block` argument."""
    if block is None:
        platform = jax.default_backend()
        if op == "token_loss" and platform != "cpu":
            return vocabulary  # a tile of rows is one block there: xla_loss.py
        size = block_size(rows, vocabulary, accumulator(*dtypes).itemsize, platform)
        return tuned.block(op, rows, width, vocabulary, promoted(*dtypes)) or size
    if block < 1:
        raise ValueError(f"{op}: block must be at least 1 column, not {block}.")
    return min(block, vocabulary)


def summary(plan: Plan, logits: Logits, targets: Array, wanted: tuple[str, ...], floor: Array | None) -> Summary:
    """Summary of the whole vocabulary, in one sweep."""
    layout = plan.layout

    def step(start: int | Array, size: int) -> Summary:
        top_k = plan.top_k if "top_k_mass" in wanted else None
        pair = logits.block(layout, start, size)
        return summarise(*pair, targets, start, wanted, floor, top_k=top_k, sparse=logits.sparse)

    return fold(layout, step, combine)


def total_variation(plan: Plan, logits: Logits, constants: Constants) -> Variation:
    """The sums that need both normalisers first, in a sweep of their own."""

    def step(start: int | Array, size: int) -> Variation:
        z, z_ref = logits.block(plan.layout, start, size)
        assert z_ref is not None
        return variation(z, z_ref, constants)

    return fold(plan.layout, step, lambda a, b: jax.tree.map(jnp.add, a, b))


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
    row = live_rows(constants, cotangent)[:, None]

    def gradient(start: int | Array, size: int) -> Array:
        z, z_ref = logits.block(plan.layout, start, size)
        g = logits.pulled(logit_gradient(z, z_ref, targets, start, constants, cotangent), z)
        return jnp.where(row, g, jnp.zeros((), g.dtype)).astype(logits.hidden.dtype)

    hidden = jnp.where(row, logits.hidden, jnp.zeros((), logits.hidden.dtype))
    return pulled_back(plan, hidden, logits.head, gradient, logits.dtype, head_gradient=head_gradient)


def pulled_back(
    plan: Plan,
    hidden: Array,
    head: Array,
    gradient: Callable[[int | Array, int], Array],
    dtype: jnp.dtype,
    *,
    head_gradient: bool,
) -> tuple[Array, Array | None]:
    """Cotangents of hidden and (if asked for) head from gradient(start, size): that of a block of logits, [N, size].

    Rows of `hidden` that have no gradient must be finite: they are multiplied by zeros.
    """
    layout, axis = plan.layout, plan.layout.vocabulary_axis
    hidden_t = hidden.T

    def step(start: int | Array, size: int) -> tuple[Array, Array | None]:
        g = gradient(start, size)
        block = lax.dynamic_slice_in_dim(head, start, size, axis=axis)
        d_hidden = matmul(g, block, (1, axis), dtype)
        if not head_gradient:
            return d_hidden, None
        return d_hidden, head_cotangent(hidden_t, g, axis, dtype).astype(head.dtype)

    last, size = layout.last
    d_hidden, d_last = step(last, size)
    d_head = None
    if d_last is not None:
        padding = [(0, 0, 0), (0, 0, 0)]
        padding[axis] = (last, 0, 0)
        d_head = lax.pad(d_last, jnp.zeros((), head.dtype), padding)

    def body(carry: tuple[Array, Array | None], index: Array) -> tuple[tuple[Array, Array | None], None]:
        total, whole = carry
        start = index * layout.size
        part, d_block = step(start, layout.size)
        if whole is not None and d_block is not None:
            whole = lax.dynamic_update_slice_in_dim(whole, d_block, start, axis=axis)
        return (total + part, whole), None

    if layout.full:
        (d_hidden, d_head), _ = lax.scan(body, (d_hidden, d_head), jnp.arange(layout.full, dtype=jnp.int32))
    return d_hidden.astype(hidden.dtype), d_head


ENGINE = Engine(columns, summary, total_variation, backward)
