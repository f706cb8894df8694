"""The last batches again: which, in what order, with whose versions, and where a stopped run goes on."""

import jax
import numpy as np
import pytest

from jaxrl_llm.rollouts.collect import ReplayCollector
from jaxrl_llm.rollouts.collect import Store
from jaxrl_llm.trajectory import check_trajectory

KEY = jax.random.key(0)


def steps_of(experience) -> list[int]:
    """The steps whose batches are in one, in order."""
    tokens = np.asarray(experience.trajectories.tokens)[:, 0]
    return tokens[::4].tolist()


def collect(collector, at_version, steps, cursor):
    found = []
    for step in steps:
        found.append(collector.collect(at_version(step), KEY, step, cursor))
        cursor = found[-1].cursor
    return found


def test_the_newest_is_first_and_missing_ones_are_stood_in_for(counting, at_version, tmp_path) -> None:
    inner = counting()
    replay = ReplayCollector(inner, Store(tmp_path), size=3)
    assert (replay.shape.rows, replay.shape.group_size, replay.shape.width) == (12, 2, 3)
    batches = collect(replay, at_version, range(5), {})
    assert [steps_of(batch) for batch in batches] == [[0, 0, 0], [1, 0, 1], [2, 1, 0], [3, 2, 1], [4, 3, 2]]
    for batch in batches:
        check_trajectory(batch.trajectories)
        assert batch.trajectories.tokens.shape == (12, 3)
        assert batch.per_row["own"].shape == (12,)
    last = batches[-1]
    # What is written down of a step is of the new batch alone; its numbers of rows are of all.
    assert (last.cursor, last.metrics, len(last.samples)) == ({"number": 5}, {"own/number": 5.0}, 1)
    np.testing.assert_allclose(last.per_row["own"][4:8], np.linspace(0.1, 0.9, 4) + 3, rtol=1e-6)
    # Each token says which weights sampled it, and what they gave it.
    assert np.asarray(last.trajectories.versions)[:, 1].tolist() == [4] * 4 + [3] * 4 + [2] * 4
    assert np.asarray(last.trajectories.log_prob_behaviour)[::4, 1].tolist() == [-5, -4, -3]


@pytest.mark.parametrize("first_group", [0, -9, 2**31 - 5])
def test_groups_of_different_batches_stay_apart(first_group, counting, at_version, tmp_path) -> None:
    replay = ReplayCollector(counting(first_group=first_group), Store(tmp_path), size=3)
    ids = np.asarray(collect(replay, at_version, range(3), {})[-1].trajectories.group_ids)
    assert ids.dtype == np.int32
    assert len(set(ids)) == 6
    assert (ids.reshape(-1, 2) == ids[::2, None]).all()


def test_a_run_that_was_stopped_learns_from_the_same_batches(counting, at_version, tmp_path) -> None:
    """It was stopped after step 6, and its newest checkpoint is of step 3."""
    first = ReplayCollector(counting(), Store(tmp_path), size=3)
    batches = collect(first, at_version, range(3), {})
    first.forget(3)
    batches += collect(first, at_version, range(3, 6), batches[-1].cursor)
    again = ReplayCollector(counting(), Store(tmp_path), size=3)
    for one, other in zip(collect(again, at_version, range(3, 6), batches[2].cursor), batches[3:], strict=True):
        for a, b in zip(jax.tree.leaves(one.trajectories), jax.tree.leaves(other.trajectories), strict=True):
            np.testing.assert_array_equal(a, b)
    again.forget(6)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["4", "5"]


def test_a_size_below_one_is_refused(counting, tmp_path) -> None:
    with pytest.raises(ValueError, match="size is 0; it must be at least 1"):
        ReplayCollector(counting(), Store(tmp_path), size=0)
