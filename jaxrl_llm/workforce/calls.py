"""Workers at work: each call in a thread of its own, with a time limit, and every way of failing turned into an answer.

A call that computes in Python is stopped at its limit. One that hangs in a library or waits for ever cannot be stopped:
it is given up and keeps its worker's place until it returns by itself, so there are never more threads than places.
"""

import queue
import threading
import time
from collections.abc import Sequence
from typing import NamedTuple

from jaxrl_llm.environments.time_limits import TimeLimitError
from jaxrl_llm.environments.time_limits import time_limit
from jaxrl_llm.workforce.protocol import Answer
from jaxrl_llm.workforce.protocol import Assignment
from jaxrl_llm.workforce.protocol import Worker

GRACE = 0.5
"""Seconds after its limit in which a call may still be stopped."""
ANSWERED, RAISED, LATE = "answered", "raised", "late"
"""How a call ends."""


class Called(NamedTuple):
    """How one call ended.

    Attributes:
        answer: the worker's, or why there is none.
        kind: `ANSWERED`, `RAISED` or `LATE`.
        thread: where it ran; alive where the call could not be stopped.
    """

    answer: Answer
    kind: str
    thread: threading.Thread


def call_all(calls: Sequence[tuple[Worker, Assignment]], seconds: float) -> list[Called]:
    """All calls at once; at the latest `seconds` (and a little grace) later each has an answer.

    Args:
        calls: who works, and at what.
        seconds: time limit of each [s].
    """
    started = []
    for worker, assignment in calls:
        # What is said after the deadline goes into a queue that nobody reads any more.
        box: queue.SimpleQueue[tuple[Answer, str]] = queue.SimpleQueue()
        arguments = (worker, assignment, seconds, box)
        # A daemon, so that a call that never returns does not keep the process from ending.
        thread = threading.Thread(target=_call, args=arguments, name=worker.card.name, daemon=True)
        thread.start()
        started.append((thread, box))
    deadline = time.monotonic() + seconds + GRACE
    ended = []
    for thread, box in started:
        try:
            answer, kind = box.get(timeout=max(0.0, deadline - time.monotonic()))
            thread.join(GRACE)
        except queue.Empty:
            answer, kind = _late(seconds)
        ended.append(Called(answer, kind, thread))
    return ended


def _call(worker: Worker, assignment: Assignment, seconds: float, box: "queue.SimpleQueue[tuple[Answer, str]]") -> None:
    name = worker.card.name
    try:
        with time_limit(seconds, what=name):
            answer = worker.work(assignment)
        if not isinstance(answer, Answer) or not isinstance(answer.text, str):
            raise TypeError(f"it returned {type(answer).__name__}, and must return an Answer with a text")
    except TimeLimitError:
        box.put(_late(seconds))
    except BaseException as error:  # an exit of the interpreter too: the thread is the worker's, the process is not
        said = " ".join(str(error).split())[:300]
        box.put((Answer(f"{name} raised {type(error).__name__}: {said}", failed=True), RAISED))
    else:
        box.put((answer, ANSWERED))


def _late(seconds: float) -> tuple[Answer, str]:
    return Answer(f"no answer within {seconds:g} s", failed=True), LATE
