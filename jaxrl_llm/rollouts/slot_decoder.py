"""A model with its slots: which texts they hold, how large the cache is, and what is read again.

The host's side of `slots`. A text is opened in a free slot, read chunk by chunk, decoded step by step and closed; what
its slot holds is kept until another text takes the slot, and a new text that begins like one that any slot holds is
read from where they part. The cache is as long as the texts at work need, in powers of two, so that short texts do not
pay for a long context.
"""

import math
from collections.abc import Mapping
from collections.abc import Sequence
from typing import Any
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxrl_llm.models.transformer import Transformer
from jaxrl_llm.rollouts.chunks import LARGEST_CHUNK
from jaxrl_llm.rollouts.chunks import chunk_width
from jaxrl_llm.rollouts.decode import SLOT_MULTIPLE
from jaxrl_llm.rollouts.decode import DecodeWeights
from jaxrl_llm.rollouts.decode import ResponseCache
from jaxrl_llm.rollouts.slots import SlotDraws
from jaxrl_llm.rollouts.slots import copy_slot
from jaxrl_llm.rollouts.slots import read_slot
from jaxrl_llm.rollouts.slots import score_slot
from jaxrl_llm.rollouts.slots import slot_step
from jaxrl_llm.typing import Float
from jaxrl_llm.typing import Int
from jaxrl_llm.typing import UInt32

SMALLEST_CAPACITY = 256
"""Tokens that a slot has room for, unless the context is shorter; more where a text needs more."""
SHORTEST_PREFIX = 16
"""Tokens in common from which on they are not read again."""
PATIENCE = 256
"""Steps after which a cache that is longer than needed becomes shorter."""


class Draw(NamedTuple):
    """How a slot draws its next token.

    Attributes:
        seed: key data of its random numbers.
        count: number of the token in its answer.
        temperature: 0 is greedy.
        top_p: mass of the nucleus; 1 keeps all.
        allowed: words of bits, one per token of the vocabulary; None: any token.
        listed: whether the most likely tokens are asked for.
    """

    seed: UInt32[np.ndarray, " 2"]
    count: int
    temperature: float = 1.0
    top_p: float = 1.0
    allowed: UInt32[np.ndarray, " words"] | None = None
    listed: bool = False


class Drawn(NamedTuple):
    """A token that a slot drew; see `slots.SlotTokens`."""

    token: int
    log_prob: float
    log_prob_behaviour: float
    top_tokens: Int[np.ndarray, " listed"]
    top_log_prob: Float[np.ndarray, " listed"]


