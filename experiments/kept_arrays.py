"""Arrays that an earlier run kept, read without trust: what a file claims is checked before anything is allocated.

A file may be half written, another program's, or made to do harm: an object array is a pickle, which runs code when it
is read, and a few bytes of a zip archive can claim to be a hundred gigabytes. So no pickle is ever read, every array is
as large as its header says and as its place in the file is, and both stay below a limit.
"""

import ast
import io
import math
import re
import struct
import zipfile
import zlib
from pathlib import Path
from typing import IO
from typing import NamedTuple

import numpy as np

from jaxrl_llm.regular import open_regular

LARGEST_FILE = 1 << 30
"""Bytes of all arrays of a file together, unpacked."""
MOST_ARRAYS = 10_000
"""In one file."""
LONGEST_HEADER = 4096
"""Bytes in which an array says its type and shape."""
TYPES = re.compile(r"[<>|=][biufcSU]\d{1,6}")
"""Of NumPy: truth values, numbers and texts."""
CHUNK = 1 << 20
"""Bytes that are unpacked at a time."""

_DAMAGE = (
    *(OSError, EOFError, ValueError, KeyError, RuntimeError, NotImplementedError, OverflowError, MemoryError),
    *(SyntaxError, TypeError, RecursionError, struct.error, zlib.error, zipfile.BadZipFile),
)
"""What Python, zipfile and NumPy raise on files that are none."""


class KeptArrayError(ValueError):
    """A file of arrays that is not read; the sentence names it and says why."""


class Header(NamedTuple):
    """What an array says of itself.

    Attributes:
        dtype: no object type.
        shape: of the array.
        start: bytes before its numbers.
        size: bytes of its numbers.
    """

    dtype: np.dtype
    shape: tuple[int, ...]
    start: int
    size: int


def _header(file: IO[bytes]) -> Header:
    """Type and shape, without reading a number.

    Raises:
        ValueError: it is no array, or one of another kind than `TYPES`.
    """
    version = np.lib.format.read_magic(file)
    if version not in ((1, 0), (2, 0)):
        raise ValueError(f"it has the format version {version[0]}.{version[1]}, expected 1.0 or 2.0")
    width = 2 if version == (1, 0) else 4
    length = int.from_bytes(file.read(width), "little")
    if not 0 < length <= LONGEST_HEADER:
        raise ValueError(f"it has a header of {length} bytes, expected at most {LONGEST_HEADER}")
    text = file.read(length)
    fields = ast.literal_eval(text.decode("latin1"))
    if len(text) < length or not isinstance(fields, dict) or set(fields) != {"descr", "fortran_order", "shape"}:
        raise ValueError("it has a header that is none")
    descr, shape = fields["descr"], fields["shape"]
    if not isinstance(descr, str) or not TYPES.fullmatch(descr):
        raise ValueError(f"it has the type {str(descr)[:40]!r}, expected numbers or texts (no pickled objects)")
    if not isinstance(shape, tuple) or not all(type(length) is int and length >= 0 for length in shape):
        raise ValueError("it has a shape that is none")
    dtype = np.dtype(descr)
    return Header(dtype, shape, 8 + width + length, math.prod(shape) * dtype.itemsize)


def _require_size(header: Header, there: int, limit: int) -> None:
    if header.size > limit:
        raise ValueError(f"it claims {header.size} bytes, expected at most {limit}")
    if header.start + header.size != there:
        raise ValueError(f"it claims {header.start + header.size} bytes and has {there}")


def _read(file: IO[bytes], size: int, limit: int) -> np.ndarray:
    """One array of a file or of a member of an archive, `size` bytes with its header."""
    header = _header(file)
    _require_size(header, size, limit)
    file.seek(0)
    return np.lib.format.read_array(file, allow_pickle=False, max_header_size=2 * LONGEST_HEADER)


def read_array(path: Path, *, limit: int = LARGEST_FILE) -> np.ndarray:
    """The array of a .npy file.

    Args:
        path: the file.
        limit: bytes that it may have.

    Raises:
        KeptArrayError: there is none that may be read.
    """
    try:
        with open_regular(path) as file:
            return _read(file, path.stat().st_size, limit)
    except _DAMAGE as error:
        raise _refused(path, error) from None


def read_arrays(path: Path, *, limit: int = LARGEST_FILE) -> dict[str, np.ndarray]:
    """The arrays of a .npz file by their names.

    Args:
        path: the file.
        limit: bytes that all of them may have, unpacked.

    Raises:
        KeptArrayError: one of them may not be read.
    """
    try:
        with open_regular(path) as file, zipfile.ZipFile(file) as archive:
            members = archive.infolist()
            _require_members(members, limit)
            return {member.filename.removesuffix(".npy"): _member(archive, member, limit) for member in members}
    except _DAMAGE as error:
        raise _refused(path, error) from None


def _require_members(members: list[zipfile.ZipInfo], limit: int) -> None:
    """Raise unless the archive's directory is one that numpy.savez writes, of a size that may be read."""
    if len(members) > MOST_ARRAYS:
        raise ValueError(f"it has {len(members)} arrays, expected at most {MOST_ARRAYS}")
    names = [member.filename for member in members]
    if len(set(names)) < len(names) or not all(name.endswith(".npy") for name in names):
        raise ValueError("it holds other things than arrays, or two of one name")
    claimed = sum(member.file_size for member in members)
    if claimed > limit:
        raise ValueError(f"it claims {claimed} bytes unpacked, expected at most {limit}")
    if any(member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED) for member in members):
        raise ValueError("it is packed in another way than arrays are")


def _member(archive: zipfile.ZipFile, member: zipfile.ZipInfo, limit: int) -> np.ndarray:
    with archive.open(member) as file:
        # The header alone first: a shape that is not that of the bytes that follow is refused before they are unpacked.
        _require_size(_header(file), member.file_size, limit)
    content = bytearray()
    with archive.open(member) as file:
        # A read without a size would unpack two gigabytes before it is cut to what the directory claims.
        while chunk := file.read(CHUNK):
            content += chunk
    return _read(io.BytesIO(content), len(content), limit)


def _refused(path: Path, error: BaseException) -> KeptArrayError:
    reason = error.strerror or str(error) if isinstance(error, OSError) else str(error)
    return KeptArrayError(f"Cannot read {path}: {reason or type(error).__name__}.")
