"""Games of TextWorldExpress (Jansen and Côté 2023) in one Java process per Python process, many at once."""

import atexit
import contextlib
import importlib
import importlib.util
import json
import os
import shutil
from pathlib import Path
from typing import Any
from typing import NamedTuple

from jaxrl_llm.environments.time_limits import TimeLimitError

ANSWER_SECONDS = 20.0
"""Java answers a step within [s]; the limit also holds in threads that signals do not reach."""
_gateways: dict[int, Any] = {}
"""The py4j gateway to Java of each process, by its id: a fork must not talk to its parent's."""
_free: dict[tuple[int, str, str], list[Any]] = {}
"""Loaded games that no episode uses, by the process of their Java: loading one takes longer than most episodes."""
_hung: list[Any] = []
"""Games whose Java did not answer."""


class Shown(NamedTuple):
    """What the simulator says of a state.

    Attributes:
        text: its answer to the last action.
        look, inventory: what can be seen and what is carried.
        score: so far, 1 at most.
        won, lost: whether the task has come to an end, and to which.
        admissible: every action that it knows here, sorted.
    """

    text: str
    look: str
    inventory: str
    score: float
    won: bool
    lost: bool
    admissible: tuple[str, ...]


def _package() -> Path:
    spec = importlib.util.find_spec("textworld_express")
    if spec is None or not spec.submodule_search_locations or importlib.util.find_spec("py4j") is None:
        raise ModuleNotFoundError(
            "TextWorldExpress needs its package; run: pip install 'jaxrl_llm[worlds]'", name="textworld_express"
        )
    if shutil.which("java") is None:
        raise FileNotFoundError(
            "TextWorldExpress runs in Java, and there is no java on the PATH; on Debian or Ubuntu run: "
            "apt-get install default-jre-headless"
        )
    return Path(next(iter(spec.submodule_search_locations)))


def _gateway() -> Any:
    """The Java of this process; a new one after a fork, and where the last one has died."""
    gateway = _gateways.get(os.getpid())
    if gateway is not None and gateway.java_process.poll() is None:
        return gateway
    folder = _package()
    java = importlib.import_module("py4j.java_gateway")
    # Port 0: the system chooses a free one, so that any number of processes stand side by side. Java ends when the pipe
    # to this process breaks, also where this one is killed.
    port, process = java.launch_gateway(
        port=0, classpath=str(folder / "textworld-express.jar"), die_on_exit=True, cwd=str(folder), return_proc=True
    )
    parameters = java.GatewayParameters(port=port, read_timeout=ANSWER_SECONDS)
    gateway = _gateways[os.getpid()] = java.JavaGateway(gateway_parameters=parameters, java_process=process)
    return gateway


@atexit.register
def _end_java() -> None:
    gateway = _gateways.pop(os.getpid(), None)
    if gateway is not None:
        with contextlib.suppress(Exception):  # it may be dead already
            gateway.shutdown()
            gateway.java_process.stdin.close()


class Simulator:
    """One game, of which one task at a time is played.

    Args:
        game: its name.
        settings: as TextWorldExpress takes them: "numLocations=3, includeDoors=0"; empty for its defaults.

    Raises:
        ModuleNotFoundError: the package is missing.
        FileNotFoundError: Java is.
        ValueError: there is no such game or setting; the sentence is TextWorldExpress's.
    """

    def __init__(self, game: str, settings: str) -> None:
        gateway = _gateway()
        self._process = gateway.java_process
        self._free = _free.setdefault((self._process.pid, game, settings), [])
        self._answered = True
        self._python: Any = None
        if self._free:
            self._python = self._free.pop()
            return
        self._python = self._call(lambda: gateway.jvm.textworldexpress.runtime.PythonInterface())
        refusal = self._call(lambda: self._python.load(game, settings))
        if refusal:
            raise ValueError(f"TextWorldExpress does not play {game!r} with settings {settings!r}: {refusal.strip()}")

    def _call(self, what: Any) -> Any:
        """A call to Java; one that was broken off, by whatever, leaves the game unfit for another episode."""
        protocol = importlib.import_module("py4j.protocol")
        self._answered = False
        try:
            answer = what()
        except protocol.Py4JJavaError:
            raise  # an exception in Java, with its trace
        except protocol.Py4JError as error:  # no answer
            if self._process.poll() is not None:
                raise RuntimeError("the Java process of TextWorldExpress has ended.") from error
            raise TimeLimitError(f"TextWorldExpress took longer than {ANSWER_SECONDS:g} s.") from error
        self._answered = True
        return answer

    def begin(self, seed: int, fold: str, *, gold: bool = False) -> Shown:
        """The first state of a task; `gold` has the simulator make a solution too."""
        return _read(self._call(lambda: self._python.generateNewGameJSON(seed, fold, gold)))

    def step(self, action: str) -> Shown:
        """The state after an action."""
        return _read(self._call(lambda: self._python.stepJSON(action)))

    def task(self) -> str:
        """What is to be done."""
        return self._call(lambda: self._python.getTaskDescription())

    def gold(self) -> list[str]:
        """The simulator's own solution of the task that was begun with `gold`; it wanders."""
        return self._call(lambda: list(self._python.getGoldActionSequence()))

    def close(self) -> None:
        """Hand the game back, for another episode; once."""
        # One that hangs is kept where nobody finds it: to collect it as garbage Python would have to ask Java.
        (self._free if self._answered else _hung).append(self._python)
        self._python = None


def _read(answer: str) -> Shown:
    said = json.loads(answer)
    return Shown(
        text=said["observation"].strip(),
        look=said["look"].strip(),
        inventory=said["inventory"].strip(),
        score=float(said["score"]),
        won=bool(said["tasksuccess"]) or said["score"] >= 1,
        lost=bool(said["taskfailure"]),
        admissible=tuple(sorted(said["validActions"])),
    )
