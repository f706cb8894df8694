"""What a row of the update looks like: many texts side by side, so that little of what is computed is padding.

Two forms, chosen by one cost function (`arrange`):

    Grid     a prompt of width P, then `slots` answers of R tokens each; every row is alike, padding stays where it is
    Packed   whole texts without their padding, put first-fit into rows of one width

In both, answers of a group share their prompt: a token attends to what came before it in its own segment and in the
segment that its own continues, the prompt. The last token of a text predicts nothing and is left out.

Nothing outside this module knows the form of a row: the states that predict the chosen tokens come out of
`chosen_states` as `[n, K, D]`, their statistics go through `by_sequence` and are `[n, S, R]`.
"""

import dataclasses
from typing import Any
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from jaxrl_llm.models.attention import Visibility
from jaxrl_llm.models.config import TransformerConfig
from jaxrl_llm.models.experts import given_selections
from jaxrl_llm.models.transformer import Passed
from jaxrl_llm.models.transformer import Transformer
from jaxrl_llm.training.text.packing import Plan
from jaxrl_llm.training.text.packing import Text
from jaxrl_llm.training.text.packing import least_multiply_adds
from jaxrl_llm.training.text.packing import multiply_adds
from jaxrl_llm.training.text.packing import plan_rows
from jaxrl_llm.training.text.packing import round_up
from jaxrl_llm.training.text.packing import texts_of
from jaxrl_llm.trajectory import Actions
from jaxrl_llm.trajectory import Trajectories
from jaxrl_llm.typing import Array
from jaxrl_llm.typing import Bool
from jaxrl_llm.typing import Float
from jaxrl_llm.typing import Int

WORTH_PACKING = 0.8
"""Packed rows are taken where they cost less than this share of a grid: then another program is worth compiling. At 0
whatever fits the grid stays in it."""


@dataclasses.dataclass(frozen=True)
class Grid:
    """Rows that are all alike: prompt P, answers per row, tokens per answer R. [tokens]"""

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
        """W, tokens in a row: P + slots (R - 1)."""
        return self.prompt_length + self.slots * (self.response_length - 1)

    @property
    def sequences(self) -> int:
        """S, sequences in a row."""
        return self.slots

    @property
    def actions(self) -> int:
        """R, chosen tokens of a sequence."""
        return self.response_length

    @property
    def chosen(self) -> int:
        """K, chosen tokens of a row."""
        return self.slots * self.response_length


@dataclasses.dataclass(frozen=True)
class Packed:
    """Rows of W tokens that hold at most S sequences, R chosen tokens of each, and K of all."""

    width: int
    sequences: int
    actions: int
    chosen: int


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Rows:
    """Rows as the model reads them; n rows of W tokens, K chosen tokens each.

    Attributes:
        tokens: token ids.
        token_mask: true at real tokens.
        positions: position of each token in its own text: an answer goes on where its prompt ended.
        targets: the chosen tokens.
        segments: which segment of its row each token is in; None in a grid, where it follows from the column.
        prefixes: the segment that the token's segment continues, its own where it continues none; None in a grid.
        sources: column of the state that predicts each chosen token; None in a grid.
        places: sequence * R + number, of each chosen token in its row, S * R where there is none; None in a grid.
        layout: the widths (static).
        selections: the k experts that each of the L layers that have experts must send each token to; None where
            routers choose themselves.
    """

    tokens: Int[Array, "n W"]
    token_mask: Bool[Array, "n W"]
    positions: Int[Array, "n W"]
    targets: Int[Array, "n K"]
    segments: Int[Array, "n W"] | None
    prefixes: Int[Array, "n W"] | None
    sources: Int[Array, "n K"] | None
    places: Int[Array, "n K"] | None
    layout: Grid | Packed = dataclasses.field(metadata={"static": True})
    selections: Int[Array, "n W L k"] | None = None


