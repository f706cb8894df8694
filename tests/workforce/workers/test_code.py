"""Arithmetic without running anything; the sandbox's command line and filter, as far as no sandbox is needed."""

import importlib
import json
import platform
import subprocess
import sys
import time
from pathlib import Path

import pytest

from jaxrl_llm.workforce import Answer
from jaxrl_llm.workforce import ArithmeticWorker
from jaxrl_llm.workforce import Assignment
from jaxrl_llm.workforce import CodeLimits
from jaxrl_llm.workforce import Sandbox
from jaxrl_llm.workforce import SandboxError
from jaxrl_llm.workforce.workers.sandbox import BOOT
from jaxrl_llm.workforce.workers.sandbox import bwrap_command
from jaxrl_llm.workforce.workers.seccomp import ALLOW
from jaxrl_llm.workforce.workers.seccomp import DENY
from jaxrl_llm.workforce.workers.seccomp import KILL
from jaxrl_llm.workforce.workers.seccomp import MACHINES
from jaxrl_llm.workforce.workers.seccomp import OTHER_ABI
from jaxrl_llm.workforce.workers.seccomp import decide
from jaxrl_llm.workforce.workers.seccomp import filter_program


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("compute 2 * (3 + 4) - -1", "15"),
        ("compute 7 / 2", "3.5"),
        ("compute 8 / 2", "4"),
        ("compute 7 // 2 + 7 % 2", "4"),
        ("compute sum(numbers(#1))", "9.5"),
        ("compute max(numbers(#1)) - min(numbers(#1))", "8"),
        ("compute len(numbers(#1)) * int(#2)", "36"),
        ("compute max([1, abs(-5), 2])", "5"),
        ("compute 1 / 100000", "0.00001"),
        ("compute sum(numbers('1e-05 and .5'))", "0.50001"),
    ],
)
def test_arithmetic(text: str, value: str) -> None:
    answer = ArithmeticWorker().work(Assignment("", text, {1: "7, 3.5, -1, room B12", 2: "12"}))
    assert answer == Answer(value)


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("__import__('os').system('true')", "is no arithmetic"),
        ("(1).__class__", "is no arithmetic"),
        ("len('#1')", "no result is put within quotes, as in '#1'"),
        ("open('/etc/passwd')", "is no arithmetic"),
        ("[x for x in [1]]", "is no arithmetic"),
        ("2 ** 10", "is no arithmetic"),
        ("sum(numbers(#7))", "cannot be read"),  # no such result: a comment, and a bracket that is never closed
        ("'a' * 3", "a str is no number"),
        ("1 / 0", "division by zero"),
        ("1e30 * 10", "beyond"),
        ("1e999", "beyond"),
        ("max([])", "empty"),
        ("int('x')", "invalid literal"),
        ("sum('ab')", "unsupported operand"),
        ("numbers(3)", "numbers takes a text"),
        ("(" * 500 + "1" + ")" * 500, "cannot be read"),
        ("1 +", "cannot be read"),
        ("1" * 3000, "at most 2000 are read"),
        ("sum([1], start=3)", "is no arithmetic"),
    ],
)
def test_what_is_no_arithmetic_is_refused_in_a_sentence(text: str, why: str) -> None:
    answer = ArithmeticWorker().work(Assignment("", f"compute {text}", {1: "2"}))
    assert answer.failed
    assert why in answer.text


def command(**changes: object) -> list[str]:
    settings = {"links": {"/lib": "usr/lib"}, "folders": ["/lib64"], "filter_number": 9, **changes}
    return bwrap_command("/usr/bin/bwrap", "/opt/py/bin/python3", "/opt/py", **settings)  # pyright: ignore


def test_the_command_line_shows_the_interpreter_read_only_and_nothing_else() -> None:
    line = command()
    text = " ".join(line)
    for part in (
        "--unshare-all", "--die-with-parent", "--new-session", "--clearenv", "--cap-drop ALL", "--uid 65534",
        "--gid 65534", "--symlink usr/lib /lib", "--remount-ro /", "--seccomp 9", "/opt/py/bin/python3 -I -S -B -u -c",
    ):  # fmt: skip
        assert f" {part}" in text
    shown = [line[place + 1] for place, part in enumerate(line) if part.startswith("--ro-bind")]
    assert shown == ["/usr", "/lib64", "/opt/py", "/etc/ld.so.cache"]
    # Nothing that can be written, no devices, no processes of others, no network of the host.
    assert not {"--bind", "--dev", "--dev-bind", "--proc", "--tmpfs", "--share-net"} & {*line}
    # What is mounted after the root became read-only could be written.
    assert line.index("--remount-ro") > max(place for place, part in enumerate(line) if part in ("--symlink", "--dir"))


@pytest.mark.parametrize("prefix", ["/", "/root", "/home"])
def test_an_interpreter_in_a_home_is_refused(prefix: str) -> None:
    with pytest.raises(SandboxError, match=f"the interpreter is installed in {prefix}, all of which"):
        bwrap_command("bwrap", "python", prefix, links={}, folders=[], filter_number=3)


