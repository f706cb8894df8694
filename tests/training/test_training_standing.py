"""Runs that go on from folders to which something was done: as they were, and never from 0 over finished steps."""

import dataclasses
import json
import os
import shutil
import signal
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import pytest

from jaxrl_llm.training import NonFiniteError
from jaxrl_llm.training import OptimizerSettings
from jaxrl_llm.training import Quiet
from jaxrl_llm.training import StorageError
from jaxrl_llm.training import TrainingError
from jaxrl_llm.training import UpdateSettings
from jaxrl_llm.training import state_hash
from jaxrl_llm.training import train
from jaxrl_llm.training.run.lock import only_process
from jaxrl_llm.training.text.finite import finite_at

FILES = ("metrics.jsonl", "samples.jsonl")


class Listening(Quiet):
    """Keeps what it is told."""

    def __init__(self) -> None:
        self.said: list[str] = []

    def say(self, message: str) -> None:
        self.said.append(message)


@pytest.fixture(scope="module")
def finished(tiny_run, tmp_path_factory) -> tuple[Path, str]:
    """A run of six steps, with the checkpoints 4 and 6."""
    folder = tmp_path_factory.mktemp("finished")
    outcome = train(tiny_run.make_parts(), tiny_run.SETTINGS, folder)
    return folder, state_hash(outcome.state)


@pytest.fixture
def folder(finished: tuple[Path, str], tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished[0], tmp_path / "run"))


def cut(name: str, share: float) -> Any:
    def change(folder: Path) -> None:
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(content[: int(share * len(content))])

    return change


def edit_the_end(folder: Path) -> None:
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    lines[-1] = lines[-1].replace('"step": 6', '"step": 7')
    (folder / "metrics.jsonl").write_text("\n".join(lines) + "\n")


def flip_a_bit(folder: Path) -> None:
    files = [path for path in (folder / "checkpoints" / "6" / "state").rglob("*") if path.is_file()]
    path = max(files, key=lambda path: path.stat().st_size)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def lose_the_newest(folder: Path) -> None:
    shutil.rmtree(folder / "checkpoints" / "6")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (flip_a_bit, "6 is not used: state/"),
        (cut("metrics.jsonl", 0.9), "6 is not used: "),
        (cut("samples.jsonl", 0.9), "samples.jsonl has "),
        (edit_the_end, "metrics.jsonl was changed since: "),
        (lose_the_newest, "6, the newest that was written, is missing."),
    ],
)
def test_a_run_goes_on_from_an_older_checkpoint_to_the_same_end(tiny_run, finished, folder, change, said) -> None:
    change(folder)
    reporter = Listening()
    outcome = train(tiny_run.make_parts(), tiny_run.SETTINGS, folder, reporter=reporter)
    assert said in reporter.said[0]
    assert "Going on after step 4 of 6." in reporter.said
    assert state_hash(outcome.state) == finished[1]
    assert [(folder / name).read_bytes() for name in FILES] == [(finished[0] / name).read_bytes() for name in FILES]
    again = Listening()
    train(tiny_run.make_parts(), tiny_run.SETTINGS, folder, reporter=again)
    assert again.said == ["Going on after step 6 of 6."]


def remove(*names: str) -> Any:
    def change(folder: Path) -> None:
        for name in names:
            path = folder / name
            shutil.rmtree(path) if path.is_dir() else path.unlink()

    return change


def empty_checkpoints(folder: Path) -> None:
    remove("checkpoints")(folder)
    (folder / "checkpoints").mkdir()


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (remove("checkpoints"), "6 finished steps and no checkpoint of them"),
        (empty_checkpoints, "6 finished steps and no checkpoint of them"),
        (remove("checkpoints", "newest.json"), "6 finished steps and no checkpoint of them"),
        (remove("checkpoints", "metrics.jsonl"), "6 finished steps and no checkpoint of them"),
        (remove("metrics.jsonl"), r"None of the checkpoints .*metrics.jsonl, which had \d+ bytes then, cannot be read"),
        (cut("metrics.jsonl", 0.2), "None of the checkpoints can be gone on with"),
        (cut("timings.jsonl", 0), "None of the checkpoints can be gone on with"),
    ],
)
def test_nothing_begins_again_over_finished_steps(tiny_run, folder, change, sentence) -> None:
    change(folder)
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file() and path.name != "run.lock"}
    with pytest.raises(StorageError, match=sentence) as error:
        train(tiny_run.make_parts(), tiny_run.SETTINGS, folder)
    assert "another folder" in str(error.value)
    assert "begin again" in str(error.value)
    after = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file() and path.name != "run.lock"}
    assert after == before


def test_a_run_that_was_killed_before_its_first_checkpoint_begins_again_and_says_so(tiny_run, finished, tmp_path):
    line = (finished[0] / "metrics.jsonl").read_bytes().splitlines(keepends=True)[0]
    (tmp_path / "metrics.jsonl").write_bytes(line + b'{"step": 2, "half')
    reporter = Listening()
    settings = dataclasses.replace(tiny_run.SETTINGS, steps=1)
    train(tiny_run.make_parts(), settings, tmp_path, reporter=reporter)
    assert reporter.said == ["The run stopped after step 1, before its first checkpoint; it begins again."]
    assert (tmp_path / "metrics.jsonl").read_bytes().count(b"\n") == 1


