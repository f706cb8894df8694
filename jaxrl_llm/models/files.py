"""What checkpoints are made of: JSON objects, folders and files that appear whole or not at all, the cache folder.

What others wrote is read with suspicion: a named pipe, a device, a file of another kind or of absurd size ends in one
`ModelFileError` with a sentence before anything is read from it, allocated for it or computed from it.
"""

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

from jaxrl_llm.regular import other_kind

CACHE_VARIABLE = "JAXRL_LLM_CACHE"
ABANDONED_AFTER = 3600.0
"""Age [seconds] from which the draft of a process that was killed is removed."""

JSON_LIMIT = 16 * 2**20
"""Largest JSON file that is parsed [bytes]; the index of a checkpoint of 160 shards has 9 MB."""


class ModelFileError(ValueError):
    """A file of a model cannot be used as it is: damaged, of another kind, inconsistent, or of a kind not read here.

    Its sentence is one line that can be printed, whatever names and texts of others it quotes.
    """

    def __str__(self) -> str:
        """The sentence; what cannot be printed (line ends, commands to terminals, half letters) stands as an escape."""
        text = super().__str__()
        return "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in text)


class MissingModelFileError(ModelFileError, FileNotFoundError):
    """A file or folder of a model is not there."""


@contextmanager
def read_from(source: str | Path) -> Iterator[None]:
    """What goes wrong inside, while content of `source` is read, comes out as a `ModelFileError` that names it.

    Sentences that were thought of pass as they are; on content that nobody thought of, libraries raise whatever there
    is.
    """
    try:
        with without_panics(source):
            yield
    except ModelFileError:
        raise
    except Exception as error:
        kind = "" if type(error) is ValueError else f"{type(error).__name__}: "
        raise ModelFileError(f"{source} cannot be used ({kind}{one_line(error)}).") from error


@contextmanager
def without_panics(source: str | Path) -> Iterator[None]:
    """A panic of a library's Rust part, which derives from BaseException only, comes out as a `ModelFileError`."""
    try:
        yield
    except BaseException as error:
        if type(error).__name__ != "PanicException":
            raise
        raise ModelFileError(f"{source} cannot be used (the library panicked: {one_line(error)}).") from error


def one_line(error: object, *, most: int = 300) -> str:
    """A text on one line, cut after `most` characters."""
    text = " ".join(str(error).split())
    return text if len(text) <= most else text[:most] + "..."


def regular_file(path: Path, *, expected: str, limit: int | None = None) -> int:
    """The size of a file [bytes], which must be one that can be read to its end.

    Args:
        path: the file; links are followed.
        expected: what it should be, for the sentence.
        limit: largest size [bytes]; None for any.

    Raises:
        MissingModelFileError: nothing there.
        ModelFileError: a folder, a named pipe, a device or a socket, or a file above the limit.
    """
    try:
        status = path.stat()
    except (FileNotFoundError, NotADirectoryError) as error:
        raise MissingModelFileError(f"{path} does not exist; expected {expected}.") from error
    except (OSError, ValueError) as error:
        raise ModelFileError(f"{path!s:.300} cannot be looked at ({one_line(error)}); expected {expected}.") from error
    kind = other_kind(status.st_mode)
    if kind:
        raise ModelFileError(f"{path} is a {kind}; expected {expected}.")
    if limit is not None and status.st_size > limit:
        raise ModelFileError(f"{path} has {status.st_size} bytes; expected {expected} of at most {limit} bytes.")
    return status.st_size


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


def is_there(path: Path) -> bool:
    """Whether there is something under this name, be it a link to nothing; for a name that no file can have, not."""
    try:
        return os.path.lexists(path)
    except (OSError, ValueError):
        return False


def read_json(path: Path, *, default: dict[str, Any] | None = None) -> dict[str, Any]:
    """The object in a JSON file; `default` where there is no such file and a default is given.

    Raises:
        MissingModelFileError: no such file, and no default.
        ModelFileError: not a file, larger than `JSON_LIMIT`, or not a JSON object.
    """
    if default is not None and not is_there(path):
        return default
    regular_file(path, expected="a JSON file", limit=JSON_LIMIT)
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except RecursionError as error:
        raise ModelFileError(f"{path} is not valid JSON here: it is nested too deep.") from error
    except ValueError as error:
        raise ModelFileError(f"{path} is not valid JSON ({one_line(error)}); it may be truncated.") from error
    except OSError as error:
        raise ModelFileError(f"{path} cannot be read ({one_line(error)}).") from error
    if not isinstance(content, dict):
        raise ModelFileError(f"{path} holds a {type(content).__name__}; expected a JSON object.")
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