class SlotDecoder:
    """Slots of one model.

    Args:
        model: what decodes; adapters are merged.
        slots: texts at a time.
        context: most tokens of a text, prompt and answer.
        dtype: of products and cache; None for the model's compute dtype.

    Attributes:
        texts: of each slot, what it is to read or has drawn; None where it is free.

    Raises:
        ValueError: sizes that cannot be.
    """

    def __init__(self, model: Transformer, *, slots: int, context: int, dtype: jnp.dtype | type | None = None) -> None:
        if slots < 1:
            raise ValueError(f"slots must be at least 1, got {slots}")
        if not 2 <= context <= model.config.max_positions:
            raise ValueError(
                f"context must lie in 2 .. {model.config.max_positions}, the model's positions, got {context}"
            )
        self.config, self.context, self.count = model.config, context, slots
        weights = DecodeWeights.of(model, dtype)
        self._leaves, self._structure = jax.tree.flatten(weights)
        self._words = -(-model.config.vocab_size // 32)
        self._dtype = weights.dtype
        self._capacities = _capacities(context)
        self._cache = ResponseCache.empty(model.config, slots, self._capacities[0], weights.dtype)
        self.texts: list[list[int] | None] = [None] * slots
        # What the cache holds of each slot, and when it was last closed.
        self._held: list[list[int]] = [[] for _ in range(slots)]
        self._begun = [False] * slots
        # Whether what is held gave a log-prob that is a number; what did not is not kept.
        self._proven = [True] * slots
        self._closed, self._clock, self._idle = [0] * slots, 0, 0
        self._step = self._compiled(slot_step)
        self._read, self._score = self._compiled(read_slot), self._compiled(score_slot)
        self._copy = jax.jit(copy_slot, donate_argnums=0)

    def _compiled(self, function):
        # The structure of the weights is fixed here: hashing it at every call would cost more than a small step.
        def call(leaves, cache, *arguments):
            return function(jax.tree.unflatten(self._structure, leaves), cache, *arguments)

        return jax.jit(call, donate_argnums=1)

    @property
    def capacity(self) -> int:
        """Tokens that each slot has room for at present."""
        return self._cache.keys[0].shape[3]

    def is_free(self, slot: int) -> bool:
        """Whether a text can be opened there."""
        return self.texts[slot] is None

    def open(self, tokens: Sequence[int]) -> int:
        """Give a text a slot: the free one that holds most of its beginning, else the one that was closed first.

        Raises:
            ValueError: no slot is free, or the text is empty, too long or has what is no token.
        """
        self.check(tokens)
        free = [slot for slot in range(self.count) if self.texts[slot] is None]
        if not free:
            raise ValueError(f"all {self.count} slots are taken; close one first.")
        slot = max(free, key=lambda slot: (self._common(tokens, slot), -self._closed[slot]))
        self.texts[slot], self._begun[slot] = list(tokens), False
        return slot

    def check(self, tokens: Sequence[int]) -> None:
        """Raise a ValueError for a text that no slot can take, which must have room for one token more."""
        if not 1 <= len(tokens) < self.context:
            raise ValueError(f"the text has {len(tokens)} tokens; expected 1 .. {self.context - 1}")
        if not 0 <= min(tokens) <= max(tokens) < self.config.vocab_size:
            raise ValueError(
                f"the text has the tokens {min(tokens)} .. {max(tokens)}; the model's are 0 .. "
                f"{self.config.vocab_size - 1}"
            )

    def unread(self, slot: int) -> int:
        """Tokens that must be read before the slot can draw; its last one is read by the step."""
        text = self.texts[slot]
        assert text is not None
        held = self._held[slot] if self._begun[slot] else ()
        return len(text) - 1 - len(held)

    def read(self, slot: int) -> int:
        """Read a chunk of a text.

        Returns:
            how many tokens.
        """
        text = self._begin(slot)
        start = len(self._held[slot])
        chunk = text[start : min(len(text) - 1, start + LARGEST_CHUNK)]
        if not chunk:
            return 0
        self._fit(len(text))  # at once for the whole of it: each length in between would be compiled too
        tokens = _padded(chunk, chunk_width(len(chunk)))
        numbers = (np.int32(len(chunk)), np.int32(start))
        self._cache = self._read(self._leaves, self._cache, np.int32(slot), tokens, *numbers)
        self._held[slot] += chunk
        return len(chunk)

    def score(self, slot: int) -> list[float]:
        """Read a chunk of a text, whose beginning is not taken from other texts.

        Returns:
            log-probs of the token after each of those that were read [nats].
        """
        text = self.texts[slot]
        assert text is not None
        if not self._begun[slot]:
            self._begun[slot], self._proven[slot], self._held[slot] = True, False, []
        start = len(self._held[slot])
        chunk = text[start : min(len(text) - 1, start + LARGEST_CHUNK)]
        if not chunk:
            return []
        self._fit(len(text))
        width = chunk_width(len(chunk))
        targets = _padded(text[start + 1 : start + 1 + len(chunk)], width)
        numbers = (np.int32(len(chunk)), np.int32(start))
        arguments = (np.int32(slot), _padded(chunk, width), targets, *numbers)
        log_probs, self._cache = self._score(self._leaves, self._cache, *arguments)
        self._held[slot] += chunk
        return np.asarray(log_probs)[: len(chunk)].tolist()

    def step(self, draws: Mapping[int, Draw]) -> dict[int, Drawn]:
        """Draw a token in each of these slots, all of whose texts are read but for the last token.

        Raises:
            ValueError: a text that is not read yet, or has reached the context.
        """
        for slot in draws:
            text = self.texts[slot]
            if text is None or self.unread(slot):
                raise ValueError(f"slot {slot} is free, or has tokens to read before it can draw.")
            if len(text) >= self.context:
                raise ValueError(f"the text of slot {slot} has reached the context of {self.context} tokens.")
            self._begin(slot)
        self._fit(max(len(self.texts[slot] or ()) for slot in draws))
        drawn, self._cache = self._step(self._leaves, self._cache, self._arrays(draws))
        drawn = jax.device_get(drawn)
        found = {}
        for slot in draws:
            text = self.texts[slot]
            assert text is not None
            self._held[slot].append(text[-1])
            one = Drawn(
                int(drawn.tokens[slot]),
                float(drawn.log_prob[slot]),
                float(drawn.log_prob_behaviour[slot]),
                drawn.top_tokens[slot],
                drawn.top_log_prob[slot],
            )
            text.append(one.token)
            self._proven[slot] = math.isfinite(one.log_prob)
            found[slot] = one
        return found

    def close(self, slot: int) -> None:
        """Free a slot; what it holds is kept for a text that begins alike, where its last step drew from numbers."""
        self._clock += 1
        if not self._proven[slot]:
            self._forget(slot)
        self.texts[slot], self._closed[slot] = None, self._clock

    def load(self, model: Transformer) -> None:
        """Go on with other weights. What was read with the ones before is read again.

        Raises:
            ValueError: a model of another structure.
        """
        leaves, structure = jax.tree.flatten(DecodeWeights.of(model, self._dtype))
        shapes = [[(leaf.shape, leaf.dtype) for leaf in each] for each in (leaves, self._leaves)]
        if model.config != self.config or structure != self._structure or shapes[0] != shapes[1]:
            raise ValueError(f"the model has the configuration {model.config}; expected {self.config}, without more")
        self._leaves = leaves
        for slot in range(self.count):
            self._forget(slot)

    def warm_up(self) -> None:
        """Compile what the smallest cache needs, before anybody waits for it."""
        slot = self.open([0, 0])
        self.read(slot)
        self.step({slot: Draw(np.zeros(2, np.uint32), 0)})
        self.close(slot)
        self._forget(slot)

    def _forget(self, slot: int) -> None:
        """Hold nothing there, not even behind a text's end: a NaN there would spoil the next text."""
        number = np.int32(slot)
        self._cache = self._copy(self._cache, number, number, np.int32(0))
        self._held[slot], self._proven[slot] = [], True

    def _begin(self, slot: int) -> list[int]:
        """The text of a slot, once what others hold of it is there."""
        text = self.texts[slot]
        assert text is not None
        if self._begun[slot]:
            return text
        self._begun[slot], self._proven[slot] = True, False
        common = [self._common(text[:-1], other) for other in range(self.count)]
        best = max(range(self.count), key=common.__getitem__)
        if common[best] >= common[slot] + SHORTEST_PREFIX:
            self._cache = self._copy(self._cache, np.int32(best), np.int32(slot), np.int32(common[best]))
            self._held[slot] = self._held[best][: common[best]]
        else:
            self._held[slot] = self._held[slot][: common[slot]]
        return text

    def _common(self, tokens: Sequence[int], slot: int) -> int:
        """Tokens from the first on that a slot holds; 0 where they are too few."""
        length = min(len(tokens), len(self._held[slot]))
        if length < SHORTEST_PREFIX:
            return 0
        differ = np.flatnonzero(np.not_equal(tokens[:length], self._held[slot][:length]))
        common = int(differ[0]) if differ.size else length
        return common if common >= SHORTEST_PREFIX else 0

    def _fit(self, needed: int) -> None:
        """Make the cache as long as these tokens and the texts at work need."""
        needed = max(
            needed, *(len(text) for text, begun in zip(self.texts, self._begun, strict=True) if text and begun), 1
        )
        fitting = next(size for size in self._capacities if size >= needed)
        self._idle = 0 if fitting >= self.capacity else self._idle + 1
        if fitting < self.capacity and self._idle < PATIENCE:
            return
        if fitting != self.capacity:
            self._idle = 0
            self._cache = _resized(self._cache, fitting)
            self._held = [held[:fitting] for held in self._held]

    def _arrays(self, draws: Mapping[int, Draw]) -> SlotDraws:
        count = self.count
        arrays: dict[str, Any] = {
            "tokens": np.zeros(count, np.int32),
            "lengths": np.zeros(count, np.int32),
            "active": np.zeros(count, bool),
            "seeds": np.zeros((count, 2), np.uint32),
            "counts": np.zeros(count, np.int32),
            "temperature": np.ones(count, np.float32),
            "top_p": np.ones(count, np.float32),
            "allowed": np.full((count, self._words), 0xFFFFFFFF, np.uint32),
            "list_tokens": np.bool_(any(draw.listed for draw in draws.values())),
        }
        for slot, draw in draws.items():
            text = self.texts[slot]
            assert text is not None
            values = (text[-1], len(text) - 1, True, draw.seed, draw.count, draw.temperature, draw.top_p)
            for array, value in zip(arrays.values(), values, strict=False):
                array[slot] = value
            if draw.allowed is not None:
                arrays["allowed"][slot] = draw.allowed
        return SlotDraws(**arrays)


def _capacities(context: int) -> list[int]:
    """Lengths that the cache may have; the last one holds a whole text."""
    whole = context + -context % SLOT_MULTIPLE
    sizes = [min(SMALLEST_CAPACITY, whole)]
    while sizes[-1] < whole:
        sizes.append(min(2 * sizes[-1], whole))
    return sizes


def _resized(cache: ResponseCache, capacity: int) -> ResponseCache:
    def resize(array, axis: int):
        extra = capacity - array.shape[axis]
        if extra < 0:
            return jax.lax.slice_in_dim(array, 0, capacity, axis=axis)
        widths = [(0, extra if number == axis else 0) for number in range(array.ndim)]
        return jnp.pad(array, widths)

    return ResponseCache(
        tuple(resize(keys, 3) for keys in cache.keys), tuple(resize(values, 2) for values in cache.values)
    )


def _padded(tokens: Sequence[int], width: int) -> Int[np.ndarray, " W"]:
    row = np.zeros(width, np.int32)
    row[: len(tokens)] = tokens
    return row
