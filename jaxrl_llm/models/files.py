"""What checkpoints are made of: JSON objects, folders and files that appear whole or not at all, the cache folder."""

import errno
import json
import os
import shutil
import sys
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from contextlib import suppress
from pathlib import Path
from typing import Any

CACHE_VARIABLE = "JAXRL_LLM_CACHE"
ABANDONED_AFTER = 3600.0
"""Age [seconds] from which the draft of a process that was killed is removed."""


def cache_folder() -> Path:
    """Where converted weights are kept: $JAXRL_LLM_CACHE, else `jaxrl_llm` in the user's cache folder."""
    chosen = os.environ.get(CACHE_VARIABLE)
    if chosen:
        return Path(chosen).expanduser()
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "jaxrl_llm"
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local") / "jaxrl_llm"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "jaxrl_llm"


def read_json(path: Path, *, default: dict[str, Any] | None = None) -> dict[str, Any]:
    """The object in a JSON file; `default` where there is no such file and a default is given.

    Raises:
        FileNotFoundError: no such file, and no default.
        ValueError: not a JSON object.
    """
    if not path.exists():
        if default is not None:
            return default
        raise FileNotFoundError(f"{path} does not exist.")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON ({error}); it may be truncated.") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}; expected a JSON object.")
    return content


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write a JSON object, indented, in the order given."""
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


@contextmanager
def whole_folder(folder: Path, *, size: int) -> Iterator[Path]:
    """A folder to write into that takes the name `folder` when all went well, and is removed otherwise.

    A process killed in between leaves at worst a hidden draft beside `folder`; a later call removes it once it is old.

    Args:
        folder: must not exist, or be empty.
        size: what will be written [bytes], compared with the free space before anything is.

    Raises:
        FileExistsError: `folder` holds something.
        OSError: the place cannot be written or has no room; the sentence names it.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise FileExistsError(f"{folder} already exists and is not empty; choose a new folder.")
    with _draft(folder, size) as draft:
        draft.mkdir()
        yield draft
        if folder.exists():
            folder.rmdir()
        draft.rename(folder)


@contextmanager
def whole_file(path: Path, *, size: int) -> Iterator[Path]:
    """A path to write to that takes the name `path`, replacing it, when all went well; see `whole_folder`."""
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a folder; expected the name of a file.")
    with _draft(path, size) as draft:
        yield draft
        draft.replace(path)


@contextmanager
def _draft(target: Path, size: int) -> Iterator[Path]:
    """A hidden name beside `target`, gone at the end; failures of the file system come out as one sentence."""
    draft = target.parent / f".{target.name}.{uuid.uuid4().hex}.draft"
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        for old in target.parent.glob(f".{target.name}.*.draft"):
            if time.time() - old.stat().st_mtime > ABANDONED_AFTER:
                _remove(old)
        free = shutil.disk_usage(target.parent).free
        if free < size:
            raise OSError(errno.ENOSPC, f"{size / 1e6:.0f} MB needed, {free / 1e6:.0f} MB free")
        yield draft
    except OSError as error:
        reason = error.strerror or str(error)
        raise type(error)(error.errno, f"{target} cannot be written: {reason}. Nothing was changed there.") from error
    finally:
        _remove(draft)


def _remove(path: Path) -> None:
    """Remove a file or folder if that can be done; what cannot be written cannot be cleaned either."""
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
        return
    with suppress(OSError):
        path.unlink()
