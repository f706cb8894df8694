"""Metric files: cut back to a position, readable after a full disk, and no clock inside."""

import importlib.util
import json
import os
from pathlib import Path

import pytest

from jaxrl_llm.training.run.errors import StorageError
from jaxrl_llm.training.run.errors import TrainingError
from jaxrl_llm.training.run.metrics import JsonLines
from jaxrl_llm.training.run.metrics import TensorBoard
from jaxrl_llm.training.run.metrics import WeightsAndBiases


def test_cutting_back_and_writing_again_gives_the_same_bytes(tmp_path: Path):
    path = tmp_path / "metrics.jsonl"
    first = JsonLines(path)
    for step in range(4):
        first.write(step, {"reward": step / 3, "loss": 1.0 - step})
        if step == 1:
            middle = first.position
    first.close()
    whole = path.read_bytes()

    second = JsonLines(path, keep_bytes=middle)
    assert path.read_bytes() == whole[:middle]
    for step in (2, 3):
        second.write(step, {"loss": 1.0 - step, "reward": step / 3})
    second.close()
    assert path.read_bytes() == whole


def test_a_number_that_is_not_finite_is_null_and_floats_come_back_exactly(tmp_path: Path):
    writer = JsonLines(tmp_path / "a.jsonl")
    writer.write(7, {"nan": float("nan"), "infinite": float("-inf"), "third": 1 / 3})
    writer.flush()
    row = json.loads((tmp_path / "a.jsonl").read_text())
    assert row == {"step": 7, "nan": None, "infinite": None, "third": 1 / 3}


def test_a_file_shorter_than_the_checkpoint_says_is_refused(tmp_path: Path):
    path = tmp_path / "metrics.jsonl"
    path.write_text("{}\n")
    with pytest.raises(StorageError, match="has 3 bytes, but the checkpoint was saved when it had 10"):
        JsonLines(path, keep_bytes=10)


def test_a_full_disk_is_one_sentence():
    writer = JsonLines(Path("/dev/full"))
    with pytest.raises(StorageError, match=r"^Cannot write /dev/full: No space left on device\.$"):
        writer.write(0, {"reward": 1.0})


def test_a_folder_that_cannot_be_made_is_one_sentence(tmp_path: Path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match=r"^Cannot write .*: (Not a directory|File exists)\.$"):
        JsonLines(tmp_path / "file" / "metrics.jsonl")


def test_tensorboard_writes_the_numbers(tmp_path: Path):
    from tensorboardX.proto.event_pb2 import Event

    board = TensorBoard(tmp_path)
    board.write(3, {"reward": 0.25, "name": "text is left out"})
    board.close()
    raw = next(tmp_path.iterdir()).read_bytes()
    found = []
    # A record is 8 bytes of length, 4 of checksum, the event, 4 of checksum.
    while raw:
        length = int.from_bytes(raw[:8], "little")
        event = Event.FromString(raw[12 : 12 + length])
        found += [(event.step, value.tag, value.simple_value) for value in event.summary.value]
        raw = raw[16 + length :]
    assert found == [(3, "reward", 0.25)]


def test_weights_and_biases_without_its_package_is_one_sentence():
    if importlib.util.find_spec("wandb"):
        os.environ["WANDB_MODE"] = "offline"
        writer = WeightsAndBiases("project", "run", {})
        writer.write(1, {"reward": 1.0})
        writer.close()
        return
    with pytest.raises(TrainingError, match=r"needs its package: pip install 'jaxrl_llm\[wandb\]'"):
        WeightsAndBiases("project", "run", {})