class Arrangement(NamedTuple):
    """Rows, and where each sequence of the batch stands in them.

    Attributes:
        rows: what the model reads.
        sequences: [n, S] the batch's row of each sequence, -1 where there is none.
        homes: [B] row * S + sequence, of each row of the batch.
        padded_share: share of the computed tokens that are padding.
        origins: [n, W] the place of each token in the batch, row * T + column; -1 where there is none.
    """

    rows: Rows
    sequences: Int[np.ndarray, "n S"]
    homes: Int[np.ndarray, " B"]
    padded_share: float
    origins: Int[np.ndarray, "n W"]

    def spread(self, values: np.ndarray) -> np.ndarray:
        """`[B, ...]` put where its sequences are, `[n, S, ...]`; 0 where there is none."""
        values = np.asarray(values)
        found = values[np.maximum(self.sequences, 0)]
        real = (self.sequences >= 0).reshape(*self.sequences.shape, *(1,) * (values.ndim - 1))
        return np.where(real, found, np.zeros((), values.dtype))

    def gather(self, values: ArrayLike) -> np.ndarray:
        """`[n, S, R]`, or `[n * S, R]`, in the order of the batch, `[B, R]`."""
        values = np.asarray(values)
        return values.reshape(self.sequences.size, values.shape[-1])[self.homes]

    def of_tokens(self, values: np.ndarray) -> np.ndarray:
        """Numbers of the batch's tokens, `[B, T, ...]`, where these stand, `[n, W, ...]`; anything where there is none.

        A prompt that answers share is that of the first of them.
        """
        return values.reshape(-1, *values.shape[2:])[np.maximum(self.origins, 0)]


