"""Trajectories: what the columns mean, every rule with a row that breaks it, and how they go through jit and vmap."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_llm.trajectory import OUTSIDE
from jaxrl_llm.trajectory import Actions
from jaxrl_llm.trajectory import Trajectories
from jaxrl_llm.trajectory import check_trajectory
from jaxrl_llm.trajectory import single_step

REAL = np.array([[0, 1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0, 0]], bool)
CHOSEN = np.array([[0, 0, 1, 1, 0, 1, 1], [0, 1, 1, 0, 0, 0, 0]], bool)
TOKENS = np.arange(14, dtype=np.int32).reshape(2, 7)


def two_turns() -> Trajectories:
    """Row 0 acts twice, with an observation between; row 1 acts once and reads a last word."""
    ids = np.array([[-1, -1, 0, 0, -1, 1, 1], [-1, 0, 0, -1, -1, -1, -1]], np.int32)
    return Trajectories(
        tokens=TOKENS,
        token_mask=REAL,
        action_mask=CHOSEN,
        group_ids=np.array([4, 4]),
        rewards=np.where(ids == 1, np.float32(0.25), np.float32(0)) + np.float32(0.5) * (TOKENS == 9),
        log_prob_behaviour=np.where(CHOSEN, -0.125 * TOKENS, 0).astype(np.float32),
        step_ids=ids,
        actor_ids=np.where(CHOSEN, np.int32(0), np.int32(-1)),
        versions=np.where(CHOSEN, np.int32(3), np.int32(-1)),
        ended=np.array([True, False]),
    )


def changed(name: str, places: dict, **others) -> Trajectories:
    """`two_turns` with some entries of one column replaced."""
    good = two_turns()
    column = np.array(vars(good)[name])
    for place, value in places.items():
        column[place] = value
    return dataclasses.replace(good, **{name: column}, **others)


def test_a_sound_batch_passes_and_returns_are_sums() -> None:
    good = two_turns()
    check_trajectory(good, vocab_size=14)
    check_trajectory(dataclasses.replace(good, log_prob_behaviour=None))
    np.testing.assert_array_equal(good.returns, [0.5, 0.5])


BROKEN = {
    "outside": (changed("tokens", {(1, 2): 14}), "row 1 has a token outside 0 .. 13 (1 of 2 rows do)."),
    "negative": (changed("tokens", {(0, 1): -1}), "row 0 has a token outside 0 .. 13"),
    "not real": (changed("action_mask", {(1, 4): True}), "row 1 has an action token that is no real token"),
    "first": (
        changed("action_mask", {(0, 1): True}, step_ids=np.where(TOKENS == 1, 0, two_turns().step_ids)),
        "row 0 has its first real token as an action; nothing predicts that one",
    ),
    "hole": (changed("token_mask", {(0, 4): False}), "row 0 has padding between real tokens"),
    "step unknown": (changed("step_ids", {(0, 2): -1}), "row 0 has an action token with step_ids below 0"),
    "actor unknown": (changed("actor_ids", {(1, 1): -1}), "row 1 has an action token with actor_ids below 0"),
    "step outside": (changed("step_ids", {(0, 4): 0}), "row 0 has step_ids other than -1 where no token was chosen"),
    "actor outside": (changed("actor_ids", {(1, 6): 0}), "row 1 has actor_ids other than -1 where no token"),
    "version": (changed("versions", {(0, 2): -2}), "row 0 has a version below -1"),
    "version outside": (changed("versions", {(0, 0): 0}), "row 0 has a version other than -1 where no token"),
    "backwards": (changed("step_ids", {(0, 2): 2}), "row 0 has steps that go backwards"),
    "reward": (changed("rewards", {(1, 3): 1.0}), "row 1 has a reward at a token that was not chosen"),
    "lost nan": (changed("rewards", {(0, 4): np.nan}), "row 0 has a reward at a token that was not chosen"),
    "log-prob": (changed("log_prob_behaviour", {(0, 4): -1.0}), "row 0 has a log-prob other than 0 at a token"),
    "above 0": (changed("log_prob_behaviour", {(1, 2): 0.5}), "row 1 has a log-prob above 0"),
    "rank": (dataclasses.replace(two_turns(), tokens=TOKENS[0]), "tokens has shape (7,); it must have two axes"),
    "no tokens": (dataclasses.replace(two_turns(), tokens=TOKENS[:, :0]), "tokens has shape (2, 0)"),
    "shape": (
        dataclasses.replace(two_turns(), rewards=np.zeros((2, 6))),
        "rewards has shape (2, 6); it must be (2, 7)",
    ),
    "rows": (dataclasses.replace(two_turns(), ended=np.zeros(3, bool)), "ended has shape (3,); it must be (2,)"),
    "routes": (
        dataclasses.replace(two_turns(), routes=np.zeros((2, 6, 1, 1), int)),
        "routes has shape (2, 6, 1, 1); it must be (2, 7) with two more axes, layers and experts",
    ),
    "routes rank": (dataclasses.replace(two_turns(), routes=np.zeros((2, 7, 1), int)), "routes has shape (2, 7, 1)"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_rule_is_named(name: str) -> None:
    broken, sentence = BROKEN[name]
    with pytest.raises(ValueError) as caught:  # noqa: PT011 - the sentence is compared below
        check_trajectory(broken, vocab_size=14)
    assert sentence in str(caught.value)
    assert str(caught.value).endswith(".")


KINDS = {
    "tokens": (np.float32, "integer"),
    "token_mask": (np.int32, "bool"),
    "action_mask": (np.int8, "bool"),
    "rewards": (np.int32, "floating"),
    "log_prob_behaviour": (np.int32, "floating"),
    "step_ids": (np.float32, "integer"),
    "actor_ids": (np.float64, "integer"),
    "versions": (np.float16, "integer"),
    "group_ids": (np.float32, "integer"),
    "ended": (np.int32, "bool"),
}


@pytest.mark.parametrize("name", KINDS)
def test_another_kind_of_dtype_is_named(name: str) -> None:
    dtype, kind = KINDS[name]
    broken = dataclasses.replace(two_turns(), **{name: vars(two_turns())[name].astype(dtype)})
    with pytest.raises(TypeError, match=f"^{name} is of {np.dtype(dtype)}; it must be of kind {kind}.$"):
        check_trajectory(broken)
    assert set(KINDS) == {field.name for field in dataclasses.fields(Trajectories)} - {"routes"}


def test_routes_are_integers() -> None:
    with pytest.raises(TypeError, match="routes is of float64; it must be of kind integer"):
        check_trajectory(dataclasses.replace(two_turns(), routes=np.zeros((2, 7, 3, 2))))
    check_trajectory(dataclasses.replace(two_turns(), routes=np.zeros((2, 7, 3, 2), np.int16)))


def test_what_is_let_through() -> None:
    # Padding may hold anything; numbers that are not finite are the trainer's to drop and count.
    check_trajectory(changed("tokens", {(0, 0): -7, (1, 6): 99}), vocab_size=14)
    for value in (np.nan, np.inf, -np.inf):
        check_trajectory(changed("rewards", {(0, 6): value}))
        check_trajectory(changed("log_prob_behaviour", {(0, 6): value}))
    check_trajectory(changed("log_prob_behaviour", {(0, 6): 5e-4}))  # a certain token, rounded
    low = np.asarray(two_turns().log_prob_behaviour).astype(jnp.bfloat16)
    check_trajectory(dataclasses.replace(two_turns(), log_prob_behaviour=low))
    idle = single_step(TOKENS, REAL, CHOSEN & False, group_ids=np.zeros(2, int), outcomes=np.zeros(2), ended=np.ones(2))
    check_trajectory(idle)
    none = jax.tree.map(lambda column: column[:0], two_turns())
    check_trajectory(none)
    assert Actions.of(none).columns.shape == (0, 1)


def test_actions_gather_in_order_and_fill() -> None:
    actions = Actions.of(two_turns())
    np.testing.assert_array_equal(actions.columns, [[2, 3, 5, 6], [1, 2, 0, 0]])
    np.testing.assert_array_equal(actions.mask, [[1, 1, 1, 1], [1, 1, 0, 0]])
    np.testing.assert_array_equal(actions.take(TOKENS), [[2, 3, 5, 6], [8, 9, 0, 0]])
    steps = actions.take(two_turns().step_ids, fill=OUTSIDE)
    np.testing.assert_array_equal(steps, [[0, 0, 1, 1], [0, 0, -1, -1]])
    assert steps.dtype == np.int32
    wide = Actions.of(two_turns(), width=6)
    np.testing.assert_array_equal(wide.take(TOKENS, fill=-5)[1], [8, 9, -5, -5, -5, -5])
    assert wide.take(REAL).dtype == bool
    assert not wide.take(REAL)[1, 2:].any()


def test_actions_take_columns_with_further_axes() -> None:
    routes = np.arange(2 * 7 * 3 * 2).reshape(2, 7, 3, 2)
    taken = Actions.of(two_turns()).take(routes, fill=-1)
    np.testing.assert_array_equal(taken[0, 2], routes[0, 5])
    np.testing.assert_array_equal(taken[1, 2:], np.full((2, 3, 2), -1))


def test_actions_scattered_back_are_the_mask() -> None:
    rng = np.random.default_rng(0)
    mask = rng.random((20, 9)) < 0.4
    mask[:, 0] = False
    many = single_step(
        rng.integers(0, 9, mask.shape), np.ones(mask.shape, bool), mask, group_ids=np.arange(20),
        outcomes=mask.any(axis=1).astype(float), ended=np.ones(20, bool),
    )  # fmt: skip
    check_trajectory(many, vocab_size=9)
    actions = Actions.of(many)
    back = np.zeros_like(mask)
    back[np.nonzero(actions.mask)[0], actions.columns[actions.mask]] = True
    np.testing.assert_array_equal(back, mask)
    for row in range(20):
        np.testing.assert_array_equal(actions.take(many.tokens)[row, : mask[row].sum()], many.tokens[row, mask[row]])


def test_a_width_that_is_too_small_is_refused() -> None:
    with pytest.raises(ValueError, match="width is 3; a row has 4 action tokens, and width must hold them all"):
        Actions.of(two_turns(), width=3)


def test_single_step_puts_the_outcome_at_the_last_action() -> None:
    mask = np.array([[0, 0, 1, 1, 1, 0, 0], [0, 1, 0, 0, 0, 0, 0]], bool)
    made = single_step(
        TOKENS,
        REAL,
        mask,
        group_ids=np.array([0, 1]),
        outcomes=np.array([2.0, -1.0]),
        ended=np.array([1, 0]),
        version=7,
    )
    check_trajectory(made, vocab_size=14)
    np.testing.assert_array_equal(made.rewards, 2.0 * (TOKENS == 4) - 1.0 * (TOKENS == 8))
    np.testing.assert_array_equal(made.step_ids, np.where(mask, 0, -1))
    np.testing.assert_array_equal(made.actor_ids, np.where(mask, 0, -1))
    np.testing.assert_array_equal(made.versions, np.where(mask, 7, -1))
    assert made.log_prob_behaviour is None
    assert made.ended.tolist() == [True, False]
    unknown = single_step(TOKENS, REAL, mask, group_ids=np.zeros(2, int), outcomes=np.zeros(2), ended=np.ones(2, bool))
    assert (unknown.versions == OUTSIDE).all()


def test_single_step_loses_no_outcome() -> None:
    mask = CHOSEN.copy()
    mask[1] = False
    arguments = {"group_ids": np.zeros(2, int), "ended": np.ones(2, bool)}
    single_step(TOKENS, REAL, mask, outcomes=np.array([1.0, 0.0]), **arguments)
    for outcome in (0.5, np.nan):
        with pytest.raises(ValueError, match=r"row 1 has the outcome .* and no action token to put it at"):
            single_step(TOKENS, REAL, mask, outcomes=np.array([1.0, outcome]), **arguments)


def test_trajectories_go_through_jit_and_vmap() -> None:
    good = jax.tree.map(jnp.asarray, two_turns())

    @jax.jit
    def doubled(t: Trajectories) -> Trajectories:
        return dataclasses.replace(t, rewards=2 * t.rewards)

    out = doubled(good)
    assert isinstance(out, Trajectories)
    check_trajectory(jax.device_get(out))
    np.testing.assert_array_equal(out.returns, [1.0, 1.0])
    np.testing.assert_array_equal(jax.vmap(lambda row: row.returns)(good), good.returns)
    assert len(jax.tree.leaves(good)) == 10
    unknown = dataclasses.replace(good, log_prob_behaviour=None)
    assert len(jax.tree.leaves(unknown)) == 9
    assert doubled(unknown).log_prob_behaviour is None
