"""What survives a power cut: files and folders that the disk itself has, not only the operating system."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO


def sync(path: Path) -> None:
    """Wait until the disk has a file, or the names in a folder.

    Raises:
        OSError: it is not there, or the disk refuses.
    """
    if sys.platform == "win32" and path.is_dir():
        return  # Windows opens no folders; it writes their names down with the files.
    number = os.open(path, os.O_RDWR if sys.platform == "win32" else os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)


@contextmanager
def write_whole(path: Path) -> Iterator[TextIO]:
    """A text file to write to, in UTF-8, that takes the name `path`, replacing it, when all went well; else it is gone.

    Raises:
        OSError: the place cannot be written.
        UnicodeEncodeError: the text holds half of a surrogate pair.
    """
    part = path.with_name(f"{path.name}.part")
    try:
        with part.open("w", encoding="utf-8", newline="\n") as file:
            yield file
        sync(part)
        part.replace(path)
        sync(path.parent)
    finally:
        part.unlink(missing_ok=True)


def sync_tree(folder: Path) -> None:
    """Wait until the disk has everything below a folder, and the folder; what is in it comes before its name.

    Raises:
        OSError: something is not there any more, or the disk refuses.
    """
    for inner, _, names in os.walk(folder, topdown=False):
        for name in names:
            sync(Path(inner, name))
        sync(Path(inner))
