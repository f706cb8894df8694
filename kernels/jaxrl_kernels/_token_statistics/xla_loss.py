"""token_loss by tiles of rows and blocks of the vocabulary, the gradient made inside the forward sweep: four matrix
products instead of six.

A tile keeps the logits of its rows while it needs them: one sweep gives the statistics, the loss of the tile and its
cotangents follow at once, and a second sweep over the kept logits adds to the cotangents of hidden states and head. The
backward pass only scales the two. Memory: 2 x tile x V logits with a reference, half without, and the head's cotangent
in the accumulator's type.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from jaxrl_kernels._token_statistics import across_devices
from jaxrl_kernels._token_statistics.blocks import Layout
from jaxrl_kernels._token_statistics.blocks import Logits
from jaxrl_kernels._token_statistics.blocks import accumulator
from jaxrl_kernels._token_statistics.blocks import head_cotangent
from jaxrl_kernels._token_statistics.blocks import matmul
from jaxrl_kernels._token_statistics.blocks import vary_together
from jaxrl_kernels._token_statistics.closed_form import Constants
from jaxrl_kernels._token_statistics.closed_form import Variation
from jaxrl_kernels._token_statistics.closed_form import conclude
from jaxrl_kernels._token_statistics.closed_form import finite_rows
from jaxrl_kernels._token_statistics.closed_form import logit_gradient
from jaxrl_kernels._token_statistics.closed_form import usable
from jaxrl_kernels._token_statistics.closed_form import variation
from jaxrl_kernels._token_statistics.streaming import Summary
from jaxrl_kernels._token_statistics.streaming import combine
from jaxrl_kernels._token_statistics.streaming import summarise
from jaxrl_kernels._token_statistics.types import Reference
from jaxrl_kernels._token_statistics.types import ReferenceLogits
from jaxrl_kernels._token_statistics.types import TokenStatistics
from jaxrl_kernels._token_statistics.vjp import Engine
from jaxrl_kernels._token_statistics.vjp import Plan
from jaxrl_kernels._token_statistics.vjp import statistics

CPU_TILE_ROWS = 512
"""Rows whose logits are kept at a time. Measured on CPU: 256 costs 10 % more time, 1024 gains nothing and doubles the
memory."""

ACCELERATOR_TILE_BYTES = 2**30
"""float32 logits of one head that a tile keeps on other platforms, in one block: 2048 rows of a vocabulary of 131072.
Every tile reads and writes the head's cotangent in float32. On an H200 at N=8192 D=4096 V=131072 that took 42 ms, and
59 ms where such a tile is cut into blocks of 256 MiB."""


class LossPlan(NamedTuple):
    """Static choices of one call; hashable."""

    layout: Layout
    wanted: tuple[str, ...]
    rows: int
    per_token_loss: Callable[..., Array]
    soft_cap: float | None = None
    top_k: int | None = None
    mesh_axis: str | None = None


class Tile(NamedTuple):
    """The rows of one tile: everything that has a row axis."""

    hidden: Array
    hidden_ref: Array | None  # or the numbers of the rows, where the reference is given as logits
    inverse_temperature: Array | None
    targets: Array
    mask: Array
    side_arrays: tuple[Array, ...]


Kept = tuple[Array, Array | None]


def tile_rows(rows: int, vocabulary: int, platform: str) -> int:
    """Rows of a tile: as many as suit the platform at most, the tiles as equal as they can be."""
    most = CPU_TILE_ROWS if platform == "cpu" else max(1, ACCELERATOR_TILE_BYTES // (4 * vocabulary))
    tiles = max(1, math.ceil(rows / most))
    return max(1, math.ceil(rows / tiles))


def _tiles(plan: LossPlan, tile: Tile) -> Tile:
    # [N, ...] -> [tiles, rows, ...]; rows are dealt out in turn so that a sharded row axis stays sharded inside every
    # tile. What is missing to whole tiles is filled with rows outside the mask: their hidden states and cotangents are
    # zero.
    count = math.ceil(tile.mask.shape[0] / plan.rows)

    def cut(x: Array) -> Array:
        padded = jnp.pad(x, [(0, count * plan.rows - x.shape[0])] + [(0, 0)] * (x.ndim - 1))
        return jnp.swapaxes(padded.reshape(plan.rows, count, *x.shape[1:]), 0, 1)

    return jax.tree.map(cut, tile)


def _evaluate(plan: LossPlan, statistics: TokenStatistics, tile: Tile) -> Array:
    # Rows outside the mask are replaced before and after the loss: neither their statistics nor what the loss makes of
    # them counts.
    clean = jax.tree.map(lambda x: jnp.where(tile.mask, x, jnp.zeros((), x.dtype)), statistics)
    losses = plan.per_token_loss(clean, *tile.side_arrays)
    return jnp.sum(jnp.where(tile.mask, losses, jnp.zeros((), losses.dtype)))


def _sweep(
    plan: LossPlan, logits: Logits, tile: Tile, log_min_p: Array | None, *, keep: bool
) -> tuple[TokenStatistics, Constants, Kept | None, Kept]:
    """Statistics, gradient constants and (if kept) the logits of a tile: those of the full blocks, and of the last."""
    layout, axis = plan.layout, plan.mesh_axis
    vocabulary = across_devices.whole_vocabulary(layout.vocabulary, axis)
    targets = across_devices.local_targets(tile.targets, layout.vocabulary, axis)
    top_k = plan.top_k if "top_k_mass" in plan.wanted else None
    keep = keep or log_min_p is not None or "total_variation" in plan.wanted

    def part(pair: Kept, start: int | Array, floor: Array | None) -> Summary:
        return summarise(*pair, targets, start, plan.wanted, floor, top_k=top_k, sparse=logits.sparse)

    def first(start: int | Array, size: int) -> tuple[Summary, Kept]:
        pair = logits.block(layout, start, size)
        if log_min_p is None:
            return part(pair, start, None), pair
        # The safe set needs the largest logit and the whole mass of the policy before anything else.
        return summarise(pair[0], None, targets, start, (), None), pair

    summary, last = first(*layout.last)

    def body(carry: Summary, index: Array):
        found, pair = first(index * layout.size, layout.size)
        return combine(carry, found), pair if keep else None

    kept = floor = whole = None
    if layout.full:
        summary, kept = lax.scan(body, summary, jnp.arange(layout.full, dtype=jnp.int32))
    summary = across_devices.join(summary, axis)
    if log_min_p is not None:
        floor, whole = summary.policy.maximum + log_min_p.astype(logits.dtype), summary.policy.total
        pruned = _fold_kept(layout, kept, last, lambda pair, start: part(pair, start, floor), combine)
        summary = across_devices.join(pruned, axis)
    statistics, constants = conclude(summary, plan.wanted, tile.targets, vocabulary, floor, whole)
    if "total_variation" in plan.wanted:
        sums = _fold_kept(layout, kept, last, lambda pair, _: variation(pair[0], pair[1], constants), _added)
        sums = across_devices.add(sums, axis)
        statistics = statistics._replace(total_variation=sums.distance)
        constants = constants._replace(sign=sums.sign)
    return statistics, constants, kept, last


def _added(a: Variation, b: Variation) -> Variation:
    return jax.tree.map(jnp.add, a, b)


def _fold_kept(layout: Layout, kept: Kept | None, last: Kept, step: Callable, join: Callable):
    """Fold step(pair of logits, start) over the logits of a tile."""
    state = step(last, layout.last[0])
    if kept is None:
        return state

    def body(carry, inputs):
        index, pair = inputs
        return join(carry, step(pair, index * layout.size)), None

    return lax.scan(body, state, (jnp.arange(layout.full, dtype=jnp.int32), kept))[0]


def _tile_gradient(plan: LossPlan, logits: Logits, tile: Tile, log_min_p: Array | None, d_head: Array | None):
    """(loss, cotangent of the tile's hidden states, d_head with the tile's part added)."""
    layout, axis = plan.layout, plan.layout.vocabulary_axis
    values, constants, kept, last = _sweep(plan, logits, tile, log_min_p, keep=True)
    loss, pull = jax.vjp(lambda s: _evaluate(plan, s, tile), values)
    (cotangents,) = pull(jnp.ones_like(loss))
    cotangent = usable(values, cotangents)
    finite = finite_rows(constants)
    targets = across_devices.local_targets(tile.targets, layout.vocabulary, plan.mesh_axis)
    hidden = logits.hidden
    hidden_t = jnp.where(finite, hidden.T, jnp.zeros((), hidden.dtype))

    def step(pair: Kept, start: int | Array, d_head: Array | None):
        size = pair[0].shape[1]
        g = logits.pulled(logit_gradient(*pair, targets, start, constants, cotangent), pair[0])
        g = jnp.where(finite[:, None], g, jnp.zeros((), g.dtype)).astype(hidden.dtype)
        block = lax.dynamic_slice_in_dim(logits.head, start, size, axis=axis)
        if d_head is not None:
            old = lax.dynamic_slice_in_dim(d_head, start, size, axis=axis)
            new = old + head_cotangent(hidden_t, g, axis, logits.dtype)
            d_head = lax.dynamic_update_slice_in_dim(d_head, new, start, axis=axis)
        return matmul(g, block, (1, axis), logits.dtype), d_head

    d_hidden, d_head = step(last, layout.last[0], d_head)

    def body(carry, inputs):
        total, d_head = carry
        index, pair = inputs
        part, d_head = step(pair, index * layout.size, d_head)
        return (total + part, d_head), None

    if kept is not None:
        (d_hidden, d_head), _ = lax.scan(body, (d_hidden, d_head), (jnp.arange(layout.full, dtype=jnp.int32), kept))
    return loss, d_hidden, d_head


def _prepare(hidden, targets, reference: Reference | ReferenceLogits | None, inverse_temperature, mask, side_arrays):
    """Rows outside the mask carry zeros from here on, so that nothing they held can reach a sum."""
    row = mask[:, None]
    hidden = jnp.where(row, hidden, jnp.zeros((), hidden.dtype))
    hidden_ref = head_ref = None
    if isinstance(reference, ReferenceLogits):
        hidden_ref, head_ref = jnp.arange(hidden.shape[0], dtype=jnp.int32), reference
    elif reference is not None:
        hidden_ref = jnp.where(row, reference.hidden, jnp.zeros((), reference.hidden.dtype))
        head_ref = reference.head
    if inverse_temperature is not None:
        inverse_temperature = jnp.broadcast_to(inverse_temperature, (hidden.shape[0], 1))
    return Tile(hidden, hidden_ref, inverse_temperature, targets, mask, side_arrays), head_ref


def _tile_logits(plan: LossPlan, tile: Tile, head: Array, head_ref: Array | ReferenceLogits | None) -> Logits:
    reference = None
    if isinstance(head_ref, ReferenceLogits):
        # Logits are gathered for the rows of a tile; cut beforehand they would be copied as a whole.
        assert tile.hidden_ref is not None
        rows = head_ref.logits[tile.hidden_ref]
        reference = ReferenceLogits(jnp.where(tile.mask[:, None], rows, jnp.zeros((), rows.dtype)))
    elif tile.hidden_ref is not None and head_ref is not None:
        reference = Reference(tile.hidden_ref, head_ref)
    return Logits(tile.hidden, head, reference, tile.inverse_temperature, plan.soft_cap)


def _dtype(*arrays) -> jnp.dtype:
    return accumulator(*(x.dtype for x in jax.tree.leaves(arrays)))


def with_gradient(plan: LossPlan, head, whole: Tile, head_ref, log_min_p, dtype, *, head_gradient: bool):
    """(sum of losses, cotangent of hidden, cotangent of head or None)."""
    rows = whole.mask.shape[0]

    def body(d_head, tile: Tile):
        logits = _tile_logits(plan, tile, head, head_ref)
        loss, d_hidden, d_head = _tile_gradient(plan, logits, tile, log_min_p, d_head)
        return d_head, (loss, d_hidden)

    start = vary_together((jnp.zeros(head.shape, dtype), head))[0] if head_gradient else None
    d_head, (losses, d_hidden) = lax.scan(body, start, _tiles(plan, whole))
    flat = jnp.swapaxes(d_hidden, 0, 1).reshape(-1, d_hidden.shape[-1])[:rows]
    return jnp.sum(losses), flat, d_head


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def loss(plan: LossPlan, hidden, head, targets, reference, inverse_temperature, log_min_p, mask, side_arrays) -> Array:
    """Sum of the losses of the rows in the mask; see `jaxrl_kernels.token_loss`."""
    whole, head_ref = _prepare(hidden, targets, reference, inverse_temperature, mask, side_arrays)

    def one(tile: Tile) -> Array:
        values = _sweep(plan, _tile_logits(plan, tile, head, head_ref), tile, log_min_p, keep=False)[0]
        return _evaluate(plan, values, tile)

    return jnp.sum(lax.map(one, _tiles(plan, whole)))


def loss_of_statistics(
    engine: Engine, plan: LossPlan, hidden, head, targets, reference, inverse_temperature, log_min_p, mask, side_arrays
) -> Array:
    """The same sum through the statistics of another implementation and their VJP."""
    whole, head_ref = _prepare(hidden, targets, reference, inverse_temperature, mask, lax.stop_gradient(side_arrays))
    if isinstance(reference, Reference):
        reference = Reference(whole.hidden_ref, head_ref)  # pyright: ignore[reportArgumentType]
    narrow = Plan(*plan[:2], plan.soft_cap, plan.top_k, plan.mesh_axis)
    values = statistics(
        engine, narrow, whole.hidden, head, targets, reference, whole.inverse_temperature, log_min_p
    )  # fmt: skip
    return _evaluate(plan, values, whole)  # pyright: ignore[reportArgumentType]


def _forward_rule(plan: LossPlan, *arguments):
    head_gradient = arguments[1].perturbed
    hidden, head, targets, reference, inverse_temperature, log_min_p, mask, side_arrays = (
        jax.custom_derivatives.custom_vjp_primal_tree_values(arguments)
    )
    whole, head_ref = _prepare(hidden, targets, reference, inverse_temperature, mask, side_arrays)
    dtype = _dtype(hidden, head, reference)
    total, d_hidden, d_head = with_gradient(
        plan, head, whole, head_ref, log_min_p, dtype, head_gradient=head_gradient
    )  # fmt: skip
    like = (jnp.zeros((0,), hidden.dtype), jnp.zeros((0,), head.dtype))
    return total, (d_hidden, d_head, like)


def _backward_rule(plan: LossPlan, residuals, cotangent):
    d_hidden, d_head, like = residuals
    if isinstance(cotangent, jax.custom_derivatives.SymbolicZero):
        return (None,) * 8
    scaled = [
        None if x is None else (x * cotangent.astype(x.dtype)).astype(y.dtype)
        for x, y in zip((d_hidden, d_head), like, strict=True)
    ]
    return (*scaled, None, None, None, None, None, None)


loss.defvjp(_forward_rule, _backward_rule, symbolic_zeros=True)
