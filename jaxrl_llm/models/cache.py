"""Keys and values of the tokens already read, so that each new token is computed once."""

from collections.abc import Callable
from collections.abc import Sequence
from dataclasses import dataclass
from dataclasses import field
from dataclasses import replace
from typing import NamedTuple
from typing import Self

import jax
import jax.numpy as jnp

from jaxrl_llm.models.attention import grouped_query_attention
from jaxrl_llm.models.config import TransformerConfig
from jaxrl_llm.models.numerics import Numerics
from jaxrl_llm.typing import Array
from jaxrl_llm.typing import Bool
from jaxrl_llm.typing import Float
from jaxrl_llm.typing import Int


class LayerCache(NamedTuple):
    """One layer's share of the cache: a `Context`.

    Attributes:
        keys, values: of the tokens already read.
        mask: slots that each of the next T tokens may attend to.
        start: slot of the first of them.
        rounding: acts on what is written; None: nothing does.
    """

    keys: Float[Array, "B KV S hd"]
    values: Float[Array, "B KV S hd"]
    mask: Bool[Array, "B T S"]
    start: Int[Array, ""]
    rounding: Callable[[Array], Array] | None = None

    def attend(
        self,
        query: Float[Array, "B T H hd"],
        key: Float[Array, "B T KV hd"],
        value: Float[Array, "B T KV hd"],
        numerics: Numerics,
    ) -> tuple[Float[Array, "B T H hd"], Self]:
        """Write the keys and values of T new tokens into their slots, and attend to all that the mask allows."""
        key, value = key.swapaxes(1, 2), value.swapaxes(1, 2)
        if self.rounding is not None:
            key, value = self.rounding(key), self.rounding(value)
        origin = (0, 0, self.start, 0)
        keys = jax.lax.dynamic_update_slice(self.keys, key.astype(self.keys.dtype), origin)
        values = jax.lax.dynamic_update_slice(self.values, value.astype(self.values.dtype), origin)
        mixed = grouped_query_attention(query, keys, values, self.mask, numerics.precision)
        return mixed, self._replace(keys=keys, values=values)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class KVCache:
    """Keys and values per layer, in separate arrays so that a compiled loop updates each in place.

    Heads come before slots: both products of attention then read the arrays as they lie (on a CPU a decode step's
    attention costs a quarter of what it does with slots first, where each step transposes the whole cache).

    All rows are written at the same slot: a left-padded prompt fills slots 0 .. P, the response the slots after it.
    `slot_mask` says which slots hold a real token; `length` counts the slots written. Writing past the capacity is not
    seen at trace time (`length` is traced): allocate prompt plus response. `rounding` acts on keys and values before
    they are written: a cache in fewer bits.
    """

    keys: tuple[Float[Array, "B KV S hd"], ...]
    values: tuple[Float[Array, "B KV S hd"], ...]
    slot_mask: Bool[Array, "B S"]
    length: Int[Array, ""]
    rounding: Callable[[Array], Array] | None = field(default=None, metadata={"static": True})

    @classmethod
    def empty(
        cls,
        config: TransformerConfig,
        batch: int,
        capacity: int,
        dtype: jnp.dtype | type = jnp.float32,
        rounding: Callable[[Array], Array] | None = None,
        *,
        layers: int | None = None,
    ) -> Self:
        """A cache of `capacity` slots for `batch` rows with nothing in it; `layers` None is those of the model."""
        if batch < 1 or capacity < 1:
            raise ValueError(f"batch and capacity must be at least 1, got {batch} and {capacity}")
        shape = (batch, config.num_kv_heads, capacity, config.head_dim)
        layers = config.num_layers if layers is None else layers
        return cls(
            keys=tuple(jnp.zeros(shape, dtype) for _ in range(layers)),
            values=tuple(jnp.zeros(shape, dtype) for _ in range(layers)),
            slot_mask=jnp.zeros((batch, capacity), bool),
            length=jnp.zeros((), jnp.int32),
            rounding=rounding,
        )

    @property
    def batch(self) -> int:
        """Number of rows."""
        return self.slot_mask.shape[0]

    @property
    def capacity(self) -> int:
        """Number of slots per row."""
        return self.slot_mask.shape[1]

    def contexts(self, tokens: int) -> tuple[LayerCache, ...]:
        """What the last `tokens` that `advance` counted attend to, layer by layer."""
        mask, start = self.attention_mask(tokens), self.length - tokens
        return tuple(
            LayerCache(*layer, mask, start, self.rounding) for layer in zip(self.keys, self.values, strict=True)
        )

    def written(self, contexts: Sequence[LayerCache]) -> Self:
        """The cache with what its layers have written."""
        keys, values = tuple(layer.keys for layer in contexts), tuple(layer.values for layer in contexts)
        return replace(self, keys=keys, values=values)

    def next_positions(self, token_mask: Bool[Array, "B T"]) -> Int[Array, "B T"]:
        """Positions of the next T tokens: the number of real tokens before each in its row."""
        seen = jnp.sum(self.slot_mask, axis=1, dtype=jnp.int32)
        return jnp.maximum(seen[:, None] + jnp.cumsum(token_mask, axis=1, dtype=jnp.int32) - 1, 0)

    def advance(self, token_mask: Bool[Array, "B T"]) -> Self:
        """Count T new slots, of which `token_mask` are real tokens; the layers write theirs separately."""
        tokens = token_mask.shape[1]
        if tokens > self.capacity:
            raise ValueError(f"{tokens} new tokens do not fit into a cache of capacity {self.capacity}")
        slot_mask = jax.lax.dynamic_update_slice(self.slot_mask, token_mask.astype(bool), (0, self.length))
        return replace(self, slot_mask=slot_mask, length=self.length + tokens)

    def attention_mask(self, tokens: int) -> Bool[Array, "B T S"]:
        """Slots that each of the last `tokens` written may attend to: real, and not after itself."""
        slots = jnp.arange(self.capacity)
        last = self.length - tokens + jnp.arange(tokens)
        return (slots[None, None, :] <= last[None, :, None]) & self.slot_mask[:, None, :]

    def repeat(self, count: int) -> Self:
        """`count` copies of every row, neighbours of each other: row = prompt * count + sample."""
        if count < 1:
            raise ValueError(f"count must be at least 1, got {count}")
        return replace(
            self,
            keys=tuple(jnp.repeat(keys, count, axis=0) for keys in self.keys),
            values=tuple(jnp.repeat(values, count, axis=0) for values in self.values),
            slot_mask=jnp.repeat(self.slot_mask, count, axis=0),
        )

    def grow(self, capacity: int) -> Self:
        """The same content with room for `capacity` slots."""
        extra = capacity - self.capacity
        if extra < 0:
            raise ValueError(f"capacity must be at least the present {self.capacity}, got {capacity}")
        return replace(
            self,
            keys=tuple(jnp.pad(keys, ((0, 0), (0, 0), (0, extra), (0, 0))) for keys in self.keys),
            values=tuple(jnp.pad(values, ((0, 0), (0, 0), (0, extra), (0, 0))) for values in self.values),
            slot_mask=jnp.pad(self.slot_mask, ((0, 0), (0, extra))),
        )
