"""One pass over the columns: the sums that give KL(p || q) and its gradient, block by block.

With w_k = e^{z_k - m}, S = sum w_k, d_k = z_k - zref_k and phi(x) = e^x - 1 - x >= 0, a row carries

    centre = sum w_k d_k / S = E_p[d]
    spread = sum w_k phi(centre - d_k)        KL = log(1 + spread / S)
    gradient of KL = (w_k / S) (d_k - centre)

Both are exact, because log p_k - log q_k = d_k - centre + KL and E_p[e^{-l}] = 1. No term of the spread is negative, so
KL keeps its relative accuracy down to zero, where a difference of log-normalisers has lost every digit; and the rows of
the gradient sum to zero, because their centre is a mean of the same arithmetic.

A term w phi(x) is w x^2 times a power series near x = 0. Elsewhere it is v - w (1 + x) with v = w e^x = e^{centre - m}
e^{zref_k} from the reference's logit, so nothing is lost where w is below the smallest number and e^x above the
largest. Where KL is so large that v itself would overflow, all of the spread is in units of e^surplus, and KL = surplus
+ log(1 + spread / S).

Everything here lowers to XLA, Mosaic TPU and Mosaic GPU (none of the Mosaics has expm1), and runs on rows kept as
[n, 1] or as [n].
"""

from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array
from jaxtyping import Float

from jaxrl_kernels._token_statistics.elementary import NEAR
from jaxrl_kernels._token_statistics.elementary import series

Rows = Float[Array, "n *one"]
Block = Float[Array, "n b"]

NOTHING = -1e30
"""Stands for a maximum over no columns: finite, so NOTHING - NOTHING is 0, and below every logit that has a weight."""

LARGEST = 60.0
"""Exponent up to which the spread is kept in its own unit; e^60 times a million columns is far from overflow."""


class State(NamedTuple):
    """What a row carries over the columns seen so far."""

    maximum: Rows
    total: Rows
    centre: Rows
    spread: Rows
    maximum_ref: Rows


def initial(rows: tuple[int, ...], dtype) -> State:
    """The state before any column."""
    zero, nothing = jnp.zeros(rows, dtype), jnp.full(rows, NOTHING, dtype)
    return State(nothing, zero, zero, zero, nothing)


def across(rows: Rows, block: Block) -> Array:
    """The value of each row, to be set against the columns of a block."""
    return rows if rows.ndim == 2 else lax.broadcast_in_dim(rows, block.shape, (0,))


def difference(weights: Block, z: Block, z_ref: Block) -> Block:
    """z - z_ref where the policy has weight; elsewhere a number that weight 0 removes from sums, and that is far from
    every centre. So a logit of -inf is a probability of 0, in either array or in both."""
    return jnp.where(weights > 0, z - z_ref, jnp.full_like(z, NOTHING))


def excess(weights: Array, x: Array, value: Array) -> Array:
    """weights * phi(x), given value = weights * e^x."""
    return jnp.where(jnp.abs(x) < NEAR, weights * (x * x * series(x)), value - weights * (1 + x))


def _level(state: State) -> tuple[Rows, Rows]:
    """(log of the largest w e^x in the unit of the spread, log of that unit)."""
    exponent = (state.maximum_ref - state.maximum) + state.centre
    level = jnp.minimum(exponent, jnp.full_like(exponent, LARGEST))
    return level, exponent - level


def _together(*arrays: Array) -> tuple[Array, ...]:
    return arrays


def absorb(
    state: State, z: Block, z_ref: Block, apart: Callable[..., tuple[Array, ...]] = _together
) -> tuple[State, Block]:
    """The state after the columns of one more block, and the weights of these columns.

    Args:
        state: before.
        z, z_ref: logits of policy and reference, in the dtype of the state; -inf is a probability of 0.
        apart: put between the parts of the work, to keep the compiler from joining them (xla.py says where that helps).
    """

    def total_of(x: Block) -> Rows:
        return jnp.sum(x, axis=1, keepdims=state.total.ndim == 2)

    def largest(x: Block) -> Rows:
        return jnp.max(x, axis=1, keepdims=state.total.ndim == 2)

    maximum = jnp.maximum(state.maximum, largest(z))
    (weights,) = apart(jnp.exp(z - across(maximum, z)))
    fall = state.maximum - maximum
    before = state.total * jnp.exp(fall)
    total = before + total_of(weights)

    w, a, b = apart(weights, z, z_ref)
    move = total_of(w * (difference(w, a, b) - across(state.centre, a)))
    move = move / jnp.where(total == 0, jnp.ones_like(total), total)
    move = jnp.where(state.centre == jnp.full_like(move, jnp.inf), jnp.zeros_like(move), move)  # infinite it stays
    after = State(maximum, total, state.centre + move, state.spread, jnp.maximum(state.maximum_ref, largest(z_ref)))

    # The columns seen before move with their mean, and count for the rest like one column of weight `before`.
    (old_level, _), (level, surplus) = _level(state), _level(after)
    unit = jnp.exp((level - after.maximum_ref) - (old_level - state.maximum_ref))
    move = jnp.where(before == 0, jnp.zeros_like(move), move)
    earlier = unit * state.spread + excess(before, move, state.total * jnp.exp(move + fall - surplus))

    w, a, b = apart(weights, z, z_ref)
    x = across(after.centre, a) - difference(w, a, b)
    value = jnp.exp((b - across(after.maximum_ref, a)) + across(level, a))
    return after._replace(spread=earlier + total_of(excess(w, x, value))), weights


def divergence(state: State) -> Rows:
    """KL(p || q) [nats] once all columns were seen; +inf where some p_k > 0 = q_k, NaN where p or q has no mass."""
    value = _level(state)[1] + jnp.log1p(state.spread / state.total)
    infinite = jnp.full_like(value, jnp.inf)
    value = jnp.where(state.centre == infinite, infinite, jnp.maximum(value, jnp.zeros_like(value)))
    empty = (state.total == jnp.zeros_like(value)) | (state.maximum_ref == jnp.full_like(value, NOTHING))
    return jnp.where(empty, jnp.full_like(value, jnp.nan), value)


def factor(cotangent: Rows, total: Rows, centre: Rows) -> Rows:
    """cotangent / S of `gradient`; 0 where the cotangent is, and where KL is infinite and has no gradient."""
    zero = jnp.zeros_like(cotangent)
    return jnp.where((cotangent != zero) & (centre != jnp.full_like(centre, jnp.inf)), cotangent / total, zero)


def gradient(weights: Block, z: Block, z_ref: Block, factor: Rows, centre: Rows) -> Block:
    """factor * w (d - centre), with factor = cotangent / S; exactly 0 in rows whose factor is 0, whatever they hold."""
    value = weights * across(factor, z) * (difference(weights, z, z_ref) - across(centre, z))
    return jnp.where(across(factor, z) != 0, value, jnp.zeros_like(value))


def weights_of(z: Block, maximum: Rows) -> Block:
    """e^{z - maximum}."""
    return jnp.exp(z - across(maximum, z))
