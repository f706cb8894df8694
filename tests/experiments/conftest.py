"""One tiny run, made once; tests that change a run copy it."""

import shutil
import sys
from pathlib import Path

import pytest

from experiments.cli import main

# So that the tests of this folder find their shared writer of synthetic files.
sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture(scope="session")
def finished_runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A runs folder with the finished run from_scratch/first."""
    runs = tmp_path_factory.mktemp("runs")
    assert main(["run", "from_scratch", "--tiny", "--id", "first", "--runs-folder", str(runs)]) == 0
    return runs


@pytest.fixture
def runs(finished_runs: Path, tmp_path: Path) -> Path:
    """A copy of it that a test may change."""
    return Path(shutil.copytree(finished_runs, tmp_path / "runs"))