def test_a_folder_in_use_is_refused(tiny_run, tmp_path):
    import threading

    entered, leave = threading.Event(), threading.Event()

    def hold() -> None:
        with only_process(tmp_path):
            entered.set()
            leave.wait(60)

    thread = threading.Thread(target=hold)
    thread.start()
    entered.wait()
    try:
        with pytest.raises(StorageError, match=rf"is in use: process {os.getpid()} on "):
            train(tiny_run.make_parts(), tiny_run.SETTINGS, tmp_path)
    finally:
        leave.set()
        thread.join()
    assert [path.name for path in tmp_path.iterdir()] == ["run.lock"]


class FullDisk:
    """A tracker whose disk is full from a step on, or that cannot even be closed."""

    def __init__(self, *, after: int, closes: bool = True) -> None:
        self.after, self.closes, self.steps = after, closes, []

    def write(self, step: int, values: Mapping[str, float]) -> None:
        if step > self.after:
            raise OSError(28, "No space left on device")
        self.steps.append(step)

    def flush(self) -> None:
        """Nothing."""

    def close(self) -> None:
        if not self.closes:
            raise RuntimeError("it is broken")


def test_a_tracker_that_fails_is_said_once_and_stops_nothing(tiny_run, tmp_path, finished):
    full, sound, stuck = FullDisk(after=1), FullDisk(after=9), FullDisk(after=9, closes=False)
    reporter = Listening()
    outcome = train(
        tiny_run.make_parts(),
        tiny_run.SETTINGS,
        tmp_path,
        reporter=reporter,
        open_writers=lambda _: [full, sound, stuck],
    )
    assert state_hash(outcome.state) == finished[1]
    assert (full.steps, sound.steps) == ([1], [1, 2, 3, 4, 5, 6])
    assert reporter.said == [
        "FullDisk is left out from here on: [Errno 28] No space left on device.",
        "FullDisk is left out from here on: it is broken.",
    ]


def test_a_tracker_does_not_take_the_place_of_the_runs_own_error(tiny_run, tmp_path):
    def fail(step: int, state: object) -> Mapping[str, float]:
        raise TrainingError("the evaluation itself")

    with pytest.raises(TrainingError, match="the evaluation itself"):
        train(
            tiny_run.make_parts(),
            tiny_run.SETTINGS,
            tmp_path,
            evaluate=fail,
            open_writers=lambda _: [FullDisk(after=9, closes=False)],
        )


@pytest.mark.parametrize("bounds_every", [1, 0])
def test_a_policy_that_is_not_finite_is_never_saved(tiny_run, tmp_path, bounds_every):
    settings = dataclasses.replace(
        tiny_run.SETTINGS,
        checkpoint_every=1,
        optimizer=OptimizerSettings(learning_rate=1e10),
        update=UpdateSettings(minibatches=1, bounds_every=bounds_every),
    )
    train(tiny_run.make_parts(), dataclasses.replace(tiny_run.SETTINGS, steps=1), tmp_path)
    with pytest.raises(
        NonFiniteError, match=rf"after step 2 are not finite; the last good checkpoint is {tmp_path}/checkpoints/1\."
    ):
        train(tiny_run.make_parts(), settings, tmp_path, allow_changed_settings=True)
    with pytest.raises(NonFiniteError, match=r"after step 1 are not finite; no checkpoint was saved yet\."):
        train(tiny_run.make_parts(), settings, tmp_path / "other")


def test_log_probs_count_where_the_mask_says_so():
    mask = jnp.array([[True, False]])
    assert finite_at(mask, jnp.array([[1.0, jnp.nan]]), None)
    assert not finite_at(mask, jnp.array([[1.0, 0.0]]), jnp.array([[jnp.inf, 0.0]]))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_while_a_checkpoint_is_written_leaves_a_whole_one(tiny_run, tmp_path, finished, number):
    from jaxrl_llm.training.run import checkpoints
    from jaxrl_llm.training.run.seals import what_is_broken

    sealed, before = [], checkpoints.write_seal

    def seal(folder: Path) -> None:
        before(folder)
        if not sealed:
            os.kill(os.getpid(), number)
        sealed.append(folder)

    checkpoints.write_seal = seal
    try:
        outcome = train(tiny_run.make_parts(), tiny_run.SETTINGS, tmp_path)
    finally:
        checkpoints.write_seal = before
    assert not outcome.finished
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["2"]
    assert what_is_broken(tmp_path / "checkpoints" / "2") is None
    assert json.loads((tmp_path / "newest.json").read_text()) == {"step": 2}
    assert state_hash(train(tiny_run.make_parts(), tiny_run.SETTINGS, tmp_path).state) == finished[1]
