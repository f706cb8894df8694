# Pallas passes references where its stubs say arrays.
# pyright: reportCallIssue=false, reportArgumentType=false, reportAssignmentType=false, reportAbstractUsage=false
# pyright: reportAttributeAccessIssue=false, reportIndexIssue=false
"""What the tiles of mosaic_gpu_tiles.py are for: sums over the vocabulary, and the gradient of a block of logits."""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array

from jaxrl_kernels._token_statistics import mosaic_gpu_tiles as tiles
from jaxrl_kernels._token_statistics.mosaic_gpu_tiles import ROWS
from jaxrl_kernels._token_statistics.mosaic_gpu_tiles import Case
from jaxrl_kernels._token_statistics.mosaic_gpu_tiles import Head
from jaxrl_kernels._token_statistics.mosaic_gpu_tiles import Part

SLICE = 64
"""Columns whose sums are taken together. With a reference the compiler spills registers at 128, not at 64."""

FEW = 10
"""Sums a row may carry for that; with more (14 for all statistics) registers spill unless slices are half as wide."""


def sweep(case: Case, heads: list[Head], targets: Array, rows: Any, tile: Callable, join: Callable, like: Any) -> Any:
    """`like` with [N] arrays, over the columns of the given heads.

    Every warpgroup carries what the tiles of its segment contribute; the segments are joined outside.
    """
    structure = jax.tree.structure(like)
    fields = structure.num_leaves
    wide = SLICE if fields <= FEW else SLICE // 2

    def work(part: Part, out, staged) -> None:
        def one_tile(j: Array, carried: tuple[Array, list[Array]]) -> tuple[Array, list[Array]]:
            count, state = carried
            count, slices = part.logits(j, count)
            for at in range(0, case.columns, wide):
                piece = tile(*slices(at, wide), part.targets, j * case.columns + at, part.rows)
                joined = jax.tree.leaves(join(jax.tree.unflatten(structure, state), piece))
                if at == 0:
                    # There is no neutral state to join the first tile with.
                    fresh = lax.broadcast(j - part.first, (ROWS,)) == 0
                    joined = [jnp.where(fresh, a, b) for a, b in zip(jax.tree.leaves(piece), joined, strict=True)]
                state = joined
            return count, state

        zero = plgpu.layout_cast(jnp.zeros((ROWS,), jnp.float32), plgpu.Layout.WGMMA.reduce(1))
        state = lax.fori_loop(part.first, part.last, one_tile, (jnp.int32(0), [zero] * fields))[1]
        for k, value in enumerate(state):
            staged[k] = value
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(staged, out.at[:, part.segment, pl.ds(part.row, ROWS)])

    shape = jax.ShapeDtypeStruct((fields, case.segments, case.padded), jnp.float32)
    staged = plgpu.SMEM((tiles.GROUPS, fields, ROWS), jnp.float32)
    out = tiles.launch(case, heads, targets, rows, work, shape, staged, type(like).__name__.lower())
    return _over_segments(case, out, join, like)


def _over_segments(case: Case, out: Array, join: Callable, like: Any) -> Any:
    """The segments' states joined in pairs, all pairs at once."""

    def joined(state: Any, segments: int) -> Any:
        if segments == 1:
            return state
        half = segments // 2 * case.count
        first, second = (jax.tree.map(lambda x, k=k: x[k : k + half], state) for k in (0, half))
        pairs = join(first, second)
        both = jax.tree.map(lambda a, x: jnp.concatenate([a, x[2 * half :]]), pairs, state)
        return joined(both, segments - segments // 2)

    fields = out[:, :, : case.count].reshape(out.shape[0], -1)
    return joined(jax.tree.unflatten(jax.tree.structure(like), list(fields)), case.segments)


def gradient(case: Case, heads: list[Head], targets: Array, rows: Any, tile: Callable) -> Array:
    """tile(z, z_ref, targets, start, row constants) of all columns, in bfloat16: [rows of all clusters, V].

    V is that of the given heads. Rows beyond the last have zeros for constants."""
    wide = tiles.STEP

    def work(part: Part, out, staged) -> None:
        def one_tile(j: Array, count: Array) -> Array:
            count, slices = part.logits(j, count)
            for at in range(0, case.columns, wide):
                start = j * case.columns + at
                value = tile(*slices(at, wide), part.targets, start, part.rows).astype(jnp.bfloat16)
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # the previous slice has left
                staged[...] = value
                plgpu.commit_smem()
                plgpu.copy_smem_to_gmem(staged, out.at[pl.ds(part.row, ROWS), pl.ds(start, wide)])
            return count

        lax.fori_loop(part.first, part.last, one_tile, jnp.int32(0))

    columns = math.ceil(case.vocabulary / case.columns) * case.columns
    shape = jax.ShapeDtypeStruct((case.padded, columns), jnp.bfloat16)
    staged = plgpu.SMEM((tiles.GROUPS, ROWS, wide), jnp.bfloat16, transforms=tiles.SWIZZLED)
    out = tiles.launch(case, heads, targets, rows, work, shape, staged, "gradient")
    return out[:, : case.vocabulary]
