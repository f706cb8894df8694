"""The device's side of episodes of text: read what each row is given, write an action for each row.

The cache of keys and values is kept from the first turn to the last, so every token is computed once: an opening that
all prompts share once per batch, a prompt once per group, everything else once per row. The tokens that the model reads
are counted where they are read.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxrl_llm.models.transformer import Transformer
from jaxrl_llm.rollouts.chunks import LARGEST_CHUNK
from jaxrl_llm.rollouts.chunks import chunk_width
from jaxrl_llm.rollouts.chunks import read_chunk
from jaxrl_llm.rollouts.decode import DecodeWeights
from jaxrl_llm.rollouts.decode import PromptCache
from jaxrl_llm.rollouts.decode import ResponseCache
from jaxrl_llm.rollouts.decode import decode_logits
from jaxrl_llm.rollouts.sampling import SamplingSettings
from jaxrl_llm.rollouts.sampling import rollout_keys
from jaxrl_llm.rollouts.sampling import sample_tokens
from jaxrl_llm.rollouts.sampling import token_uniforms
from jaxrl_llm.typing import Array
from jaxrl_llm.typing import Bool
from jaxrl_llm.typing import Float
from jaxrl_llm.typing import Int
from jaxrl_llm.typing import Key
from jaxrl_llm.typing import PRNGKey


class Reading(NamedTuple):
    """What changes as rows are read; its buffers are taken over by the next call.

    Attributes:
        cache: of everything after the prompts.
        counts: tokens of each row in it.
        logits: of each row's next token.
        reads: tokens that the model has read so far, in all rows.
    """

    cache: ResponseCache
    counts: Int[Array, " B"]
    logits: Float[Array, "V B"]
    reads: Int[Array, ""]


class Session(NamedTuple):
    """A batch of episodes in progress.

    Attributes:
        weights, prompt: only read.
        keys: of each row's random numbers.
        reading: where the rows stand.
    """

    weights: DecodeWeights
    prompt: PromptCache
    keys: Key[Array, " B"]
    reading: Reading


class Said(NamedTuple):
    """An action of every row.

    Attributes:
        tokens: its tokens, that which ends it among them.
        log_probs: of each under the distribution that drew it [nats].
        counts: tokens of each row's action; 0 of a row that did not act.
    """

    tokens: Int[Array, "B A"]
    log_probs: Float[Array, "B A"]
    counts: Int[Array, " B"]


class _Writing(NamedTuple):
    # What the loop over the tokens of an action carries.
    number: Int[Array, ""]
    ended: Bool[Array, " B"]
    said: Said
    reading: Reading


class TextTurns:
    """Compiled programs for models of one structure: one that begins, one that acts, and one per width of a chunk."""

    def __init__(
        self,
        model: Transformer,
        *,
        opening: Sequence[int],
        group_size: int,
        slots: int,
        action_tokens: int,
        sampling: SamplingSettings,
        end_ids: Sequence[int],
        pad_id: int,
        decode_dtype: jnp.dtype | type | None = None,
    ) -> None:
        """Nothing is compiled before the first batch.

        Args:
            model: for its structure; the weights come with each batch.
            opening: tokens in front of every prompt; may be empty.
            group_size: G, episodes per prompt.
            slots: most tokens of a row after its prompt.
            action_tokens: A, most tokens of an action, its end among them.
            sampling: temperature and truncation.
            end_ids: tokens that end an action.
            pad_id: token written at places without one.
            decode_dtype: see `make_generate`.
        """
        self._graphdef = nnx.graphdef(model)
        self._opening, self._group_size = tuple(opening), group_size
        self._slots, self._action_tokens, self._sampling = slots, action_tokens, sampling
        self._end_ids, self._pad_id, self._dtype = tuple(end_ids), pad_id, decode_dtype
        self._begin = jax.jit(self._begin_rows)
        self._read = jax.jit(self._read_rows, donate_argnums=2)
        self._act = jax.jit(self._act_rows, donate_argnums=2)

    def begin(
        self,
        state: nnx.State,
        prompts: Sequence[Sequence[int]],
        key: PRNGKey,
        step: int,
        prompt_index: Int[Array, " N"],
        sample_index: Int[Array, " G"] | None = None,
    ) -> Session:
        """Read the prompts: row = prompt * G + sample.

        Args:
            state: parameters of the policy.
            prompts: tokens of each prompt behind the opening, none empty.
            key, step, prompt_index, sample_index: the random numbers of a row are fold_in(fold_in(fold_in(key, step),
                prompt_index), sample_index), then fold_in of turn * A + the number of the token in its action, whatever
                else is in the batch; `sample_index` None is 0 .. G - 1.
        """
        # Two widths in an octave: few programs, and at most a third of padding.
        longest = max(map(len, prompts))
        step_width = max(1 << max(longest.bit_length() - 2, 0), 8)
        width = -(-longest // step_width) * step_width
        tokens, mask = np.full((len(prompts), width), self._pad_id, np.int32), np.zeros((len(prompts), width), bool)
        for row, ids in enumerate(prompts):
            tokens[row, width - len(ids) :], mask[row, width - len(ids) :] = ids, True
        sample_index = jnp.arange(self._group_size) if sample_index is None else sample_index
        return self._begin(state, tokens, mask, key, step, prompt_index, sample_index)

    def read(self, session: Session, rows: Sequence[Sequence[int]]) -> Session:
        """Read what each row is given next; a row of none stays where it is."""
        reading = session.reading
        for first in range(0, max(map(len, rows)), LARGEST_CHUNK):
            pieces = [row[first : first + LARGEST_CHUNK] for row in rows]
            counts = np.array([*map(len, pieces)], np.int32)
            tokens = np.full((len(rows), chunk_width(int(counts.max()))), self._pad_id, np.int32)
            for row, ids in enumerate(pieces):
                tokens[row, : len(ids)] = ids
            reading = self._read(session.weights, session.prompt, reading, tokens, counts)
        return session._replace(reading=reading)

    def act(self, session: Session, turn: int, active: Bool[np.ndarray, " B"]) -> tuple[Session, Said]:
        """Draw an action for every active row, token by token until each has ended or has A tokens.

        The last token of an action is not read: what follows it may never be needed. What was said is on the host.
        """
        weights, prompt, keys, reading = session
        reading, said = self._act(weights, prompt, reading, keys, active, turn)
        return session._replace(reading=reading), jax.device_get(said)

    def _begin_rows(self, state, tokens, mask, key, step, prompt_index, sample_index):
        model, count = nnx.merge(self._graphdef, state), len(tokens)
        reads = jnp.sum(mask, dtype=jnp.int32) + len(self._opening)
        if self._opening:
            capacity = len(self._opening) + tokens.shape[1]
            _, cache = model.prefill(jnp.asarray([self._opening], jnp.int32), capacity=capacity)
            hidden, cache = model.extend(tokens, cache.repeat(count), mask)
        else:
            hidden, cache = model.prefill(tokens, mask)
        weights = DecodeWeights.of(model, self._dtype)
        keys = rollout_keys(key, step, prompt_index, sample_index).reshape(-1)
        reading = Reading(
            cache=ResponseCache.empty(model.config, len(keys), self._slots, weights.dtype),
            counts=jnp.zeros(len(keys), jnp.int32),
            logits=jnp.repeat(model.logits(hidden[:, -1]).T, self._group_size, axis=1),
            reads=reads,
        )
        return Session(weights, PromptCache.of(cache, weights.dtype), keys, reading)

    def _read_rows(self, weights, prompt, reading, tokens, counts):
        hidden, cache = read_chunk(weights, tokens, counts, reading.counts, prompt, reading.cache)
        logits = jnp.where(counts > 0, decode_logits(weights, hidden), reading.logits)
        reads = reading.reads + jnp.sum(counts, dtype=jnp.int32)
        return Reading(cache, reading.counts + counts, logits.astype(reading.logits.dtype), reads)

    def _act_rows(self, weights, prompt, reading, keys, active, turn):
        rows, most = len(keys), self._action_tokens

        def record(writing: _Writing) -> _Writing:
            """Draw the next token of every row that has not ended, and write it down."""
            number, ended, said = writing.number, writing.ended, writing.said
            uniforms = token_uniforms(keys, turn * most + number)
            drawn, log_probs = sample_tokens(writing.reading.logits, uniforms, self._sampling)
            drawn = jnp.where(ended, self._pad_id, drawn)
            ends = jnp.isin(drawn, jnp.asarray(self._end_ids))
            said = Said(
                tokens=said.tokens.at[:, number].set(drawn),
                log_probs=said.log_probs.at[:, number].set(jnp.where(ended, 0, log_probs)),
                counts=said.counts + ~ended,
            )
            return _Writing(number + 1, ended | ends, said, writing.reading)

        def unfinished(writing: _Writing) -> Array:
            return (writing.number < most) & ~jnp.all(writing.ended)

        def advance(writing: _Writing) -> _Writing:
            last = jax.lax.dynamic_index_in_dim(writing.said.tokens, writing.number - 1, axis=1)
            reading = self._read_rows(weights, prompt, writing.reading, last, (~writing.ended).astype(jnp.int32))
            return record(writing._replace(reading=reading))

        said = Said(
            tokens=jnp.full((rows, most), self._pad_id, jnp.int32),
            log_probs=jnp.zeros((rows, most), reading.logits.dtype),
            counts=jnp.zeros(rows, jnp.int32),
        )
        writing = record(_Writing(jnp.zeros((), jnp.int32), ~active, said, reading))
        writing = jax.lax.while_loop(unfinished, advance, writing)
        return writing.reading, writing.said
