"""Python programs of others, in a process that can compute and print and nothing else.

bubblewrap (bwrap) makes the process: without network, its file system the interpreter and the system's libraries and
all of it read-only, no environment, no processes beside its own. A filter of system calls forbids processes, threads,
sockets; limits of the process bound memory and time. What it prints is read up to a number of bytes, until a deadline.
"""

import json
import os
import platform
import selectors
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from subprocess import PIPE
from typing import NamedTuple

from jaxrl_llm.checks import require_positive
from jaxrl_llm.checks import require_sizes
from jaxrl_llm.workforce.workers.seccomp import MACHINES
from jaxrl_llm.workforce.workers.seccomp import filter_program

LARGEST_INPUT = 60_000
"""Bytes of a program and its results."""
SYSTEM = ("/lib", "/lib32", "/lib64", "/bin")
"""Folders that are links into /usr on most systems."""
HELP = "install bubblewrap (apt-get install bubblewrap) on a Linux that lets users make namespaces"
BOOT = Path(__file__).with_name("boot.py").read_text(encoding="utf-8")
"""What runs first in the sandbox."""


class SandboxError(RuntimeError):
    """No sandbox can be made here; the sentence says what to install."""


class Ran(NamedTuple):
    """What became of a program.

    Attributes:
        output: what it printed.
        error: why it failed, on one line; None where it did not.
    """

    output: str
    error: str | None = None


@dataclass(frozen=True)
class CodeLimits:
    """What a program may take.

    Attributes:
        seconds: of the clock, and of the processor [s].
        memory: address space [bytes].
        output: what is printed [bytes].
    """

    seconds: float = 5.0
    memory: int = 512 * 2**20
    output: int = 20_000

    def __post_init__(self) -> None:
        """Raise a ValueError for limits that cannot be."""
        require_positive("seconds", self.seconds)
        require_sizes(memory=self.memory, output=self.output)


def bwrap_command(
    bwrap: str, python: str, prefix: str, *, links: Mapping[str, str], folders: Sequence[str], filter_number: int
) -> list[str]:
    """The command line of an interpreter in a sandbox, up to its program.

    Args:
        bwrap: path of bubblewrap.
        python: path of the interpreter, without links.
        prefix: folder of its library.
        links: names in the root that are links, and where they lead.
        folders: more folders that are shown, read-only.
        filter_number: descriptor of the filter of system calls.

    Raises:
        SandboxError: the interpreter's folder is the root or a home, all of which would be shown.
    """
    if prefix in ("/", "/home", "/root", str(Path.home())):
        raise SandboxError(f"the interpreter is installed in {prefix}, all of which its programs could read.")
    shown = list(dict.fromkeys(["/usr", *folders, prefix]))
    return [
        bwrap, "--unshare-all", "--die-with-parent", "--new-session", "--clearenv", "--cap-drop", "ALL",
        "--uid", "65534", "--gid", "65534", "--hostname", "sandbox",
        *(part for folder in shown for part in ("--ro-bind", folder, folder)),
        *(part for name, target in links.items() for part in ("--symlink", target, name)),
        "--ro-bind-try", "/etc/ld.so.cache", "/etc/ld.so.cache", "--dir", "/empty", "--chdir", "/empty",
        "--remount-ro", "/", "--seccomp", str(filter_number),
        # Isolated, without site packages, without writing compiled files; -u, so that what was printed is not lost.
        python, "-I", "-S", "-B", "-u", "-c",
    ]  # fmt: skip


