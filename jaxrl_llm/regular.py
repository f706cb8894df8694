"""Files that can be read to their end: a named pipe, a device, a socket or a folder under the name of a file is refused
before it is opened, since opening a pipe waits for whoever writes into it, for ever.
"""

import errno
import os
import stat
from io import BufferedReader
from pathlib import Path


def other_kind(mode: int) -> str | None:
    """What something is that is no regular file, in words; None for a regular file.

    Args:
        mode: its `st_mode`, links followed.
    """
    if stat.S_ISREG(mode):
        return None
    kinds = {stat.S_IFDIR: "folder", stat.S_IFIFO: "named pipe", stat.S_IFSOCK: "socket"}
    return kinds.get(stat.S_IFMT(mode), "device")


def require_regular(path: Path, *, devices: bool = False) -> None:
    """Raise unless there is a file that can be read to its end; links are followed.

    Args:
        path: the file.
        devices: whether devices pass too, for files that are only written.

    Raises:
        IsADirectoryError: it is a folder.
        OSError: it is of another kind, is not there, or has a name that no file can have.
    """
    try:
        kind = other_kind(path.stat().st_mode)
    except ValueError as error:
        raise OSError(errno.EINVAL, f"no file can have this name ({error})", repr(path)) from error
    if kind == "folder":
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    if kind and not (devices and kind == "device"):
        raise OSError(errno.EINVAL, f"it is a {kind}, expected a file", str(path))


def open_regular(path: Path) -> BufferedReader:
    """A file, opened for reading bytes.

    Raises:
        OSError: see `require_regular`; or it cannot be opened.
    """
    require_regular(path)
    return path.open("rb")


def read_regular(path: Path) -> bytes:
    """All bytes of a file.

    Raises:
        OSError: see `require_regular`; or it cannot be read.
    """
    with open_regular(path) as file:
        return file.read()
