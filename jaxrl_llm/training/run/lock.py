"""One process at a time in the folder of a run.

The lock is the operating system's (flock on `run.lock`): it ends with its process, however that ends, so there is
nothing to clean up. What the file says is for the sentence that a second process ends with.
"""

import datetime
import json
import os
import socket
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from contextlib import suppress
from pathlib import Path
from typing import IO

from jaxrl_llm.regular import require_regular
from jaxrl_llm.training.run.errors import StorageError

if sys.platform != "win32":
    import fcntl

NAME = "run.lock"

_HELD: dict[Path, tuple[int, IO[str]]] = {}
"""Folder -> thread that holds it, and the open file."""


def _close_in_child() -> None:
    """A forked child shares the lock of its parent and would keep it beyond the parent's end."""
    for _, file in _HELD.values():
        with suppress(OSError):
            file.close()
    _HELD.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_close_in_child)


@contextmanager
def only_process(folder: Path) -> Iterator[None]:
    """While entered, no other process or thread works in the folder; the same thread may enter again.

    Where the file system has no locks (some network file systems), and on Windows, everybody may enter.

    Raises:
        StorageError: another process is there, naming it; or the folder cannot be written.
    """
    place = Path(os.path.realpath(folder))
    if _HELD.get(place, (None,))[0] == threading.get_ident():
        yield
        return
    file = _locked(place)
    _HELD[place] = threading.get_ident(), file
    try:
        yield
    finally:
        _HELD.pop(place, None)
        file.close()


def _locked(folder: Path) -> IO[str]:
    path = folder / NAME
    while True:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with suppress(FileNotFoundError):
                require_regular(path)
            file = open(path, "a+", encoding="utf-8", errors="replace")  # noqa: SIM115  (open as long as it is held)
        except OSError as error:
            raise StorageError(f"Cannot write {path}: {error.strerror}.") from error
        try:
            _lock(file)
            # Whoever held it before may have removed the file between opening and locking it.
            if not path.exists() or not os.path.samestat(os.fstat(file.fileno()), path.stat()):
                file.close()
                continue
            _sign(file)
        except BlockingIOError:
            sentence = _who(file)
            file.close()
            raise StorageError(
                f"{folder} is in use: {sentence} works in it. Wait for it, stop it, or choose another folder."
            ) from None
        except OSError as error:
            file.close()
            raise StorageError(f"Cannot write {path}: {error.strerror}.") from error
        return file


def _lock(file: IO[str]) -> None:
    """Lock the file at once.

    Raises:
        BlockingIOError: somebody else has it.
    """
    if sys.platform == "win32":
        return
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise
    except OSError:
        return  # No locks here.


def _sign(file: IO[str]) -> None:
    started = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    file.seek(0)
    file.truncate()
    file.write(json.dumps({"pid": os.getpid(), "host": socket.gethostname(), "started": started}) + "\n")
    file.flush()


def _who(file: IO[str]) -> str:
    """Who signed the file, in words."""
    try:
        file.seek(0)
        told = json.loads(file.read(10_000))
        return f"process {told['pid']} on {told['host']}, started {told['started']},"
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return "another process"


def remove_if_alone(folder: Path) -> None:
    """Remove a folder that holds nothing but the lock of this process; any other stays."""
    with suppress(OSError):
        if [path.name for path in folder.iterdir()] == [NAME]:
            (folder / NAME).unlink()
        folder.rmdir()
