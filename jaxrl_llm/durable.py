"""What survives a power cut: files and folders that the disk itself has, not only the operating system."""

import os
import sys
from pathlib import Path


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


def sync_tree(folder: Path) -> None:
    """Wait until the disk has everything below a folder, and the folder; what is in it comes before its name.

    Raises:
        OSError: something is not there any more, or the disk refuses.
    """
    for inner, _, names in os.walk(folder, topdown=False):
        for name in names:
            sync(Path(inner, name))
        sync(Path(inner))
