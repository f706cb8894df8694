"""SQL over CSV files: read-only, bounded, results bound and not written in."""

import time
import tracemalloc
from pathlib import Path

import pytest

from jaxrl_llm.workforce import Answer
from jaxrl_llm.workforce import Assignment
from jaxrl_llm.workforce import TablesWorker


@pytest.fixture(scope="module")
def worker(tmp_path_factory: pytest.TempPathFactory) -> TablesWorker:
    folder = tmp_path_factory.mktemp("tables")
    (folder / "countries.csv").write_text("country,area,density\nFrance,640,1.5\nPeru,1285,2\nO'Higgins,7,0.25\n")
    return TablesWorker(folder, seconds=0.5, rows=2)


def ask(worker: TablesWorker, text: str, **results: str) -> Answer:
    return worker.work(Assignment("", text, {int(name[1:]): value for name, value in results.items()}))


def test_queries_are_answered_as_people_write_numbers(worker: TablesWorker) -> None:
    assert ask(worker, "SELECT area FROM countries WHERE country = 'Peru'") == Answer("1285")
    assert ask(worker, "SELECT density FROM countries WHERE area > 100 ORDER BY area") == Answer("1.5, 2")
    assert ask(worker, "SELECT country, area FROM countries WHERE area < 700 ORDER BY area") == Answer(
        "O'Higgins, 7; France, 640"
    )
    assert ask(worker, "SELECT NULL") == Answer("nothing")
    assert "countries(country, area, density)" in worker.card.description


def test_results_are_bound_and_never_become_sql(worker: TablesWorker) -> None:
    assert ask(worker, "SELECT area FROM countries WHERE country = #1", r1="O'Higgins") == Answer("7")
    assert ask(worker, "SELECT area FROM countries WHERE country = #1", r1="' OR 1=1 --").failed
    # A text that is a number is compared as one with a column of numbers.
    assert ask(worker, "SELECT country FROM countries WHERE area > #2", r2="1000") == Answer("Peru")
    assert "no such column" in ask(worker, "SELECT capital FROM countries WHERE country = #1", r1="Peru").text


@pytest.mark.parametrize(
    "query",
    [
        "DELETE FROM countries",
        "INSERT INTO countries VALUES ('x', 1, 1)",
        "UPDATE countries SET area = 0",
        "DROP TABLE countries",
        "CREATE TABLE x (y)",
        "ATTACH DATABASE '/tmp/workforce-test.db' AS other",
        "PRAGMA writable_schema = 1",
        "VACUUM INTO '/tmp/workforce-test.db'",
        "SELECT load_extension('x')",
        "SELECT 1; DELETE FROM countries",
        "BEGIN",
        "not SQL",
        "",
    ],
)
def test_everything_but_reading_is_refused(worker: TablesWorker, query: str) -> None:
    assert ask(worker, query).failed
    assert not Path("/tmp/workforce-test.db").exists()
    assert ask(worker, "SELECT COUNT(*) FROM countries") == Answer("3")


def test_a_query_without_end_is_stopped_and_one_that_grows_is_refused(worker: TablesWorker) -> None:
    began = time.monotonic()
    endless = "WITH RECURSIVE n(x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM n) SELECT COUNT(*) FROM n"
    assert ask(worker, endless) == Answer("the query failed: longer than 0.5 s", failed=True)
    assert time.monotonic() - began < 5
    assert "too big" in ask(worker, "SELECT zeroblob(1000000000)").text
    assert "too big" in ask(worker, "SELECT hex(zeroblob(9000))").text
    assert "too complex" in ask(worker, f"SELECT area FROM countries WHERE country LIKE '{'%a' * 30}'").text
    assert ask(worker, "SELECT country FROM countries") == Answer(
        "the query failed: more than 2 rows; ask for fewer", failed=True
    )
    assert ask(worker, "SELECT area FROM countries WHERE area < 0") == Answer("no row fits the query", failed=True)
    assert "at most 2000 are read" in ask(worker, "SELECT " + "1" * 2000).text


