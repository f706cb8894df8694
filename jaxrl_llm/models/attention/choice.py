"""Which implementation of attention runs: named, or chosen by platform, dtype and size."""

import jax
import jax.numpy as jnp

from jaxrl_llm.models.attention.dense import grouped_query_attention
from jaxrl_llm.models.attention.visibility import Visibility
from jaxrl_llm.typing import Array
from jaxrl_llm.typing import Float

IMPLEMENTATIONS = ("reference", "xla", "cudnn", "splash")
"""Names that `attend(implementation=...)` takes."""


def choose(shape: tuple[int, int, int, int], dtype: jnp.dtype | type, *, platform: str | None = None) -> str:
    """Name of the implementation that runs where none is named.

    Args:
        shape: of the queries, (B, T, H, hd).
        dtype: of the queries.
        platform: "cpu", "gpu" or "tpu"; None: the one of `jax.default_backend()`.
    """
    del shape, dtype, platform
    return "reference"


def attend(
    query: Float[Array, "B T H hd"],
    keys: Float[Array, "B KV T hd"],
    values: Float[Array, "B KV T hd"],
    visibility: Visibility,
    *,
    precision: jax.lax.Precision | None = None,
    implementation: str | None = None,
) -> Float[Array, "B T H hd"]:
    """softmax(q k^T / sqrt(hd)) v over what each query sees; H / KV neighbouring query heads share a key-value head.

    Args:
        query: after norm and rotation.
        keys, values: heads before tokens, as caches hold them.
        visibility: who sees whom.
        precision: of the products.
        implementation: one of `IMPLEMENTATIONS`, which then runs or raises; None: what `choose` says.

    Raises:
        ValueError: no such implementation, or it cannot run here.
    """
    name = implementation or choose(query.shape, query.dtype)
    if name not in IMPLEMENTATIONS:
        raise ValueError(f"implementation is {name!r}; it must be one of {', '.join(IMPLEMENTATIONS)}, or None.")
    if name == "reference":
        return grouped_query_attention(query, keys, values, visibility.dense(), precision)
    raise NotImplementedError(name)
