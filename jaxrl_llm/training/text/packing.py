"""Which texts stand together in which row: first fit, for the width that costs fewest products."""

from typing import NamedTuple

import numpy as np

from jaxrl_llm.models.config import TransformerConfig
from jaxrl_llm.trajectory import Trajectories
from jaxrl_llm.typing import Bool

MOST_WIDTHS = 8
"""Widths that are tried: attention makes the next ones dearer than the padding that they save."""

Block = tuple[int, ...]
"""Rows of the batch that stand behind one copy of their prompt."""


class Text(NamedTuple):
    """One row of a batch without its padding; columns of the batch.

    Attributes:
        start: first real token.
        split: first chosen token; what is before it is the prompt.
        stop: one past the last real token.
        unit: number of the prompt; neighbours that answer the same one have the same number.
    """

    start: int
    split: int
    stop: int
    unit: int

    @property
    def prompt(self) -> int:
        """Tokens of the prompt."""
        return self.split - self.start

    @property
    def rest(self) -> int:
        """Tokens after the prompt, but for the last one, which predicts nothing."""
        return self.stop - self.split - 1


class Plan(NamedTuple):
    """Rows of `width` tokens, each a list of blocks."""

    width: int
    rows: list[list[Block]]

    @property
    def count(self) -> int:
        """Number of rows."""
        return len(self.rows)


def multiply_adds(config: TransformerConfig, rows: int, width: int) -> float:
    """Products of one layer on rows of that width: those of its matrices, and those of attention."""
    heads = config.num_heads * config.head_dim
    per_token = config.hidden_size * (
        2 * heads + 2 * config.num_kv_heads * config.head_dim + 3 * config.intermediate_size
    )
    return rows * width * (per_token + 2 * heads * width)


def round_up(size: int, multiple: int = 1) -> int:
    """The next size of a coarse scale, at most an eighth above, so that few programs are compiled; then a multiple."""
    step = 1 << max(size.bit_length() - 4, 0)
    size = -(-size // step) * step
    return -(-size // multiple) * multiple


def texts_of(trajectories: Trajectories, *, share_prompts: bool) -> list[Text]:
    """The texts of a batch; with `share_prompts`, neighbours of one group with the same prompt have one unit.

    A row without a chosen token is all prompt but for its last token.
    """
    tokens, real, chosen = (
        np.asarray(array) for array in (trajectories.tokens, trajectories.token_mask, trajectories.action_mask)
    )
    groups = np.asarray(trajectories.group_ids)
    texts: list[Text] = []
    for row in range(len(tokens)):
        where = np.flatnonzero(real[row])
        start, stop = (int(where[0]), int(where[-1]) + 1) if len(where) else (0, 1)
        split = int(np.argmax(chosen[row])) if chosen[row].any() else max(stop - 1, start)
        unit = texts[-1].unit + 1 if texts else 0
        if share_prompts and texts and groups[row] == groups[row - 1]:
            last = texts[-1]
            before, now = tokens[row - 1, last.start : last.split], tokens[row, start:split]
            if len(before) == len(now) and (before == now).all():
                unit = last.unit
        texts.append(Text(start, split, stop, unit))
    return texts


def least_multiply_adds(texts: list[Text], config: TransformerConfig) -> float:
    """What no packed rows are below: no padding, and rows no wider than the longest text."""
    total = sum(_size(texts, tuple(unit)) for unit in _units(texts))
    longest = max(_size(texts, (index,)) for index in range(len(texts)))
    return multiply_adds(config, 1, longest) * total / longest


def _units(texts: list[Text]) -> list[list[int]]:
    units: dict[int, list[int]] = {}
    for index, text in enumerate(texts):
        units.setdefault(text.unit, []).append(index)
    return list(units.values())


def plan_rows(
    texts: list[Text],
    config: TransformerConfig,
    *,
    first: Bool[np.ndarray, " B"],
    whole_groups: bool = False,
    least_rows: int = 1,
) -> Plan:
    """The plan with the fewest products among those of some widths; the same for the same texts.

    Args:
        texts: of the batch.
        config: of the model.
        first: texts whose units are packed before the others.
        whole_groups: whether a unit must stand in one row.
        least_rows: rows that there must be, if any width gives as many.
    """
    ordered = sorted(_units(texts), key=lambda unit: not first[unit].any())  # stable
    longest = max(
        _size(texts, tuple(unit)) if whole_groups else max(_size(texts, (index,)) for index in unit) for unit in ordered
    )
    total = sum(_size(texts, tuple(unit)) for unit in ordered)
    widths = [round_up(longest)]
    while widths[-1] < total:
        widths.append(round_up(widths[-1] * 5 // 4 + 1))
    plans = [Plan(width, _first_fit(texts, ordered, width)) for width in widths[:MOST_WIDTHS]]
    enough = [plan for plan in plans if plan.count >= least_rows] or plans[:1]
    return min(enough, key=lambda plan: multiply_adds(config, plan.count, plan.width))


def _size(texts: list[Text], block: Block) -> int:
    return texts[block[0]].prompt + sum(texts[index].rest for index in block)


def _blocks(texts: list[Text], unit: list[int], width: int) -> list[Block]:
    """A unit in as few blocks as rows of that width need, in order."""
    blocks: list[Block] = []
    for index in unit:
        if blocks and _size(texts, (*blocks[-1], index)) <= width:
            blocks[-1] = (*blocks[-1], index)
        else:
            blocks.append((index,))
    return blocks


def _first_fit(texts: list[Text], units: list[list[int]], width: int) -> list[list[Block]]:
    rows: list[list[Block]] = []
    room: list[int] = []
    for unit in units:
        for block in _blocks(texts, unit, width):
            size = _size(texts, block)
            row = next((row for row, free in enumerate(room) if size <= free), len(rows))
            if row == len(rows):
                rows.append([])
                room.append(width)
            rows[row].append(block)
            room[row] -= size
    return rows