def test_an_answer_is_bounded_before_it_is_in_memory(tmp_path: Path) -> None:
    """Large values in many columns and rows: neither its memory nor its time is beyond what is allowed."""
    (tmp_path / "a.csv").write_text("a\n1\n")
    worker = TablesWorker(tmp_path, seconds=0.5)
    many = "WITH RECURSIVE n(x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM n WHERE x < 99) SELECT {} FROM n"
    tracemalloc.start()
    try:
        assert "too many columns" in ask(worker, many.format(", ".join(["zeroblob(9999)"] * 60))).text
        assert "a value is a blob" in ask(worker, many.format(", ".join(["zeroblob(9999)"] * 20))).text
        text = "printf('%9999s', x)"
        assert "more than 100000 characters" in ask(worker, many.format(", ".join([text] * 20))).text
        assert tracemalloc.get_traced_memory()[1] < 2_000_000
    finally:
        tracemalloc.stop()
    assert ask(worker, many.format("x")).text.startswith("1, 2, 3, ")


def test_a_table_may_have_more_columns_than_an_answer(tmp_path: Path) -> None:
    names = [f"c{number}" for number in range(30)]
    (tmp_path / "a.csv").write_text(",".join(names) + "\n" + ",".join("7" * 30) + "\n")
    assert ask(TablesWorker(tmp_path), "SELECT c29 FROM a") == Answer("7")


def test_a_result_within_quotes_is_refused(worker: TablesWorker) -> None:
    for text in ("SELECT area FROM countries WHERE country = '#1'", 'SELECT "#1"', "SELECT 'a''b #1'"):
        assert "no result is put within quotes, as in " in ask(worker, text, r1="Peru").text
    between = "SELECT area FROM countries WHERE country IN ('France', #1, 'x') AND area > 700"
    assert ask(worker, between, r1="Peru") == Answer("1285")


def test_numbers_are_those_that_sql_keeps_and_the_rest_are_texts(tmp_path: Path) -> None:
    columns = {
        "whole": "12", "negative": "-3", "real": "2.50", "zero": "0", "most": "9" * 18,
        "long": "9" * 20, "huge": "9" * 400, "code": "007", "grouped": "1_0", "power": "1e5", "blank": " 1",
    }  # fmt: skip
    # The mark of UTF-8 in front is no part of the first name.
    (tmp_path / "a.csv").write_text(",".join(columns) + "\n" + ",".join(columns.values()) + "\n", encoding="utf-8-sig")
    worker = TablesWorker(tmp_path)
    for column, entry in columns.items():
        kind = {"real": "real"}.get(column, "integer" if column in ("whole", "negative", "zero", "most") else "text")
        assert ask(worker, f"SELECT typeof({column}) FROM a") == Answer(kind), column
        assert ask(worker, f"SELECT {column} FROM a") == Answer("2.5" if column == "real" else entry)


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"a,a\n1,2\n", "a.csv cannot be a table of SQL: duplicate column name: a"),
        (b"a,A\n1,2\n", "a.csv cannot be a table of SQL: duplicate column name: A"),
        (b"a\n\xff\n", "a.csv cannot be read: .* expected a CSV file in UTF-8"),
        (b"a\n" + b"x" * 200_000, "a.csv cannot be read: field larger"),
    ],
)
def test_a_file_that_sql_does_not_take_is_refused_in_a_sentence(tmp_path: Path, content: bytes, sentence: str) -> None:
    (tmp_path / "a.csv").write_bytes(content)
    with pytest.raises(ValueError, match=sentence) as refused:
        TablesWorker(tmp_path)
    assert type(refused.value) is ValueError


def test_what_is_no_table_is_refused_in_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="has no CSV file"):
        TablesWorker(tmp_path)
    (tmp_path / "a.csv").write_text("a,b\n1,2\n3\n")
    with pytest.raises(ValueError, match="has a row of 1 entries under 2 columns"):
        TablesWorker(tmp_path)
    (tmp_path / "a.csv").write_text("")
    with pytest.raises(ValueError, match="is empty"):
        TablesWorker(tmp_path)
