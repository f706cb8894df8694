"""An output that is closed while something runs, and a study that is stopped: what is kept, and who is told."""

import io
import os
import shlex
import signal
import sys
from pathlib import Path

import numpy as np
import pytest

from experiments import output
from experiments.arguments import RunArguments
from experiments.run import go_on_command
from experiments.run_folder import RunFolder
from experiments.study import kept_parts
from experiments.study import read_results
from experiments.study import run_parts
from jaxrl_llm.training.run.interrupts import StopRequests


def test_a_pipe_without_a_reader_asks_to_stop_once_and_the_rest_goes_to_the_errors() -> None:
    reader, writer = os.pipe()
    instead = io.StringIO()
    with os.fdopen(writer, "w") as stream, StopRequests() as stop:
        guarded = output.Guarded(stream, instead)
        print("seen", file=guarded, flush=True)
        assert stop.requested is None
        assert os.read(reader, 100) == b"seen\n"
        os.close(reader)
        print("lost", file=guarded, flush=True)
        assert stop.requested == output.CLOSED
        print("the last sentence", file=guarded, flush=True)
        assert not guarded.isatty()
    assert instead.getvalue() == "the last sentence\n"


def test_what_the_encoding_cannot_say_is_written_as_an_escape() -> None:
    raw = io.BytesIO()
    guarded = output.Guarded(io.TextIOWrapper(raw, encoding="ascii"), io.StringIO())
    print("½ \ud800", file=guarded, flush=True)
    assert raw.getvalue() == b"\\xbd \\ud800\n"


def test_standard_output_comes_back() -> None:
    before = sys.stdout
    with output.guarded_output():
        assert sys.stdout is not before
    assert sys.stdout is before


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_a_study_that_is_stopped_keeps_its_finished_parts_and_says_which(tmp_path, number) -> None:
    run = RunFolder(tmp_path)
    computed = []

    def part(name):
        def compute():
            computed.append(name)
            if name == "second" and computed.count(name) == 1:
                os.kill(os.getpid(), number)
            return {"value": np.arange(3)}

        return compute

    parts = {name: part(name) for name in ("first", "second", "third")}
    assert str(run_parts(run, parts)).startswith(("SIG", "Ctrl-C"))
    assert computed == ["first", "second"]
    assert kept_parts(run, parts) == f"1 of 3 parts are kept in {tmp_path / 'parts'} (first)"
    assert run_parts(run, parts) is None
    assert computed == ["first", "second", "second", "third"]
    assert set(read_results(run)) == set(parts)


def test_the_command_to_go_on_is_what_a_shell_takes() -> None:
    arguments = RunArguments(settings=None, runs_folder=Path("my runs/$x"))
    command = go_on_command("from_scratch/an id's $name", arguments)
    assert shlex.split(command) == [
        *("python", "-m", "experiments", "run", "from_scratch", "--resume", "from_scratch/an id's $name"),
        *("--runs-folder", "my runs/$x"),
    ]
