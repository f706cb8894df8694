"""SQL over CSV files: read-only, bounded, results bound and not written in."""

import time
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
    assert ask(worker, "SELECT country FROM countries") == Answer("more than 2 rows; ask for fewer", failed=True)
    assert ask(worker, "SELECT area FROM countries WHERE area < 0") == Answer("no row fits the query", failed=True)
    assert "at most 2000 are read" in ask(worker, "SELECT " + "1" * 2000).text


def test_what_is_no_table_is_refused_in_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="has no CSV file"):
        TablesWorker(tmp_path)
    (tmp_path / "a.csv").write_text("a,b\n1,2\n3\n")
    with pytest.raises(ValueError, match="has a row of 1 entries under 2 columns"):
        TablesWorker(tmp_path)
    (tmp_path / "a.csv").write_text("")
    with pytest.raises(ValueError, match="is empty"):
        TablesWorker(tmp_path)
