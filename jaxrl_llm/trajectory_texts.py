"""Rows of trajectories as texts: what was given, what was chosen, and the piece of text of each token."""

import dataclasses
import itertools
from collections.abc import Callable
from collections.abc import Sequence
from typing import Any

import numpy as np

from jaxrl_llm.trajectory import Trajectories


@dataclasses.dataclass(frozen=True)
class Stretch:
    """Neighbouring tokens that were all chosen, or all given.

    Attributes:
        start, stop: columns of the row.
        chosen: whether the policy chose them.
    """

    start: int
    stop: int
    chosen: bool


def stretches(trajectories: Trajectories, row: int) -> list[Stretch]:
    """The stretches of real tokens of a row, in order."""
    real = np.flatnonzero(np.asarray(trajectories.token_mask)[row])
    if not len(real):
        return []
    chosen = np.asarray(trajectories.action_mask)[row, real]
    edges = [0, *(np.flatnonzero(np.diff(chosen)) + 1).tolist(), len(real)]
    first = int(real[0])
    return [Stretch(first + start, first + stop, bool(chosen[start])) for start, stop in itertools.pairwise(edges)]


def text_stretches(trajectories: Trajectories, decode: Callable[[Sequence[int]], str]) -> list[list[dict[str, Any]]]:
    """Every row as texts for `write_trajectories`: who wrote what, and the piece of text of each token.

    Args:
        trajectories: arrays on the host.
        decode: ids to text, special tokens included. A token that ends within a letter has an empty piece, and the
            letter stands at the token that ends it.

    Returns:
        For each row its stretches, {"role": "given" or "chosen", "text": .., "pieces": one text per token}.
    """
    tokens = np.asarray(trajectories.tokens)
    rows = []
    for row in range(len(tokens)):
        found = []
        for part in stretches(trajectories, row):
            ids = tokens[row, part.start : part.stop].tolist()
            role = "chosen" if part.chosen else "given"
            found.append({"role": role, "text": decode(ids), "pieces": _pieces(ids, decode)})
        rows.append(found)
    return rows


def _pieces(ids: Sequence[int], decode: Callable[[Sequence[int]], str]) -> list[str]:
    pieces, start = [], 0
    for stop in range(1, len(ids) + 1):
        text = decode(ids[start:stop])
        # A letter of several bytes is shown once it is whole; four bytes are the most that a letter takes.
        if text.endswith("\ufffd") and stop < len(ids) and stop - start < 4:
            pieces.append("")
            continue
        pieces.append(text)
        start = stop
    return pieces
