"""Which texts stand together in which row: first fit, for the width that costs fewest products."""

import itertools
from typing import NamedTuple

import numpy as np

from jaxrl_llm.models.blueprint import multiply_adds_per_token
from jaxrl_llm.models.config import TransformerConfig
from jaxrl_llm.trajectory import Trajectories
from jaxrl_llm.typing import Bool

MOST_WIDTHS = 8
"""Widths that are tried, two in an octave: attention makes the next ones dearer than the padding that they save."""

NEAR = 1.2
"""Of the plans that cost at most so many times as much as the cheapest one, that of the roundest width is taken: so
batches that are much alike have the same one, and fewer programs are compiled.
"""

Block = tuple[int, ...]
"""Rows of the batch that stand behind one copy of their prompt."""


class Text(NamedTuple):
    """One row of a batch without its padding; columns of the batch.

    Attributes:
        start: first real token.
        split: first chosen token; what is before it is the prompt.
        stop: one past the last real token.
        unit: number of the prompt; neighbours that answer the same one have the same number.
        group: what the row is compared with.
        chosen: tokens that the policy chose.
    """

    start: int
    split: int
    stop: int
    unit: int
    group: int
    chosen: int

    @property
    def prompt(self) -> int:
        """Tokens of the prompt."""
        return self.split - self.start

    @property
    def rest(self) -> int:
        """Tokens after the prompt, but for the last one, which predicts nothing."""
        return self.stop - self.split - 1


class Plan(NamedTuple):
    """Which blocks stand in which row, and the sizes of what is computed.

    Attributes:
        width: W, tokens of a row.
        chosen: K, chosen tokens of a row, at least those of the fullest one.
        count: n, rows: those that hold blocks, and empty ones behind them.
        rows: the blocks of each row that holds some.
    """

    width: int
    chosen: int
    count: int
    rows: list[list[Block]]


def multiply_adds(config: TransformerConfig, rows: int, width: int, chosen: int) -> float:
    """Products of a forward pass over rows of that width: matrices and attention of every layer, and the logits of the
    chosen tokens of each row.
    """
    attention = 2 * config.num_heads * config.head_dim * width
    layers = width * (multiply_adds_per_token(config) + config.num_layers * attention)
    return rows * (layers + chosen * config.hidden_size * config.vocab_size)


