"""What is no file under the name of one, in every reader of a run: a sentence at once, and never a wait."""

import json
import os
import socket
from collections.abc import Callable
from pathlib import Path

import pytest

from jaxrl_llm.regular import open_regular
from jaxrl_llm.regular import read_regular
from jaxrl_llm.rollouts.collect.store import Store
from jaxrl_llm.training.run.checkpoints import Checkpoints
from jaxrl_llm.training.run.checkpoints import Progress
from jaxrl_llm.training.run.checkpoints import read_progress
from jaxrl_llm.training.run.errors import StorageError
from jaxrl_llm.training.run.lock import only_process
from jaxrl_llm.training.run.metrics import JsonLines
from jaxrl_llm.training.run.seals import what_is_broken
from jaxrl_llm.training.run.seals import write_seal
from jaxrl_llm.training.run.standing import _finished_steps
from jaxrl_llm.training.run.standing import _newest
from jaxrl_llm.training.run.standing import file_problem
from jaxrl_llm.training.run.standing import write_newest
from jaxrl_llm.trajectory_files import TrajectoryFileError
from jaxrl_llm.trajectory_files import read_episodes


def as_socket(path: Path) -> None:
    here = Path.cwd()
    os.chdir(path.parent)  # names of sockets are short
    try:
        with socket.socket(socket.AF_UNIX) as end:
            end.bind(path.name)
    finally:
        os.chdir(here)


KINDS: dict[str, Callable[[Path], object]] = {
    "named pipe": os.mkfifo,
    "device": lambda path: path.symlink_to("/dev/zero"),
    "socket": as_socket,
    "folder": Path.mkdir,
}


pytestmark = pytest.mark.timeout(60)  # what waits, waits for ever


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_no_file_is_named(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "file"
    KINDS[kind](path)
    for read in (open_regular, read_regular):
        with pytest.raises(OSError, match="Is a directory" if kind == "folder" else f"it is a {kind}, expected a file"):
            read(path)
    with pytest.raises(OSError, match="no file can have this name"):
        read_regular(Path("a\0b"))


def test_a_file_and_a_link_to_one_are_read(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"content")
    (tmp_path / "link").symlink_to("file")
    assert read_regular(tmp_path / "file") == read_regular(tmp_path / "link") == b"content"


@pytest.mark.parametrize("kind", KINDS)
def test_the_files_of_a_run_that_goes_on(tmp_path: Path, kind: str) -> None:
    progress = Progress(
        step=1, settings={}, frozen_hash="", file_bytes={"metrics.jsonl": 3}, file_sha256={"metrics.jsonl": "0"}
    )
    for name in ("metrics.jsonl", "newest.json"):
        KINDS[kind](tmp_path / name)
    problem = file_problem(tmp_path, ["metrics.jsonl"], progress)
    assert problem is not None
    assert "cannot be read" in problem
    assert _newest(tmp_path) == _finished_steps(tmp_path / "metrics.jsonl") == 0
    (tmp_path / "1" / "progress").mkdir(parents=True)
    KINDS[kind](tmp_path / "1" / "progress" / "metadata")
    with pytest.raises(StorageError, match="cannot be read"):
        read_progress(tmp_path / "1", 1)
    assert Checkpoints(tmp_path).last_good(5) == "no checkpoint was saved before that policy"


@pytest.mark.parametrize("kind", KINDS)
def test_what_a_run_writes_to(tmp_path: Path, kind: str) -> None:
    KINDS[kind](tmp_path / "run.lock")
    with pytest.raises(StorageError, match=r"^Cannot write .*run\.lock: .+\.$"), only_process(tmp_path):
        pass
    KINDS[kind](tmp_path / ".newest.json.part")
    if kind == "folder":
        with pytest.raises(StorageError, match=r"^Cannot write .*newest\.json: .+\.$"):
            write_newest(tmp_path, 1)
    else:
        write_newest(tmp_path, 1)
        assert _newest(tmp_path) == 1
    if kind != "device":  # a device takes rows
        KINDS[kind](tmp_path / "metrics.jsonl")
        with pytest.raises(StorageError, match=r"^Cannot write .*metrics\.jsonl: .+\.$"):
            JsonLines(tmp_path / "metrics.jsonl")


@pytest.mark.parametrize("kind", KINDS)
def test_a_sealed_folder(tmp_path: Path, kind: str) -> None:
    (tmp_path / "a").mkdir()
    for name in ("one", "two"):
        (tmp_path / "a" / name).write_bytes(b"0")
    write_seal(tmp_path / "a")
    (tmp_path / "a" / "two").unlink()
    KINDS[kind](tmp_path / "a" / "two")
    assert what_is_broken(tmp_path / "a") in ("two is no file", "two is missing")
    (tmp_path / "a" / "seal.json").unlink()
    KINDS[kind](tmp_path / "a" / "seal.json")
    assert what_is_broken(tmp_path / "a") == "seal.json is missing, which every checkpoint has"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["about.json", "experience.json"])
def test_episodes_and_kept_batches(tmp_path: Path, kind: str, name: str) -> None:
    (tmp_path / "3").mkdir()
    KINDS[kind](tmp_path / "3" / name)
    assert Store(tmp_path).load(3) is None
    with pytest.raises(TrajectoryFileError, match=r"about\.json (is missing|cannot be read)"):
        read_episodes(tmp_path / "3")


def test_a_kept_batch_that_is_nested_too_deep_is_none(tmp_path: Path) -> None:
    (tmp_path / "3").mkdir()
    (tmp_path / "3" / "experience.json").write_text("[" * 100_000)
    assert Store(tmp_path).load(3) is None
    (tmp_path / "3" / "experience.json").write_text(json.dumps({"per_row": {}}))
    assert Store(tmp_path).load(3) is None
