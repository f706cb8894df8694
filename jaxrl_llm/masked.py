"""Masked reductions: the only place in the project where a mask meets a sum.

Masked entries are replaced by `where` before any arithmetic, so a NaN or inf at a masked place never reaches the
result nor its gradient. Every denominator is a count; an empty mask gives zero, never NaN.
"""

import jax.numpy as jnp
from jaxtyping import Array
from jaxtyping import Bool
from jaxtyping import Float

Axis = int | tuple[int, ...] | None


def masked_sum(x: Float[Array, "..."], mask: Bool[Array, "..."], *, axis: Axis = None) -> Float[Array, "..."]:
    """Sum of `x` over the true entries of `mask` (broadcast against x); 0 where the mask is empty."""
    return jnp.sum(jnp.where(mask, x, jnp.zeros((), x.dtype)), axis=axis)


def masked_count(x: Float[Array, "..."], mask: Bool[Array, "..."], *, axis: Axis = None) -> Float[Array, "..."]:
    """Number of true entries of `mask` once broadcast against `x`, in the dtype of `x`."""
    shape = jnp.broadcast_shapes(x.shape, mask.shape)
    return jnp.sum(jnp.broadcast_to(mask, shape), axis=axis, dtype=x.dtype)


def masked_sum_count(
    x: Float[Array, "..."], mask: Bool[Array, "..."], *, axis: Axis = None
) -> tuple[Float[Array, "..."], Float[Array, "..."]]:
    """(sum, count) over the true entries: what micro-batches and shards add before they divide once."""
    return masked_sum(x, mask, axis=axis), masked_count(x, mask, axis=axis)


def safe_divide(total: Float[Array, "..."], count: Float[Array, "..."]) -> Float[Array, "..."]:
    """total / count, and 0 where count is 0 (guarded before the division, so the gradient is finite too)."""
    empty = count == 0
    return jnp.where(empty, jnp.zeros((), total.dtype), total / jnp.where(empty, jnp.ones((), count.dtype), count))


def masked_mean(x: Float[Array, "..."], mask: Bool[Array, "..."], *, axis: Axis = None) -> Float[Array, "..."]:
    """Mean of `x` over the true entries of `mask`; 0 where the mask is empty."""
    return safe_divide(*masked_sum_count(x, mask, axis=axis))


def masked_max(x: Float[Array, "..."], mask: Bool[Array, "..."], *, axis: Axis = None) -> Float[Array, "..."]:
    """Maximum over the true entries; -inf where the mask is empty, as the maximum of nothing is."""
    return jnp.max(jnp.where(mask, x, jnp.array(-jnp.inf, x.dtype)), axis=axis, initial=-jnp.inf)


def masked_min(x: Float[Array, "..."], mask: Bool[Array, "..."], *, axis: Axis = None) -> Float[Array, "..."]:
    """Minimum over the true entries; +inf where the mask is empty, as the minimum of nothing is."""
    return jnp.min(jnp.where(mask, x, jnp.array(jnp.inf, x.dtype)), axis=axis, initial=jnp.inf)
