"""Collectors that take turns: whose batch it is, in which width, and where each of them goes on."""

import json

import jax
import numpy as np
import pytest

from jaxrl_llm.rollouts.collect import TurnsCollector
from jaxrl_llm.trajectory import check_trajectory

KEY = jax.random.key(0)


def test_each_takes_its_turn_and_has_its_own_cursor(counting, at_version) -> None:
    narrow, wide = counting(width=3), counting(width=5)
    turns = TurnsCollector({"narrow": narrow, "wide": wide})
    assert (turns.shape.width, turns.shape.actions, turns.shape.rows) == (5, 4, 4)
    assert turns.shape.prompt_length is None
    cursor, found = {}, []
    for step in range(4):
        found.append(turns.collect(at_version(step), KEY, step, cursor))
        cursor = json.loads(json.dumps(found[-1].cursor))
    assert narrow.calls == [(0, 1, 0), (1, 2, 2)]
    assert wide.calls == [(0, 1, 1), (1, 2, 3)]
    assert cursor == {"narrow": {"number": 2}, "wide": {"number": 2}}
    assert [next(iter(batch.per_row)) for batch in found] == ["narrow/own", "wide/own"] * 2
    assert found[2].metrics == {"narrow/own/number": 2.0}
    for batch in found:
        check_trajectory(batch.trajectories)
        assert batch.trajectories.tokens.shape == (4, 5)
    padded = found[0].trajectories
    assert not padded.token_mask[:, 3:].any()
    assert (np.asarray(padded.step_ids)[:, 3:] == -1).all()
    np.testing.assert_array_equal(padded.returns, np.arange(4))


def test_their_random_numbers_differ(counting, at_version) -> None:
    keys = []

    class Keyed(counting):
        def collect(self, policy, key, step, cursor):
            keys.append(jax.random.key_data(key).tolist())
            return super().collect(policy, key, step, cursor)

    turns = TurnsCollector({"one": Keyed(), "other": Keyed()})
    for step in range(2):
        turns.collect(at_version(0), KEY, step, {})
    assert keys[0] != keys[1]


def test_batches_of_other_sizes_are_refused(counting) -> None:
    with pytest.raises(ValueError, match="collectors is empty"):
        TurnsCollector({})
    with pytest.raises(ValueError, match="batches of one size and kind; they have a: 4 rows in groups of 2, b: 6 rows"):
        TurnsCollector({"a": counting(), "b": counting(rows=6)})
