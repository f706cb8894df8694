"""Blocks of logits: slices of the head, products with the hidden states, and folds over the vocabulary.

The vocabulary is cut into `full` blocks of `size` columns and one last block of 1 to `size` columns, so no block has
padding and nothing needs a mask. A fold starts from the last block and scans over the full ones: what it accumulates
never needs a neutral element.
"""

import math
from collections.abc import Callable
from functools import cache
from functools import partial
from pathlib import Path
from typing import NamedTuple
from typing import TypeVar

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array
from jaxtyping import Float

from jaxrl_kernels._token_statistics.types import Reference
from jaxrl_kernels._token_statistics.types import ReferenceLogits

State = TypeVar("State")
Tree = TypeVar("Tree")

CPU_BLOCK_BYTES = 2 * 2**20
"""Logits of one head, in the accumulator's type, that a block holds on CPU where no tuned size is known. 2 to 10 MB
take the same time there within the noise."""

ACCELERATOR_BLOCK_BYTES = 256 * 2**20
"""The same on every other platform: a narrow block would leave most of the chip idle (8192 rows by 256 columns are 64
tiles of 128 by 256 for the 132 multiprocessors of a Hopper GPU), and the cotangent of the hidden states is read and
written once per block. Half of it is 2 % slower on an H200, four times as much 5 % faster."""

SMALLEST_BLOCK = 256
"""Below this many columns the matrix products lose speed."""


class Layout(NamedTuple):
    """Static description of the vocabulary's blocks; hashable."""

    vocabulary_axis: int
    vocabulary: int
    size: int

    @property
    def full(self) -> int:
        """Number of full blocks before the last one."""
        return (self.vocabulary - 1) // self.size

    @property
    def last(self) -> tuple[int, int]:
        """(start, size) of the last block, which is never empty."""
        start = self.full * self.size
        return start, self.vocabulary - start


