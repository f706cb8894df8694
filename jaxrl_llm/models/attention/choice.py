"""Which implementation of attention runs: named, or chosen by size, platform and dtype."""

import jax
import jax.numpy as jnp

from jaxrl_llm.models.attention.blocked import block_size
from jaxrl_llm.models.attention.blocked import blocked_attention
from jaxrl_llm.models.attention.dense import grouped_query_attention
from jaxrl_llm.models.attention.fused import CUDNN_DTYPES
from jaxrl_llm.models.attention.fused import CUDNN_WIDTH
from jaxrl_llm.models.attention.fused import cudnn_attention
from jaxrl_llm.models.attention.fused import splash_attention
from jaxrl_llm.models.attention.over_devices import on_each_device
from jaxrl_llm.models.attention.visibility import Visibility
from jaxrl_llm.typing import Array
from jaxrl_llm.typing import Float

IMPLEMENTATIONS = ("reference", "xla", "cudnn", "splash")
"""Names that `attend(implementation=...)` takes."""

DENSE_BYTES = 64 * 2**20
"""Most float32 scores [B, H, T, T] that a layer keeps. [bytes]"""


def choose(
    shape: tuple[int, ...],
    dtype: jnp.dtype | type,
    *,
    platform: str | None = None,
    sharded: bool | None = None,
) -> str:
    """Name of the implementation that runs where none is named.

    - "reference" where the scores of a layer, 4 B H T^2 bytes, are at most 64 MiB: 64 rows of 9 heads up to T = 170,
      one row of 32 heads up to T = 724. What is small stays as it always was, to the bit; on two CPU cores "xla" is the
      faster one from about there on.
    - "splash" above that on a TPU in bfloat16, outside a mesh, where it must be named; its kernel does not multiply
      float32 in full precision.
    - "cudnn" above that on an NVIDIA GPU in bfloat16 or float16, where heads are at most 128 wide, in multiples of 8.
    - "xla" otherwise: on CPUs, in float32, on other accelerators.

    Args:
        shape: of the queries, (B, T, H, hd).
        dtype: of the queries.
        platform: "cpu", "cuda", "rocm" or "tpu"; None: that of the first device.
        sharded: whether a mesh of several devices is set; None: look (`jax.set_mesh`).
    """
    batch, length, heads, width = shape
    dtype = jnp.dtype(dtype)
    if 4 * batch * heads * length**2 <= DENSE_BYTES:
        return "reference"
    platform = _platform() if platform is None else platform
    sharded = jax.sharding.get_abstract_mesh().size > 1 if sharded is None else sharded
    if platform == "tpu" and dtype == jnp.bfloat16 and not sharded:
        return "splash"
    if platform == "cuda" and dtype in CUDNN_DTYPES and width <= CUDNN_WIDTH and width % 8 == 0:
        return "cudnn"
    return "xla"


def _platform() -> str:
    name = jax.default_backend()
    if name != "gpu":
        return name
    return "rocm" if "rocm" in jax.devices()[0].client.platform_version else "cuda"


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

    Implementations, and what they hold beyond arguments and results:

    - "reference": all scores, 4 B H T^2 bytes and more; the only one with forward-mode derivatives.
    - "xla": one pair of blocks, 4 B H b^2 bytes a few times over with b of 64 to 512 tokens (`blocked.block_size`), and
      O(T) arrays.
    - "cudnn": the mask as a bias, 2 B T^2 bytes; bfloat16 and float16 on an NVIDIA GPU.
    - "splash": O(T) on a TPU; `precision` has no say in its kernel. Under a mesh each device runs it on its rows and
      heads.

    What comes out of a padding query means nothing, but it is finite. "cudnn" and "splash" make it zero, and so does
    "xla" where the query sees nothing; a gradient at such an output reaches no real token. "reference" gives the mean
    of all values there; nobody reads it, so its gradient is zero where it comes in.

    Args:
        query: after norm and rotation.
        keys, values: heads before tokens, as caches hold them.
        visibility: who sees whom.
        precision: of the products.
        implementation: one of `IMPLEMENTATIONS`, which then runs or raises, whatever the platform; None: what `choose`
            says.

    Raises:
        ValueError: no such implementation, or the visibility is of other rows.
        ValueError, RuntimeError: the implementation named cannot run here.
    """
    batch, length, heads, _ = query.shape
    if visibility.real.shape != (batch, length):
        raise ValueError(
            f"visibility is of rows {visibility.real.shape}; it must be of the rows of the queries, {(batch, length)}."
        )
    name = choose(query.shape, query.dtype) if implementation is None else implementation
    if name == "reference":
        return grouped_query_attention(query, keys, values, visibility.dense(), precision)
    if name == "xla":
        return blocked_attention(query, keys, values, visibility, precision, block_size(batch, heads, length))
    if name == "cudnn":
        return cudnn_attention(query, keys, values, visibility)
    if name == "splash":
        return on_each_device(splash_attention, query, keys, values, visibility)
    raise ValueError(f"implementation is {name!r}; it must be one of {', '.join(IMPLEMENTATIONS)}, or None.")
