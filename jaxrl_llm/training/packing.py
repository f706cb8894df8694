"""Several answers to one prompt in one row, so that the prompt is computed once.

A row of the update is a prompt of width P followed by `slots` answers of R tokens each; an answer attends to the prompt
and to itself. The last token of an answer predicts nothing and is left out, so a row is P + slots (R - 1) tokens long.
With one slot this is the plain layout.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from jaxrl_llm.models.attention import Visibility
from jaxrl_llm.models.config import TransformerConfig
from jaxrl_llm.models.transformer import Transformer
from jaxrl_llm.typing import Array
from jaxrl_llm.typing import Bool
from jaxrl_llm.typing import Float
from jaxrl_llm.typing import Int


@dataclasses.dataclass(frozen=True)
class Layout:
    """Widths of a row: prompt P, answers per row, tokens per answer R. [tokens]"""

    prompt_length: int
    slots: int
    response_length: int

    def __post_init__(self) -> None:
        """Refuse impossible widths."""
        for field in dataclasses.fields(self):
            if getattr(self, field.name) < 1:
                raise ValueError(f"{field.name} is {getattr(self, field.name)}; it must be at least 1.")

    @property
    def width(self) -> int:
        """Tokens in a row: P + slots (R - 1)."""
        return self.prompt_length + self.slots * (self.response_length - 1)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PackedTokens:
    """Rows as the model reads them; W is `layout.width`.

    Attributes:
        tokens: token ids.
        token_mask: true at real tokens.
        positions: position of each token in its own text: an answer goes on where its prompt ended.
        layout: the widths (static).
    """

    tokens: Int[Array, "n W"]
    token_mask: Bool[Array, "n W"]
    positions: Int[Array, "n W"]
    layout: Layout = dataclasses.field(metadata={"static": True})


def choose_slots(config: TransformerConfig, prompt_length: int, response_length: int, group_size: int) -> int:
    """The number of answers per row with the fewest products: prompts are shared, but attention grows with the row.

    Counts multiply-adds of one group in one layer; only divisors of `group_size` are considered.
    """
    heads = config.num_heads * config.head_dim
    per_token = config.hidden_size * (
        2 * heads + 2 * config.num_kv_heads * config.head_dim + 3 * config.intermediate_size
    )

    def cost(slots: int) -> int:
        width = Layout(prompt_length, slots, response_length).width
        return group_size // slots * width * (per_token + 2 * heads * width)

    return min((slots for slots in range(1, group_size + 1) if group_size % slots == 0), key=cost)


def pack(
    tokens: Int[ArrayLike, "B T"], token_mask: Bool[ArrayLike, "B T"], group_ids: Int[ArrayLike, " B"], layout: Layout
) -> PackedTokens:
    """Rows of a batch whose neighbouring `layout.slots` sequences answer the same prompt.

    Args:
        tokens: left-padded prompts of width P, then answers of width R.
        token_mask: true at real tokens.
        group_ids: sequences with the same id have the same prompt.
        layout: the widths.

    Raises:
        ValueError: T is not P + R, or the sequences of a row belong to different groups.
    """
    prompt, slots, response = layout.prompt_length, layout.slots, layout.response_length
    tokens, token_mask, ids = np.asarray(tokens), np.asarray(token_mask), np.asarray(group_ids)
    if tokens.shape[1] != prompt + response:
        raise ValueError(
            f"tokens has {tokens.shape[1]} columns; it must have {prompt} (prompt) + {response} (response)."
        )
    if len(ids) % slots or (ids.reshape(-1, slots) != ids[::slots, None]).any():
        raise ValueError(
            f"group_ids must come in runs of {slots} equal ids, because a row holds {slots} answers to one prompt."
        )
    count = len(ids) // slots
    inputs = slice(prompt, prompt + response - 1)

    def rows(array: np.ndarray) -> np.ndarray:
        return np.concatenate([array[::slots, :prompt], array[:, inputs].reshape(count, -1)], axis=1)

    positions = np.maximum(np.cumsum(token_mask, axis=1, dtype=np.int32) - 1, 0)
    return PackedTokens(jnp.asarray(rows(tokens)), jnp.asarray(rows(token_mask)), jnp.asarray(rows(positions)), layout)


def attention_mask(token_mask: Bool[Array, "n W"], layout: Layout) -> Visibility:
    """A token sees the prompt and its own answer: the prompt is segment 0, answers are 1, 2, .. and continue it."""
    places = np.arange(layout.width) - layout.prompt_length
    slots = np.where(places < 0, 0, 1 + places // max(layout.response_length - 1, 1)).astype(np.int32)
    segments = jnp.broadcast_to(jnp.asarray(slots), token_mask.shape)
    return Visibility(token_mask, segments, jnp.zeros_like(segments))


def through_layers(
    model: Transformer,
    x: Float[Array, "n W D"],
    packed: PackedTokens,
    *,
    start: int,
    stop: int | None = None,
    remat: bool = False,
) -> Float[Array, "n W D"]:
    """Apply layers start .. stop to packed rows; `remat` recomputes each layer in the backward pass."""
    visibility = attention_mask(packed.token_mask, packed.layout)
    return model.blocks(
        x, packed.positions, packed.token_mask, start=start, stop=stop, remat=remat, visibility=visibility
    )


def predicting_states(x: Float[Array, "n W D"], layout: Layout) -> Float[Array, "n slots R D"]:
    """The state that predicts each response token: the prompt's last token, then the answer's own."""
    count, width = x.shape[0], x.shape[-1]
    first = jnp.broadcast_to(
        x[:, None, layout.prompt_length - 1 : layout.prompt_length], (count, layout.slots, 1, width)
    )
    rest = x[:, layout.prompt_length :].reshape(count, layout.slots, layout.response_length - 1, width)
    return jnp.concatenate([first, rest], axis=2)
