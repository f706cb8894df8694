"""Attention with all of its scores in memory: what the other implementations are held to."""

import jax
import jax.numpy as jnp

from jaxrl_llm.typing import Array
from jaxrl_llm.typing import Bool
from jaxrl_llm.typing import Float

MASKED_SCORE = -1e30
"""Finite, so that a row with nothing to attend to gives a uniform softmax instead of NaN."""


def grouped_query_attention(
    query: Float[Array, "B T H hd"],
    keys: Float[Array, "B KV S hd"],
    values: Float[Array, "B KV S hd"],
    mask: Bool[Array, "B T S"],
    precision: jax.lax.Precision | None = None,
) -> Float[Array, "B T H hd"]:
    """softmax(q k^T / sqrt(hd)) v, where H / KV neighbouring query heads share a key-value head.

    Scores and softmax are float32 or wider. A query that may attend to nothing returns the mean of all values.
    """
    batch, length, heads, size = query.shape
    shared, slots = keys.shape[1:3]
    group = heads // shared
    # The queries of a group are rows of one product per key-value head: keys and values are read once, uncopied.
    rows = query.reshape(batch, length, shared, group, size).swapaxes(1, 2).reshape(batch, shared, length * group, size)
    wide = jnp.promote_types(query.dtype, jnp.float32)
    scores = jnp.matmul(rows, keys.swapaxes(2, 3), precision=precision, preferred_element_type=wide)
    scores = scores.reshape(batch, shared, length, group, slots) * size**-0.5
    weights = jax.nn.softmax(jnp.where(mask[:, None, :, None], scores, MASKED_SCORE), axis=-1)
    weights = weights.astype(values.dtype).reshape(batch, shared, length * group, slots)
    mixed = jnp.matmul(weights, values, precision=precision).reshape(batch, shared, length, group, size)
    return mixed.swapaxes(1, 2).reshape(batch, length, heads, size).astype(query.dtype)