@pytest.mark.parametrize("machine", sorted(MACHINES))
def test_the_filter_decides_call_by_call(machine: str) -> None:
    program, (audit, calls) = filter_program(machine), MACHINES[machine]
    forbidden = {*calls.values()}
    for number in range(500):
        assert decide(program, audit=audit, number=number) == (DENY if number in forbidden else ALLOW)
    assert decide(program, audit=audit, number=OTHER_ABI) == DENY
    assert decide(program, audit=audit, number=OTHER_ABI + 57) == DENY
    others = [other.audit for name, other in MACHINES.items() if name != machine]
    assert decide(program, audit=others[0], number=0) == KILL
    # The kernel takes no jump beyond 255 and no program beyond 4096 instructions.
    assert len(program) // 8 == len(forbidden) + 7 < 256


def booted(task: dict[str, object], folder: Path, *, inside: bool = True) -> "subprocess.CompletedProcess[str]":
    """The first program without a sandbox, in a process of its own; where it is `inside`, it takes the folder for that
    of the sandbox.
    """
    assert BOOT.count('"/empty"') == 1
    boot = BOOT.replace('"/empty"', repr(str(folder.resolve()))) if inside else BOOT
    command = [sys.executable, "-I", "-S", "-c", boot]
    return subprocess.run(command, input=json.dumps(task), cwd=folder, capture_output=True, text=True)


def test_the_first_program_limits_itself_before_it_runs_anything(tmp_path: Path) -> None:
    """What is printed, and which limits hold for the program."""
    program = "import resource\nprint(resource.getrlimit(resource.RLIMIT_FSIZE), sum(numbers(r1)))"
    ran = booted({"program": program, "results": {"r1": "3, 4"}, "memory": 400_000_000, "seconds": 5}, tmp_path)
    assert (ran.stdout, ran.stderr) == ("(0, 0) 7\n", "")


@pytest.mark.parametrize(
    ("program", "printed"),
    [("print(2)", "2\n"), ("1 + 1", "2\n"), ("None", ""), ("numbers('1e-05, .5, 7, 1.5x')", "[1e-05, 0.5, 7]\n")],
)
def test_the_value_of_an_expression_is_printed_once(program: str, printed: str, tmp_path: Path) -> None:
    ran = booted({"program": program, "results": {}, "memory": 400_000_000, "seconds": 5}, tmp_path)
    assert (ran.stdout, ran.stderr) == (printed, "")


@pytest.mark.parametrize("machine", sorted(MACHINES))
def test_memory_of_the_kernel_is_not_given(machine: str) -> None:
    """Semaphores, queues of input and output, and secret memory are counted by no limit of a process."""
    known = {"x86_64": {64, 206, 447, 29, 68}, "aarch64": {190, 0, 447, 194, 186}}
    audit, _ = MACHINES[machine]
    decided = {number: decide(filter_program(machine), audit=audit, number=number) for number in known[machine]}
    assert decided == dict.fromkeys(known[machine], DENY)


def test_where_there_is_no_bubblewrap_the_sentence_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(SandboxError, match=r"needs bubblewrap, which is not here; install bubblewrap \(apt-get"):
        Sandbox()


def test_one_that_does_not_work_is_found_at_once(monkeypatch: pytest.MonkeyPatch, tmp_path: object) -> None:
    """A bwrap that ends with a message, as it does where namespaces are off."""
    broken = f"{tmp_path}/bwrap"
    with open(broken, "w") as file:
        file.write("#!/bin/sh\necho 'bwrap: No permissions to create new namespace' >&2\nexit 1\n")
    subprocess.run(["chmod", "+x", broken], check=True)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
    if platform.machine() in MACHINES:
        with pytest.raises(SandboxError, match=r"does not work here \(bwrap: No permissions .*\); install"):
            Sandbox()


@pytest.mark.parametrize(
    "does",
    ["exec sleep 60", "exec >&- 2>&-; exec sleep 60", "exec <&-; echo lost >&2; exit 1"],
)
def test_whoever_does_not_read_or_end_is_not_waited_for(
    does: str, monkeypatch: pytest.MonkeyPatch, tmp_path: object
) -> None:
    """A bwrap that answers the first program as it should, and then does not do as it should."""
    fake = f"{tmp_path}/bwrap"
    with open(fake, "w") as file:
        file.write(f"#!/bin/sh\nif [ -e {tmp_path}/tried ]; then {does}; fi\ntouch {tmp_path}/tried; echo 2\n")
    subprocess.run(["chmod", "+x", fake], check=True)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
    if platform.machine() not in MACHINES:
        return
    sandbox, began = Sandbox(CodeLimits(seconds=0.3)), time.monotonic()
    sandbox_module = importlib.import_module("jaxrl_llm.workforce.workers.sandbox")
    # More than any pipe holds.
    monkeypatch.setattr(sandbox_module, "LARGEST_INPUT", 10**7)
    assert sandbox.run("#" * 2_000_000, {}).error == ("lost" if "lost" in does else "it took longer than 0.3 s")
    assert time.monotonic() - began < 5


def test_limits_that_cannot_be_are_refused() -> None:
    with pytest.raises(ValueError, match="seconds is 0"):
        CodeLimits(seconds=0)
    with pytest.raises(ValueError, match="output is 0"):
        CodeLimits(output=0)


def test_what_runs_first_in_a_sandbox_runs_nothing_elsewhere(tmp_path: Path) -> None:
    task = {"program": f"open({str(tmp_path / 'made')!r}, 'w')", "results": {}, "memory": 400_000_000, "seconds": 5}
    ran = booted(task, tmp_path, inside=False)
    assert (ran.returncode, ran.stderr) == (1, "programs of steps are run in the sandbox only.\n")
    assert not (tmp_path / "made").exists()
