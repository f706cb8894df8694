"""camel-ai's Workforce, in an environment of its own, with our server and SmolLM2 in all of its roles.

camel pins pydantic and psutil, so it has a Python of its own (`make test-camel`) and only HTTP in common with this one.
"""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PYTHON = Path(os.environ.get("JAXRL_CAMEL_PYTHON", ROOT / ".venv-camel/bin/python"))
# Two to four minutes each of SmolLM2 on two cores, and more where these are shared.
pytestmark = [
    pytest.mark.skipif(not PYTHON.exists(), reason="camel-ai is not installed here; `make test-camel` does it"),
    pytest.mark.timeout(900),
]


@pytest.fixture(scope="module")
def address(tmp_path_factory) -> Iterator[str]:
    """`python -m jaxrl_llm.serving smollm2_135m` in a process of its own."""
    key = tmp_path_factory.mktemp("key") / "key"
    key.write_text("a-key\n")
    command = [sys.executable, "-m", "jaxrl_llm.serving", "smollm2_135m", "--port", "0", "--api-key-file", str(key)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels"), *sys.path])}
    command += ["--slots", "2", "--context", "4096"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT, env=environment)
    assert process.stdout is not None
    line = process.stdout.readline()
    assert line.startswith("smollm2_135m at http://127.0.0.1:"), line
    yield line.split(" at ")[1].split(",")[0]
    process.send_signal(signal.SIGINT)
    assert process.wait(60) in (0, -signal.SIGINT)


def team(address: str, kind: str, folder: Path) -> dict:
    """What the Workforce made of its task."""
    script = Path(__file__).with_name("workforce.py")
    command = [PYTHON, script, address, "a-key", "smollm2_135m", kind]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    run = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False, timeout=600)
    assert run.returncode == 0, run.stderr[-2000:]
    return json.loads(run.stdout.splitlines()[-1])


def test_a_task_is_decomposed_assigned_solved_and_finished(address, tmp_path):
    found = team(address, "held", tmp_path)
    assert found["state"] == "TaskState.DONE"
    assert (
        sorted(found["asked"])
        == ["Plan", "TaskAnalysisResult", "TaskAnalysisResult", "TaskAssignResult"] + ["TaskResult"] * 2
    )
    assert found["workers"] == 2
    assert found["result"].count("--- Subtask 0.") == 2


def test_a_coordinator_that_misbehaves_is_survived(address, tmp_path):
    """It names workers that there are not, twice, so that camel hires one; and a fault comes without a remedy."""
    found = team(address, "free", tmp_path)
    assert found["state"] == "TaskState.DONE"
    assert found["asked"].count("TaskAssignResult") >= 2
    assert "WorkerConf" in found["asked"]
    assert found["workers"] == 3
    assert found["asked"].count("TaskResult") == found["asked"].count("TaskAnalysisResult") >= 2
