"""Several tokens of every row at once, each row at its own place: what a policy is given between two of its actions.

`decode_step` reads one token per row, all rows at one slot. Here a row reads as many of the W columns as it has tokens
for, none included, into the slots behind its last one: rows of different lengths leave no holes in the cache, and an
episode needs as many slots as it has tokens. Weights, prompts and cache are those of `decode`.
"""

from typing import NamedTuple
from typing import Self

import jax
import jax.numpy as jnp

from jaxrl_llm.models.attention import MASKED_SCORE
from jaxrl_llm.models.numerics import Numerics
from jaxrl_llm.rollouts.decode import DecodeWeights
from jaxrl_llm.rollouts.decode import PromptCache
from jaxrl_llm.rollouts.decode import ResponseCache
from jaxrl_llm.rollouts.decode import product
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


class ChunkContext(NamedTuple):
    """What several new tokens of every row attend to in one layer: the prompt, and the response up to themselves.

    Attributes:
        prompt: keys [N, KV, hd, P], values [N, KV, P, hd] and mask [N, P], once per prompt.
        keys, values: of the response so far.
        written: slot of each new token; outside the cache for padding, which is written nowhere.
        sees: slots of the response that each may attend to.
    """

    prompt: tuple[Array, Array, Array]
    keys: Float[Array, "B KV hd R"]
    values: Float[Array, "B KV R hd"]
    written: Int[Array, "B W"]
    sees: Bool[Array, "B W R"]

    def attend(
        self,
        query: Float[Array, "B W H hd"],
        key: Float[Array, "B W KV hd"],
        value: Float[Array, "B W KV hd"],
        numerics: Numerics,
    ) -> tuple[Float[Array, "B W H*hd"], Self]:
        """See `models.context.Context`."""
        keys = self._write(self.keys, key, (slice(None), slice(None), self.written))
        values = self._write(self.values, value, (slice(None), self.written))
        return _attend(query, self.sees, (keys, values), self.prompt), self._replace(keys=keys, values=values)

    def _write(self, cache: Array, entries: Float[Array, "B W KV hd"], behind: tuple) -> Array:
        rows = jnp.arange(cache.shape[0])[:, None]
        return cache.at[(rows, *behind)].set(entries.astype(cache.dtype), mode="drop")


def read_chunk(
    weights: DecodeWeights,
    tokens: Int[Array, "B W"],
    counts: Int[Array, " B"],
    starts: Int[Array, " B"],
    prompt: PromptCache,
    response: ResponseCache,
) -> tuple[Float[Array, "B D"], ResponseCache]:
    """Read the next tokens of every row.

    Args:
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
    model = weights.model
    positions, contexts = chunk_contexts(tokens.shape[1], counts, starts, prompt, response)
    passed = model.through(model.embed(tokens), positions, contexts)
    return model.final_norm(last_column(passed.x, counts)), ResponseCache.of(passed.contexts)


def read_columns(
    weights: DecodeWeights,
    tokens: Int[Array, "B W"],
    counts: Int[Array, " B"],
    starts: Int[Array, " B"],
    prompt: PromptCache,
    response: ResponseCache,
) -> tuple[Float[Array, "B W D"], ResponseCache]:
    """`read_chunk` with the final hidden states of all columns; they mean nothing behind a row's tokens."""
    model = weights.model
    positions, contexts = chunk_contexts(tokens.shape[1], counts, starts, prompt, response)
    passed = model.through(model.embed(tokens), positions, contexts)
    return model.final_norm(passed.x), ResponseCache.of(passed.contexts)


def chunk_contexts(
    width: int, counts: Int[Array, " B"], starts: Int[Array, " B"], prompt: PromptCache, response: ResponseCache
) -> tuple[Int[Array, "B W"], list[ChunkContext]]:
    """Positions of the columns of a chunk, and what they attend to in each layer; arguments as of `read_chunk`."""
    rows, slots, columns = counts.shape[0], response.keys[0].shape[3], jnp.arange(width)
    places = starts[:, None] + columns
    length = jnp.repeat(jnp.sum(prompt.mask, axis=1, dtype=jnp.int32), rows // prompt.mask.shape[0])
    written = jnp.where(columns < counts[:, None], places, slots)
    sees = jnp.arange(slots) <= places[..., None]
    contexts = [
        ChunkContext((*shared, prompt.mask), *own, written, sees)
        for shared, own in zip(prompt.layers(), response.layers(), strict=True)
    ]
    return length[:, None] + places, contexts


def last_column(x: Float[Array, "B W D"], counts: Int[Array, " B"]) -> Float[Array, "B D"]:
    """What stands in the column of each row's last token; in the first one of a row of none."""
    return x[jnp.arange(x.shape[0]), jnp.maximum(counts - 1, 0)]


def _attend(
    query: Float[Array, "B W H hd"], sees: Bool[Array, "B W R"], response: tuple, prompt: tuple
) -> Float[Array, "B W H*hd"]:
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
    return mixed.reshape(rows, width, heads * size)
