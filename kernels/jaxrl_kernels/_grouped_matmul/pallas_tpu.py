"""The grouped product as the Mosaic TPU kernels that come with JAX (megablox), under the semantics of this op.

What they leave to the caller: rows behind the groups are never written, and the number of rows must be a multiple of
the tile's, so they are filled up.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.megablox.gmm import gmm
from jax.experimental.pallas.ops.tpu.megablox.gmm import tgmm
from jaxtyping import Array
from jaxtyping import Float
from jaxtyping import Int

TILE = 128
"""Rows of a tile. Not measured on a TPU."""

LARGEST = 512
"""Most columns of a tile, of either width: with its operands twice in flight a float32 tile takes 5 MiB of VMEM."""

Rows = Float[Array, "N _"]


def refusal(dtype) -> str | None:
    """Why operands of this dtype cannot go through the kernels, if they cannot."""
    return None if dtype in (jnp.bfloat16, jnp.float32) else f"takes bfloat16 and float32, not {dtype}"


def _tiling(inner: int, outer: int) -> tuple[int, int, int]:
    inner, outer = (min(LARGEST, -(-width // 128) * 128) for width in (inner, outer))
    return TILE, inner, outer


def _filled(x: Array) -> Array:
    return jnp.pad(x, ((0, -x.shape[0] % TILE), (0, 0)))


@contextmanager
def _settings(dtype) -> Iterator[None]:
    """What the kernels leave to JAX's settings: they name no precision, and a TPU's default rounds float32 to bfloat16;
    and they promote integers, to which a caller's strict mode would object."""
    precision = jax.default_matmul_precision("highest" if dtype == jnp.float32 else "default")
    with precision, jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


def products(x: Rows, weights: Float[Array, "E _ _"], sizes: Int[Array, " E"], *, transposed: bool) -> Rows:
    """As `xla.products`."""
    tiling = _tiling(x.shape[1], weights.shape[1 if transposed else 2])
    with _settings(x.dtype):
        out = gmm(_filled(x), weights, sizes, x.dtype, tiling, transpose_rhs=transposed)[: x.shape[0]]
    inside = jnp.arange(x.shape[0], dtype=jnp.int32) < jnp.sum(sizes, dtype=jnp.int32)
    return jnp.where(inside[:, None], out, jnp.zeros((), x.dtype))


def weight_gradient(x: Rows, dy: Rows, sizes: Int[Array, " E"]) -> Float[Array, "E _ _"]:
    """As `xla.weight_gradient`."""
    tiling = _tiling(x.shape[1], dy.shape[1])
    with _settings(x.dtype):
        return tgmm(_filled(x).T, _filled(dy), sizes, x.dtype, tiling)
