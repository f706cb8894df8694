"""The example of docs/training.md runs, and what its table names exists."""

import re
from pathlib import Path

import pytest

from jaxrl_llm.rollouts import constrained

PAGE = (Path(__file__).parents[3] / "docs" / "training.md").read_text()
SECTION = PAGE.split("## Texts in a grammar\n")[1].split("\n## ")[0]


def test_the_example_runs(capsys: pytest.CaptureFixture[str]) -> None:
    (example,) = re.findall(r"```python\n(.*?)```", SECTION, re.DOTALL)
    exec(example, {})
    texts, log_prob = capsys.readouterr().out.splitlines()
    assert re.fullmatch(r"\[(\{'worker': '(files|facts)'\}(, )?){4}\]", texts)
    assert float(log_prob) < 0


def test_what_the_table_names_exists() -> None:
    named = re.findall(r"`(\w+)`", "".join(row.split("|")[1] for row in re.findall(r"^\|.*$", SECTION, re.MULTILINE)))
    assert len(named) == 6
    assert all(hasattr(constrained, name) for name in named)
    grammars = re.findall(r"from_\w+(?=`[,.])", SECTION)
    assert len({*grammars}) == 4
    assert all(hasattr(constrained.Grammar, name) for name in grammars)
