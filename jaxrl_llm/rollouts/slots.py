"""Slot decoding: a fixed number of rows, each with a text of its own, that come and go while the others go on.

Continuous batching (Orca, Yu et al., OSDI 2022) over the model's one forward pass. A slot is a row of the cache that
holds one text from its first token on. One program reads the last token of every slot, each at its own place, and draws
the next one, each with its own temperature, nucleus, seed and allowed tokens; another reads a chunk of one slot's
prompt. Neither depends on how many slots are at work, so few programs are compiled: one per capacity of the cache, and
one per width of a chunk.

A slot draws its token number t with fold_in(key, t), whatever else is decoded; two numbers of slots may round a product
differently.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxrl_kernels import token_statistics
from jaxrl_llm.rollouts.chunks import read_chunk
from jaxrl_llm.rollouts.chunks import read_columns
from jaxrl_llm.rollouts.decode import DecodeWeights
from jaxrl_llm.rollouts.decode import PromptCache
from jaxrl_llm.rollouts.decode import ResponseCache
from jaxrl_llm.rollouts.decode import decode_logits
from jaxrl_llm.rollouts.sampling import sample_rows
from jaxrl_llm.rollouts.sampling import token_uniforms
from jaxrl_llm.typing import Array
from jaxrl_llm.typing import Bool
from jaxrl_llm.typing import Float
from jaxrl_llm.typing import Int
from jaxrl_llm.typing import UInt32

LISTED = 20
"""Most likely tokens that a step can list: as many as OpenAI's API allows."""


class SlotDraws(NamedTuple):
    """What a step reads and how it draws, slot by slot.

    Attributes:
        tokens: the last token of each text, which is not in the cache yet.
        lengths: tokens that the cache has of each.
        active: slots that take part; the others keep what they hold.
        seeds: key data of each slot's random numbers.
        counts: number of the token to be drawn, in its answer.
        temperature: 0 is greedy.
        top_p: mass of the nucleus in (0, 1]; 1 keeps all.
        allowed: bit v % 32 of word v // 32 says whether token v may be drawn.
        list_tokens: whether anybody asks for the most likely tokens.
    """

    tokens: Int[Array, " S"]
    lengths: Int[Array, " S"]
    active: Bool[Array, " S"]
    seeds: UInt32[Array, "S 2"]
    counts: Int[Array, " S"]
    temperature: Float[Array, " S"]
    top_p: Float[Array, " S"]
    allowed: UInt32[Array, "S words"]
    list_tokens: Bool[Array, ""]


class SlotTokens(NamedTuple):
    """What a step drew; NaN log-probs where the logits or the mask are no distribution.

    Attributes:
        tokens: drawn.
        log_prob: under the softmax over the allowed tokens, at temperature 1 and without the nucleus [nats].
        log_prob_behaviour: under the distribution that drew it: tempered, truncated, renormalised [nats].
        top_tokens: most likely first; 0 where nobody asked.
        top_log_prob: of these, as `log_prob`.
    """

    tokens: Int[Array, " S"]
    log_prob: Float[Array, " S"]
    log_prob_behaviour: Float[Array, " S"]
    top_tokens: Int[Array, "S listed"]
    top_log_prob: Float[Array, "S listed"]


def slot_step(weights: DecodeWeights, cache: ResponseCache, draws: SlotDraws) -> tuple[SlotTokens, ResponseCache]:
    """Read the last token of every active slot and draw the next one.

    Args:
        weights: of `DecodeWeights.of`.
        cache: a row per slot, with room for one token more in each active one.
        draws: what is read and how is drawn.

    Returns:
        The tokens, and the cache with those that were read in it.
    """
    prompt = PromptCache.none(weights.model.config, len(draws.tokens), weights.dtype)
    counts = draws.active.astype(jnp.int32)
    hidden, cache = read_chunk(weights, draws.tokens[:, None], counts, draws.lengths, prompt, cache)
    logits = _allowed_only(decode_logits(weights, hidden), draws.allowed)
    uniforms = token_uniforms(jax.random.wrap_key_data(draws.seeds), draws.counts)
    tokens, behaviour = sample_rows(logits, uniforms, draws.temperature, draws.top_p)
    total = jax.nn.logsumexp(logits, axis=0)
    log_prob = jnp.take_along_axis(logits, tokens[None], axis=0)[0] - total
    listed = min(LISTED, len(logits))

    def most_likely() -> tuple[Array, Array]:
        values, found = jax.lax.top_k(logits.T, listed)
        return found.astype(jnp.int32), values - total[:, None]

    def nothing() -> tuple[Array, Array]:
        return jnp.zeros((len(tokens), listed), jnp.int32), jnp.zeros((len(tokens), listed), logits.dtype)

    top_tokens, top_log_prob = jax.lax.cond(draws.list_tokens, most_likely, nothing)
    return SlotTokens(tokens, log_prob, behaviour, top_tokens, top_log_prob), cache