def round_up(size: int, multiple: int = 1, *, bits: int) -> int:
    """The next number of `bits` binary digits followed by zeros, so that few programs are compiled; then a multiple."""
    step = 1 << max(size.bit_length() - bits, 0)
    size = -(-size // step) * step
    return -(-size // multiple) * multiple


def texts_of(trajectories: Trajectories, *, share_prompts: bool) -> list[Text]:
    """The texts of a batch; with `share_prompts`, neighbours of one group with the same prompt have one unit.

    A row without a chosen token is all prompt but for its last token.
    """
    tokens, real, chosen = (
        np.asarray(array) for array in (trajectories.tokens, trajectories.token_mask, trajectories.action_mask)
    )
    groups, counts, width = np.asarray(trajectories.group_ids), chosen.sum(axis=1), real.shape[1]
    some = real.any(axis=1)
    starts = np.where(some, real.argmax(axis=1), 0)
    stops = np.where(some, width - real[:, ::-1].argmax(axis=1), 1)
    splits = np.where(counts > 0, chosen.argmax(axis=1), np.maximum(stops - 1, starts))
    texts: list[Text] = []
    columns = zip(*(array.tolist() for array in (starts, splits, stops, groups, counts)), strict=True)
    for row, (start, split, stop, group, count) in enumerate(columns):
        unit = texts[-1].unit + 1 if texts else 0
        if share_prompts and texts and group == texts[-1].group:
            last = texts[-1]
            if np.array_equal(tokens[row - 1, last.start : last.split], tokens[row, start:split]):
                unit = last.unit
        texts.append(Text(start, split, stop, unit, group, count))
    return texts


def least_multiply_adds(texts: list[Text], config: TransformerConfig) -> float:
    """What no packed rows are below: no padding, and rows no wider than the longest text."""
    total = sum(_size(texts, unit) for unit in _units(texts))
    longest = max(1, *(text.prompt + text.rest for text in texts))
    chosen = sum(text.chosen for text in texts)
    return multiply_adds(config, 1, longest, 0) * total / longest + multiply_adds(config, 1, 0, chosen)


def _units(texts: list[Text]) -> list[Block]:
    return [tuple(unit) for _, unit in itertools.groupby(range(len(texts)), key=lambda index: texts[index].unit)]


def plan_rows(
    texts: list[Text],
    config: TransformerConfig,
    *,
    first: Bool[np.ndarray, " B"],
    whole_groups: bool = False,
    least_rows: int = 1,
    multiple: int = 1,
) -> Plan:
    """The plan with the fewest products among those of some widths; the same for the same texts.

    Args:
        texts: of the batch.
        config: of the model.
        first: texts that are packed before the others, with what must stand beside them.
        whole_groups: whether a group must stand in one row, whatever its prompts.
        least_rows: rows that there must be, as far as there are blocks to put there.
        multiple: the number of rows is a multiple of this one.
    """
    together: dict[int, list[Block]] = {}
    for unit in _units(texts):
        text = texts[unit[0]]
        together.setdefault(text.group if whole_groups else text.unit, []).append(unit)
    ordered = sorted(together.values(), key=lambda units: not any(first[list(unit)].any() for unit in units))  # stable
    totals = [sum(_size(texts, unit) for unit in units) for units in ordered]
    longest = max(1, *totals) if whole_groups else max(1, *(text.prompt + text.rest for text in texts))
    widths = [round_up(longest, bits=2)]
    while widths[-1] < sum(totals) and len(widths) < MOST_WIDTHS:
        widths.append(round_up(widths[-1] + 1, bits=2))

    def plan(width: int) -> Plan:
        # What must stand in one row: all of a group, or as many texts behind one prompt as a row holds.
        pieces = ordered if whole_groups else [[block] for [unit] in ordered for block in _blocks(texts, unit, width)]
        rows = _first_fit(pieces, [sum(_size(texts, block) for block in piece) for piece in pieces], width, least_rows)
        most = max(sum(texts[index].chosen for block in row for index in block) for row in rows)
        return Plan(width, round_up(max(most, 1), bits=3), round_up(len(rows), multiple, bits=3), rows)

    plans = [(multiply_adds(config, found.count, found.width, found.chosen), found) for found in map(plan, widths)]
    near = [(-(found.width & -found.width), cost, found) for cost, found in plans if cost <= NEAR * min(plans)[0]]
    return min(near)[-1]


def padded_rows(texts: list[Text], *, width: int, chosen: int, multiple: int = 1) -> Plan:
    """A row for each text: the same sizes for every batch of as many texts, so that one program serves them all.

    Args:
        texts: of the batch.
        width: tokens that a text can have.
        chosen: chosen tokens that a text can have.
        multiple: the number of rows is a multiple of this one.
    """
    count = -(-len(texts) // multiple) * multiple
    return Plan(width, chosen, count, [[(index,)] for index in range(len(texts))])


def _size(texts: list[Text], block: Block) -> int:
    return texts[block[0]].prompt + sum(texts[index].rest for index in block)


def _blocks(texts: list[Text], unit: Block, width: int) -> list[Block]:
    """A unit in as few blocks as rows of that width need, in order."""
    blocks: list[list[int]] = []
    room = -1
    for index in unit:
        if texts[index].rest > room:
            blocks.append([])
            room = width - texts[index].prompt
        blocks[-1].append(index)
        room -= texts[index].rest
    return [tuple(block) for block in blocks]


def _first_fit(pieces: list[list[Block]], sizes: list[int], width: int, least_rows: int) -> list[list[Block]]:
    """Each piece in the first row that has room for it; the first `least_rows` pieces begin a row each."""
    rows: list[list[Block]] = []
    room = np.zeros(len(pieces), np.int64)
    for piece, size in zip(pieces, sizes, strict=True):
        fits = room[: len(rows)] >= size
        row = int(fits.argmax()) if len(rows) >= least_rows and fits.any() else len(rows)
        if row == len(rows):
            rows.append([])
            room[row] = width
        rows[row].extend(piece)
        room[row] -= size
    return rows
