"""What the tokens of a layer attend to: each other, or also what was read before.

One forward pass serves training rows, caches and decoding: a layer makes queries, keys and values, and its context says
what becomes of them.
"""

from dataclasses import dataclass
from typing import Protocol
from typing import Self

from jaxrl_llm.models.attention import Visibility
from jaxrl_llm.models.attention import attend
from jaxrl_llm.models.attention import grouped_query_attention
from jaxrl_llm.models.numerics import Numerics
from jaxrl_llm.typing import Array
from jaxrl_llm.typing import Bool
from jaxrl_llm.typing import Float


class Context(Protocol):
    """Of one layer."""

    def attend(
        self,
        query: Float[Array, "B T H hd"],
        key: Float[Array, "B T KV hd"],
        value: Float[Array, "B T KV hd"],
        numerics: Numerics,
    ) -> tuple[Float[Array, "B T H hd"], Self]:
        """softmax(q k^T / sqrt(hd)) v over what each query may see, the new keys among it; and the context after them.

        H / KV neighbouring query heads share a key-value head. The result may come as [B, T, H * hd].
        """
        ...


@dataclass(frozen=True)
class RowContext:
    """Rows of training tokens, which see nothing outside their row.

    Attributes:
        sight: who sees whom; as an array where the scores are made whole.
    """

    sight: Visibility | Bool[Array, "B T T"]

    def attend(
        self,
        query: Float[Array, "B T H hd"],
        key: Float[Array, "B T KV hd"],
        value: Float[Array, "B T KV hd"],
        numerics: Numerics,
    ) -> tuple[Float[Array, "B T H hd"], Self]:
        """See `Context`; nothing is kept."""
        key, value, precision = key.swapaxes(1, 2), value.swapaxes(1, 2), numerics.precision
        if isinstance(self.sight, Visibility):
            chosen = numerics.attention
            return attend(query, key, value, self.sight, precision=precision, implementation=chosen), self
        return grouped_query_attention(query, key, value, self.sight, precision), self
