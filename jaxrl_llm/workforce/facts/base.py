"""A base of facts: what can be searched, tables, files, and which relation leads from what to what."""

import csv
import functools
import hashlib
import io
import json
from collections.abc import Callable
from collections.abc import Mapping
from dataclasses import asdict
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from jaxrl_llm.models.files import cache_folder
from jaxrl_llm.models.files import whole_folder

BASE, DIGEST, TABLES, FILES = "base.json", "SHA256", "tables", "files"
"""What a folder of a base holds."""


class Relation(NamedTuple):
    """What facts of one kind say.

    Attributes:
        name: as a title has it: "capital" in "capital of France".
        subject: kind of thing that it is said of.
        value: kind of thing that it leads to.
    """

    name: str
    subject: str
    value: str

    def title(self, subject: str) -> str:
        """What a fact is found under."""
        return f"{self.name} of {subject}"


class Fact(NamedTuple):
    """One fact: "capital of France" is "Paris"."""

    relation: str
    subject: str
    value: str


@dataclass(frozen=True)
class Table:
    """A table: names of columns, and rows of texts and numbers; the first entry of a row names it."""

    columns: tuple[str, ...]
    rows: tuple[tuple[str | int | float, ...], ...]

    @functools.cached_property
    def _named(self) -> dict[str | int | float, tuple[str | int | float, ...]]:
        return {row[0]: row for row in self.rows}

    def value(self, row: str, column: str) -> str | int | float | None:
        """The entry of a column in the row of this name; None where there is no such row."""
        return self._named[row][self.columns.index(column)] if row in self._named else None


@dataclass(frozen=True)
class FactBase:
    """Facts, tables and files of one world.

    Attributes:
        name: of the world.
        relations: by name.
        facts: each title once.
        tables: by name; the first column names the row.
        files: texts, by their path.
    """

    name: str
    relations: tuple[Relation, ...]
    facts: tuple[Fact, ...]
    tables: Mapping[str, Table]
    files: Mapping[str, str]

    @functools.cached_property
    def _values(self) -> dict[tuple[str, str], str]:
        return {(fact.relation, fact.subject): fact.value for fact in self.facts}

    @functools.cached_property
    def digest(self) -> str:
        """SHA-256 of everything: equal bases have equal digests."""
        return hashlib.sha256(_as_json(self).encode()).hexdigest()

    def relation(self, name: str) -> Relation:
        """The relation of this name."""
        return next(relation for relation in self.relations if relation.name == name)

    def title(self, fact: Fact) -> str:
        """What a fact is found under."""
        return self.relation(fact.relation).title(fact.subject)

    def value(self, relation: str, subject: str) -> str | None:
        """What a relation says of a subject; None where nothing is known."""
        return self._values.get((relation, subject))

    def subjects(self, relation: str) -> tuple[str, ...]:
        """Of whom a relation says something, in the order of the facts."""
        return tuple(fact.subject for fact in self.facts if fact.relation == relation)


def _as_json(base: FactBase) -> str:
    # Key by key in the order given: the order of facts is part of a base.
    return json.dumps(asdict(base), ensure_ascii=False)


def write_base(base: FactBase, folder: Path) -> None:
    """Write a base into a folder that is not there: its JSON and digest, a CSV file per table, and its files.

    Raises:
        FileExistsError: the folder holds something.
        OSError: it cannot be written.
    """
    contents = _contents(base)
    with whole_folder(folder, size=4 * len(contents[BASE])) as draft:
        for name in (TABLES, FILES):
            (draft / name).mkdir()
        for path, content in contents.items():
            (draft / path).parent.mkdir(parents=True, exist_ok=True)
            (draft / path).write_bytes(content)


def _contents(base: FactBase) -> dict[str, bytes]:
    """Everything that a folder of a base holds, by path."""
    contents = {BASE: _as_json(base).encode(), DIGEST: base.digest.encode()}
    for name, table in base.tables.items():
        text = io.StringIO(newline="")
        csv.writer(text, lineterminator="\n").writerows([table.columns, *table.rows])
        contents[f"{TABLES}/{name}.csv"] = text.getvalue().encode()
    return contents | {f"{FILES}/{path}": content.encode() for path, content in base.files.items()}


def read_base(folder: Path) -> FactBase:
    """The base in a folder, of which nothing was changed: its tables and files, which workers read, among it.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is not what was written.
    """
    contents = {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    for name in (BASE, DIGEST):
        if name not in contents:
            raise FileNotFoundError(f"{folder} has no {name}; it is no folder of a base.")
    if hashlib.sha256(contents[BASE]).hexdigest().encode() != contents[DIGEST]:
        raise ValueError(f"{folder} has another SHA-256 than when it was written; remove it, and it is built anew.")
    found = json.loads(contents[BASE])
    base = FactBase(
        name=found["name"],
        relations=tuple(Relation(*one) for one in found["relations"]),
        facts=tuple(Fact(*one) for one in found["facts"]),
        tables={
            name: Table(tuple(table["columns"]), tuple(map(tuple, table["rows"])))
            for name, table in found["tables"].items()
        },
        files=found["files"],
    )
    expected = _contents(base)
    changed = sorted(path for path in {*contents, *expected} if contents.get(path) != expected.get(path))
    if changed:
        raise ValueError(f"{folder / changed[0]} is not what was written; remove {folder}, and it is built anew.")
    return base


def kept_base(key: str, build: Callable[[], FactBase]) -> tuple[FactBase, Path]:
    """A base that is built once and kept in the cache folder (see `models.files.cache_folder`).

    Args:
        key: what the base is a function of: its name, versions, seeds.
        build: makes it.

    Returns:
        The base and its folder.

    Raises:
        ValueError: the kept one was changed.
        OSError: it cannot be written.
    """
    folder = cache_folder() / "workforce" / f"{key}-{hashlib.sha256(key.encode()).hexdigest()[:8]}"
    if not (folder / DIGEST).exists():
        try:
            write_base(build(), folder)
        except OSError:
            # Another process may have been faster, before this one began to write or while it did.
            if not (folder / DIGEST).exists():
                raise
    return read_base(folder), folder
