"""A worker that reads files of one folder: what is outside, and what a link leads to, is refused.

Every part of a path is opened by itself without following links, so that nothing changes between a check and its use.
"""

import os
import re
import stat
from pathlib import Path

from jaxrl_llm.workforce.protocol import Answer
from jaxrl_llm.workforce.protocol import Assignment
from jaxrl_llm.workforce.protocol import Card
from jaxrl_llm.workforce.workers.wording import filled

LARGEST_FILE = 1_000_000
"""Bytes above which a file is refused."""
MOST_NAMES = 200
"""Entries of a folder that are listed."""
NUMBER = re.compile(r"(?<![\w.])-?(?>\d+(?:\.\d+)?|\.\d+)(?:[eE][+-]?\d+)?(?!\w)")
"""A number in a text: 12, -2.5, .5, 1e-05; "1.5x" has none."""
_COMMAND = re.compile(r"(list|read|numbers in)(?: (.+))?", re.DOTALL)


class FilesWorker:
    """Does "list FOLDER", "read FILE" and "numbers in FILE" within one folder.

    Args:
        folder: the only one that it sees.
        name: of the worker.
        capacity: steps at a time.

    Raises:
        ValueError: there is no such folder.
    """

    def __init__(self, folder: str | Path, *, name: str = "files", capacity: int = 4) -> None:
        self._folder = Path(folder).resolve()
        if not self._folder.is_dir():
            raise ValueError(f"folder is {folder}, which is no folder.")
        self.card = Card(name, "works on files: list FOLDER, read FILE, numbers in FILE", capacity)

    def work(self, assignment: Assignment) -> Answer:
        """See `Worker.work`."""
        said = filled(assignment)
        found = _COMMAND.fullmatch(said)
        if found is None or (found[1] != "list" and found[2] is None):
            return Answer(
                f"{said[:100]!r} is no command; expected list FOLDER, read FILE or numbers in FILE", failed=True
            )
        command, path = found[1], found[2] or "."
        try:
            if command == "list":
                return self._list(path)
            text = self._read(path)
        except (OSError, ValueError) as error:
            reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
            return Answer(f"{path[:100]} cannot be used: {reason}", failed=True)
        if command == "read":
            return Answer(text)
        numbers = NUMBER.findall(text)
        return Answer(", ".join(numbers)) if numbers else Answer(f"{path} has no numbers", failed=True)

    def _list(self, path: str) -> Answer:
        number = self._open(path, folder=True)
        try:
            names = sorted(os.listdir(number))
        finally:
            os.close(number)
        rest = f", and {len(names) - MOST_NAMES} more" if len(names) > MOST_NAMES else ""
        return Answer(", ".join(names[:MOST_NAMES]) + rest) if names else Answer("the folder is empty")

    def _read(self, path: str) -> str:
        number = self._open(path, folder=False)
        with open(number, "rb") as file:
            # Read one byte more than allowed: a file may grow after its size was looked at.
            content = file.read(LARGEST_FILE + 1)
        if len(content) > LARGEST_FILE:
            raise ValueError(f"it has more than {LARGEST_FILE} bytes")
        try:
            return content.decode("utf-8")
        except UnicodeDecodeError as error:
            raise ValueError("it is no text in UTF-8") from error

    def _open(self, path: str, *, folder: bool) -> int:
        """A descriptor of a file or folder within the folder."""
        parts = [part for part in path.split("/") if part not in ("", ".")]
        if path.startswith("/") or ".." in parts or "\0" in path:
            raise ValueError("it is outside the folder; a path must be relative and without '..'")
        if not parts and not folder:
            raise ValueError("it is a folder")
        number = os.open(self._folder, os.O_RDONLY | os.O_DIRECTORY)
        for place, part in enumerate(parts):
            try:
                inner = _open_inner(number, part, file=not folder and place == len(parts) - 1)
            finally:
                os.close(number)
            number = inner
        return number


def _open_inner(outer: int, part: str, *, file: bool) -> int:
    if stat.S_ISLNK(os.stat(part, dir_fd=outer, follow_symlinks=False).st_mode):
        raise ValueError("it goes through a link, which is not followed")
    # O_NOFOLLOW, should it become a link now; O_NONBLOCK, as opening a named pipe waits for whoever writes.
    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK
    number = os.open(part, flags if file else flags | os.O_DIRECTORY, dir_fd=outer)
    if file and not stat.S_ISREG(os.fstat(number).st_mode):
        os.close(number)
        raise ValueError("it is no file")
    return number
