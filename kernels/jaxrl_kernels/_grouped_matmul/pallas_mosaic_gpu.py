# Pallas passes references where its stubs say arrays.
# pyright: reportCallIssue=false, reportArgumentType=false
"""The grouped product on Hopper GPUs: the kernel that comes with JAX forward, one of our own for the weights' gradient.

JAX's `ragged_dot` makes every product of rows and weights, transposed or not; rows behind the groups it leaves
unwritten. Its counterpart for the weights' gradient asks a GPU for its size while it is traced, so that it cannot be
compiled elsewhere, and multiplies rows of other groups by 0, which keeps their NaN; hence the kernel here. A thread
block makes one tile of one group's gradient from that group's rows, 64 at a time.

The products are those of the tensor cores, for two bytes, accumulated in float32. Widths that are not a multiple of 64,
and rows that are not one of 8, are filled up with zeros first, which copies the arrays.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array
from jaxtyping import Float
from jaxtyping import Int

from jaxrl_kernels import _dispatch

STEP = 64
"""Rows, or columns of the inner width, that a step of the pipeline multiplies: 128 bytes, the widest swizzle."""

TILE = 128
"""Rows of a tile; its columns are as many where the width is a multiple of them. Not measured on a GPU."""

EIGHT = 8
"""Rows of an array come in multiples of these, those of a tile's first tiling in shared memory."""

STEPS = 4
"""Blocks in flight."""

Rows = Float[Array, "N _"]


def refusal(dtype) -> str | None:
    """Why operands of this dtype cannot go through the kernels here, if they cannot."""
    if _dispatch.VERSION < _dispatch.NEEDS:
        return f"needs jax {'.'.join(map(str, _dispatch.NEEDS))} or newer, not {jax.__version__}"
    return None if dtype in (jnp.bfloat16, jnp.float16) else f"takes bfloat16 and float16, not {dtype}"


def _filled(x: Array, *steps: int) -> Array:
    """x with zeros behind it, so that each axis is a multiple of its step."""
    widths = [(0, -size % step) for size, step in zip(x.shape, steps, strict=True)]
    return jnp.pad(x, widths) if any(after for _, after in widths) else x


def _tile(width: int) -> int:
    return TILE if width % TILE == 0 else STEP


def _parameters() -> plgpu.CompilerParams:
    return plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Warpgroup)


def products(x: Rows, weights: Float[Array, "E _ _"], sizes: Int[Array, " E"], *, transposed: bool) -> Rows:
    """As `xla.products`."""
    # The module also loads JAX's own test utilities: only those who use it wait for them.
    from jax.experimental.pallas.ops.gpu.ragged_dot_mgpu import ragged_dot

    width = weights.shape[1 if transposed else 2]
    weights = _filled(weights, 1, STEP, STEP)
    out = ragged_dot(
        _filled(x, EIGHT, STEP),
        weights,
        group_sizes=sizes,
        block_m=TILE,
        block_n=_tile(weights.shape[1 if transposed else 2]),
        block_k=STEP,
        max_concurrent_steps=STEPS,
        grid_block_n=1,
        transpose_rhs=transposed,
    )[: x.shape[0], :width]
    inside = jnp.arange(x.shape[0], dtype=jnp.int32) < jnp.sum(sizes, dtype=jnp.int32)
    return jnp.where(inside[:, None], out, jnp.zeros((), x.dtype))


def weight_gradient(x: Rows, dy: Rows, sizes: Int[Array, " E"]) -> Float[Array, "E _ _"]:
    """As `xla.weight_gradient`."""
    shape = (sizes.shape[0], x.shape[1], dy.shape[1])
    x, dy = _filled(x, EIGHT, STEP), _filled(dy, EIGHT, STEP)
    ends = jnp.cumsum(sizes)
    return _weight_gradient(x, dy, ends - sizes, ends)[:, : shape[1], : shape[2]]


def _weight_gradient(x: Rows, dy: Rows, firsts: Int[Array, " E"], ends: Int[Array, " E"]) -> Array:
    height, width = _tile(x.shape[1]), _tile(dy.shape[1])

    def body(firsts_gmem, ends_gmem, x_gmem, dy_gmem, out_gmem, out_smem):
        group, row, column = (lax.axis_index(name) for name in ("group", "row", "column"))
        first, end = firsts_gmem[group], ends_gmem[group]
        start = lax.div(first, STEP)
        steps = jnp.where(end > first, lax.div(end + STEP - 1, STEP) - start, 0)

        def clear(smem, before: Array, after: Array) -> None:
            index = plgpu.layout_cast(lax.broadcasted_iota(jnp.int32, smem.shape, 0), plgpu.Layout.WGMMA)
            block = smem[...]
            smem[...] = jnp.where((index >= before) & (index < after), block, jnp.zeros_like(block))

        def multiply(accumulator) -> Array:
            def step(index, x_smem, dy_smem) -> None:
                begin = (start + index[0]) * STEP

                @pl.when((begin < first) | (begin + STEP > end))
                def _():
                    clear(x_smem, first - begin, end - begin)
                    clear(dy_smem, first - begin, end - begin)
                    plgpu.commit_smem()

                plgpu.wgmma(accumulator, x_smem.transpose((1, 0)), dy_smem)

            @pl.when(steps > 0)
            def _():
                plgpu.emit_pipeline(
                    step,
                    grid=(steps,),
                    in_specs=[
                        plgpu.BlockSpec((STEP, height), lambda k: (start + k, row), delay_release=1),
                        plgpu.BlockSpec((STEP, width), lambda k: (start + k, column), delay_release=1),
                    ],
                    max_concurrent_steps=STEPS,
                )(x_gmem, dy_gmem)

            return accumulator[...]

        total = pl.run_scoped(multiply, plgpu.ACC((height, width)))
        out_smem[...] = total.astype(out_smem.dtype)
        plgpu.commit_smem()
        target = out_gmem.at[group, pl.ds(row * height, height), pl.ds(column * width, width)]
        plgpu.copy_smem_to_gmem(out_smem, target)
        plgpu.wait_smem_to_gmem(0)

    groups, shape = firsts.shape[0], (x.shape[1], dy.shape[1])
    return plgpu.kernel(
        body,
        out_type=jax.ShapeDtypeStruct((groups, *shape), x.dtype),
        scratch_types=[plgpu.SMEM((height, width), x.dtype)],
        grid=(groups, shape[0] // height, shape[1] // width),
        grid_names=("group", "row", "column"),
        compiler_params=_parameters(),
    )(firsts, ends, x, dy)
