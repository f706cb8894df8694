"""token_statistics by a scan over blocks of the vocabulary, closed-form VJP: portable XLA, no [N, V] array.

Forward: one sweep, one matrix product per head. Backward: the logits of each block are computed again, the gradient of
the block is closed form, and two more products give the cotangents of hidden states and head. Total variation needs
both normalisers first and costs a second sweep; `log_min_p` needs the largest logit first and costs one more product
with the policy's head.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from jaxrl_kernels._token_statistics.blocks import Layout
from jaxrl_kernels._token_statistics.blocks import Logits
from jaxrl_kernels._token_statistics.blocks import fold
from jaxrl_kernels._token_statistics.blocks import head_cotangent
from jaxrl_kernels._token_statistics.blocks import matmul
from jaxrl_kernels._token_statistics.closed_form import Constants
from jaxrl_kernels._token_statistics.closed_form import Variation
from jaxrl_kernels._token_statistics.closed_form import conclude
from jaxrl_kernels._token_statistics.closed_form import logit_gradient
from jaxrl_kernels._token_statistics.closed_form import usable
from jaxrl_kernels._token_statistics.closed_form import variation
from jaxrl_kernels._token_statistics.streaming import Moments
from jaxrl_kernels._token_statistics.streaming import combine
from jaxrl_kernels._token_statistics.streaming import combine_moments
from jaxrl_kernels._token_statistics.streaming import moments
from jaxrl_kernels._token_statistics.streaming import row_maximum
from jaxrl_kernels._token_statistics.streaming import summarise
from jaxrl_kernels._token_statistics.types import DIFFERENTIABLE
from jaxrl_kernels._token_statistics.types import WITH_REFERENCE
from jaxrl_kernels._token_statistics.types import TokenStatistics


class Plan(NamedTuple):
    """Static choices of one call; hashable."""

    layout: Layout
    wanted: tuple[str, ...]


def safe_set(logits: Logits, layout: Layout, log_min_p: Array) -> tuple[Array, Array, Array]:
    """(smallest logit that is kept, largest logit, sum_k e^{z_k - max}) of each row: the sweep that pruning needs
    first."""

    def step(start: int | Array, size: int) -> Moments:
        z, _ = logits._replace(reference=None).block(layout, start, size)
        top = row_maximum(z)
        return moments(jnp.exp(z - top[:, None]), top, None, None)

    whole = fold(layout, step, lambda a, b: combine_moments(a, b)[0])
    return whole.maximum + log_min_p.astype(whole.maximum.dtype), whole.maximum, whole.total


def forward(plan: Plan, logits: Logits, targets: Array, log_min_p: Array | None) -> tuple[TokenStatistics, Constants]:
    """Statistics and the constants that the backward pass needs."""
    layout = plan.layout
    floor = whole = None
    if log_min_p is not None:
        floor, _, whole = safe_set(logits, layout, log_min_p)
    summary = fold(
        layout,
        lambda start, size: summarise(*logits.block(layout, start, size), targets, start, plan.wanted, floor),
        combine,
    )
    statistics, constants = conclude(summary, plan.wanted, targets, layout.vocabulary, floor, whole)
    if "total_variation" in plan.wanted:

        def step(start: int | Array, size: int) -> Variation:
            z, z_ref = logits.block(layout, start, size)
            assert z_ref is not None
            return variation(z, z_ref, constants)

        sums = fold(layout, step, lambda a, b: jax.tree.map(jnp.add, a, b))
        statistics = statistics._replace(total_variation=sums.distance)
        constants = constants._replace(sign=sums.sign)
    return statistics, constants


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
    layout, axis = plan.layout, plan.layout.vocabulary_axis
    hidden, head = logits.hidden, logits.head
    alone = logits._replace(reference=None)
    if not set(cotangent) & set(WITH_REFERENCE) and alone.dtype == logits.dtype:
        logits = alone
    # A row without a cotangent is out of the gradient even if it holds NaN or inf.
    live = jnp.any(jnp.stack([value != 0 for value in cotangent.values()]), axis=0)
    row = live[:, None]
    hidden_t = jnp.where(row, hidden, jnp.zeros((), hidden.dtype)).T

    def step(start: int | Array, size: int) -> tuple[Array, Array | None]:
        z, z_ref = logits.block(layout, start, size)
        g = logit_gradient(z, z_ref, targets, start, constants, cotangent)
        if logits.inverse_temperature is not None:
            g = g * logits.inverse_temperature
        g = jnp.where(row, g, jnp.zeros((), g.dtype)).astype(hidden.dtype)
        block = lax.dynamic_slice_in_dim(head, start, size, axis=axis)
        d_hidden = matmul(g, block, (1, axis), logits.dtype)
        if not head_gradient:
            return d_hidden, None
        return d_hidden, head_cotangent(hidden_t, g, axis, logits.dtype).astype(head.dtype)

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


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def statistics(plan: Plan, hidden, head, targets, reference, inverse_temperature, log_min_p) -> TokenStatistics:
    """Statistics of every row; see `jaxrl_kernels.token_statistics`."""
    return forward(plan, Logits(hidden, head, reference, inverse_temperature), targets, log_min_p)[0]


def _forward_rule(plan: Plan, *arguments):
    perturbed = {name: argument.perturbed for name, argument in zip(("hidden", "head"), arguments, strict=False)}
    hidden, head, targets, reference, inverse_temperature, log_min_p = (
        jax.custom_derivatives.custom_vjp_primal_tree_values(arguments)
    )
    logits = Logits(hidden, head, reference, inverse_temperature)
    values, constants = forward(plan, logits, targets, log_min_p)
    # The head is a residual entry of its own so that whether it was perturbed is known (as structure) in the backward
    # rule.
    marker = () if perturbed["head"] else None
    return values, (logits, targets, constants, marker)


def _backward_rule(plan: Plan, residuals, cotangents: TokenStatistics):
    logits, targets, constants, marker = residuals
    cotangent = usable(cotangents, DIFFERENTIABLE)
    if not cotangent:
        return (None,) * 6
    d_hidden, d_head = backward(plan, logits, targets, constants, cotangent, head_gradient=marker is not None)
    return d_hidden, d_head, None, None, None, None


statistics.defvjp(_forward_rule, _backward_rule, symbolic_zeros=True)