class Sandbox:
    """Runs programs one at a time or side by side; each in a sandbox of its own.

    Args:
        limits: of each program.

    Raises:
        SandboxError: bubblewrap is missing or cannot work here.
    """

    def __init__(self, limits: CodeLimits | None = None) -> None:
        self.limits = CodeLimits() if limits is None else limits
        bwrap, machine = shutil.which("bwrap"), platform.machine()
        if sys.platform != "linux" or bwrap is None:
            raise SandboxError(f"running programs needs bubblewrap, which is not here; {HELP}.")
        if machine not in MACHINES:
            raise SandboxError(f"programs are run on {', '.join(MACHINES)} only; this is {machine}.")
        self._bwrap, self._filter = bwrap, filter_program(machine)
        tried = self.run("1 + 1", {})
        if tried.output != "2\n":
            raise SandboxError(f"bubblewrap does not work here ({tried.error or tried.output}); {HELP}.")

    def run(self, program: str, results: Mapping[str, str]) -> Ran:
        """Run a program; where it is an expression, its value is printed.

        Args:
            program: Python.
            results: texts that it finds under these names.
        """
        limits = self.limits
        task = {"program": program, "results": dict(results), "memory": limits.memory, "seconds": limits.seconds}
        content = json.dumps(task).encode()
        if len(content) > LARGEST_INPUT:
            return Ran("", f"the program and its results have {len(content)} bytes; at most {LARGEST_INPUT} are taken")
        number = os.memfd_create("filter")
        try:
            os.write(number, self._filter)
            os.lseek(number, 0, os.SEEK_SET)
            process = subprocess.Popen(
                [*self._command(number), BOOT], pass_fds=(number,), env={}, stdin=PIPE, stdout=PIPE, stderr=PIPE
            )
        finally:
            os.close(number)
        with process:
            try:
                return _attended(process, content, limits)
            finally:
                process.kill()

    def _command(self, number: int) -> list[str]:
        here = [folder for folder in SYSTEM if os.path.lexists(folder)]
        links = {folder: os.readlink(folder) for folder in here if os.path.islink(folder)}
        return bwrap_command(
            self._bwrap,
            str(Path(getattr(sys, "_base_executable", sys.executable)).resolve()),
            str(Path(sys.base_prefix).resolve()),
            links=links,
            folders=[folder for folder in here if folder not in links],
            filter_number=number,
        )


def _attended(process: "subprocess.Popen[bytes]", content: bytes, limits: CodeLimits) -> Ran:
    deadline = time.monotonic() + limits.seconds
    output, errors, stopped = _exchanged(process, content, limits, deadline)
    text = output.decode("utf-8", "replace")
    if stopped is not None:
        return Ran(text, stopped)
    try:
        # A program that has closed what it prints to need not have ended.
        code = process.wait(max(0.0, deadline - time.monotonic()))
    except subprocess.TimeoutExpired:
        return Ran(text, _late(limits))
    if code == 0:
        return Ran(text)
    last = errors.decode("utf-8", "replace").strip().splitlines()[-1:] or [f"it ended with the status {code}"]
    return Ran(text, last[0][:300])


def _exchanged(
    process: "subprocess.Popen[bytes]", content: bytes, limits: CodeLimits, deadline: float
) -> tuple[bytes, bytes, str | None]:
    """What was printed, the end of what went wrong, and why reading stopped before the end; `content` is written."""
    assert process.stdin is not None
    assert process.stdout is not None
    assert process.stderr is not None
    output, errors = b"", b""
    with selectors.DefaultSelector() as selector:
        # What is written waits for whoever reads, as a pipe may hold less than `content`.
        os.set_blocking(process.stdin.fileno(), False)
        selector.register(process.stdin, selectors.EVENT_WRITE)
        selector.register(process.stdout, selectors.EVENT_READ)
        selector.register(process.stderr, selectors.EVENT_READ)
        while selector.get_map():
            ready = selector.select(max(0.0, deadline - time.monotonic()))
            if time.monotonic() >= deadline:
                return output, errors, _late(limits)
            for key, _ in ready:
                if key.fileobj is process.stdin:
                    content = _rest(key.fd, content)
                    if not content:
                        selector.unregister(process.stdin)
                        process.stdin.close()
                    continue
                piece = os.read(key.fd, 65_536)
                if not piece:
                    selector.unregister(key.fileobj)
                elif key.fileobj is process.stderr:
                    # Its last line says what happened; a traceback may be longer than what may be printed.
                    errors = (errors + piece)[-limits.output :]
                elif len(output) + len(piece) > limits.output:
                    return (output + piece)[: limits.output], errors, f"it printed more than {limits.output} bytes"
                else:
                    output += piece
    return output, errors, None


def _rest(number: int, content: bytes) -> bytes:
    """What is still to be written after as much as a pipe takes now; nothing where nobody reads any more."""
    try:
        return content[os.write(number, content) :]
    except BlockingIOError:
        return content
    except BrokenPipeError:
        return b""  # the program ended before it read; its error says why


def _late(limits: CodeLimits) -> str:
    return f"it took longer than {limits.seconds:g} s"
