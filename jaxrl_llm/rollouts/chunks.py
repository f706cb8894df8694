"""Several tokens of every row at once, each row at its own place: what a policy is given between two of its actions.

`decode_step` reads one token per row, all rows at one slot. Here a row reads as many of the W columns as it has tokens
for, none included, into the slots behind its last one: rows of different lengths leave no holes in the cache, and an
episode needs as many slots as it has tokens. Weights, prompts and cache are those of `decode`.
"""

import jax
import jax.numpy as jnp

from jaxrl_llm.models.attention import MASKED_SCORE
from jaxrl_llm.models.config import TransformerConfig
from jaxrl_llm.models.layers import Rotation
from jaxrl_llm.models.sharding import constrain
from jaxrl_llm.rollouts.decode import ROW_AXES
from jaxrl_llm.rollouts.decode import DecodeWeights
from jaxrl_llm.rollouts.decode import PromptCache
from jaxrl_llm.rollouts.decode import ResponseCache
from jaxrl_llm.rollouts.decode import feed_forward
from jaxrl_llm.rollouts.decode import norm
from jaxrl_llm.rollouts.decode import product
from jaxrl_llm.rollouts.decode import project
from jaxrl_llm.rollouts.decode import to_prompts
from jaxrl_llm.rollouts.decode import to_rows
from jaxrl_llm.typing import Array
from jaxrl_llm.typing import Bool
from jaxrl_llm.typing import Float
from jaxrl_llm.typing import Int

SMALLEST_CHUNK, LARGEST_CHUNK = 16, 128
"""Columns of a chunk: a power of two from one to the other, so at most four programs are compiled."""


def chunk_width(longest: int) -> int:
    """W, columns for rows of at most so many tokens; what is longer than the largest chunk is read in several."""
    return min(max(SMALLEST_CHUNK, 1 << (longest - 1).bit_length()), LARGEST_CHUNK)


def read_chunk(
    config: TransformerConfig,
    weights: DecodeWeights,
    tokens: Int[Array, "B W"],
    counts: Int[Array, " B"],
    starts: Int[Array, " B"],
    prompt: PromptCache,
    response: ResponseCache,
) -> tuple[Float[Array, "B D"], ResponseCache]:
    """Read the next tokens of every row.

    Args:
        config: of the model.
        weights: of `DecodeWeights.of`.
        tokens: each row's from the first column on, row = prompt * G + sample; any token of the vocabulary after them.
        counts: tokens of each row, 0 .. W; a row of none is left as it is.
        starts: tokens that each row has in the response cache already.
        prompt: cache of the N prompts, B = N * G.
        response: cache with room for starts + counts of each row; a token beyond it is lost.

    Returns:
        The final hidden state of each row's last token, which predicts the next one (of a row that read none it means
        nothing), and the cache with the tokens in it.
    """
    (rows, width), slots = tokens.shape, response.keys[0].shape[3]
    columns = jnp.arange(width)
    places = starts[:, None] + columns
    length = jnp.repeat(jnp.sum(prompt.mask, axis=1, dtype=jnp.int32), rows // prompt.mask.shape[0])
    rotation = Rotation.at((length[:, None] + places).reshape(-1, 1), config)
    # Padding is written nowhere: outside the cache.
    written = (jnp.arange(rows)[:, None], jnp.where(columns < counts[:, None], places, slots))
    sees = jnp.arange(slots) <= places[..., None]
    wide = jnp.promote_types(weights.dtype, jnp.float32)
    x = constrain(weights.embedding[tokens.reshape(-1)].astype(wide), ROW_AXES)
    keys, values = [], []
    for index, layer in enumerate(weights.layers):
        query, key, value = project(layer, norm(x, layer.attention_norm, config.norm_eps), rotation, config)
        keys.append(_write(response.keys[index], key, written, (slice(None), slice(None), written[1])))
        values.append(_write(response.values[index], value, written, (slice(None), written[1])))
        shared = (prompt.keys[index], prompt.values[index], prompt.mask)
        mixed = _attend(query.reshape(rows, width, *query.shape[1:]), sees, (keys[-1], values[-1]), shared)
        x = x + layer.output(mixed)
        x = constrain(x + feed_forward(layer, norm(x, layer.mlp_norm, config.norm_eps)), ROW_AXES)
    last = x.reshape(rows, width, -1)[jnp.arange(rows), jnp.maximum(counts - 1, 0)]
    return norm(last, weights.final_norm, config.norm_eps), ResponseCache(tuple(keys), tuple(values))


def _write(cache: Array, entries: Float[Array, "BW KV hd"], written: tuple[Array, Array], behind: tuple) -> Array:
    entries = entries.reshape(*written[1].shape, *entries.shape[1:]).astype(cache.dtype)
    return cache.at[(written[0], *behind)].set(entries, mode="drop")


def _attend(
    query: Float[Array, "B W H hd"], sees: Bool[Array, "B W R"], response: tuple, prompt: tuple
) -> Float[Array, "BW H*hd"]:
    """Attention of each new token to its prompt, and to the response up to itself.

    Args:
        query: of the new tokens.
        sees: slots of the response that each may attend to.
        response: keys [B, KV, hd, R] and values [B, KV, R, hd], the new tokens' own among them.
        prompt: keys [N, KV, hd, P], values [N, KV, P, hd] and mask [N, P], once per prompt.
    """
    rows, width, heads, size = query.shape
    (prompts, shared), length = prompt[0].shape[:2], prompt[2].shape[1]
    scaled = (query * size**-0.5).reshape(rows, width, shared, -1, size).swapaxes(1, 2).reshape(rows, shared, -1, size)
    prompt_scores = product("nkmd,nkdp->nkmp", to_prompts(scaled, prompts), prompt[0])
    prompt_scores = to_rows(jnp.where(prompt[2][:, None, None], prompt_scores, MASKED_SCORE), rows)
    visible = jnp.repeat(sees, heads // shared, axis=1)[:, None]
    response_scores = jnp.where(visible, product("bkmd,bkdr->bkmr", scaled, response[0]), MASKED_SCORE)
    weights = jax.nn.softmax(jnp.concatenate([prompt_scores, response_scores], axis=-1), axis=-1)
    mixed = to_rows(product("nkmp,nkpd->nkmd", to_prompts(weights[..., :length], prompts), prompt[1]), rows)
    mixed += product("bkmr,bkrd->bkmd", weights[..., length:], response[1])
    mixed = mixed.reshape(rows, shared, width, -1, size).swapaxes(1, 2)
    return mixed.reshape(rows * width, heads * size)
