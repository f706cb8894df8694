# Pallas passes references where its stubs say arrays.
# pyright: reportCallIssue=false, reportArgumentType=false, reportAssignmentType=false
"""The dense gradient as two Mosaic TPU kernels: blocks of rows and columns stream through VMEM.

The first sweeps the columns of a block of rows and carries the row sums in its output blocks; the second makes the
gradient of each block from them, all blocks independent. A block may stick out of the arrays: columns beyond the
vocabulary get a logit of -inf, and rows beyond the last are never written.
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array
from jaxtyping import Float

from jaxrl_kernels._dense_gradient import streaming
from jaxrl_kernels._dense_gradient.streaming import State
from jaxrl_kernels._token_statistics.blocks import varying_axes

ROWS, COLUMNS = 128, 1024
"""Size of a block. Not measured on a TPU: with its intermediates in float32 it takes about 6 MiB of VMEM."""

ZERO = np.int32(0)
"""An index map that returns a plain 0 makes an int64 under jax_enable_x64, which Mosaic refuses."""


def _grid(shape: tuple[int, int]) -> tuple[int, int, int, int]:
    """(blocks of rows, blocks of columns, rows of a block, columns of a block)."""
    rows, columns = min(ROWS, shape[0]), min(COLUMNS, shape[1])
    return math.ceil(shape[0] / rows), math.ceil(shape[1] / columns), rows, columns


def _shaped(like: Array, shape: tuple[int, ...], dtype) -> jax.ShapeDtypeStruct:
    # Inside a shard_map an output differs over the same mesh axes as the logits.
    if not varying_axes(like):
        return jax.ShapeDtypeStruct(shape, dtype)
    kind = jax.typeof(like)
    if hasattr(kind, "manual_axis_type"):
        return jax.ShapeDtypeStruct(shape, dtype, manual_axis_type=kind.manual_axis_type)
    return jax.ShapeDtypeStruct(shape, dtype, vma=kind.vma)


def _logits(ref, start, vocabulary: int, dtype) -> Array:
    z = ref[...].astype(dtype)
    if vocabulary % z.shape[1] == 0:
        return z
    inside = start + lax.broadcasted_iota(jnp.int32, z.shape, 1) < vocabulary
    return jnp.where(inside, z, jnp.full_like(z, -jnp.inf))


def _state_kernel(z_ref, reference_ref, *out_refs, vocabulary: int, dtype):
    column = pl.program_id(1)

    @pl.when(column == 0)
    def _():
        for out, value in zip(out_refs, streaming.initial(out_refs[0].shape, dtype), strict=True):
            out[...] = value

    start = column * z_ref.shape[1]
    blocks = (_logits(ref, start, vocabulary, dtype) for ref in (z_ref, reference_ref))
    state, _ = streaming.absorb(State(*(out[...] for out in out_refs)), *blocks)
    for out, value in zip(out_refs, state, strict=True):
        out[...] = value


def _gradient_kernel(z_ref, reference_ref, maximum_ref, factor_ref, centre_ref, out_ref):
    # Columns beyond the vocabulary hold anything and are never written.
    dtype = factor_ref.dtype
    z, reference = z_ref[...].astype(dtype), reference_ref[...].astype(dtype)
    weights = streaming.weights_of(z, maximum_ref[...])
    out_ref[...] = streaming.gradient(weights, z, reference, factor_ref[...], centre_ref[...]).astype(out_ref.dtype)


def _call(kernel: Callable, arrays: tuple[Array, ...], columns_out: bool, out_shape, arithmetic: int, name: str):
    """Run `kernel` over all blocks; arrays of one column are read by rows, others block by block."""
    row_blocks, column_blocks, rows, columns = _grid(arrays[0].shape)
    block = pl.BlockSpec((rows, columns), lambda i, j: (i, j))
    row = pl.BlockSpec((rows, 1), lambda i, j: (i, ZERO))
    whole = arrays[0].shape
    return pl.pallas_call(
        kernel,
        grid=(row_blocks, column_blocks),
        in_specs=[block if x.shape == whole else row for x in arrays],
        out_specs=jax.tree.map(lambda _: block if columns_out else row, out_shape),
        out_shape=out_shape,
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel" if columns_out else "arbitrary")
        ),
        cost_estimate=pl.CostEstimate(
            flops=arithmetic * math.prod(whole),
            transcendentals=(1 if columns_out else 2) * math.prod(whole),
            bytes_accessed=sum(x.nbytes for x in arrays)
            + sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(out_shape)),
        ),
        name=f"dense_gradient_{name}",
    )(*arrays)


def state(z: Float[Array, "N V"], z_ref: Float[Array, "N V"], dtype) -> State:
    """The sums of every row, as [N] arrays."""
    rows, vocabulary = z.shape
    out = [_shaped(z, (rows, 1), dtype)] * len(State._fields)

    def kernel(*refs):
        _state_kernel(*refs, vocabulary=vocabulary, dtype=dtype)

    return State(*(x[:, 0] for x in _call(kernel, (z, z_ref), False, out, 40, "state")))


def gradient(
    z: Float[Array, "N V"],
    z_ref: Float[Array, "N V"],
    maximum: Float[Array, " N"],
    factor: Float[Array, " N"],
    centre: Float[Array, " N"],
) -> Float[Array, "N V"]:
    """The gradient from the sums of every row, in the dtype of z."""
    rows = tuple(x[:, None] for x in (maximum, factor, centre))
    return _call(_gradient_kernel, (z, z_ref, *rows), True, _shaped(z, z.shape, z.dtype), 6, "gradient")
