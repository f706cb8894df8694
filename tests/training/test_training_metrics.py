"""Metric files: cut back to a position, readable after a full disk, and no clock inside."""

import contextlib
import hashlib
import importlib.util
import json
import os
import resource
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from jaxrl_llm.training.run.errors import StorageError
from jaxrl_llm.training.run.errors import TrainingError
from jaxrl_llm.training.run.metrics import JsonLines
from jaxrl_llm.training.run.metrics import TensorBoard
from jaxrl_llm.training.run.metrics import Trackers
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


def read_events(raw: bytes) -> Iterator:
    """The events of a file, whose checksums are those that tensorboardX computes."""
    from tensorboardX.proto.event_pb2 import Event
    from tensorboardX.record_writer import masked_crc32c

    # A record is 8 bytes of length, 4 of checksum, the event, 4 of checksum.
    while raw:
        length = int.from_bytes(raw[:8], "little")
        content = raw[12 : 12 + length]
        assert int.from_bytes(raw[8:12], "little") == masked_crc32c(raw[:8])
        assert int.from_bytes(raw[12 + length : 16 + length], "little") == masked_crc32c(content)
        yield Event.FromString(content)
        raw = raw[16 + length :]


def test_tensorboard_writes_the_numbers(tmp_path: Path):
    board = TensorBoard(tmp_path)
    board.write(3, {"reward": 0.25, "name": "text is left out"})
    board.close()
    events = read_events(next(tmp_path.iterdir()).read_bytes())
    found = [(event.step, value.tag, value.simple_value) for event in events for value in event.summary.value]
    assert found == [(3, "reward", 0.25)]


@contextlib.contextmanager
def small_disk(folder: Path) -> Iterator[None]:
    """A folder that takes 8 kB: a file system of its own, or a limit on the size of files where mounting is refused."""
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=8k", "none", folder], capture_output=True, check=False
    )
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        if mounted.returncode:
            resource.setrlimit(resource.RLIMIT_FSIZE, (8192, before[1]))
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        if not mounted.returncode:
            subprocess.run(["umount", folder], check=True)


def fill(writer: TensorBoard | Trackers | JsonLines) -> None:
    for step in range(1000):
        writer.write(step, {"reward": 0.25, "loss": 1.0})


def test_a_disk_that_fills_up_is_an_error_of_the_write_and_not_a_thread_that_waits_for_ever(tmp_path: Path):
    folder = tmp_path / "disk"
    with small_disk(folder):
        board = TensorBoard(folder)
        with pytest.raises(StorageError, match=r"^Cannot write .*disk: (No space left on device|File too large)\.$"):
            fill(board)
        board.close()
        said: list[str] = []
        trackers = Trackers([TensorBoard(folder)], said.append)
        fill(trackers)
        trackers.flush()
        trackers.close()
    (sentence,) = said
    assert sentence.startswith(f"TensorBoard is left out from here on: Cannot write {folder}: ")


def test_a_disk_that_takes_half_a_line_loses_the_half_when_the_file_is_opened_again(tmp_path: Path):
    folder = tmp_path / "disk"
    with small_disk(folder):
        writer = JsonLines(folder / "metrics.jsonl")
        writer.write(0, {"reward": 0.5})
        kept, digest = writer.position, writer.sha256
        with pytest.raises(StorageError, match=r"metrics\.jsonl: (No space left on device|File too large)\.$"):
            fill(writer)
        writer.close()
        again = JsonLines(folder / "metrics.jsonl", keep_bytes=kept)
        assert (again.position, again.sha256) == (kept, digest)
        again.write(1, {"reward": 0.25})
        assert again.sha256 == hashlib.sha256((folder / "metrics.jsonl").read_bytes()).hexdigest() != digest
        again.close()


def test_what_a_run_that_went_on_says_hides_what_was_said_before(tmp_path: Path):
    from tensorboardX.proto.event_pb2 import SessionLog

    for first in (0, 5):
        board = TensorBoard(tmp_path, first_step=first)
        board.write(first, {"reward": 1.0})
        board.flush()
        board.close()
    purges = []
    for path in sorted(tmp_path.iterdir()):
        events = list(read_events(path.read_bytes()))
        assert events[0].file_version == "brain.Event:2"
        purges += [event.step for event in events if event.session_log.status == SessionLog.START]
    assert purges == [5]


def test_weights_and_biases_without_its_package_is_one_sentence():
    if importlib.util.find_spec("wandb"):
        os.environ["WANDB_MODE"] = "offline"
        writer = WeightsAndBiases("project", "run", {})
        writer.write(1, {"reward": 1.0})
        writer.close()
        return
    with pytest.raises(TrainingError, match=r"needs its package: pip install 'jaxrl_llm\[wandb\]'"):
        WeightsAndBiases("project", "run", {})
