"""A limit on the seconds that a call may take, for generators and verifiers that can loop forever."""

import contextlib
import ctypes
import gc
import math
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

REPEAT_SECONDS = 0.05
"""The alarm rings again this often, since a bare `except:` inside the call may swallow it."""
SOON = 1e-6
"""Delay of an alarm that is overdue [s]; a delay of 0 would switch the timer off."""


class TimeLimitError(TimeoutError):
    """A call ran into its time limit."""


class AlarmError(BaseException):
    """Raised inside the call by the alarm; no `except Exception` of the call can swallow it."""


def _keeps_the_alarm(frame: FrameType | None) -> bool:
    """Whether an exception raised in this frame would do harm or be lost.

    In this module and in contextlib it would leave the timer running for good; a destructor and a callback of the
    garbage collector swallow it.
    """
    if frame is None:
        return False
    code = frame.f_code
    collecting = any(getattr(callback, "__code__", None) is code for callback in gc.callbacks)
    return code.co_filename in (__file__, contextlib.__file__) or code.co_name == "__del__" or collecting


def _raise_in(thread: int, error: type[BaseException] | None) -> None:
    """Have a thread raise an error at its next instruction of Python; None takes back what is not raised yet."""
    raised = None if error is None else ctypes.py_object(error)
    ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread), raised)


def _ours(frame: FrameType) -> bool:
    return frame.f_code.co_filename in (__file__, contextlib.__file__)


def _caller() -> FrameType | None:
    """The frame whose `with` statement has a time limit."""
    frame = sys._getframe(1)
    while frame is not None and _ours(frame):
        frame = frame.f_back
    return frame


def _may_ring(thread: int, caller: FrameType | None) -> bool | None:
    """Whether an error may be raised in the thread now: not while it enters or leaves the limit. None where the caller
    has returned, so that nobody would catch it; another thread may have the number of this one by then.
    """
    frame = sys._current_frames().get(thread)
    may = not _keeps_the_alarm(frame)
    while frame is not None and frame is not caller:
        may, frame = may and not _ours(frame), frame.f_back
    return None if frame is None else may


@contextmanager
def _watched(seconds: float, what: str) -> Iterator[None]:
    """`time_limit` of a thread that signals do not reach."""
    thread, over, turn, rang = threading.get_ident(), threading.Event(), threading.Lock(), False
    caller = _caller()

    def watch() -> None:
        nonlocal rang
        delay = seconds
        while not over.wait(delay):
            with turn:
                may = None if over.is_set() else _may_ring(thread, caller)
                if may is None:
                    return
                if may:
                    # Again and again, since a bare `except:` inside the call may swallow it.
                    rang = True
                    _raise_in(thread, AlarmError)
                delay = REPEAT_SECONDS

    watcher = threading.Thread(target=watch, name="time-limit", daemon=True)
    watcher.start()
    try:
        try:
            yield
        finally:
            with turn:
                over.set()
                _raise_in(thread, None)
    except AlarmError:
        with turn:
            over.set()
            _raise_in(thread, None)
    if rang:
        raise TimeLimitError(f"{what} took longer than {seconds:g} s.")


@contextmanager
def time_limit(seconds: float, *, what: str = "the call") -> Iterator[None]:
    """Raise TimeLimitError if the body takes longer than `seconds` of wall-clock time.

    In the main thread it works by SIGALRM, where the system has that signal; in another thread, such as one that
    samples ahead, a watching thread raises in it. Both interrupt Python code, not one long call into C. A handler and a
    timer that were set before (pytest-timeout's, another time_limit around this one) are put back with their remaining
    time, and an outer timer that is due first still fires first.

    Args:
        seconds: the limit [s].
        what: how the error names the call.

    Raises:
        TimeLimitError: the body took longer.
        ValueError: `seconds` is not positive.
        RuntimeError: in the main thread of a system without SIGALRM.
    """
    if seconds <= 0:
        raise ValueError(f"seconds is {seconds}; it must be positive.")
    if threading.current_thread() is not threading.main_thread():
        with _watched(seconds, what):
            yield
        return
    if not hasattr(signal, "SIGALRM"):
        raise RuntimeError(f"{what} needs a time limit, which works on a POSIX system only.")
    started = time.monotonic()
    outer_handler = signal.getsignal(signal.SIGALRM)
    outer_delay, outer_interval = signal.getitimer(signal.ITIMER_REAL)
    outer_due = started + outer_delay if outer_delay > 0 else math.inf
    armed, rang = True, False

    def set_alarm() -> None:
        delay = min(started + seconds, outer_due) - time.monotonic()
        signal.setitimer(signal.ITIMER_REAL, max(delay, SOON), REPEAT_SECONDS)

    def on_alarm(number: int, frame: FrameType | None) -> None:
        nonlocal outer_due, rang
        if not armed or _keeps_the_alarm(frame):
            return  # where it is still due it rings again after REPEAT_SECONDS
        now = time.monotonic()
        if outer_due <= now and callable(outer_handler):
            outer_due = now + outer_interval if outer_interval > 0 else math.inf
            outer_handler(number, frame)
        if now >= started + seconds:
            rang = True
            raise AlarmError
        set_alarm()

    def put_back() -> None:
        nonlocal armed
        armed = False
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, signal.SIG_DFL if outer_handler is None else outer_handler)
        if outer_due < math.inf:
            signal.setitimer(signal.ITIMER_REAL, max(outer_due - time.monotonic(), SOON), outer_interval)

    try:
        signal.signal(signal.SIGALRM, on_alarm)
        set_alarm()
        yield
        armed = False
    except AlarmError:
        armed = False
    finally:
        put_back()
    if rang:  # also where the body swallowed the alarm and went on: what it did after that is not to be trusted
        raise TimeLimitError(f"{what} took longer than {seconds:g} s.")
