"""The examples of the README are run as they stand there, at tiny size."""

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from experiments.cli import main

ROOT = Path(__file__).parents[2]
TITLE = "## Train with your own loss, task, data, engine\n"


def blocks() -> list[tuple[str, str]]:
    """(language, text) of the code blocks of that section."""
    section = (ROOT / "README.md").read_text(encoding="utf-8").split(TITLE)[1].split("\n## ")[0]
    return re.findall(r"```(\w*)\n(.*?)```", section, flags=re.DOTALL)


MINE, DATA, COMMANDS, PYTHON = (text for _, text in blocks())
PROGRAM = ".venv/bin/python -m experiments "


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `mine.py` and `twice.jsonl`."""
    folder = tmp_path_factory.mktemp("readme")
    (folder / "mine.py").write_text(MINE)
    (folder / "twice.jsonl").write_text(DATA)
    return folder


def test_the_section_has_these_blocks() -> None:
    assert [language for language, _ in blocks()] == ["python", "json", "", "python"]
    assert len(COMMANDS.splitlines()) == 4
    assert all(line.startswith(PROGRAM) for line in COMMANDS.splitlines())


@pytest.mark.parametrize("line", COMMANDS.splitlines(), ids=["loss", "task", "data", "engine"])
def test_a_command_trains(line: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    monkeypatch.syspath_prepend(str(folder))
    # Other tests of the same process have a module of that name too.
    monkeypatch.delitem(sys.modules, "mine", raising=False)
    words = shlex.split(line.removeprefix(PROGRAM))
    name = str(COMMANDS.splitlines().index(line))
    assert main([*words, "--tiny", "--runs-folder", "runs", "--id", name]) == 0
    rows = [json.loads(row) for row in (folder / "runs/from_scratch" / name / "metrics.jsonl").read_text().splitlines()]
    assert rows[-1]["step"] == 3
    assert (folder / "runs/from_scratch" / name / "report.html").exists()


def test_python_trains(folder: Path) -> None:
    (folder / "train.py").write_text(PYTHON)
    done = subprocess.run([sys.executable, "train.py"], cwd=folder, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
    for name in ("reinforced", "imitated"):
        assert len((folder / "runs/mine" / name / "metrics.jsonl").read_text().splitlines()) == 3
