"""Batches on disk come back as they were, and one that is there already is replaced."""

from pathlib import Path

import numpy as np

from jaxrl_llm.rollouts.collect import Experience
from jaxrl_llm.rollouts.collect.store import Store
from jaxrl_llm.trajectory import single_step


def experience(outcome: float) -> Experience:
    tokens = np.arange(12, dtype=np.int32).reshape(2, 6)
    real = np.ones((2, 6), bool)
    outcomes = np.full(2, outcome, np.float32)
    made = single_step(
        tokens, real, real & (tokens % 6 > 1), group_ids=np.zeros(2, int), outcomes=outcomes, ended=real[:, 0]
    )
    return Experience(made, per_row={"task/strict": np.array([True, False])}, cursor={"position": outcome})


def test_a_batch_that_a_stopped_run_left_is_replaced(tmp_path: Path):
    store = Store(tmp_path)
    for outcome in (1.0, 2.0):
        store.save(3, experience(outcome))
    found = store.load(3)
    assert found is not None
    np.testing.assert_array_equal(found.trajectories.returns, [2.0, 2.0])
    assert found.cursor == {"position": 2.0}


def test_a_batch_whose_writing_was_cut_off_is_not_there_and_can_be_written(tmp_path: Path):
    store = Store(tmp_path)
    store.save(3, experience(1.0))
    (tmp_path / "3" / "arrays.safetensors").write_bytes(b"cut")
    assert store.load(3) is None
    store.save(3, experience(2.0))
    assert store.load(3) is not None
