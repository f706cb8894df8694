"""The example of docs/workforce.md runs, is as long as it says, and its page names things that exist."""

import re
from pathlib import Path

import pytest

import jaxrl_llm.workforce

PAGE = (Path(__file__).parents[2] / "docs" / "workforce.md").read_text()


def test_the_example_runs(capsys: pytest.CaptureFixture[str]) -> None:
    (example,) = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    assert len([line for line in example.splitlines() if line]) <= 20
    exec(example, {})
    assert capsys.readouterr().out.startswith("[1.0, 1.0, 1.0, 1.0] [")


def test_every_class_of_the_page_exists() -> None:
    named = {name for name in re.findall(r"`([A-Z]\w+)", PAGE) if name[1].islower()}
    assert {name for name in named if not hasattr(jaxrl_llm.workforce, name)} == set()
