"""Hostile programs in the real sandbox: `make test-sandbox`, on a Linux that has bubblewrap and user namespaces."""

import http.server
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from jaxrl_llm.workforce import Answer
from jaxrl_llm.workforce import Assignment
from jaxrl_llm.workforce import CodeLimits
from jaxrl_llm.workforce import CodeWorker
from jaxrl_llm.workforce import FactsWorker
from jaxrl_llm.workforce import FilesWorker
from jaxrl_llm.workforce import Questions
from jaxrl_llm.workforce import Sandbox
from jaxrl_llm.workforce import ScriptedPlanner
from jaxrl_llm.workforce import TablesWorker
from jaxrl_llm.workforce import WordCoordinator
from jaxrl_llm.workforce import Workforce
from jaxrl_llm.workforce import fictional_base
from jaxrl_llm.workforce.facts import write_base
from jaxrl_llm.workforce.workers.sandbox import Ran

LIMITS = CodeLimits(seconds=2.0, memory=256 * 2**20, output=1000)


@pytest.fixture(scope="module")
def sandbox() -> Sandbox:
    return Sandbox(LIMITS)


@pytest.fixture(scope="module")
def patient() -> Sandbox:
    """One whose time is never over before its memory is, on a busy machine either."""
    return Sandbox(CodeLimits(seconds=60.0, memory=LIMITS.memory))


@pytest.fixture(autouse=True)
def _nothing_is_left_running() -> Iterator[None]:
    yield
    deadline = time.monotonic() + 5
    while children() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not children()


def children() -> list[str]:
    """Processes below this one, and theirs, that run a sandbox or its program."""
    found, below = [], {os.getpid()}
    for entry in sorted(int(name) for name in os.listdir("/proc") if name.isdigit()):
        try:
            parent = int(Path(f"/proc/{entry}/stat").read_text().rpartition(")")[2].split()[1])
            line = Path(f"/proc/{entry}/cmdline").read_bytes().replace(b"\0", b" ").decode()
        except OSError:
            continue
        if parent in below:
            below.add(entry)
            found.append(line)
    return found


def test_programs_compute_and_print(sandbox: Sandbox) -> None:
    assert sandbox.run("sum(numbers(r1)) * 2", {"r1": "3, 4.5"}).output == "15\n"
    assert sandbox.run("import math\nprint(math.comb(10, 3))\nprint('é')", {}).output == "120\né\n"
    assert sandbox.run("print(2)", {}).output == "2\n"
    assert sandbox.run("1 / 0", {}).error == "ZeroDivisionError: division by zero"
    assert "SyntaxError" in str(sandbox.run("1 +", {}).error)


@pytest.mark.parametrize(
    "program",
    [
        "import os\nwhile True: os.fork()",
        "import os\nos.spawnv(os.P_WAIT, '/bin/sh', ['sh', '-c', ':(){ :|:& };:'])",
        "import subprocess\nsubprocess.run(['/bin/sh'])",
        "import threading\nwhile True: threading.Thread(target=print).start()",
        "import _thread\nwhile True: _thread.start_new_thread(print, ())",
        "import ctypes\nlibc = ctypes.CDLL(None)\nassert libc.fork() >= 0",
    ],
)
def test_no_process_and_no_thread_is_made(sandbox: Sandbox, program: str) -> None:
    ran = sandbox.run(program, {})
    assert ran.error is not None
    assert "longer than" not in ran.error


def test_endless_output_is_stopped(sandbox: Sandbox) -> None:
    began = time.monotonic()
    ran = sandbox.run("while True: print('x' * 99)", {})
    assert ran.error == "it printed more than 1000 bytes"
    assert len(ran.output) == 1000
    assert time.monotonic() - began < LIMITS.seconds
    # Of endless errors only the end is kept, until the time is over.
    ran = sandbox.run("import sys\nwhile True: sys.stderr.write('x' * 99)", {})
    assert ran.error == "it took longer than 2 s"


def test_what_is_outside_cannot_be_read_or_written(sandbox: Sandbox, tmp_path: Path) -> None:
    secret = tmp_path / "secret.txt"
    secret.write_text("secret 42")
    # Each of them can be read here, and is not there inside; what is shown can be read inside.
    for path in (secret, Path(__file__), "/etc/passwd", "/proc/self/environ", "/proc/1/status", "/dev/zero"):
        with Path(path).open("rb") as file:
            assert file.read(1), path
        ran = sandbox.run(f"print(open({str(path)!r}, 'rb').read(1))", {})
        assert (ran.output, str(ran.error)[:18]) == ("", "FileNotFoundError:"), path
    assert sandbox.run("import os\nprint(len(open(os.__file__).read(9)))", {}) == Ran("9\n")
    for path in ("/x", "/empty/x", "/usr/x", "/etc/ld.so.cache"):
        assert "Read-only file system" in str(sandbox.run(f"open({path!r}, 'w')", {}).error), path
    for path in ("/tmp/x", "/dev/shm/x", str(secret)):
        assert "FileNotFoundError" in str(sandbox.run(f"open({path!r}, 'w')", {}).error), path
    assert secret.read_text() == "secret 42"
    assert sandbox.run("import os; print(os.getuid(), sorted(os.environ))", {}).output.startswith(
        "65534 ['LC_CTYPE', 'PWD']"
    )


