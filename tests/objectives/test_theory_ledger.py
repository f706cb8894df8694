"""docs/theory.md names every public function of objectives and bounds, and everything that it names exists."""

import importlib
import inspect
import pkgutil
import re
from pathlib import Path

import pytest

import jaxrl_llm.bounds
import jaxrl_llm.objectives
from theory_checks.registry import all_checks

ROOT = Path(__file__).parents[2]
COLUMNS = ("id", "statement", "function", "check", "test", "experiment", "notebook")


def ledger():
    rows = []
    for line in (ROOT / "docs/theory.md").read_text().splitlines():
        cells = [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
        if line.startswith("| ") and len(cells) == len(COLUMNS) and cells[0] != "id":
            rows.append(dict(zip(COLUMNS, cells, strict=True)))
    return rows


def quoted(text):
    return re.findall(r"`([^`]+)`", text)


def public_functions():
    names = set()
    for package in (jaxrl_llm.objectives, jaxrl_llm.bounds):
        for module in pkgutil.iter_modules(package.__path__):
            loaded = importlib.import_module(f"{package.__name__}.{module.name}")
            for name, value in vars(loaded).items():
                if inspect.isroutine(value) and value.__module__ == loaded.__name__ and not name.startswith("_"):
                    names.add(f"{loaded.__name__.removeprefix('jaxrl_llm.')}.{name}")
    return names


def test_exists(name):
    path, _, function = name.partition("::")
    source = (ROOT / path).read_text()
    return not function or re.search(rf"def {function}\(", source) is not None


test_exists.__test__ = False


def test_every_public_function_is_in_the_ledger_and_nothing_else():
    named = {name for row in ledger() for name in quoted(row["function"])}
    assert named == public_functions()


def test_ids_are_unique_and_no_cell_is_empty():
    rows = ledger()
    assert len(rows) > 80
    assert len({row["id"] for row in rows}) == len(rows)
    assert all(cell for row in rows for cell in row.values())


def test_every_named_test_exists():
    missing = [name for row in ledger() for name in quoted(row["test"]) if not test_exists(name)]
    assert not missing
    assert all(quoted(row["test"]) for row in ledger())


def test_every_named_check_experiment_and_notebook_exists():
    checks = {check.name for check in all_checks()}
    for row in ledger():
        assert set(quoted(row["check"])) <= checks, row["id"]
        for name in quoted(row["experiment"]):
            assert (ROOT / "experiments" / f"{name}.py").exists(), row["id"]
        for name in quoted(row["notebook"]):
            assert (ROOT / "notebooks" / name).exists(), row["id"]


@pytest.mark.parametrize("document", ["errata.md", "theory.md"])
def test_every_test_and_function_that_a_document_names_exists(document):
    text = (ROOT / "docs" / document).read_text()
    for name in quoted(text):
        if "::" in name:
            assert test_exists(name), name
        elif re.fullmatch(r"(objectives|bounds)\.\w+\.\w+", name):
            package, module, attribute = name.split(".")
            assert hasattr(importlib.import_module(f"jaxrl_llm.{package}.{module}"), attribute), name


def test_every_erratum_that_the_code_cites_exists_and_is_tested():
    text = (ROOT / "docs/errata.md").read_text()
    entries = dict(re.findall(r"\*\*([FP][\d.]+) .*?\n(.*?)(?=\n\n)", text + "\n\n", flags=re.DOTALL))
    sources = [*(ROOT / "jaxrl_llm").rglob("*.py"), *(ROOT / "tests").rglob("*.py")]
    cited = {label for path in sources for label in re.findall(r"errata ([FP]\d+(?:\.\d+)?)", path.read_text())}
    assert cited <= set(entries)
    assert all("Test:" in body for body in entries.values())


def test_a_missing_row_would_be_noticed():
    assert "bounds.inputs.not_there" not in public_functions()
    assert not test_exists("tests/objectives/test_theory_ledger.py::test_that_is_not_there")
