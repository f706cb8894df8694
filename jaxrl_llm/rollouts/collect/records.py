"""Records of a file, by number: JSON lines, read where they stand, or Parquet, held in memory.

A file is read through once when it is opened: every record is checked, so that a mistake in line 900 000 is named
before anything is computed. Of JSON lines only offsets and numbers are kept, 16 bytes per line; one gigabyte took
20 s to check on a core of an AMD EPYC. A Parquet file is held whole, so it must fit into memory.
"""

import hashlib
import json
from array import array
from collections.abc import Callable
from pathlib import Path
from typing import Any
from typing import Protocol

MOST_LINE = 64 * 2**20
"""Bytes above which a line is refused; one is read at a time."""

Record = dict[str, Any]
Check = Callable[[Record, str], None]
"""Raises a ValueError for a record that cannot be used; the text says where it stands."""


class Records(Protocol):
    """What `open_records` returns."""

    fingerprint: str
    """Tells one content of the file from another."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Record: ...

    def place(self, index: int) -> str:
        """Where a record stands, in words."""
        ...


def open_records(path: str | Path, check: Check) -> Records:
    """The records of a file, each of them checked: Parquet by its ending, else one JSON object per line.

    Args:
        path: the file.
        check: is called with every record and its place.

    Raises:
        FileNotFoundError: no such file.
        ModuleNotFoundError: a Parquet file, and pyarrow is not installed.
        ValueError: there is no record, or the first one that cannot be read or used, by its place.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path} is not a file; expected JSON lines or Parquet.")
    records = ParquetRecords(path, check) if path.suffix == ".parquet" else JsonLines(path, check)
    if not len(records):
        raise ValueError(f"{path} has no records; it must have at least one.")
    return records


class JsonLines:
    """One JSON object per line; lines that are blank do not count.

    Args:
        path: the file, in UTF-8.
        check: see `open_records`.
    """

    def __init__(self, path: Path, check: Check) -> None:
        self.path = path
        self._offsets, self._numbers = array("q"), array("q")
        digest, offset, number = hashlib.sha256(), 0, 0
        with path.open("rb") as file:
            while line := file.readline(MOST_LINE + 1):
                number += 1
                place = f"line {number} of {path}"
                if len(line) > MOST_LINE:
                    raise ValueError(f"{place} is longer than {MOST_LINE} bytes; expected one JSON object per line.")
                digest.update(line)
                if line.strip():
                    check(_parsed(line, place), place)
                    self._offsets.append(offset)
                    self._numbers.append(number)
                offset += len(line)
        self.fingerprint = digest.hexdigest()

    def __len__(self) -> int:
        return len(self._offsets)

    def __getitem__(self, index: int) -> Record:
        with self.path.open("rb") as file:
            file.seek(self._offsets[index])
            return _parsed(file.readline(MOST_LINE + 1), self.place(index))

    def place(self, index: int) -> str:
        """The line of a record."""
        return f"line {self._numbers[index]} of {self.path}"


class ParquetRecords:
    """The rows of a Parquet file.

    Args:
        path: the file.
        check: see `open_records`.
    """

    def __init__(self, path: Path, check: Check) -> None:
        try:
            import pyarrow
            import pyarrow.parquet
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError(
                f"reading {path} needs pyarrow; run: pip install pyarrow, or give JSON lines.", name="pyarrow"
            ) from error
        self.path = path
        try:
            self._table = pyarrow.parquet.read_table(path)
        except (pyarrow.ArrowException, OSError) as error:
            reason = " ".join(str(error).split())
            raise ValueError(f"{path} is not a readable Parquet file ({reason}); it may be cut or damaged.") from error
        with path.open("rb") as file:
            self.fingerprint = hashlib.file_digest(file, "sha256").hexdigest()
        start = 0
        for batch in self._table.to_batches(max_chunksize=1024):
            for index, record in enumerate(batch.to_pylist(), start=start):
                check(record, self.place(index))
            start += batch.num_rows

    def __len__(self) -> int:
        return self._table.num_rows

    def __getitem__(self, index: int) -> Record:
        return self._table.slice(index, 1).to_pylist()[0]

    def place(self, index: int) -> str:
        """The row of a record, counted from 1."""
        return f"row {index + 1} of {self.path}"


def _parsed(line: bytes, place: str) -> Record:
    try:
        record = json.loads(line.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{place} is not JSON ({error}); expected one JSON object per line.") from error
    if not isinstance(record, dict):
        raise ValueError(f"{place} holds a {type(record).__name__}; expected one JSON object per line.")
    return record
