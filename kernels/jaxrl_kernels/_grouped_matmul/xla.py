"""The grouped product in portable XLA, in the way that each platform does well.

On a TPU `lax.ragged_dot` is a kernel of the compiler's own. On a CPU it is one dense product per group with all rows
(20 times the time of the loops here), and on a GPU a single dense product of E times the width, with E copies of the
rows; so there the rows go in blocks of one group each.
"""

from functools import partial

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array
from jaxtyping import Float
from jaxtyping import Int

from jaxrl_kernels._grouped_matmul import xla_blocks
from jaxrl_kernels._grouped_matmul import xla_loops
from jaxrl_kernels._token_statistics.blocks import accumulator

Rows = Float[Array, "N _"]


def products(x: Rows, weights: Float[Array, "E _ _"], sizes: Int[Array, " E"], *, transposed: bool) -> Rows:
    """x_i w_e of every row, or x_i w_e^T; 0 behind the groups. Operands and result have one dtype."""
    return lax.platform_dependent(
        x,
        weights,
        sizes,
        cpu=partial(xla_loops.products, transposed=transposed),
        tpu=partial(_ragged_products, transposed=transposed),
        default=partial(xla_blocks.products, transposed=transposed),
    )


def weight_gradient(x: Rows, dy: Rows, sizes: Int[Array, " E"]) -> Float[Array, "E _ _"]:
    """sum_{i in e} x_i dy_i^T of every group."""
    return lax.platform_dependent(
        x,
        dy,
        sizes,
        cpu=xla_loops.weight_gradient,
        tpu=_ragged_weight_gradient,
        default=xla_blocks.weight_gradient,
    )


def _precision(dtype) -> lax.Precision:
    return lax.Precision.DEFAULT if dtype in (jnp.bfloat16, jnp.float16) else lax.Precision.HIGHEST


def _ragged(x: Array, y: Array, sizes: Array, contract: tuple[int, int], groups: list[int]) -> Array:
    dimensions = lax.RaggedDotDimensionNumbers(
        dot_dimension_numbers=(((contract[0],), (contract[1],)), ((), ())),
        lhs_ragged_dimensions=[0],
        rhs_group_dimensions=groups,
    )
    return lax.ragged_dot_general(
        x, y, sizes, dimensions, precision=_precision(x.dtype), preferred_element_type=accumulator(x.dtype)
    ).astype(x.dtype)


def _ragged_products(x: Rows, weights: Array, sizes: Array, *, transposed: bool) -> Rows:
    return _ragged(x, weights, sizes, (1, 2 if transposed else 1), [0])


def _ragged_weight_gradient(x: Rows, dy: Rows, sizes: Array) -> Array:
    return _ragged(x, dy, sizes, (0, 0), [])