def block_size(rows: int, vocabulary: int, itemsize: int, platform: str) -> int:
    """Columns of a block: about as many bytes of logits as suit the platform, a divisor of the vocabulary if one is
    near."""
    most, step = (CPU_BLOCK_BYTES, 16) if platform == "cpu" else (ACCELERATOR_BLOCK_BYTES, 128)
    wanted = max(SMALLEST_BLOCK, most // (max(rows, 1) * itemsize))
    if wanted >= vocabulary:
        return vocabulary
    divisors = (size for size in range(wanted // step * step, wanted // 2, -step) if vocabulary % size == 0)
    return next(divisors, math.ceil(wanted / 128) * 128)


def promoted(*dtypes: jnp.dtype) -> jnp.dtype:
    """The common dtype of operands that are cast explicitly, so a caller's strict promotion mode does not object to
    it."""
    with jax.numpy_dtype_promotion("standard"):
        return jnp.result_type(*dtypes)


def accumulator(*dtypes: jnp.dtype) -> jnp.dtype:
    """The wider of float32 and the given dtypes."""
    return promoted(jnp.dtype(jnp.float32), *dtypes)


@cache
def _cpu_has_bfloat16() -> bool:
    info = Path("/proc/cpuinfo")
    return info.exists() and "amx_bf16" in info.read_text()


DEPTH = 128
"""Products of widened operands that are summed in one go where digits count. At logits of deviation 30 made of 576
products, log-probs are 7e-5 off by one running sum, 5e-6 by sums of 96 and 1.3e-5 by sums of 192."""


def matmul(
    x: Float[Array, "_ _"],
    y: Float[Array, "_ _"],
    contract: tuple[int, int],
    dtype: jnp.dtype,
    depth: int | None = None,
) -> Float[Array, "_ _"]:
    """Product of two matrices over one axis of each, accumulated and returned in `dtype`.

    float32 operands ask for full precision by name: accelerators otherwise round them to fewer bits. On a CPU without
    instructions for bfloat16 such operands (and float16) become float32 first, which loses nothing, and are summed
    `depth` at a time if that is given: there XLA 0.11 fails at run time on those of their products whose result it
    wants transposed.
    """

    def product(x: Array, y: Array, operands: jnp.dtype, precision: lax.Precision) -> Array:
        dimensions = (((contract[0],), (contract[1],)), ((), ()))
        x, y = x.astype(operands), y.astype(operands)
        return lax.dot_general(x, y, dimensions, precision=precision, preferred_element_type=dtype)

    def widened(x: Array, y: Array) -> Array:
        length = max(1, x.shape[contract[0]])
        parts = []
        for start in range(0, length, depth or length):
            pair = [
                lax.slice_in_dim(z, start, min(start + (depth or length), z.shape[axis]), axis=axis)
                for z, axis in zip((x, y), contract, strict=True)
            ]
            parts.append(product(pair[0], pair[1], jnp.dtype(jnp.float32), lax.Precision.HIGHEST))
        return sum(parts[1:], parts[0])

    narrow = promoted(x.dtype, y.dtype)
    if narrow not in (jnp.bfloat16, jnp.float16):
        return product(x, y, narrow, lax.Precision.HIGHEST)
    as_given = partial(product, operands=narrow, precision=lax.Precision.DEFAULT)
    return as_given(x, y) if _cpu_has_bfloat16() else lax.platform_dependent(x, y, cpu=widened, default=as_given)


def varying_axes(x: Array) -> frozenset[str]:
    """Mesh axes over which `x` differs inside a shard_map; empty outside."""
    kind = jax.typeof(x)
    return kind.vma if hasattr(kind, "vma") else kind.manual_axis_type.varying


def vary_together(tree: Tree, besides: str | None = None) -> Tree:
    """The same arrays, all varying over the mesh axes that any of them varies over.

    Inside a shard_map a custom VJP must return cotangents of the very types of its arguments. Cast like this before, a
    head that is the same on every device gets its cotangent summed over them by the transpose of the cast.

    besides: an axis that is left out.
    """
    axes = frozenset[str]().union(*(varying_axes(x) for x in jax.tree.leaves(tree))) - {besides}

    def cast(x: Array) -> Array:
        missing = tuple(sorted(axes - varying_axes(x)))
        return lax.pcast(x, missing, to="varying") if missing else x

    return jax.tree.map(cast, tree)


def head_cotangent(hidden_t: Float[Array, "D N"], g: Float[Array, "N B"], axis: int, dtype: jnp.dtype) -> Array:
    """hidden^T g in the head's layout: [D, B], or [B, D] for vocabulary_axis=0. The caller transposes `hidden` once.

    On CPU a product that contracts the leading axes packs its left operand anew each time; transposed beforehand it is
    15 % faster.
    """
    product = matmul(hidden_t, g, (1, 0), dtype)
    return product if axis == 1 else product.T


class Logits(NamedTuple):
    """Where blocks of soft-capped, temperature-scaled logits come from: the policy's head and, if any, the reference.

    With raw products x, z = cap tanh(x / cap) / temperature; no cap means z = x / temperature.
    """

    hidden: Float[Array, "N D"]
    head: Float[Array, "_ _"]
    reference: Reference | ReferenceLogits | None
    inverse_temperature: Float[Array, "_ 1"] | None
    soft_cap: float | None = None

    @property
    def dtype(self) -> jnp.dtype:
        """dtype of logits and statistics."""
        arrays = jax.tree.leaves((self.hidden, self.head, self.reference))
        return accumulator(*(x.dtype for x in arrays))

    @property
    def sparse(self) -> bool:
        """Whether the reference may have logits of -inf: a head makes none."""
        return isinstance(self.reference, ReferenceLogits)

    def _product(self, hidden: Array, head: Array, layout: Layout, start: int | Array, size: int) -> Array:
        axis = layout.vocabulary_axis
        block = lax.dynamic_slice_in_dim(head, start, size, axis=axis)
        return self.scaled(matmul(hidden, block, (1, 1 - axis), self.dtype, DEPTH))

    def scaled(self, x: Float[Array, "n b"]) -> Float[Array, "n b"]:
        """Soft cap and temperature applied to raw products."""
        z = x if self.soft_cap is None else self.soft_cap * jnp.tanh(x / self.soft_cap)
        return z if self.inverse_temperature is None else z * self.inverse_temperature

    def pulled(self, g: Float[Array, "n b"], z: Float[Array, "n b"]) -> Float[Array, "n b"]:
        """Gradient with respect to raw products from g, that with respect to z: g (1 - tanh^2) / temperature."""
        if self.soft_cap is not None:
            capped = z if self.inverse_temperature is None else z / self.inverse_temperature
            g = g * (1 - jnp.square(capped / self.soft_cap))
        return g if self.inverse_temperature is None else g * self.inverse_temperature

    def block(self, layout: Layout, start: int | Array, size: int) -> tuple[Array, Array | None]:
        """Logits [N, size] of the policy and of the reference (or None) from column `start` on."""
        z = self._product(self.hidden, self.head, layout, start, size)
        if self.reference is None:
            return z, None
        if isinstance(self.reference, ReferenceLogits):
            z_ref = lax.dynamic_slice_in_dim(self.reference.logits, start, size, axis=1).astype(self.dtype)
            return z, z_ref if self.inverse_temperature is None else z_ref * self.inverse_temperature
        return z, self._product(self.reference.hidden, self.reference.head, layout, start, size)


def fold(layout: Layout, step: Callable[[int | Array, int], State], combine: Callable[[State, State], State]) -> State:
    """combine(... combine(step(last block), step(block 0)), ... step(block full-1)); step gets (start, size)."""
    state = step(*layout.last)
    if layout.full == 0:
        return state

    def body(carry: State, index: Array) -> tuple[State, None]:
        return combine(carry, step(index * layout.size, layout.size)), None

    return lax.scan(body, state, jnp.arange(layout.full, dtype=jnp.int32))[0]
