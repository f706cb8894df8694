"""Learning from earlier batches again: a run that was stopped has the batches that it would have had."""

import dataclasses

import pytest

from jaxrl_llm.training import state_hash
from jaxrl_llm.training import train


class Crash(Exception):
    """The process dies."""


def test_a_run_that_crashed_between_checkpoints_ends_in_the_same_weights(tiny_run, tmp_path):
    settings = dataclasses.replace(tiny_run.SETTINGS, steps=4, replay=2, evaluate_every=1)

    def crash(step, state):
        if step == 3:
            raise Crash
        return {}

    whole = train(tiny_run.make_parts(), settings, tmp_path / "whole")
    # The checkpoint is of step 2; step 3, the fourth batch not yet sampled, is lost.
    with pytest.raises(Crash):
        train(tiny_run.make_parts(), settings, tmp_path / "crashed", evaluate=crash)
    resumed = train(tiny_run.make_parts(), settings, tmp_path / "crashed")
    assert resumed.finished
    assert state_hash(resumed.state) == state_hash(whole.state)
    # Those of `keep_checkpoints` intervals before the last checkpoint, and the one before them that is replayed.
    assert sorted(path.name for path in (tmp_path / "crashed" / "replay").iterdir()) == list("0123")


def test_batches_are_written_whatever_the_steps_of_the_bounds(tiny_run, tmp_path):
    update = dataclasses.replace(tiny_run.SETTINGS.update, bounds_every=0)
    settings = dataclasses.replace(tiny_run.SETTINGS, steps=2, episodes_every=2, update=update)
    train(tiny_run.make_parts(), settings, tmp_path)
    assert [path.name for path in (tmp_path / "episodes").iterdir()] == ["2"]
