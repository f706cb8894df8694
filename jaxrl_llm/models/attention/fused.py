"""Attention by the kernels that jax brings: cuDNN's on NVIDIA GPUs, splash attention on TPUs.

Both give zero for padding queries, whose gradient then reaches nobody.
"""

from functools import partial
from typing import Any
from typing import Literal

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu import splash_attention as splash

from jaxrl_llm.models.attention import blocked
from jaxrl_llm.models.attention.visibility import Visibility
from jaxrl_llm.typing import Array
from jaxrl_llm.typing import Float
from jaxrl_llm.typing import Int

CUDNN_DTYPES = (jnp.dtype(jnp.bfloat16), jnp.dtype(jnp.float16))
CUDNN_WIDTH = 128
"""Widest head that every GPU takes; it must be a multiple of 8."""

LANES = 128
"""Splash attention works on whole multiples of this many tokens and channels."""

SPLASH_BLOCKS = (512, 256)
"""Tokens of a block of splash attention, the largest first, where filling the last one adds an eighth at most."""

NOBODY = -1
NO_PREFIX = -2


def _padded(x: Array, axis: int, multiple: int) -> Array:
    widths = [(0, 0)] * x.ndim
    widths[axis] = (0, -x.shape[axis] % multiple)
    return jnp.pad(x, widths)


def _padding_made_zero(mixed: Float[Array, "B T H hd"], visibility: Visibility) -> Float[Array, "B T H hd"]:
    return jnp.where(visibility.real[:, :, None, None], mixed, jnp.zeros((), mixed.dtype))


def cudnn_attention(
    query: Float[Array, "B T H hd"],
    keys: Float[Array, "B KV T hd"],
    values: Float[Array, "B KV T hd"],
    visibility: Visibility,
) -> Float[Array, "B T H hd"]:
    """cuDNN's flash attention under a mask; the mask is 2 T^2 bytes a row, shared by all heads.

    Raises:
        ValueError: arrays of another dtype than bfloat16 and float16, or heads of a width that cuDNN does not take.
    """
    if query.dtype not in CUDNN_DTYPES:
        raise ValueError(f"cuDNN's attention takes bfloat16 or float16, and the queries are {query.dtype}.")
    if query.shape[-1] % 8 or query.shape[-1] > CUDNN_WIDTH:
        raise ValueError(
            f"head_dim is {query.shape[-1]}; for cuDNN's attention it must be a multiple of 8, at most {CUDNN_WIDTH}."
        )
    return masked_attention(query, keys, values, visibility, "cudnn")


def masked_attention(
    query: Float[Array, "B T H hd"],
    keys: Float[Array, "B KV T hd"],
    values: Float[Array, "B KV T hd"],
    visibility: Visibility,
    implementation: Literal["cudnn", "xla"],
) -> Float[Array, "B T H hd"]:
    """`jax.nn.dot_product_attention` under the visibility's mask, in whole tiles of 64 tokens."""
    length = query.shape[1]
    query, keys, values = _padded(query, 1, 64), _padded(keys, 2, 64), _padded(values, 2, 64)
    wide = jax.tree.map(lambda x: _padded(x, 1, 64), visibility)
    # A padding query sees itself, so that no row of the softmax is empty and none of its gradient reaches others.
    mask = (wide.dense() & wide.real[:, :, None]) | jnp.eye(wide.real.shape[1], dtype=bool)
    mixed = jax.nn.dot_product_attention(
        query,
        keys.swapaxes(1, 2),
        values.swapaxes(1, 2),
        mask=mask[:, None],
        implementation=implementation,
    )
    return _padding_made_zero(mixed[:, :length], visibility)


