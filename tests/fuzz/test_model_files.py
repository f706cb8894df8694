"""A few cases of the fuzz of model files, and that it sees the faults it is for."""

import time
from pathlib import Path

import pytest

from jaxrl_llm.models.files import ModelFileError
from tests.fuzz import model_files
from tests.fuzz.model_files import load
from tests.fuzz.model_files import make_sources
from tests.fuzz.model_files import run_case


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JAXRL_LLM_CACHE", str(tmp_path_factory.mktemp("cache")))
        return make_sources(tmp_path_factory.mktemp("sources"))


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JAXRL_LLM_CACHE", str(tmp_path / "cache"))


def test_sources_are_sound(sources: dict[str, Path]) -> None:
    assert {name: load(path) for name, path in sources.items()} == dict.fromkeys(sources, "loaded")


def test_damaged_files_load_or_end_in_a_sentence(sources: dict[str, Path], tmp_path: Path) -> None:
    found = [run_case(sources, tmp_path, 1, case) for case in range(60)]
    assert not [line for line in found if line.startswith("FAULT")]
    assert found.count("refused") > 20


def test_a_case_is_the_same_again(sources: dict[str, Path], tmp_path: Path) -> None:
    assert [run_case(sources, tmp_path, 2, case) for case in range(6)] == [
        run_case(sources, tmp_path, 2, case) for case in range(6)
    ]


def _raises(path: Path) -> None:
    raise TypeError("of another kind")


def _no_sentence(path: Path) -> None:
    raise ModelFileError("one, two " * 500)


def _sleeps(path: Path) -> None:
    time.sleep(3)


@pytest.mark.parametrize("reader", [_raises, _no_sentence, _sleeps])
def test_faults_are_seen(reader, sources: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model_files, "load_pretrained", reader)
    monkeypatch.setattr(model_files, "SECONDS", 0.2)
    assert run_case(sources, tmp_path, 0, 0).startswith("FAULT")
