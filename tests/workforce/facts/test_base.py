"""Worlds of facts: the same from the same seed, written and read, kept and not changed behind one's back."""

import dataclasses
import shutil
from pathlib import Path

import pytest

from jaxrl_llm.workforce import FactBase
from jaxrl_llm.workforce import fictional_base
from jaxrl_llm.workforce import kept_base
from jaxrl_llm.workforce.facts import Table
from jaxrl_llm.workforce.facts import base as base_module
from jaxrl_llm.workforce.facts import read_base
from jaxrl_llm.workforce.facts import write_base
from jaxrl_llm.workforce.facts.readings import numbers_of
from jaxrl_llm.workforce.facts.readings import path_of


def test_a_world_is_a_function_of_its_seed() -> None:
    assert fictional_base(0) == fictional_base(0)
    digests = {fictional_base(0).digest, fictional_base(1).digest, fictional_base(0, size=8).digest}
    assert len(digests) == 3
    with pytest.raises(ValueError, match="size is 3; it must be at least 4"):
        fictional_base(0, size=3)


def test_every_relation_leads_on_and_no_two_things_share_a_name() -> None:
    base = fictional_base(0)
    titles = [base.title(fact) for fact in base.facts]
    assert len({*titles}) == len(titles)
    for relation in base.relations:
        assert len(base.subjects(relation.name)) == 24
        for fact in (fact for fact in base.facts if fact.relation == relation.name):
            onwards = [other for other in base.relations if other.subject == relation.value]
            assert all(base.value(other.name, fact.value) is not None for other in onwards)
    assert base.value("capital", "Nowhere") is None
    kinds = [{f.subject for f in base.facts if f.relation == name} for name in ("discoverer", "capital", "mayor")]
    assert sum(map(len, kinds)) == len(set.union(*kinds))


def test_readings_are_numbers_of_a_week() -> None:
    base = fictional_base(0)
    text = base.files[path_of(base.subjects("mayor")[0])]
    assert len(numbers_of(text)) == 7
    assert str(sum(numbers_of(text))) not in text


def test_a_world_is_written_and_read(tmp_path: Path) -> None:
    base = fictional_base(0, size=4)
    write_base(base, tmp_path / "world")
    assert read_base(tmp_path / "world") == base
    assert (tmp_path / "world" / "tables" / "countries.csv").read_text().startswith("country,region,area,population\n")
    assert len([*(tmp_path / "world" / "files" / "readings").iterdir()]) == 4
    with pytest.raises(FileExistsError, match="already exists"):
        write_base(base, tmp_path / "world")


def test_a_kept_world_is_built_once_and_one_that_was_changed_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("JAXRL_LLM_CACHE", str(tmp_path))
    base, folder = kept_base("small", lambda: fictional_base(0, size=4))
    assert folder.parent == tmp_path / "workforce"

    def again() -> None:
        raise AssertionError("it is built already")

    assert kept_base("small", again) == (base, folder)  # pyright: ignore[reportArgumentType]
    content = (folder / "base.json").read_text()
    (folder / "base.json").write_text(content.replace(base.facts[0].value, "Somebody", 1))
    with pytest.raises(ValueError, match="has another SHA-256 than when it was written; remove it"):
        kept_base("small", again)  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("path", ["tables/metals.csv", "files/readings/{}.txt", "tables/more.csv", "SHA256"])
def test_what_workers_read_is_what_was_written(tmp_path: Path, path: str) -> None:
    base, folder = fictional_base(0, size=4), tmp_path / "world"
    write_base(base, folder)
    changed = folder / path.format(base.subjects("mayor")[0])
    changed.write_text((changed.read_text() if changed.exists() else "") + "9\n")
    with pytest.raises(ValueError, match="than when it was written" if path == "SHA256" else "is not what was written"):
        read_base(folder)
    changed.unlink()
    if path != "tables/more.csv":
        with pytest.raises((ValueError, FileNotFoundError), match=r"is not what was written|has no SHA256"):
            read_base(folder)


def test_a_process_that_was_faster_is_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It finishes while this one builds, or while this one writes; a folder that is empty is no base."""
    monkeypatch.setenv("JAXRL_LLM_CACHE", str(tmp_path))
    base = fictional_base(0, size=4)

    def slow() -> FactBase:
        kept_base("small", lambda: base)
        return base

    assert kept_base("small", slow)[0] == base

    def while_writing(made: FactBase, where: Path) -> None:
        write_base(made, where)
        raise OSError(39, "Directory not empty")

    monkeypatch.setattr(base_module, "write_base", while_writing)
    found, folder = kept_base("late", lambda: base)
    assert found == base
    monkeypatch.undo()
    monkeypatch.setenv("JAXRL_LLM_CACHE", str(tmp_path))
    shutil.rmtree(folder)
    folder.mkdir()
    assert kept_base("late", lambda: base) == (base, folder)

    def full() -> FactBase:
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space left"):
        kept_base("never", full)


def test_names_share_no_part() -> None:
    """Of seed 312 a person and a currency did: Somplun and Sompluno."""
    base = fictional_base(312)
    names = {fact.subject for fact in base.facts} | {fact.value for fact in base.facts}
    low = sorted(name.lower() for name in names)
    assert [(one, other) for one in low for other in low if one != other and one in other] == []


def test_tables_are_looked_up_by_the_name_of_a_row() -> None:
    table = Table(("metal", "number"), (("Tin", 50), ("Iron", 26)))
    assert table.value("Iron", "number") == 26
    assert table.value("Gold", "number") is None
    assert dataclasses.replace(table, rows=()).value("Tin", "number") is None
