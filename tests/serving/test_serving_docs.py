"""The examples of README.md and docs/serving.md, run as they stand there against a small server."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.serving.conftest import KEY

ROOT = Path(__file__).parents[2]
SECTIONS = {"README.md": "## Serve what you trained", "docs/serving.md": "## Clients"}


@pytest.mark.parametrize("page", SECTIONS)
def test_the_example_runs(page, address, tmp_path):
    section = (ROOT / page).read_text(encoding="utf-8").split(SECTIONS[page])[1].split("\n## ")[0]
    (code,) = re.findall(r"```python\n(.*?)```", section, re.DOTALL)
    code = code.replace("http://127.0.0.1:8000", address).replace('"mine"', '"tiny"')
    (tmp_path / "key.txt").write_text(KEY + "\n")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.strip()
