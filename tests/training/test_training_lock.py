"""One process at a time in a folder, whatever becomes of the one before."""

import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from jaxrl_llm.training.run.errors import StorageError
from jaxrl_llm.training.run.lock import NAME
from jaxrl_llm.training.run.lock import only_process
from jaxrl_llm.training.run.lock import remove_if_alone

HOLDER = """
import os, sys, time
from pathlib import Path
from jaxrl_llm.training.run.lock import only_process
with only_process(Path(sys.argv[1])):
    child = os.fork()
    if child == 0:
        time.sleep(30)  # outlives its parent, and must not keep the lock
    print(child, flush=True)
    time.sleep(30)
"""


def test_a_second_process_is_told_who_is_there_and_a_dead_one_holds_nothing(tmp_path: Path) -> None:
    holder = subprocess.Popen([sys.executable, "-c", HOLDER, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None
    child = int(holder.stdout.readline())
    try:
        with (
            pytest.raises(StorageError, match=rf"is in use: process {holder.pid} on .*, started 20.*Wait for it"),
            only_process(tmp_path),
        ):
            pass
        holder.kill()
        holder.wait()
        os.kill(child, 0)
        with only_process(tmp_path):
            assert str(os.getpid()) in (tmp_path / NAME).read_text()
    finally:
        holder.kill()
        os.kill(child, 9)
        holder.stdout.close()


def test_the_same_thread_enters_twice_and_another_does_not(tmp_path: Path) -> None:
    refused = []

    def enter() -> None:
        try:
            with only_process(tmp_path):
                pass
        except StorageError as error:
            refused.append(str(error))

    with only_process(tmp_path), only_process(tmp_path):
        thread = threading.Thread(target=enter)
        thread.start()
        thread.join()
    assert len(refused) == 1
    enter()
    assert len(refused) == 1


@pytest.mark.parametrize("content", [b"", b"\xff\xfe", b"[]", b'{"pid": 1}', b"[" * 100_000])
def test_whatever_a_lock_file_says_it_is_taken_when_nobody_holds_it(tmp_path: Path, content: bytes) -> None:
    (tmp_path / NAME).write_bytes(content)
    with only_process(tmp_path):
        pass


def test_a_folder_with_nothing_but_its_lock_is_removed(tmp_path: Path) -> None:
    for name, stays in (("empty", False), ("full", True)):
        folder = tmp_path / name
        with only_process(folder):
            if stays:
                (folder / "file").write_text("")
            remove_if_alone(folder)
        assert folder.exists() is stays


def test_a_folder_that_cannot_be_written_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(StorageError, match=r"^Cannot write .*run\.lock: (File exists|Not a directory)\.$"),
        only_process(tmp_path / "file"),
    ):
        pass
