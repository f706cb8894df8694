"""The public function: arguments are checked here, at trace time, and handed to the implementation."""

from functools import partial
from types import ModuleType

import jax
import jax.numpy as jnp
from jaxtyping import Array
from jaxtyping import Float
from jaxtyping import Int

from jaxrl_kernels import _dispatch
from jaxrl_kernels._grouped_matmul import pallas_mosaic_gpu
from jaxrl_kernels._grouped_matmul import pallas_tpu
from jaxrl_kernels._grouped_matmul import reference as plain
from jaxrl_kernels._grouped_matmul import xla
from jaxrl_kernels._token_statistics.blocks import accumulator
from jaxrl_kernels._token_statistics.blocks import promoted
from jaxrl_kernels._token_statistics.blocks import vary_together

ENGINES: dict[str, ModuleType] = {"xla": xla, "pallas_tpu": pallas_tpu, "pallas_mosaic_gpu": pallas_mosaic_gpu}
IMPLEMENTATIONS = ("reference", *ENGINES)


def grouped_matmul(
    x: Float[Array, "N D"],
    weights: Float[Array, "E D F"],
    group_sizes: Int[Array, " E"],
    *,
    implementation: str | None = None,
) -> Float[Array, "N F"]:
    """Product of each row with the weights of its group; the rows of a group lie together, groups in order.

    y_i = x_i w_{e(i)}, where group e has the rows from n_0 + ... + n_{e-1} on, n_e of them. Rows behind the last group
    give 0, whatever they hold. Gradients, in reverse mode only:

        dx_i = dy_i w_{e(i)}^T        dw_e = sum_{i in e} x_i dy_i^T

    which is 0 for an empty group and for rows behind the groups. Sums are accumulated in the wider of float32 and the
    inputs' dtype. No row is dropped and none of a group reaches another; the sizes may be traced, so that one compiled
    program serves every distribution of rows over groups.

    Args:
        x: [N, D] rows; float16, bfloat16, float32 or float64.
        weights: [E, D, F] of each group. Where its dtype differs from that of x, both are promoted.
        group_sizes: [E] rows of each group, n_e >= 0. A sum below N leaves rows behind the groups; rows beyond N,
            where the sum is larger, do not exist and are not counted.
        implementation: "reference" (plain jax.numpy and autodiff, E times the work), "xla", "pallas_tpu",
            "pallas_mosaic_gpu", or None for "xla". The Pallas ones run on their own platform, and elsewhere only
            interpreted (`pltpu.force_tpu_interpret_mode`, `plgpu.force_gpu_interpret_mode`).

    Returns:
        [N, F] in the dtype of x.

    Raises:
        ValueError: shapes or names that do not fit, or a dtype that the named implementation does not take.
        TypeError: x or weights that are not floating, group_sizes that are not integers.

    Source: derived; d/dw_e of sum_i <dy_i, x_i w_{e(i)}> collects the rows of e.
    """
    op = "grouped_matmul"
    _check(op, x, weights, group_sizes)
    chosen = _dispatch.resolve(op, implementation, IMPLEMENTATIONS)
    operands = promoted(x.dtype, weights.dtype)
    if chosen.startswith("pallas") and (reason := ENGINES[chosen].refusal(operands)):
        raise ValueError(f"{op}: implementation {chosen!r} {reason}.")
    with jax.named_scope(f"{op}.{chosen}"):
        if x.shape[0] == 0:
            return jnp.zeros((0, weights.shape[2]), x.dtype)
        ends = jnp.minimum(jnp.cumsum(group_sizes.astype(jnp.int32)), x.shape[0])
        sizes = jnp.diff(ends, prepend=0)
        if chosen == "reference":
            return plain.products(x, weights, sizes, accumulator(operands)).astype(x.dtype)
        rows, matrices, sizes = vary_together((x.astype(operands), weights.astype(operands), sizes))
        return _product(chosen, rows, matrices, sizes).astype(x.dtype)  # pyright: ignore[reportAttributeAccessIssue]


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _product(chosen: str, x: Array, weights: Array, sizes: Array) -> Array:
    return _rows(chosen, x, weights, sizes, transposed=False)


def _forward_rule(chosen: str, x: Array, weights: Array, sizes: Array):
    return _rows(chosen, x, weights, sizes, transposed=False), (x, weights, sizes)


def _backward_rule(chosen: str, residuals: tuple[Array, Array, Array], cotangent: Array):
    x, weights, sizes = residuals
    d_weights = jax.custom_batching.sequential_vmap(ENGINES[chosen].weight_gradient)(x, cotangent, sizes)
    return _rows(chosen, cotangent, weights, sizes, transposed=True), d_weights, None


_product.defvjp(_forward_rule, _backward_rule)


def _rows(chosen: str, x: Array, weights: Array, sizes: Array, *, transposed: bool) -> Array:
    # Under vmap one after the other: sizes that differ would turn slices into gathers, and each branch into all.
    product = partial(ENGINES[chosen].products, transposed=transposed)
    return jax.custom_batching.sequential_vmap(product)(x, weights, sizes)


def _check(op: str, x: Array, weights: Array, group_sizes: Array) -> None:
    if x.ndim != 2 or x.shape[1] == 0:
        raise ValueError(f"{op}: x has shape {x.shape}; it must be [N, D] with D >= 1 (flatten [B, T, D] first).")
    if weights.ndim != 3 or 0 in weights.shape or weights.shape[1] != x.shape[1]:
        raise ValueError(
            f"{op}: weights has shape {weights.shape}; it must be [E, D, F] with D = {x.shape[1]} as x, E and F >= 1."
        )
    if group_sizes.shape != weights.shape[:1]:
        raise ValueError(
            f"{op}: group_sizes has shape {group_sizes.shape}; it must be [E] = ({weights.shape[0]},), as weights."
        )
    for name, array in (("x", x), ("weights", weights)):
        if not jnp.issubdtype(array.dtype, jnp.floating):
            raise TypeError(f"{op}: {name} must be floating, not {array.dtype}.")
    if not jnp.issubdtype(group_sizes.dtype, jnp.integer):
        raise TypeError(f"{op}: group_sizes must be integers, not {group_sizes.dtype}.")