def read_slot(
    weights: DecodeWeights,
    cache: ResponseCache,
    slot: Int[Array, ""],
    tokens: Int[Array, " W"],
    count: Int[Array, ""],
    start: Int[Array, ""],
) -> ResponseCache:
    """The cache after the next tokens of one slot.

    Args:
        weights: of `DecodeWeights.of`.
        cache: a row per slot, with room for start + count in this one.
        slot: its number.
        tokens: its next tokens; any after the first `count`.
        count: 1 .. W.
        start: tokens that it has already.
    """
    prompt = PromptCache.none(weights.model.config, 1, weights.dtype)
    _, row = read_chunk(weights, tokens[None], count[None], start[None], prompt, _row(cache, slot))
    return _with_row(cache, row, slot)


def score_slot(
    weights: DecodeWeights,
    cache: ResponseCache,
    slot: Int[Array, ""],
    tokens: Int[Array, " W"],
    targets: Int[Array, " W"],
    count: Int[Array, ""],
    start: Int[Array, ""],
) -> tuple[Float[Array, " W"], ResponseCache]:
    """`read_slot`, with the log-prob of the token after each of those that are read [nats].

    Args:
        weights, cache, slot, tokens, count, start: as for `read_slot`.
        targets: the token after each; any after the first `count`.
    """
    prompt = PromptCache.none(weights.model.config, 1, weights.dtype)
    states, row = read_columns(weights, tokens[None], count[None], start[None], prompt, _row(cache, slot))
    found = token_statistics(
        states[0], weights.head, targets, vocabulary_axis=weights.vocabulary_axis, statistics=("log_prob",)
    ).log_prob
    assert found is not None
    return found, _with_row(cache, row, slot)


def copy_slot(
    cache: ResponseCache, source: Int[Array, ""], slot: Int[Array, ""], length: Int[Array, ""]
) -> ResponseCache:
    """The cache with the first tokens of one slot in another one too, and zeros behind them.

    What lies behind a text has the weight 0, which makes nothing of a number and NaN of a NaN.

    Args:
        cache: a row per slot.
        source: the slot that is copied.
        slot: the slot that is written; `source` itself drops what is behind.
        length: tokens that are kept.
    """
    row = _row(cache, source)

    def kept(array: Array, axis: int) -> Array:
        places = jnp.arange(array.shape[axis]).reshape([-1 if number == axis else 1 for number in range(array.ndim)])
        return jnp.where(places < length, array, 0)

    keys, values = (tuple(kept(array, axis) for array in arrays) for arrays, axis in ((row.keys, 3), (row.values, 2)))
    return _with_row(cache, ResponseCache(keys, values), slot)


def _row(cache: ResponseCache, slot: Int[Array, ""]) -> ResponseCache:
    return jax.tree.map(lambda array: jax.lax.dynamic_slice_in_dim(array, slot, 1, axis=0), cache)


def _with_row(cache: ResponseCache, row: ResponseCache, slot: Int[Array, ""]) -> ResponseCache:
    def write(array: Array, part: Array) -> Array:
        return jax.lax.dynamic_update_slice_in_dim(array, part, slot, axis=0)

    return jax.tree.map(write, cache, row)


def _allowed_only(logits: Float[Array, "V S"], allowed: UInt32[Array, "S words"]) -> Float[Array, "V S"]:
    """-inf at tokens whose bit is 0; where all bits are 1 the logits as they are, without a pass over them."""

    def masked() -> Float[Array, "V S"]:
        bits = (allowed.T[:, None, :] >> jnp.arange(32, dtype=allowed.dtype)[:, None]) & 1
        return jnp.where(bits.reshape(-1, logits.shape[1])[: len(logits)] == 1, logits, -jnp.inf)

    everything = jnp.all(~allowed == 0)
    return jax.lax.cond(everything, lambda: logits, masked)
