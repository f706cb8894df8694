"""Packed rows say of every chosen token what its own row says, and hold every text once, where they should."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxrl_llm.models.config import tiny
from jaxrl_llm.models.transformer import Transformer
from jaxrl_llm.rollouts.collect import BatchShape
from jaxrl_llm.rollouts.collect import Experience
from jaxrl_llm.training import Trainer
from jaxrl_llm.training.text import layout
from jaxrl_llm.training.text.layout import Arrangement
from jaxrl_llm.training.text.layout import Grid
from jaxrl_llm.training.text.layout import Packed
from jaxrl_llm.training.text.layout import Rows
from jaxrl_llm.training.text.layout import arrange
from jaxrl_llm.training.text.layout import by_sequence
from jaxrl_llm.training.text.layout import chosen_states
from jaxrl_llm.training.text.layout import through_layers
from jaxrl_llm.training.text.packing import Text
from jaxrl_llm.training.text.packing import multiply_adds
from jaxrl_llm.training.text.packing import plan_rows
from jaxrl_llm.training.text.packing import round_up
from jaxrl_llm.training.text.packing import texts_of
from jaxrl_llm.trajectory import Actions
from jaxrl_llm.trajectory import Trajectories
from jaxrl_llm.trajectory import single_step

WIDTH, ROWS, MODEL = 20, 12, tiny()
LETTERS = 6
"""Few tokens, so that neighbours often have the same ones and only their segments tell them apart."""


def close(got, expected):
    # Relative to the largest entry of the parameter: entries near zero carry the rounding of the large ones.
    np.testing.assert_allclose(got, expected, rtol=0, atol=2e-5 * float(jnp.max(jnp.abs(expected))))


@pytest.fixture(scope="module")
def tiny_model() -> Transformer:
    """Weights large enough for what is attended to to be seen in the log-probs."""
    graphdef, params = nnx.split(Transformer(MODEL, rngs=nnx.Rngs(0)))
    return nnx.merge(graphdef, jax.tree.map(lambda leaf: 2 * leaf if leaf.ndim > 1 else leaf, params))


def conversations(seed: int, *, group_size: int = 3, same_prompts: bool = True, padded: str = "both") -> Trajectories:
    """Rows of several stretches of chosen tokens; some rows have none, one has no token, one a single token."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, LETTERS, (ROWS, WIDTH)).astype(np.int32)
    real, chosen = np.zeros_like(tokens, bool), np.zeros_like(tokens, bool)
    for row in range(ROWS):
        lead = row if not same_prompts else row - row % group_size
        prompt = int(np.random.default_rng([seed, lead]).integers(1, 6))
        length = prompt + int(rng.integers(1, WIDTH - 5))
        start = {"left": WIDTH - length, "right": 0, "both": int(rng.integers(0, WIDTH - length + 1))}[padded]
        stop = start + length
        tokens[row, start : start + prompt] = np.random.default_rng([seed, lead, 1]).integers(0, LETTERS, prompt)
        real[row, start:stop] = True
        chosen[row, start + prompt : stop] = rng.random(length - prompt) < 0.7
        chosen[row, start + prompt] = True
    chosen[rng.integers(0, ROWS, 2)] = False
    real[-2], chosen[-2] = False, False
    real[-1], chosen[-1] = np.arange(WIDTH) == 3, False
    ids = np.repeat(rng.permutation(ROWS // group_size), group_size)
    return single_step(
        tokens, real, chosen, group_ids=ids, outcomes=np.zeros(ROWS, np.float32), ended=np.ones(ROWS, bool)
    )


def arranged(trajectories: Trajectories, **options) -> tuple[Arrangement, Actions]:
    actions = Actions.of(trajectories, width=WIDTH)
    options = {"grid": None, "first": np.ones(len(actions.mask), bool)} | options
    found = arrange(trajectories, actions, MODEL, **options)
    assert isinstance(found.rows.layout, Packed)
    return found, actions


def in_one_shape(rows: Rows, count: int = ROWS, width: int = 112, chosen: int = 112) -> Rows:
    """Padded to the same widths for all batches, so that one program serves them."""
    given = len(rows.tokens)

    def pad(array, columns: int, fill=0) -> np.ndarray:
        return np.pad(array, ((0, count - given), (0, columns - array.shape[1])), constant_values=fill)

    arrays = {name: pad(vars(rows)[name], width) for name in ("tokens", "token_mask", "positions")}
    arrays |= {name: pad(vars(rows)[name], width, -1) for name in ("segments", "prefixes")}
    arrays |= {name: pad(vars(rows)[name], chosen) for name in ("targets", "sources")}
    nowhere = rows.layout.sequences * rows.layout.actions
    layout = Packed(width, rows.layout.sequences, rows.layout.actions, chosen)
    return dataclasses.replace(rows, **arrays, places=pad(rows.places, chosen, nowhere), layout=layout)


def log_probs(model: Transformer, states: jax.Array, targets: jax.Array) -> jax.Array:
    return jnp.take_along_axis(jax.nn.log_softmax(model.logits(states)), targets[..., None], axis=-1)[..., 0]


@pytest.fixture(scope="module")
def one_by_one(tiny_model):
    """Compiled: log-probs [B, R] of one sequence per row, and the gradient of their weighted sum."""
    graphdef, params = nnx.split(tiny_model)

    def total(params, tokens, real, columns, weights):
        model = nnx.merge(graphdef, params)
        states = jnp.take_along_axis(model(tokens, real), jnp.maximum(columns - 1, 0)[:, :, None], axis=1)
        found = log_probs(model, states, jnp.take_along_axis(tokens, columns, axis=1))
        return jnp.sum(weights * found), (found, states)

    compiled = jax.jit(jax.value_and_grad(total, has_aux=True))

    def plain(trajectories: Trajectories, actions: Actions, weights):
        (_, found), gradient = compiled(
            params, trajectories.tokens, trajectories.token_mask, actions.columns, weights * actions.mask
        )
        return (*map(np.asarray, found), gradient)

    return plain


@pytest.fixture(scope="module")
def side_by_side(tiny_model):
    """The same from packed rows, put back in the order of the batch."""
    graphdef, params = nnx.split(tiny_model)

    def total(params, tokens, mask, positions, targets, segments, prefixes, sources, weights):
        rows = Rows(tokens, mask, positions, targets, segments, prefixes, sources, sources, Packed(112, 1, 1, 112))
        model = nnx.merge(graphdef, params)
        x = through_layers(model, model.embed(tokens), rows, start=0).x
        states = chosen_states(model.final_norm(x), rows)
        found = log_probs(model, states, targets)
        return jnp.sum(weights * found), (found, states)

    compiled = jax.jit(jax.value_and_grad(total, has_aux=True))

    def packed(arrangement: Arrangement, weights):
        rows = in_one_shape(arrangement.rows)
        count, places = len(arrangement.rows.tokens), np.asarray(rows.places)
        spread = np.pad(arrangement.spread(weights).reshape(count, -1), ((0, ROWS - count), (0, 1)))
        names = ("tokens", "token_mask", "positions", "targets", "segments", "prefixes", "sources")
        at_tokens = np.take_along_axis(spread, places, axis=1)
        (_, (found, states)), gradient = compiled(params, *(vars(rows)[name] for name in names), at_tokens)

        def back(values):
            there = np.zeros(spread.shape, np.float32)
            np.put_along_axis(there, places, np.asarray(values), axis=1)
            return arrangement.gather(there[:count, :-1].reshape(count, -1, weights.shape[1]))

        states = np.asarray(states)
        return back(found), np.stack([back(states[..., channel]) for channel in range(3)], axis=-1), gradient

    return packed


FORMS = {
    "turns": {},
    "left": {"padded": "left", "group_size": 4},
    "right": {"padded": "right", "group_size": 6},
    "alone": {"group_size": 1},
    "other prompts": {"same_prompts": False},
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("whole_groups", [False, True])
def test_packed_rows_say_of_every_chosen_token_what_its_own_row_says(form, whole_groups, one_by_one, side_by_side):
    for seed, share_prompts in enumerate((True, True, False)):
        batch = conversations(seed, **FORMS[form])
        found, actions = arranged(
            batch, whole_groups=whole_groups, share_prompts=share_prompts, least_rows=1 + 2 * seed
        )
        mask = actions.mask
        weights = np.random.default_rng(seed).normal(size=mask.shape).astype(np.float32) * mask
        expected, states, gradient = one_by_one(batch, actions, weights)
        got, got_states, got_gradient = side_by_side(found, weights)
        np.testing.assert_allclose(got[mask], expected[mask], rtol=0, atol=2e-5)
        np.testing.assert_allclose(got_states[mask], states[mask][:, :3], rtol=0, atol=2e-5)
        assert not got[~mask].any()
        jax.tree.map(close, got_gradient, gradient)


def test_an_answer_that_does_not_see_its_prompt_is_found(one_by_one, side_by_side):
    batch = conversations(0, group_size=4)
    found, actions = arranged(batch)
    rows = found.rows
    assert (rows.prefixes != rows.segments).any()
    blind = found._replace(rows=dataclasses.replace(rows, prefixes=rows.segments))
    one = np.minimum(rows.segments, 0)
    mixed = found._replace(rows=dataclasses.replace(rows, segments=one, prefixes=one))
    expected = one_by_one(batch, actions, actions.mask)[0]
    later = actions.mask & (np.arange(WIDTH) > 0)
    for wrong in (blind, mixed):
        difference = np.abs(side_by_side(wrong, actions.mask)[0] - expected)
        assert np.mean(difference[later] > 1e-3) > 0.5


@pytest.mark.parametrize("form", FORMS)
def test_gather_undoes_spread(form):
    found, actions = arranged(conversations(3, **FORMS[form]), multiple=5)
    values = np.random.default_rng(0).normal(size=actions.mask.shape)
    there = found.spread(values)
    np.testing.assert_array_equal(found.gather(there), values)
    np.testing.assert_array_equal(found.gather(there.reshape(-1, WIDTH)), values)
    np.testing.assert_array_equal(found.spread(found.gather(there)), there)
    assert not there[found.sequences < 0].any()
    np.testing.assert_array_equal(np.sort(found.sequences[found.sequences >= 0]), np.arange(ROWS))
    np.testing.assert_array_equal(found.sequences.ravel()[found.homes], np.arange(ROWS))
    tokens = actions.take(conversations(3, **FORMS[form]).tokens)
    np.testing.assert_array_equal(found.gather(by_sequence(jnp.asarray(found.rows.targets), found.rows)), tokens)


def units(batch: Trajectories, **options) -> list[Text]:
    return texts_of(batch, **{"share_prompts": True} | options)


def test_first_fit_depends_on_the_texts_alone():
    """Not on where their padding stands, nor on what stands there."""
    right, left = (conversations(1, padded=padded) for padded in ("right", "left"))
    junk = dataclasses.replace(right, tokens=np.where(right.token_mask, right.tokens, 63))
    everyone = np.ones(ROWS, bool)
    plans = [plan_rows(units(batch), MODEL, first=everyone) for batch in (right, right, junk)]
    assert plans[0] == plans[1] == plans[2]
    for name in ("tokens", "positions", "segments", "prefixes", "sources", "places"):
        arrays = [vars(arranged(batch)[0].rows)[name] for batch in (right, junk)]
        np.testing.assert_array_equal(*arrays)
    assert len(units(left)) == ROWS


@pytest.mark.parametrize("form", FORMS)
def test_rows_hold_every_token_once_and_no_more_than_their_width(form):
    batch = conversations(4, **FORMS[form])
    for options in ({}, {"whole_groups": True}, {"least_rows": 7}):
        plan = plan_rows(units(batch), MODEL, first=np.zeros(ROWS, bool), **options)
        found, actions = arranged(batch, first=np.zeros(ROWS, bool), **options)
        held = sorted(index for row in plan.rows for block in row for index in block)
        assert held == list(range(ROWS))
        layout = found.rows.layout
        assert (layout.width, layout.chosen, len(found.rows.tokens)) == (plan.width, plan.chosen, plan.count)
        size = sum(
            units(batch)[block[0]].prompt + sum(units(batch)[index].rest for index in block)
            for row in plan.rows
            for block in row
        )
        assert found.rows.token_mask.sum() == size
        assert found.padded_share == pytest.approx(1 - size / (plan.count * plan.width))
        assert (found.rows.places < layout.sequences * layout.actions).sum() == actions.mask.sum()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("share_prompts", [False, True])
def test_a_whole_group_stands_in_one_row(form, share_prompts):
    batch = conversations(5, **FORMS[form])
    found, _ = arranged(batch, whole_groups=True, share_prompts=share_prompts, least_rows=3)
    row_of = found.homes // found.rows.layout.sequences
    for group in np.unique(batch.group_ids):
        assert len(set(row_of[batch.group_ids == group])) == 1
    assert len(set(row_of)) >= min(3, len(np.unique(batch.group_ids)))


def test_there_are_as_many_rows_as_asked_for_with_something_to_learn():
    """Four optimiser steps need four rows of what is learned, also where all of it would fit in one."""
    batch = conversations(6, group_size=2)
    first = np.isin(batch.group_ids, [1, 4, 5])
    for least, expected in ((1, 1), (3, 3), (5, 3)):
        found, _ = arranged(batch, first=first, least_rows=least)
        assert len(set(found.homes[first] // found.rows.layout.sequences)) >= expected
        assert len(found.rows.tokens) >= least


def test_the_number_of_rows_is_a_multiple_and_the_plan_counts_the_empty_ones():
    batch = conversations(7, group_size=2)
    for multiple in (1, 4, 7):
        found, _ = arranged(batch, multiple=multiple)
        assert len(found.rows.tokens) % multiple == 0
        empty = ~found.rows.token_mask.any(axis=1)
        assert not found.rows.targets[empty].any()
    plans = {
        multiple: plan_rows(units(batch), MODEL, first=np.ones(ROWS, bool), multiple=multiple) for multiple in (1, 4)
    }
    costs = {multiple: multiply_adds(MODEL, plan.count, plan.width, plan.chosen) for multiple, plan in plans.items()}
    assert costs[1] <= costs[4]


def test_sizes_are_rounded_up_to_few_numbers():
    for size in range(1, 400):
        assert size <= round_up(size, bits=3) <= size * 5 / 4
    assert len({round_up(size, bits=3) for size in range(1, 1025)}) < 40
    assert [round_up(size, bits=1) for size in (1, 3, 4, 5)] == [1, 4, 4, 8]
    assert round_up(17, 6, bits=2) == 24


def test_batches_that_are_much_alike_have_few_layouts():
    """Another layout is another program to compile."""
    layouts = set()
    for seed in range(12):
        lengths = np.minimum(np.random.default_rng(seed).geometric(0.25, 64), 16)
        batch = answers(lengths)
        plan = plan_rows(units(batch), MODEL, first=np.ones(64, bool), least_rows=4, multiple=4)
        layouts.add(plan[:3])
    assert len(layouts) <= 4


GRID = Grid(4, 4, 16)


def answers(lengths: np.ndarray, seed: int = 0) -> Trajectories:
    """Groups of four answers of these lengths to prompts of four tokens, as the sampler returns them."""
    tokens = np.random.default_rng(seed).integers(0, 64, (len(lengths), 20)).astype(np.int32)
    tokens[:, :4] = tokens[np.arange(len(lengths)) // 4 * 4, :4]
    real = np.arange(20) < 4 + lengths[:, None]
    groups = np.arange(len(lengths)) // 4
    zeros, ended = np.zeros(len(lengths), np.float32), np.ones(len(lengths), bool)
    return single_step(tokens, real, real & (np.arange(20) >= 4), group_ids=groups, outcomes=zeros, ended=ended)


def form_of(batch: Trajectories, grid: Grid = GRID) -> type:
    actions = Actions.of(batch, width=16)
    everyone = np.ones(len(actions.mask), bool)
    return type(arrange(batch, actions, MODEL, grid=grid, first=everyone).rows.layout)


def test_full_answers_stay_in_the_grid_and_short_ones_are_packed():
    rng = np.random.default_rng(0)
    assert form_of(answers(np.full(32, 16))) is Grid
    assert form_of(answers(np.full(32, 15))) is Grid
    short = answers(np.minimum(rng.geometric(0.25, 32), 16))
    assert form_of(short) is Packed


def test_rows_that_are_no_grid_are_packed_whoever_promised_one():
    full = answers(np.full(32, 16))
    assert form_of(full) is Grid
    gap = full.action_mask.copy()
    gap[5, 7] = False
    other = np.array(full.tokens)
    other[6, 1] += 1
    assert form_of(dataclasses.replace(full, action_mask=gap)) is Packed
    assert form_of(dataclasses.replace(full, tokens=other)) is Packed
    pairs = dataclasses.replace(full, group_ids=np.arange(32) // 2)
    assert form_of(pairs) is Packed


def test_without_packing_every_batch_has_rows_of_one_shape():
    layouts = set()
    for seed in range(3):
        batch = conversations(seed)
        found, actions = arranged(batch, pack=False, multiple=8)
        layouts.add((found.rows.layout, found.rows.tokens.shape))
        # Each text once, in a row of its own; every chosen token and the state before it are where it says.
        np.testing.assert_array_equal(found.sequences[:, 0], [*range(ROWS), *[-1] * 4])
        rows, columns = np.nonzero(actions.mask)
        places = actions.columns[rows, columns]
        np.testing.assert_array_equal(
            np.where(actions.mask, found.gather(by_sequence(found.rows.targets, found.rows)), 0)[rows, columns],
            batch.tokens[rows, places],
        )
        np.testing.assert_array_equal(
            np.take_along_axis(np.asarray(found.rows.tokens), np.asarray(found.rows.sources), 1)[rows, columns],
            batch.tokens[rows, places - 1],
        )
    assert layouts == {(Packed(WIDTH, 1, WIDTH, WIDTH), (16, WIDTH))}
    short = answers(np.full(32, 3))
    actions = Actions.of(short, width=16)
    assert arrange(short, actions, MODEL, grid=GRID, first=np.ones(32, bool), pack=False).rows.layout == GRID


def test_the_head_of_a_large_vocabulary_is_part_of_the_cost():
    """Half of the tokens that are chosen: little of the layers' cost, much of the head's."""
    small, large = (dataclasses.replace(MODEL, vocab_size=size) for size in (64, 49_152))
    costs = {
        config.vocab_size: multiply_adds(config, 8, 100, 32) / multiply_adds(config, 8, 100, 64)
        for config in (small, large)
    }
    assert costs[64] > 0.9
    assert costs[49_152] < 0.55


def test_a_training_step_is_the_same_in_both_forms(tiny_run, monkeypatch):
    """One optimiser step on all answers: loss, gradient, signal and scores do not say how the rows were made."""
    lengths = np.minimum(np.random.default_rng(0).geometric(0.25, 32), 16)
    batch = answers(lengths)
    outcomes = np.random.default_rng(1).random(32).astype(np.float32)
    experience = tiny_run.with_outcomes(Experience(batch), outcomes)
    settings = dataclasses.replace(tiny_run.SETTINGS, prompts=8, group_size=4, response_length=16)
    found = []
    for packs in (True, False):
        update = dataclasses.replace(settings.update, minibatches=1, micro_batch=0)
        monkeypatch.setattr(layout, "WORTH_PACKING", float(packs))
        trainer = Trainer(
            tiny_run.make_parts("grpo", layers=2),
            dataclasses.replace(settings, update=update),
            BatchShape(32, 4, 20, 16, 4),
        )
        state = trainer.initial_state()
        prepared = trainer.prepare(state, 0, experience)
        assert isinstance(prepared.batch.rows.layout, Packed if packs else Grid)
        scores = prepared.gather(np.asarray(prepared.batch.log_prob_old))
        state, metrics = trainer.improve(state, prepared)
        found.append((np.where(prepared.mask, scores, 0), prepared.advantages, metrics[0]))
    (packed, advantages, values), (grid, expected, others) = found
    np.testing.assert_allclose(packed, grid, atol=2e-5)
    np.testing.assert_array_equal(advantages, expected)
    assert set(values) == set(others)
    for name, (total, count) in values.items():
        np.testing.assert_allclose(total / count, others[name][0] / others[name][1], rtol=2e-4, atol=2e-5, err_msg=name)


def test_what_compares_answers_is_packed(tiny_run):
    parts = dataclasses.replace(tiny_run.make_parts("grpo", layers=2), objective="dpo")
    settings = dataclasses.replace(
        tiny_run.SETTINGS, update=dataclasses.replace(tiny_run.SETTINGS.update, minibatches=1, pack=False)
    )
    with pytest.raises(ValueError, match=r"update\.pack is False, and 'dpo' compares the answers of a group"):
        Trainer(parts, settings, BatchShape(8, 2, 20, 16))