def test_no_socket_is_opened(sandbox: Sandbox) -> None:
    """A server of this machine listens, and is not reached."""
    reached: list[str] = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            reached.append(self.path)
            self.send_response(200)
            self.end_headers()

    with http.server.HTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}/"
        for program in (
            f"import urllib.request\nurllib.request.urlopen({url!r}, timeout=1)",
            "import socket\nsocket.socket(socket.AF_UNIX)",
            "import socket\nsocket.socketpair()",
            "import socket\nsocket.socket(socket.AF_INET, socket.SOCK_DGRAM)",
        ):
            assert "Operation not permitted" in str(sandbox.run(program, {}).error)
        server.shutdown()
    assert not reached


@pytest.mark.parametrize(
    "program",
    [
        "kept = []\nwhile True: kept.append(bytearray(10_000_000))",
        "'x' * 10**12",
        "import mmap\nkept = []\nwhile True: kept.append(mmap.mmap(-1, 50_000_000))",
        "import os\nfile = os.memfd_create('x')\nwhile True: os.write(file, bytes(1_000_000))",
        "import ctypes\nassert ctypes.CDLL(None).shmget(0, 10**9, 0o600) >= 0",
        "import ctypes\nassert ctypes.CDLL(None).semget(0, 32_000, 0o600) >= 0",
        "import resource\nresource.setrlimit(resource.RLIMIT_AS, (-1, -1))",
    ],
)
def test_no_more_memory_than_the_limit(patient: Sandbox, program: str) -> None:
    ran = patient.run(program, {})
    assert ran.error is not None
    assert "longer than" not in ran.error


@pytest.mark.parametrize(
    "program",
    [
        "while True: pass",
        "import time\ntime.sleep(60)",
        "import signal\nfor n in {*range(1, 32)} - {9, 19}: signal.signal(n, signal.SIG_IGN)\nwhile True: pass",
        "import sys\nsys.stdout.close()\nsys.stderr.close()\nimport os\nos.close(1)\nos.close(2)\nwhile True: pass",
    ],
)
def test_a_program_without_end_is_stopped(program: str) -> None:
    began = time.monotonic()
    ran = Sandbox(CodeLimits(seconds=1.0)).run(program, {})
    assert ran.error is not None
    assert time.monotonic() - began < 10


def test_ways_out_are_closed(sandbox: Sandbox) -> None:
    for call in ("unshare(0x10000000)", "mount(b'x', b'/', b'tmpfs', 0, 0)", "ptrace(0, 0, 0, 0)", "setns(0, 0)"):
        ran = sandbox.run(
            f"import ctypes\nlibc = ctypes.CDLL(None, use_errno=True)\nprint(libc.{call}, ctypes.get_errno())", {}
        )
        assert ran.output == "-1 1\n", call
    killed = sandbox.run(
        "import os, signal\nos.kill(1, signal.SIGKILL)\nprint('alive')\nos.kill(-1, signal.SIGKILL)", {}
    )
    # The first process takes no signal from inside, and beside it there is none but the program.
    assert killed == Ran("alive\n", "ProcessLookupError: [Errno 3] No such process")
    assert sandbox.run("2 + 2", {}).output == "4\n"


def test_a_program_that_is_too_long_is_refused(sandbox: Sandbox) -> None:
    assert "at most 60000 are taken" in str(sandbox.run("#" * 60_000, {}).error)


def test_the_worker_answers_and_fails_in_sentences(sandbox: Sandbox) -> None:
    worker = CodeWorker(sandbox)
    assert worker.work(Assignment("", "compute max(numbers(#1))", {1: "3, 9"})) == Answer("9")
    # A result is data, whatever is in it.
    hostile = "'); import os; print(os.listdir('/')) #"
    assert worker.work(Assignment("", "compute len(#1)", {1: hostile})) == Answer(str(len(hostile)))
    assert (
        worker.work(Assignment("", "compute 1 / 0")).text == "the program failed: ZeroDivisionError: division by zero"
    )
    assert worker.work(Assignment("", "compute x = 1")) == Answer("the program printed nothing", failed=True)


def test_the_scripted_team_solves_its_questions_with_programs(sandbox: Sandbox, tmp_path: Path) -> None:
    base = fictional_base(0, size=4)
    write_base(base, tmp_path / "world")
    questions = [question for question in Questions(base).all() if "code" in question.capabilities][::8]
    folder = tmp_path / "world"
    workers = [FactsWorker(base), TablesWorker(folder / "tables"), FilesWorker(folder / "files"), CodeWorker(sandbox)]
    planner = ScriptedPlanner({question.text: question.plan for question in questions})
    outcomes = Workforce(planner, WordCoordinator(), workers).run([question.text for question in questions])
    assert [outcome.answer for outcome in outcomes] == [question.answer for question in questions]