def splash_attention(
    query: Float[Array, "B T H hd"],
    keys: Float[Array, "B KV T hd"],
    values: Float[Array, "B KV T hd"],
    visibility: Visibility,
    *,
    interpret: bool = False,
) -> Float[Array, "B T H hd"]:
    """Splash attention on one TPU: a causal mask, and segment ids for padding and packed texts.

    A query that sees its own segment and the one that it continues is not what segment ids can say. There the kernel
    runs once for each of the two, and with l_1, l_2 the logs of the sums of exponentials of their scores

        l = log(e^l_1 + e^l_2),   result = e^(l_1 - l) result_1 + e^(l_2 - l) result_2;

    its backward pass is the blocked one, from that result and that l. Products are those of the kernel: float32 arrays
    are multiplied in the precision that `jax.default_matmul_precision` names.

    Args:
        query, keys, values, visibility: as in `attend`.
        interpret: run the kernel in Pallas' interpreter, on any platform.
    """
    length, width = query.shape[1], query.shape[-1]
    segments = jnp.zeros(visibility.real.shape, jnp.int32) if visibility.segments is None else visibility.segments
    size = splash_block(length)
    filled = jax.tree.map(lambda x: _padded(x, 1, size), Visibility(visibility.real, segments, visibility.prefixes))
    # Padding is a segment of its own: a query always sees something, and no real token sees padding.
    own = jnp.where(filled.real, filled.segments, NOBODY)
    scaled = _padded(_padded(query * jnp.asarray(width**-0.5, query.dtype), 1, size), 3, LANES)
    keys, values = (_padded(_padded(x, 2, size), 3, LANES) for x in (keys, values))
    if filled.prefixes is None:
        mixed: Array = _kernel(scaled, keys, values, own, own, (size, interpret), save=False)
    else:
        apart = Visibility(filled.real, own, filled.prefixes)
        mixed = jnp.asarray(_two_segments(scaled, keys, values, apart, (size, interpret)))
    return _padding_made_zero(mixed[:, :length, :, :width], visibility)


def splash_block(length: int) -> int:
    """Tokens of a block: the largest of `SPLASH_BLOCKS` whose filling adds at most an eighth to the row, else 128."""
    return next((size for size in SPLASH_BLOCKS if 8 * (-length % size) <= length), LANES)


def _kernel(query, keys, values, of_query: Int[Array, "B T"], of_key: Int[Array, "B T"], how, save: bool) -> Any:
    """Result [B, T, H, hd], with `save` also the log-sums [B, H, T], of queries that are scaled already.

    `how` is the size of a block and whether to interpret.
    """
    length, heads = query.shape[1:3]
    size, interpret = how
    sizes = splash.BlockSizes(
        block_q=size, block_kv=size, block_q_dkv=size, block_kv_dkv=size, block_q_dq=size, block_kv_dq=size
    )
    mask = splash.MultiHeadMask([splash.CausalMask((length, length)) for _ in range(heads)])
    kernel = splash.make_splash_mha_single_device(
        mask=mask, block_sizes=sizes, save_residuals=save, interpret=interpret
    )
    found: Any = jax.vmap(kernel)(query.swapaxes(1, 2), keys, values, splash.SegmentIds(q=of_query, kv=of_key))
    return (found[0].swapaxes(1, 2), found[1][0]) if save else found.swapaxes(1, 2)


@partial(jax.custom_vjp, nondiff_argnums=(4,))
def _two_segments(query, keys, values, visibility: Visibility, how: tuple[int, bool]) -> Float[Array, "B T H hd"]:
    return _two_segments_forward(query, keys, values, visibility, how)[0]


def _two_segments_forward(query, keys, values, visibility, how):
    segments, prefixes = visibility.segments, visibility.prefixes
    continues = visibility.real & (prefixes != segments)
    calls = (segments, jnp.where(continues, prefixes, NO_PREFIX))
    (own, log_own), (prompt, log_prompt) = (
        _kernel(query, keys, values, seen, segments, how, save=True) for seen in calls
    )
    # Of a query that continues nothing the second log-sum is about -1e38, and its weight zero.
    lse = jnp.logaddexp(log_own, log_prompt)
    first, second = (jnp.exp(log - lse).swapaxes(1, 2)[..., None] for log in (log_own, log_prompt))
    mixed = (first * own + second * prompt).astype(query.dtype)
    return mixed, (query, keys, values, visibility, mixed, lse)


def _two_segments_backward(how, residuals, cotangent):
    del how
    query, keys, values, visibility, mixed, lse = residuals
    size = blocked.block_size(query.shape[0], query.shape[2], query.shape[1])
    gradients = blocked.pull(
        query, keys, values, visibility, mixed, lse, cotangent, precision=None, size=size, scale=1.0
    )
    return (*gradients, None)


_two_segments.defvjp(_two_segments_forward, _two_segments_backward)
