"""In which dtype a model is kept, multiplied and summed."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxrl_llm.typing import Array
from jaxrl_llm.typing import Float


class Numerics(NamedTuple):
    """Dtypes of a model; norms, rotations and softmax are never below float32.

    Attributes:
        param_dtype: of the parameters.
        compute_dtype: of what goes into a product.
        attention: implementation of `models.attention.attend`; None: the one that `choose` says.
        stream_dtype: of what comes out of a product, and of the sums that run through the layers; None: as goes in.
    """

    param_dtype: jnp.dtype = jnp.dtype(jnp.float32)
    compute_dtype: jnp.dtype = jnp.dtype(jnp.float32)
    attention: str | None = None
    stream_dtype: jnp.dtype | None = None

    @property
    def precision(self) -> jax.lax.Precision:
        """Of products: in float32 the full one, by name, since accelerators default to less."""
        narrow = self.compute_dtype.itemsize < 4
        return jax.lax.Precision.DEFAULT if narrow else jax.lax.Precision.HIGHEST

    @property
    def stream(self) -> jnp.dtype:
        """The dtype in which the layers pass on what they have."""
        return self.compute_dtype if self.stream_dtype is None else self.stream_dtype


def at_least_float32(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """The array in float32, or in its own dtype if that is wider."""
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def matrix_product(
    x: Float[Array, "*batch I"], kernel: Float[Array, "I O"], numerics: Numerics
) -> Float[Array, "*batch O"]:
    """x @ kernel, multiplied in `compute_dtype` and returned in `stream`."""
    dtype = numerics.compute_dtype
    rows = two_rows(x.astype(dtype))
    y = jnp.matmul(rows, kernel.astype(dtype), precision=numerics.precision, preferred_element_type=numerics.stream)
    return y if rows.shape == x.shape else y[:1]


def two_rows(x: Float[Array, "*batch I"]) -> Float[Array, "*batch2 I"]:
    """A single narrow vector twice: XLA on a CPU makes its product element by element, ten times slower than of two."""
    return jnp.concatenate([x, x]) if x.ndim > 1 and x.size == x.shape[-1] and x.dtype.itemsize < 4 else x
