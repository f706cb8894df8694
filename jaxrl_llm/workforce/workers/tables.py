"""A worker that queries tables: SQL over CSV files, read-only, with limits on time, rows and memory.

SQLite of the standard library. Every query runs on a copy in memory that is thrown away; an authorizer lets it read and
call functions, and nothing else.
"""

import csv
import re
import sqlite3
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

from jaxrl_llm.workforce.protocol import Answer
from jaxrl_llm.workforce.protocol import Assignment
from jaxrl_llm.workforce.protocol import Card
from jaxrl_llm.workforce.workers.wording import named
from jaxrl_llm.workforce.workers.wording import shown

READING = frozenset({sqlite3.SQLITE_SELECT, sqlite3.SQLITE_READ, sqlite3.SQLITE_FUNCTION, sqlite3.SQLITE_RECURSIVE})
"""What a query may do."""
LONGEST_QUERY = 2_000
"""Characters of a query."""
LARGEST_VALUE = 10_000
"""Bytes of a text that a query makes."""
LARGEST_ANSWER = 100_000
"""Characters of an answer."""
MOST_COLUMNS = 20
"""Columns of an answer, unless a table has more."""
LONGEST_PATTERN = 50
"""Characters of a pattern of LIKE and GLOB."""
NUMBER = re.compile(r"-?(0|[1-9][0-9]{0,17})(\.[0-9]+)?")
"""An entry that is a number of SQL: not more digits than it keeps."""
STEPS_BETWEEN_LOOKS = 1_000
"""Instructions of SQLite between two looks at the clock."""


class TablesWorker:
    """Answers SQL: "SELECT area FROM countries WHERE country = #1", where #1 is bound and not written in.

    One column comes back as its values, several as rows; values are separated by commas, rows by semicolons.

    Args:
        folder: of CSV files; a file is a table, its first line names the columns. A column of numbers is one in SQL.
        name: of the worker.
        capacity: steps at a time.
        seconds: time of a query [s].
        rows: most rows of an answer.

    Raises:
        ValueError: there is no table, or a file is none.
    """

    def __init__(
        self, folder: str | Path, *, name: str = "tables", capacity: int = 4, seconds: float = 2.0, rows: int = 100
    ) -> None:
        self._seconds, self._rows = seconds, rows
        tables = {path.stem: _read_csv(path) for path in sorted(Path(folder).glob("*.csv"))}
        if not tables:
            raise ValueError(f"{folder} has no CSV file; expected at least one.")
        with closing(sqlite3.connect(":memory:")) as made:
            for table, (columns, entries) in tables.items():
                declared = ", ".join(f"{_quoted(column)} {kind}" for column, kind in columns)
                try:
                    made.execute(f"CREATE TABLE {_quoted(table)} ({declared})")
                    made.executemany(f"INSERT INTO {_quoted(table)} VALUES ({', '.join('?' * len(columns))})", entries)
                except sqlite3.Error as error:
                    raise ValueError(f"{folder}/{table}.csv cannot be a table of SQL: {error}.") from error
            made.commit()
            self._database = made.serialize()
        self._columns = max(MOST_COLUMNS, *(len(columns) for columns, _ in tables.values()))
        names = {table: ", ".join(column for column, _ in columns) for table, (columns, _) in tables.items()}
        shown = "; ".join(f"{table}({columns})" for table, columns in names.items())
        self.card = Card(
            name, f"answers SQL queries, SELECT column FROM table WHERE .., over the tables {shown}", capacity
        )

    def work(self, assignment: Assignment) -> Answer:
        """See `Worker.work`."""
        try:
            query, results = named(assignment, ":r{}")
            if len(query) > LONGEST_QUERY:
                raise ValueError(f"it has {len(query)} characters; at most {LONGEST_QUERY} are read")
            rows = self._found(query, results)
        except (ValueError, sqlite3.Error, sqlite3.Warning, OverflowError, MemoryError) as error:
            said = f"longer than {self._seconds:g} s" if "interrupted" in str(error) else str(error)
            return Answer(f"the query failed: {said}", failed=True)
        if not rows:
            return Answer("no row fits the query", failed=True)
        # One column reads as a list, several as rows.
        return Answer((", " if len(rows[0]) == 1 else "; ").join(", ".join(row) for row in rows))

    def _found(self, query: str, results: dict[int, str]) -> list[list[str]]:
        """The rows of an answer as texts, taken one by one: its size is bounded before it is in memory."""
        with closing(sqlite3.connect(":memory:")) as database:
            database.deserialize(self._database)
            database.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, LARGEST_VALUE)
            database.setlimit(sqlite3.SQLITE_LIMIT_COLUMN, self._columns)
            # A pattern is matched without a look at the clock.
            database.setlimit(sqlite3.SQLITE_LIMIT_LIKE_PATTERN_LENGTH, LONGEST_PATTERN)
            database.set_authorizer(lambda action, *_: sqlite3.SQLITE_OK if action in READING else sqlite3.SQLITE_DENY)
            database.set_progress_handler(_over(self._seconds), STEPS_BETWEEN_LOOKS)
            rows, size = [], 0
            for row in database.execute(query, {f"r{number}": result for number, result in results.items()}):
                if any(isinstance(value, bytes) for value in row):
                    raise ValueError("a value is a blob, which is no text")
                rows.append([shown(value) for value in row])
                size += sum(map(len, rows[-1]))
                if len(rows) > self._rows:
                    raise ValueError(f"more than {self._rows} rows; ask for fewer")
                if size > LARGEST_ANSWER:
                    raise ValueError(f"its rows have more than {LARGEST_ANSWER} characters; ask for less")
        return rows


def _over(seconds: float) -> Callable[[], int]:
    deadline = time.monotonic() + seconds
    return lambda: int(time.monotonic() > deadline)


def _quoted(name: str) -> str:
    return '"' + name.replace('"', '""') + '"'


def _read_csv(path: Path) -> tuple[list[tuple[str, str]], list[list[str | int | float]]]:
    """Columns, each with its type in SQL, and rows."""
    try:
        # With the mark that some programs write in front of UTF-8, or without.
        with path.open(encoding="utf-8-sig", newline="") as text:
            columns, *rows = [row for row in csv.reader(text) if row] or [[]]
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{path} cannot be read: {error}; expected a CSV file in UTF-8.") from error
    wrong = next((row for row in rows if len(row) != len(columns)), None)
    if not columns or wrong is not None:
        what = "is empty" if wrong is None else f"has a row of {len(wrong)} entries under {len(columns)} columns"
        raise ValueError(f"{path} {what}; expected a CSV file whose first line names the columns.")
    kinds = [_kind([row[place] for row in rows]) for place in range(len(columns))]
    names = {str: "TEXT", int: "INTEGER", float: "REAL"}
    declared = [(column, names[kind]) for column, kind in zip(columns, kinds, strict=True)]
    return declared, [[kind(entry) for kind, entry in zip(kinds, row, strict=True)] for row in rows]


def _kind(entries: list[str]) -> type:
    """What a column holds: numbers only where every entry is written as a number is (007 and 1_0 are names)."""
    found = [NUMBER.fullmatch(entry) for entry in entries]
    if not all(found):
        return str
    return float if any(number and number[2] for number in found) else int
