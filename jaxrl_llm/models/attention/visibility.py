"""Who attends to whom in a row of training tokens, said in O(T)."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from jaxrl_llm.typing import Array
from jaxrl_llm.typing import Bool
from jaxrl_llm.typing import Int


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Visibility:
    """Query q sees key k of its row where k is real, not after q, and of q's segment or of the one that it continues.

    visible[b, q, k] = real[b, k] and k <= q and (segments[b, k] = segments[b, q] or segments[b, k] = prefixes[b, q])

    k <= q compares places in the row. Padding lies anywhere; its queries see what the formula says, and what comes out
    of them means nothing. One text per row needs `real` alone, packed texts also `segments`, and answers that share the
    prompt in front of them also `prefixes`.

    Attributes:
        real: true at real tokens.
        segments: number of each real token's segment, 0 or more; anything at padding. None: one segment per row.
        prefixes: number of the segment that the token's segment continues (its prompt), its own where it continues
            none; anything at padding. None: no segment continues another. Needs `segments`.
    """

    real: Bool[Array, "B T"]
    segments: Int[Array, "B T"] | None = None
    prefixes: Int[Array, "B T"] | None = None

    def __post_init__(self) -> None:
        """Refuse prefixes of no segments."""
        if self.prefixes is not None and self.segments is None:
            raise ValueError("prefixes name segments, but segments is None; give segments [B, T] as well.")

    def dense(self) -> Bool[Array, "B T T"]:
        """The mask as an array, visible[b, q, k]: T^2 bytes a row."""
        length = self.real.shape[1]
        earlier = jnp.tril(jnp.ones((length, length), bool))[None]
        visible = earlier & self.real.astype(bool)[:, None, :]
        if self.segments is None:
            return visible
        of_key = self.segments[:, None, :]
        related = of_key == self.segments[:, :, None]
        if self.prefixes is not None:
            related |= of_key == self.prefixes[:, :, None]
        return visible & related
