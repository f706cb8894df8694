"""Checks of texts before they reach a compiled function, which cannot see their values."""

from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from jaxrl_llm.typing import Array
from jaxrl_llm.typing import Bool
from jaxrl_llm.typing import Int


def _known(*arrays: Array) -> bool:
    # Values of a tracer are not known, nor those of an array of which other hosts hold a part.
    def here(x: Array) -> bool:
        return not isinstance(x, Tracer) and getattr(x, "is_fully_addressable", True)

    return all(here(x) for x in arrays)


def require_arrays(**arguments: Any) -> None:
    """Tokens and masks must be arrays; a list of lists has no shape.

    Raises:
        TypeError: naming the first that is none.
    """
    for name, value in arguments.items():
        if not hasattr(value, "shape") or not hasattr(value, "dtype"):
            raise TypeError(f"{name} is a {type(value).__name__}; it must be an array (jnp.asarray makes one).")


def require_ids(name: str, tokens: Int[Array, "B T"]) -> None:
    """Tokens are integers: true and false are no ids.

    Raises:
        ValueError: they have another dtype.
    """
    if not jnp.issubdtype(tokens.dtype, jnp.integer):
        raise ValueError(f"{name} has dtype {tokens.dtype}; it must be integers.")


def check_tokens(name: str, tokens: Int[Array, "B T"], mask: Bool[Array, "B T"], *, vocabulary: int) -> None:
    """Every real token must be one of the vocabulary; what stands at padding does not matter.

    Raises:
        ValueError: naming the first that is not, where the values are known (not inside jit).
    """
    if not _known(tokens, mask):
        return
    ids = np.asarray(tokens)
    wrong = np.asarray(mask, bool) & ((ids < 0) | (ids >= vocabulary))
    if wrong.any():
        row, column = (int(i) for i in np.argwhere(wrong)[0])
        raise ValueError(
            f"{name}[{row}, {column}] is {ids[row, column]}; it must be a token of the vocabulary, "
            f"0 .. {vocabulary - 1}."
        )


def check_mask(name: str, mask: Bool[Array, "B T"]) -> None:
    """A mask must be true and false, or 1 and 0: -1e9 is what others add to a score, and 0.5 says nothing.

    Raises:
        ValueError: naming the first entry that is neither, where the values are known (not inside jit).
    """
    if not _known(mask) or mask.dtype == bool:
        return
    values = np.asarray(mask)
    wrong = (values != 0) & (values != 1)
    if wrong.any():
        place = tuple(int(i) for i in np.argwhere(wrong)[0])
        raise ValueError(f"{name}{list(place)} is {values[place]}; a mask must be true or false, or 1 or 0.")


def check_left_padded(name: str, mask: Bool[Array, "B P"], *, rows: Bool[Array, " B"] | None = None) -> None:
    """Prompts must be left-padded: real tokens without a gap up to the last column, where sampling goes on.

    Args:
        name: of the mask, for the message.
        mask: true at the real tokens of the prompts.
        rows: which rows hold a text; all if None.

    Raises:
        ValueError: naming the first that is not, where the values are known (not inside jit).
    """
    if not _known(mask) or (rows is not None and not _known(rows)):
        return
    real = np.asarray(mask, bool)
    holds = np.ones(real.shape[0], bool) if rows is None else np.asarray(rows, bool)
    wrong = holds & ~(real[:, -1] & (np.diff(real.astype(int), axis=1) >= 0).all(axis=1))
    if not wrong.any():
        return
    row = int(np.argmax(wrong))
    what = "is empty" if not real[row].any() else "has padding after a real token"
    raise ValueError(f"{name}[{row}] {what}; a prompt must be left-padded, its last token in the last column.")


def check_texts(tokens: Any, mask: Any, *, response_width: int, vocabulary: int) -> None:
    """`check_tokens` of whole texts `[B, T]`, `check_left_padded` of their prompts: all but the last `response_width`.

    Arguments whose shapes do not fit each other are left to those who read them.
    """
    if tokens.ndim != 2 or mask.shape != tokens.shape or not 1 <= response_width < tokens.shape[1]:
        return
    check_mask("token_mask", mask)
    check_tokens("tokens", tokens, mask, vocabulary=vocabulary)
    check_left_padded("token_mask", mask[:, : tokens.shape[1] - response_width], rows=mask.any(axis=1))
