"""Who proposes the tokens that the model then judges: its own layer for further tokens, or a smaller model.

A draft keeps its own cache of prompts and responses. In every round it first reads the tokens that have become certain
since the last one, each row's count of them, with what the model knew about them; its last state predicts the next
token. Then it reads what it has drawn itself, one token after the other; these entries are written over in the next
round, since slots are those of the tokens.
"""

from typing import NamedTuple
from typing import Protocol

import jax.numpy as jnp

from jaxrl_llm.models.cache import KVCache
from jaxrl_llm.models.cache import LayerCache
from jaxrl_llm.models.layers import Rotation
from jaxrl_llm.models.transformer import positions_of
from jaxrl_llm.rollouts.chunks import chunk_contexts
from jaxrl_llm.rollouts.chunks import last_column
from jaxrl_llm.rollouts.chunks import read_chunk
from jaxrl_llm.rollouts.decode import DecodeWeights
from jaxrl_llm.rollouts.decode import PromptCache
from jaxrl_llm.rollouts.decode import ResponseCache
from jaxrl_llm.typing import Array
from jaxrl_llm.typing import Bool
from jaxrl_llm.typing import Float
from jaxrl_llm.typing import Int


class Draft(Protocol):
    """Proposes tokens."""

    @property
    def weights(self) -> DecodeWeights:
        """Of the model that it is or belongs to."""
        ...

    def begin(self, hidden: Float[Array, "N P D"], tokens: Int[Array, "N P"], mask: Bool[Array, "N P"]) -> PromptCache:
        """Read the prompts.

        Args:
            hidden: final states of the judging model.
            tokens: left-padded prompts.
            mask: which tokens are real.
        """
        ...

    def room(self, rows: int, slots: int) -> ResponseCache:
        """A cache for the responses with nothing in it."""
        ...

    def read(
        self,
        tokens: Int[Array, "B W"],
        hidden: Float[Array, "B W D"],
        counts: Int[Array, " B"],
        starts: Int[Array, " B"],
        prompt: PromptCache,
        response: ResponseCache,
    ) -> tuple[Float[Array, "B D"], ResponseCache]:
        """Read the next tokens of every row; see `read_chunk`.

        Args:
            tokens: each row's from the first column on.
            hidden: the state that predicted each of them: the judging model's, or in its place the draft's own.
            counts: tokens of each row.
            starts: number of the first of them in the response.
            prompt: of `begin`.
            response: of `room`.

        Returns:
            a state of each row that predicts its next token, and the cache.
        """
        ...


class FurtherDraft(NamedTuple):
    """The model's own first layer for further tokens, which reads a token with the state that predicted it.

    Of the second draft on, the state is the one that this layer itself has made: DeepSeek-V3 (arXiv:2412.19437, section
    2.2) trains a layer for each; GLM-4.5 has one and applies it again.

    Attributes:
        weights: with `further` layers in them.
    """

    weights: DecodeWeights

    def begin(self, hidden: Float[Array, "N P D"], tokens: Int[Array, "N P"], mask: Bool[Array, "N P"]) -> PromptCache:
        """See `Draft`; without it the layer would not know of the prompt."""
        model = self.weights.model
        # A pair stands where its token does; that of a prompt's first token has no state before it.
        real = mask & jnp.pad(mask, ((0, 0), (1, 0)))[:, :-1]
        before = jnp.pad(hidden, ((0, 0), (1, 0), (0, 0)))[:, :-1]
        rows, length = tokens.shape
        cache = KVCache.empty(model.config, rows, length, self.weights.dtype, layers=1).advance(real)
        rotation = Rotation.at(positions_of(real), model.config)
        _, context, _ = model.further[0](before, model.embed(tokens), rotation, cache.contexts(length)[0])
        assert isinstance(context, LayerCache)
        return PromptCache.of(cache.written([context]), self.weights.dtype)

    def room(self, rows: int, slots: int) -> ResponseCache:
        """See `Draft`."""
        return ResponseCache.empty(self.weights.model.config, rows, slots, self.weights.dtype, layers=1)

    def read(
        self,
        tokens: Int[Array, "B W"],
        hidden: Float[Array, "B W D"],
        counts: Int[Array, " B"],
        starts: Int[Array, " B"],
        prompt: PromptCache,
        response: ResponseCache,
    ) -> tuple[Float[Array, "B D"], ResponseCache]:
        """See `Draft`."""
        model = self.weights.model
        positions, contexts = chunk_contexts(tokens.shape[1], counts, starts, prompt, response)
        rotation = Rotation.at(positions, model.config)
        x, context, _ = model.further[0](hidden, model.embed(tokens), rotation, contexts[0])
        return last_column(x, counts), ResponseCache.of([context])


class ModelDraft(NamedTuple):
    """Another model of the same vocabulary, which looks at tokens only.

    Attributes:
        weights: of that model.
    """

    weights: DecodeWeights

    def begin(self, hidden: Float[Array, "N P D"], tokens: Int[Array, "N P"], mask: Bool[Array, "N P"]) -> PromptCache:
        """See `Draft`."""
        del hidden
        return PromptCache.of(self.weights.model.prefill(tokens, mask)[1], self.weights.dtype)

    def room(self, rows: int, slots: int) -> ResponseCache:
        """See `Draft`."""
        return ResponseCache.empty(self.weights.model.config, rows, slots, self.weights.dtype)

    def read(
        self,
        tokens: Int[Array, "B W"],
        hidden: Float[Array, "B W D"],
        counts: Int[Array, " B"],
        starts: Int[Array, " B"],
        prompt: PromptCache,
        response: ResponseCache,
    ) -> tuple[Float[Array, "B D"], ResponseCache]:
        """See `Draft`."""
        del hidden
        return read_chunk(self.weights, tokens, counts, starts, prompt, response)
