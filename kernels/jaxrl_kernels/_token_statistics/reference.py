"""token_statistics and token_loss in plain jax.numpy with plain autodiff: every logit is held, nothing is clever. The
oracle."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from jaxrl_kernels._token_statistics.blocks import accumulator
from jaxrl_kernels._token_statistics.blocks import matmul
from jaxrl_kernels._token_statistics.streaming import NOTHING
from jaxrl_kernels._token_statistics.types import Reference
from jaxrl_kernels._token_statistics.types import ReferenceLogits
from jaxrl_kernels._token_statistics.types import TokenStatistics


def _logits(
    hidden: Array,
    head: Array,
    vocabulary_axis: int,
    inverse_temperature: Array | None,
    soft_cap: float | None,
    dtype: jnp.dtype,
) -> Array:
    z = matmul(hidden, head, (1, 1 - vocabulary_axis), dtype)
    if soft_cap is not None:
        z = soft_cap * jnp.tanh(z / soft_cap)
    return z if inverse_temperature is None else z * inverse_temperature


def _compare(log_p: Array, kept: Array, z_ref: Array) -> dict[str, Array]:
    """Divergences between p (zero outside `kept`) and q; the sums are over non-negative terms, so nothing cancels."""
    seen = z_ref > NOTHING
    p, q = jnp.where(kept, jnp.exp(log_p), 0.0), jnp.where(seen, jax.nn.softmax(z_ref, axis=-1), 0.0)
    log_q = jnp.where(seen, jax.nn.log_softmax(z_ref, axis=-1), 0.0)
    log_ratio = jnp.where(kept & seen, log_p - log_q, 0.0)
    infinite = jnp.any(~seen & (p > 0), axis=-1)
    outside = jnp.sum(jnp.where(kept, 0.0, q), axis=-1)
    # sum_S p (l + e^{-l} - 1) = KL + q(S) - 1 = KL - q(outside S)
    small = seen & (jnp.abs(log_ratio) < 0.5)
    tame = jnp.where(small, log_ratio, 0.0)
    near = p * (tame + jnp.expm1(-tame))
    kl = jnp.sum(jnp.where(small & kept, near, jnp.where(kept & seen, p * log_ratio + q - p, 0.0)), axis=-1) + outside
    near_reverse = q * (jnp.expm1(tame) - tame)
    kl_reverse = jnp.sum(jnp.where(small, near_reverse, p - q - q * log_ratio), axis=-1)
    near_distance = p * jnp.abs(jnp.expm1(-tame))
    distance = jnp.where(kept, jnp.where(small, near_distance, jnp.abs(p - q)), q)
    far = jnp.where(seen, jnp.exp(2 * log_p - log_q) - 2 * p + q, 0.0)
    chi = jnp.where(kept, jnp.where(small, q * jnp.square(jnp.expm1(tame)), far), q)
    return {
        "kl": jnp.where(infinite, jnp.inf, kl),
        "kl_reverse": kl_reverse,
        "total_variation": 0.5 * jnp.sum(distance, axis=-1),
        "chi_square": lax.stop_gradient(jnp.where(infinite, jnp.inf, jnp.sum(chi, axis=-1))),
    }


def statistics(
    hidden: Array,
    head: Array,
    targets: Array,
    reference: Reference | ReferenceLogits | None,
    inverse_temperature: Array | None,
    log_min_p: Array | None,
    *,
    vocabulary_axis: int,
    wanted: tuple[str, ...],
    soft_cap: float | None,
    top_k: int | None,
) -> TokenStatistics:
    """Statistics of every row; see `jaxrl_kernels.token_statistics`."""
    dtype = accumulator(*(x.dtype for x in jax.tree.leaves((hidden, head, reference))))
    # A row with NaN or inf in it must not reach the head's gradient: it is computed as zeros, and NaN put back.
    finite = jnp.all(jnp.isfinite(hidden), axis=-1)
    if isinstance(reference, Reference):
        finite &= jnp.all(jnp.isfinite(reference.hidden), axis=-1)
        reference = reference._replace(hidden=jnp.where(finite[:, None], reference.hidden, 0.0))
    elif reference is not None:
        largest = jnp.max(reference.logits, axis=-1)
        finite &= jnp.isfinite(largest) & (largest > NOTHING)
        reference = reference._replace(logits=jnp.where(finite[:, None], reference.logits, 0.0))
    hidden = jnp.where(finite[:, None], hidden, 0.0)
    z = _logits(hidden, head, vocabulary_axis, inverse_temperature, soft_cap, dtype)
    top = lax.stop_gradient(jnp.max(z, axis=-1, keepdims=True))
    whole = jnp.sum(jnp.exp(z - top), axis=-1)
    kept = jnp.ones(z.shape, bool) if log_min_p is None else lax.stop_gradient(z) >= top + log_min_p.astype(dtype)
    centred = jnp.where(kept, z - top, 0.0)
    total = jnp.sum(jnp.where(kept, jnp.exp(centred), 0.0), axis=-1)
    log_p = centred - jnp.log(total)[:, None]
    p = jnp.where(kept, jnp.exp(log_p), 0.0)
    inside = (targets >= 0) & (targets < z.shape[1])
    index = jnp.clip(targets, 0, z.shape[1] - 1)[:, None]
    log_prob = jnp.take_along_axis(log_p, index, axis=-1)[:, 0]
    values: dict[str, Array] = {
        "entropy": -jnp.sum(p * log_p, axis=-1),
        "collision": jnp.sum(p * p, axis=-1),
        "max_log_prob": lax.stop_gradient(-jnp.log(total)),
    }
    if top_k is not None:
        values["top_k_mass"] = lax.stop_gradient(jnp.minimum(jnp.sum(lax.top_k(p, top_k)[0], axis=-1), 1.0))
    if log_min_p is not None:
        target_kept = inside & jnp.take_along_axis(kept, index, axis=-1)[:, 0]
        log_prob = jnp.where(target_kept, log_prob, -jnp.inf)
        values["kept_mass"] = lax.stop_gradient(jnp.minimum(total / whole, 1.0))
        values["target_kept"] = target_kept
    values["log_prob"] = jnp.where(inside, log_prob, jnp.nan)
    if reference is not None:
        z_ref = _reference_logits(lax.stop_gradient(reference), vocabulary_axis, inverse_temperature, soft_cap, dtype)
        values |= _compare(log_p, kept, z_ref)
    return TokenStatistics(
        **{
            name: value if value.dtype == bool else jnp.where(finite, value, jnp.nan)
            for name, value in values.items()
            if name in wanted
        }
    )


def _reference_logits(
    reference: Reference | ReferenceLogits, axis: int, inverse_temperature: Array | None, soft_cap, dtype
) -> Array:
    if isinstance(reference, Reference):
        return _logits(*reference, axis, inverse_temperature, soft_cap, dtype)
    z = reference.logits.astype(dtype)
    return z if inverse_temperature is None else z * inverse_temperature


def loss(
    hidden: Array,
    head: Array,
    targets: Array,
    reference: Reference | ReferenceLogits | None,
    inverse_temperature: Array | None,
    log_min_p: Array | None,
    mask: Array,
    side_arrays: tuple[Array, ...],
    *,
    vocabulary_axis: int,
    wanted: tuple[str, ...],
    soft_cap: float | None,
    top_k: int | None,
    per_token_loss: Callable[..., Array],
) -> Array:
    """Sum of the losses of the rows in the mask; see `jaxrl_kernels.token_loss`."""
    row = mask[:, None]
    hidden = jnp.where(row, hidden, 0.0)
    if reference is not None:
        # Both kinds start with an array that has a row axis.
        name = reference._fields[0]
        reference = reference._replace(**{name: jnp.where(row, getattr(reference, name), 0.0)})
    values = statistics(
        hidden,
        head,
        targets,
        reference,
        inverse_temperature,
        log_min_p,
        vocabulary_axis=vocabulary_axis,
        wanted=wanted,
        soft_cap=soft_cap,
        top_k=top_k,
    )
    values = jax.tree.map(lambda x: jnp.where(mask, x, jnp.zeros((), x.dtype)), values)
    losses = per_token_loss(values, *lax.stop_gradient(side_arrays))
    return jnp.sum(jnp.where(mask, losses, 0.0))
