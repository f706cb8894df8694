"""Files of a run that somebody edited: whatever reads them ends with a sentence, or with what it was asked for."""

import json
import os
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from synthetic_run import write_synthetic_run

from experiments.cli import main
from experiments.run_folder import UserError
from experiments.run_folder import new_folder
from experiments.run_folder import read_rows

EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES", "25"))
FILES = ("config.json", "environment.json", "samples.json", "summary.json", "metrics.jsonl", "timings.jsonl")
VALUES: tuple[Any, ...] = (
    *(None, True, -1, 0, 10**400, 0.5, float("nan"), float("inf"), "", "\ud800", "text", [], [1], [[]], {}),
    *({"a": 1}, ["\ud800"], 2**63, "a" * 1000),
)
WHOLE = (b"", b"\xff\xfe\x00", b"null", b"[]", b"{}", b"{", b'{"a": NaN}', b"[" * 5000, b"\x00", b"\xef\xbb\xbf{}")


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The way to each part of a JSON value; of long lists, the first two members and the last."""
    found = [path]
    if isinstance(value, dict):
        for name, item in value.items():
            found += places(item, (*path, name))
    elif isinstance(value, list):
        for index in sorted({0, 1, len(value) - 1} & set(range(len(value)))):
            found += places(value[index], (*path, index))
    return found


def changed(value: Any, path: tuple[Any, ...], new: Any, *, remove: bool) -> Any:
    """The value with another one at that place, or with none."""
    if not path:
        return new
    copy = list(value) if isinstance(value, list) else dict(value)
    if len(path) == 1 and remove:
        del copy[path[0]]
    else:
        copy[path[0]] = changed(value[path[0]], path[1:], new, remove=remove)
    return copy


@st.composite
def edits(draw: st.DrawFn) -> tuple[str, Callable[[bytes], bytes]]:
    """A file, and what is done to it."""
    name = draw(st.sampled_from(FILES))
    kind = draw(st.sampled_from(("whole", "half", "value", "value", "value", "remove", "remove")))
    seed, new = draw(st.integers(0, 10**6)), draw(st.sampled_from(VALUES))

    def edit(content: bytes) -> bytes:
        if kind == "whole":
            return WHOLE[seed % len(WHOLE)]
        if kind == "half":
            return content[: seed % len(content)]
        lines = content.splitlines() if name.endswith("l") else [content]
        number = seed % len(lines)
        value = json.loads(lines[number])
        ways = places(value)[kind == "remove" :]
        way = ways[seed % len(ways)]
        lines[number] = json.dumps(changed(value, way, new, remove=kind == "remove")).encode()
        return b"\n".join(lines) + b"\n"

    return name, edit


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    runs = tmp_path_factory.mktemp("edited") / "runs"
    for name in ("first", "second"):
        run = write_synthetic_run(runs / "smollm2_arithmetic" / name, steps=3)
        config = json.loads(run.config.read_text())
        run.config.write_text(json.dumps(config | {"tiny": False}))
    return runs


COMMANDS = (
    ["list", "runs"],
    ["report", "smollm2_arithmetic/first"],
    ["compare", "smollm2_arithmetic/first", "smollm2_arithmetic/second"],
    ["show", "smollm2_arithmetic/first"],
    ["run", "smollm2_arithmetic", "--dry-run", "--resume", "smollm2_arithmetic/first"],
)


@hypothesis_settings(
    max_examples=EXAMPLES,
    deadline=None,
    derandomize="FUZZ_EXAMPLES" not in os.environ,
    database=None,
    suppress_health_check=list(HealthCheck),
)
@given(edit=edits(), command=st.sampled_from(COMMANDS))
def test_every_edited_file_ends_in_a_sentence(written: Path, tmp_path_factory, capfd, edit, command) -> None:
    runs = tmp_path_factory.mktemp("copy") / "runs"
    shutil.copytree(written, runs)
    name, change = edit
    path = runs / "smollm2_arithmetic" / "first" / name
    path.write_bytes(change(path.read_bytes()))
    try:
        status = main([*command, "--runs-folder", str(runs)])
    except SystemExit as stopped:  # tyro's own sentence
        status = stopped.code
    output = capfd.readouterr()
    shutil.rmtree(runs.parent)
    assert status in (0, 2)
    assert "Traceback" not in output.out + output.err
    if status == 2:
        assert output.err.count("error: ") + output.err.count("For full helptext") == 1, output.err


def test_of_many_that_ask_for_a_new_folder_each_gets_its_own(tmp_path: Path) -> None:
    with ThreadPoolExecutor(20) as pool:
        made = list(pool.map(lambda _: new_folder(tmp_path / "runs"), range(20)))
    assert len(set(made)) == 20
    assert all(path.is_dir() for path in made)


@pytest.mark.parametrize("line", [b"[]", b"{}", b'{"step": "1"}', b'{"step": -1}', b'{"step": true}', b"\xff", b"{"])
def test_a_line_that_is_no_row_is_named(tmp_path: Path, line: bytes) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 0}\n' + line + b'\n{"step": 2}\n')
    with pytest.raises(UserError, match=r"^Line 2 of .*metrics\.jsonl is (not JSON|damaged): "):
        read_rows(path)


@pytest.mark.parametrize("steps", [(2, 1), (0, 1, 1), (0, 1, 2, 0), (3, 3)])
def test_steps_that_do_not_grow_are_named(tmp_path: Path, steps: tuple[int, ...]) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps({"step": step}) + "\n" for step in steps))
    with pytest.raises(UserError, match=rf"^Line {len(steps)} of .* is damaged: step {steps[-1]} comes after step "):
        read_rows(path)


def test_what_can_be_computed_again_is(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = runs / "from_scratch" / "first"
    before = {name: json.loads((run / name).read_text()) for name in ("summary.json", "samples.json")}
    (run / "summary.json").write_text('{"accuracy_before": []}')
    (run / "environment.json").write_text("[]")
    (run / "samples.json").write_bytes(b"\xff")
    assert main(["run", "from_scratch", "--resume", "first", "--runs-folder", str(runs)]) == 0
    said = capsys.readouterr().out
    for sentence in ("summary.json is damaged", "environment.json is damaged", "The answers before training are given"):
        assert sentence in said
    assert {name: json.loads((run / name).read_text()) for name in before} == before
    assert json.loads((run / "environment.json").read_text())["device"]


@pytest.mark.parametrize("name", [*FILES, "episodes", "checkpoints", "model.json", "evaluation-a.json"])
def test_a_pipe_in_the_place_of_a_file_is_a_sentence(
    written: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], name: str
) -> None:
    runs = Path(shutil.copytree(written, tmp_path / "runs"))
    path = runs / "smollm2_arithmetic" / "first" / name
    path.unlink(missing_ok=True)
    os.mkfifo(path)
    for command in COMMANDS:
        try:
            status = main([*command, "--runs-folder", str(runs)])
        except SystemExit as stopped:
            status = stopped.code
        output = capfd.readouterr()
        assert status in (0, 2), command
        assert "Traceback" not in output.out + output.err


@pytest.mark.parametrize("folder", ["run.lock", "summary.json", "config.json", "metrics.jsonl", "checkpoints/999999"])
def test_a_folder_in_the_place_of_a_file_is_a_sentence(
    runs: Path, capsys: pytest.CaptureFixture[str], folder: str
) -> None:
    path = runs / "from_scratch" / "first" / folder
    path.unlink(missing_ok=True)
    path.mkdir()
    status = main(["run", "from_scratch", "--resume", "from_scratch/first", "--runs-folder", str(runs)])
    assert status in (0, 2)
    assert status == 0 or capsys.readouterr().err.startswith("error: ")