def choose_slots(config: TransformerConfig, prompt_length: int, response_length: int, group_size: int) -> int:
    """The number of answers per row of a grid with the fewest products: prompts are shared, but attention grows with
    the row. Only divisors of `group_size` are considered.
    """

    def cost(slots: int) -> float:
        grid = Grid(prompt_length, slots, response_length)
        return multiply_adds(config, group_size // slots, grid.width, grid.chosen)

    return min((slots for slots in range(1, group_size + 1) if group_size % slots == 0), key=cost)


def arrange(
    trajectories: Trajectories,
    actions: Actions,
    config: TransformerConfig,
    *,
    grid: Grid | None,
    first: Bool[np.ndarray, " B"],
    share_prompts: bool = True,
    whole_groups: bool = False,
    least_rows: int = 1,
    multiple: int = 1,
) -> Arrangement:
    """The batch in the rows that cost fewest products.

    Args:
        trajectories: arrays on the host.
        actions: its chosen tokens, in R columns.
        config: of the model, whose products are counted.
        grid: the grid that every batch of the collector fits, or None where its rows have another form. A batch that
            does not fit it is packed.
        first: rows of the batch that are packed before the others: those that will be learned from.
        share_prompts: whether answers of a group share their prompt.
        whole_groups: whether a group must stand in one packed row, since the loss compares its members.
        least_rows: packed rows that there must be, as far as there are blocks to put there.
        multiple: the number of packed rows is a multiple of this one, so that they are dealt out evenly.
    """
    grid = grid if grid is not None and _fits(trajectories, actions, grid) else None
    texts, dear = texts_of(trajectories, share_prompts=share_prompts), np.inf
    if grid is not None:
        dear = WORTH_PACKING * multiply_adds(config, len(texts) // grid.slots, grid.width, grid.chosen)
        if least_multiply_adds(texts, config) > dear:
            return _in_grid(trajectories, grid)
    options = {"whole_groups": whole_groups, "least_rows": least_rows, "multiple": multiple}
    plan = plan_rows(texts, config, first=first, **options)
    if grid is not None and multiply_adds(config, plan.count, plan.width, plan.chosen) > dear:
        return _in_grid(trajectories, grid)
    return _in_packed_rows(trajectories, actions, texts, plan)


def _fits(trajectories: Trajectories, actions: Actions, grid: Grid) -> bool:
    """Whether rows are left-padded prompts, the same for `slots` neighbours, each with one stretch of chosen tokens."""
    prompt, slots = grid.prompt_length, grid.slots
    tokens, real, ids = (np.asarray(x) for x in (trajectories.tokens, trajectories.token_mask, trajectories.group_ids))
    if tokens.shape[1] != prompt + grid.response_length or len(tokens) % slots:
        return False
    places = np.where(actions.mask, actions.columns - prompt - np.arange(grid.response_length), 0)
    shown = np.where(real, tokens, -1)[:, :prompt].reshape(-1, slots, prompt)
    ids = ids.reshape(-1, slots)
    alike = (shown == shown[:, :1]).all() and (ids == ids[:, :1]).all()
    return bool(alike and not places.any() and (real[:, prompt - 1] | ~actions.mask.any(axis=1)).all())


def _in_grid(trajectories: Trajectories, layout: Grid) -> Arrangement:
    rows = pack(trajectories.tokens, trajectories.token_mask, trajectories.group_ids, layout)
    order = np.arange(len(trajectories.group_ids))
    real = np.asarray(rows.token_mask)
    places = np.arange(trajectories.tokens.size).reshape(trajectories.tokens.shape)
    origins = np.where(real, _grid_rows(places, layout), -1)
    return Arrangement(rows, order.reshape(-1, layout.slots), order, 1 - float(np.mean(real)), origins)


def _grid_rows(array: np.ndarray, layout: Grid) -> np.ndarray:
    """`[B, T]` as `[n, W]`: a prompt, then answers without their last tokens."""
    prompt, slots = layout.prompt_length, layout.slots
    answers = array[:, prompt : prompt + layout.response_length - 1]
    return np.concatenate([array[::slots, :prompt], answers.reshape(len(array) // slots, -1)], axis=1)


def pack(
    tokens: Int[ArrayLike, "B T"], token_mask: Bool[ArrayLike, "B T"], group_ids: Int[ArrayLike, " B"], layout: Grid
) -> Rows:
    """The grid of a batch whose neighbouring `layout.slots` sequences answer the same prompt.

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
    positions = np.maximum(np.cumsum(token_mask, axis=1, dtype=np.int32) - 1, 0)
    targets = tokens[:, prompt:].reshape(count, -1)
    columns = {"tokens": tokens, "token_mask": token_mask, "positions": positions}
    arrays: dict[str, Any] = {name: jnp.asarray(_grid_rows(column, layout)) for name, column in columns.items()}
    arrays |= {"targets": jnp.asarray(targets), "layout": layout}
    return Rows(**arrays, segments=None, prefixes=None, sources=None, places=None)


def _in_packed_rows(trajectories: Trajectories, actions: Actions, texts: list[Text], plan: Plan) -> Arrangement:
    (batch, most), count, chosen = actions.mask.shape, plan.count, plan.chosen
    sequences = round_up(max(sum(map(len, blocks)) for blocks in plan.rows), bits=1)
    layout = Packed(plan.width, sequences, most, chosen)
    names = ("tokens", "positions", "segments", "prefixes", "origins")
    columns = {name: np.zeros((count, plan.width), np.int64 if name == "origins" else np.int32) for name in names}
    # Padding is a segment of its own, which nothing real sees.
    columns["segments"][:], columns["prefixes"][:], columns["origins"][:] = -1, -1, -1
    mask = np.zeros((count, plan.width), bool)
    targets, sources = np.zeros((count, chosen), np.int32), np.zeros((count, chosen), np.int32)
    places = np.full((count, chosen), sequences * most, np.int32)
    order, homes = np.full((count, sequences), -1, np.int32), np.zeros(batch, np.int32)
    tokens = np.asarray(trajectories.tokens)

    for row, blocks in enumerate(plan.rows):
        start, segment, number, slot = 0, 0, 0, 0
        for block in blocks:
            head = texts[block[0]]
            ids, place = tokens[block[0], head.start : head.split], block[0] * tokens.shape[1]
            _write(columns, mask, row, start, ids, 0, segment, segment, place + head.start)
            prompt_start, prompt_segment, start = start, segment, start + len(ids)
            for index in block:
                text, segment = texts[index], segment + 1
                # Without its last token, which predicts nothing.
                ids, place = tokens[index, text.split : text.stop - 1], index * tokens.shape[1] + text.split
                _write(columns, mask, row, start, ids, text.split - text.start, segment, prompt_segment, place)
                where = actions.columns[index][actions.mask[index]]
                before = where - 1
                found = np.where(before < text.split, prompt_start + before - text.start, start + before - text.split)
                slots = slice(slot, slot + len(where))
                targets[row, slots], sources[row, slots] = tokens[index, where], found
                places[row, slots] = number * most + np.arange(len(where))
                order[row, number], homes[index] = index, row * sequences + number
                start, number, slot = start + len(ids), number + 1, slot + len(where)
            segment += 1
    origins = columns.pop("origins")
    arrays: dict[str, Any] = {**columns, "token_mask": mask, "targets": targets, "sources": sources, "places": places}
    rows = Rows(**{name: jnp.asarray(array) for name, array in arrays.items()}, layout=layout)
    return Arrangement(rows, order, homes, 1 - float(mask.mean()), origins)


def _write(columns, mask, row, start, ids, position, segment, prefix, origin) -> None:
    # One segment's tokens at their places in a row.
    here = slice(start, start + len(ids))
    columns["tokens"][row, here] = ids
    columns["positions"][row, here] = position + np.arange(len(ids))
    columns["segments"][row, here], columns["prefixes"][row, here] = segment, prefix
    columns["origins"][row, here] = origin + np.arange(len(ids))
    mask[row, here] = True


def visibility(rows: Rows) -> Visibility:
    """A token sees what is before it in its own segment and in the one that it continues, its prompt."""
    if rows.segments is not None:
        return Visibility(rows.token_mask, rows.segments, rows.prefixes)
    layout = rows.layout
    assert isinstance(layout, Grid)
    # The prompt is segment 0, answers are 1, 2, .. and continue it.
    places = np.arange(layout.width) - layout.prompt_length
    slots = np.where(places < 0, 0, 1 + places // max(layout.response_length - 1, 1)).astype(np.int32)
    segments = jnp.broadcast_to(jnp.asarray(slots), rows.token_mask.shape)
    return Visibility(rows.token_mask, segments, jnp.zeros_like(segments))


def through_layers(
    model: Transformer,
    x: Float[Array, "n W D"],
    rows: Rows,
    *,
    start: int,
    stop: int | None = None,
    remat: bool = False,
) -> Passed:
    """Apply layers start .. stop to rows; `remat` recomputes each layer in the backward pass."""
    selections = given_selections(model.config, rows.selections)[start:stop]
    return model.rows(x, rows.positions, visibility(rows), start=start, stop=stop, remat=remat, selections=selections)


def predecessors(rows: Rows) -> tuple[Int[Array, "n W"], Bool[Array, "n W"]]:
    """The column of the token before each token in its own text, and whether there is one: a text's first has none."""
    layout, (count, width) = rows.layout, rows.tokens.shape
    columns = jnp.broadcast_to(jnp.arange(width), (count, width))
    if rows.segments is None:
        assert isinstance(layout, Grid)
        places = np.arange(width) - layout.prompt_length
        first = (places >= 0) & (places % max(layout.response_length - 1, 1) == 0)
        before = jnp.where(jnp.asarray(first), layout.prompt_length - 1, columns - 1)
    else:
        assert rows.prefixes is not None
        # Segments lie in one piece: the last column of each, and padding in a place of its own.
        ends = jnp.full((count, width + 1), -1).at[jnp.arange(count)[:, None], rows.segments].max(columns)
        begins = rows.segments != jnp.roll(rows.segments, 1, axis=1)
        begins = begins.at[:, 0].set(True)
        continued = jnp.where(
            rows.prefixes == rows.segments, -1, jnp.take_along_axis(ends, jnp.maximum(rows.prefixes, 0), axis=1)
        )
        before = jnp.where(begins, continued, columns - 1)
    there = jnp.take_along_axis(rows.token_mask, jnp.maximum(before, 0), axis=1) & (before >= 0)
    return jnp.maximum(before, 0), there & rows.token_mask


def chosen_states(x: Float[Array, "n W D"], rows: Rows) -> Float[Array, "n K D"]:
    """The state that predicts each chosen token: the one of the token before it in its own text."""
    layout, (count, _, width) = rows.layout, x.shape
    if rows.sources is not None:
        return jnp.take_along_axis(x, rows.sources[:, :, None], axis=1)
    assert isinstance(layout, Grid)
    first = jnp.broadcast_to(
        x[:, None, layout.prompt_length - 1 : layout.prompt_length], (count, layout.slots, 1, width)
    )
    rest = x[:, layout.prompt_length :].reshape(count, layout.slots, layout.response_length - 1, width)
    return jnp.concatenate([first, rest], axis=2).reshape(count, layout.chosen, width)


def by_sequence(values: Array, rows: Rows) -> Array:
    """Numbers of the chosen tokens, `[n, K]` or `[n * K]`, as `[n, S, R]`; 0 where a sequence has no such token."""
    layout = rows.layout
    count = rows.targets.shape[0]
    if rows.places is None:
        return values.reshape(count, layout.sequences, layout.actions)
    room = jnp.zeros((count, layout.sequences * layout.actions + 1), values.dtype)
    # Places of a row differ but for the last one, which is cut off.
    filled = room.at[jnp.arange(count)[:, None], rows.places].set(values.reshape(count, layout.chosen))
    return filled[:, :-1].reshape(count, layout.sequences, layout.actions)
