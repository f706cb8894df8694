"""Number formats of inference engines, simulated: each function returns the nearest values that the format can hold.

The arithmetic that follows stays that of the caller's dtype, so that nothing but the storage is coarser.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from jaxrl_llm.typing import Array
from jaxrl_llm.typing import Float

Rounding = Callable[[Array], Array]
"""An array in, an array of the same shape and dtype out, whose blocks lie along the last axis."""

INT8_MAX = 127
E4M3_MAX = 448.0
E4M3_MIN_EXPONENT = -6
E4M3_FRACTION_BITS = 3


def round_to_bf16(x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """The nearest bfloat16: eight bits of exponent, seven of fraction; ties to even."""
    # Not two casts: XLA may drop a pair of them (xla_allow_excess_precision).
    return jax.lax.reduce_precision(x, exponent_bits=8, mantissa_bits=7)


def round_to_e4m3(x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """The nearest float8_e4m3fn: 4 bits of exponent, 3 of fraction, subnormals, saturating at 448; ties to even."""
    clipped = jnp.clip(x, -E4M3_MAX, E4M3_MAX)
    # frexp's mantissa lies in [1/2, 1), so that the leading bit has the exponent minus one.
    exponent = jnp.maximum(jnp.frexp(clipped)[1] - 1, E4M3_MIN_EXPONENT)
    step = jnp.ldexp(jnp.ones((), x.dtype), exponent - E4M3_FRACTION_BITS)
    return jnp.clip(jnp.round(clipped / step) * step, -E4M3_MAX, E4M3_MAX)


def _in_blocks(x: Float[Array, "*rows size"], block: int) -> Float[Array, "*rows blocks block"]:
    if block < 1:
        raise ValueError(f"block must be at least 1 entry, got {block}")
    padding = -x.shape[-1] % block
    padded = jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, padding)])
    return padded.reshape(*x.shape[:-1], -1, block)


def _scaled(
    x: Float[Array, "*rows size"], block: int, largest: float, rounding: Callable[[Array], Array]
) -> Float[Array, "*rows size"]:
    blocks = _in_blocks(x, block)
    scale = jnp.max(jnp.abs(blocks), axis=-1, keepdims=True) / largest
    safe = jnp.where(scale > 0, scale, jnp.ones((), x.dtype))
    rounded = rounding(blocks / safe) * scale
    return rounded.reshape(*x.shape[:-1], -1)[..., : x.shape[-1]]


def _half_away_from_zero(x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    return jnp.sign(x) * jnp.floor(jnp.abs(x) + 0.5)


def quantise_int8(x: Float[Array, "*rows size"], *, block: int = 32) -> Float[Array, "*rows size"]:
    """round(x / s) s with s = max|x| / 127 over each block of `block` entries of the last axis, ties away from zero.

    The rule of ggml's Q8_0, whose block is 32, but for the scale, which that format stores in float16.

    Args:
        x: values; a last block that is not full has a scale of its own.
        block: entries that share a scale.

    Returns:
        the dequantised values; a block of zeros stays zero.

    Raises:
        ValueError: block < 1.
    """
    return _scaled(x, block, INT8_MAX, _half_away_from_zero)


def quantise_fp8(x: Float[Array, "*rows size"], *, block: int = 128) -> Float[Array, "*rows size"]:
    """e4m3(x / s) s with s = max|x| / 448 over each block of `block` entries of the last axis.

    Args, Returns, Raises as `quantise_int8`.
    """
    return _scaled(x, block, E4M3_MAX, round_to_e4m3)
