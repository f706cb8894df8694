"""What is asked of the thing at the end of a chain, and how a team finds it out.

An ask has a phrase, a kind of thing that it fits, the capabilities that it needs beside those of the chain, an exact
answer from the base itself, and the steps of the oracle's plan. Answers never come from a worker.
"""

from collections.abc import Callable
from typing import NamedTuple

from jaxrl_llm.workforce.facts.base import FactBase
from jaxrl_llm.workforce.facts.readings import numbers_of
from jaxrl_llm.workforce.facts.readings import path_of
from jaxrl_llm.workforce.plans import Step
from jaxrl_llm.workforce.workers.wording import shown

FACTS, TABLES, FILES, CODE = "facts", "tables", "files", "code"
"""Capabilities; a worker has one."""
TOTALS: dict[str, Callable[[list[int]], int]] = {"sum": sum, "max": max, "min": min}
WORDS = {"sum": "sum", "max": "highest", "min": "lowest"}


class Ask(NamedTuple):
    """One kind of question about a thing.

    Attributes:
        name: of it; part of what is held out.
        kind: of thing that it fits.
        capabilities: that it needs beside the chain's.
        phrase: of the question, with {} for the thing.
        answer: from the base and the thing; None where there is none.
        steps: of the plan. Their first argument is how the thing is written (its name, or #n), the second the numbers
            that such a step comes after, the third the number of the next step.
    """

    name: str
    kind: str
    capabilities: frozenset[str]
    phrase: str
    answer: Callable[[FactBase, str], str | None]
    steps: Callable[[str, tuple[int, ...], int], list[Step]]


def asks(base: FactBase) -> list[Ask]:
    """Every ask that a base allows."""
    found = []
    for table, content in base.tables.items():
        kind, columns = content.columns[0], content.columns
        for column in columns[1:]:
            if not isinstance(content.rows[0][columns.index(column)], str):
                found.append(_column(table, kind, column))
        if "region" in columns:
            found.append(_count(table, kind))
            found.append(_exceeds(table, kind, columns[-1]))
    if any(relation.value == "city" for relation in base.relations):
        found += [_readings(), *map(_total, TOTALS)]
        if "countries" in base.tables:
            found += [_more(total, "countries", "country", "area") for total in TOTALS]
    return found


def _entry(table: str, column: str) -> Callable[[FactBase, str], str | None]:
    def answer(base: FactBase, thing: str) -> str | None:
        value = base.tables[table].value(thing, column)
        return None if value is None else shown(value)

    return answer


def _select(table: str, kind: str, column: str, thing: str, after: tuple[int, ...]) -> Step:
    # A result is bound, so it needs no quotes; a name that the question gives is written as SQL writes texts.
    value = thing if after else "'" + thing.replace("'", "''") + "'"
    return Step(f"SELECT {column} FROM {table} WHERE {kind} = {value}", after)


def _column(table: str, kind: str, column: str) -> Ask:
    return Ask(
        f"{table} {column}", kind, frozenset({TABLES}), f"In the table {table}, what is the {column} of {{}}?",
        _entry(table, column), lambda thing, after, _: [_select(table, kind, column, thing, after)],
    )  # fmt: skip


def _count(table: str, kind: str) -> Ask:
    def answer(base: FactBase, region: str) -> str | None:
        content = base.tables[table]
        count = sum(row[content.columns.index("region")] == region for row in content.rows)
        return str(count) if count else None

    return Ask(
        f"{table} count", "region", frozenset({TABLES}),
        f"In the table {table}, how many rows have {{}} as their region?", answer,
        lambda thing, after, _: [_select(table, "region", "COUNT(*)", thing, after)],
    )  # fmt: skip


def _exceeds(table: str, kind: str, column: str) -> Ask:
    """Two queries, the second of which needs nothing of the first, and a difference."""
    largest = f"SELECT MAX({column}) FROM {table}"

    def answer(base: FactBase, thing: str) -> str | None:
        content = base.tables[table]
        own = _entry(table, column)(base, thing)
        values = [int(row[content.columns.index(column)]) for row in content.rows]
        return None if own is None else str(max(values) - int(own))

    def steps(thing: str, after: tuple[int, ...], number: int) -> list[Step]:
        difference = Step(f"compute int(#{number + 1}) - int(#{number})", (number, number + 1))
        return [_select(table, kind, column, thing, after), Step(largest), difference]

    phrase = f"In the table {table}, by how much does the largest {column} exceed the {column} of {{}}?"
    return Ask(f"{table} exceeds", kind, frozenset({TABLES, CODE}), phrase, answer, steps)


def _numbers(base: FactBase, city: str) -> list[int] | None:
    text = base.files.get(path_of(city))
    return None if text is None else numbers_of(text)


def _read(thing: str, after: tuple[int, ...]) -> Step:
    return Step(f"numbers in {path_of(thing)}", after)


def _readings() -> Ask:
    def answer(base: FactBase, city: str) -> str | None:
        found = _numbers(base, city)
        return None if found is None else ", ".join(map(str, found))

    return Ask(
        "readings", "city", frozenset({FILES}), "What are the readings of the gauge in {}, in their order?",
        answer, lambda thing, after, _: [_read(thing, after)],
    )  # fmt: skip


def _total(total: str) -> Ask:
    def answer(base: FactBase, city: str) -> str | None:
        found = _numbers(base, city)
        return None if found is None else str(TOTALS[total](found))

    return Ask(
        f"readings {total}", "city", frozenset({FILES, CODE}),
        f"What is the {WORDS[total]} of the readings of the gauge in {{}}?", answer,
        lambda thing, after, number: [_read(thing, after), Step(f"compute {total}(numbers(#{number}))", (number,))],
    )  # fmt: skip


def _more(total: str, table: str, kind: str, column: str) -> Ask:
    """Of a country: the total of its capital's readings, and what the table says of the country itself."""

    def answer(base: FactBase, country: str) -> str | None:
        capital, own = base.value("capital", country), _entry(table, column)(base, country)
        found = None if capital is None else _numbers(base, capital)
        return None if found is None or own is None else shown(TOTALS[total](found) + float(own))

    def steps(thing: str, after: tuple[int, ...], number: int) -> list[Step]:
        return [
            Step(f"capital of {thing}", after),
            _select(table, kind, column, thing, after),
            Step(f"numbers in {path_of(f'#{number}')}", (number,)),
            Step(f"compute {total}(numbers(#{number + 2})) + sum(numbers(#{number + 1}))", (number + 1, number + 2)),
        ]

    phrase = (
        f"What is the {WORDS[total]} of the readings of the gauge in the capital of {{}}, plus its {column} in the "
        f"table {table}?"
    )
    return Ask(f"{table} plus {total}", kind, frozenset({FACTS, TABLES, FILES, CODE}), phrase, answer, steps)
