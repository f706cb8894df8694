"""What asks a run to stop: SIGTERM, SIGHUP, Ctrl-C, or an output that nobody reads any more (`ask_to_stop`).

Training stops at the next safe point, where everything computed so far can be saved (`StopRequests`); a computation
that keeps what it has finished may stop anywhere (`StopAtOnce`).
"""

import signal
import sys
import threading
from abc import ABC
from abc import abstractmethod
from types import FrameType
from typing import Any
from typing import Self

NAMES = {signal.SIGTERM: "SIGTERM", signal.SIGINT: "Ctrl-C"}
if sys.platform != "win32":
    NAMES[signal.SIGHUP] = "SIGHUP, which ends what a closed terminal started"

_LISTENERS: list["_Listener"] = []


def ask_to_stop(reason: str) -> None:
    """Ask whatever is running to stop; nothing happens where nothing is.

    Args:
        reason: what the sentence at the end names, after "Stopped by".

    Raises:
        StoppedError: the innermost that listens is a `StopAtOnce`.
    """
    if _LISTENERS:
        _LISTENERS[-1].hear(reason)


class StoppedError(KeyboardInterrupt):
    """Raised by `StopAtOnce`; like its base it passes by everything that handles errors of a computation."""

    def __init__(self, reason: str) -> None:
        """`reason` is what asked to stop."""
        super().__init__(reason)
        self.reason = reason


class _Listener(ABC):
    """While entered, handles the signals of `NAMES`.

    Outside the main thread, where Python installs no handlers, signals are not noticed. A signal that was ignored
    before, as nohup ignores SIGHUP, stays ignored.
    """

    def __init__(self) -> None:
        """Nothing requested yet."""
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Self:
        """Install the handlers."""
        _LISTENERS.append(self)
        if threading.current_thread() is threading.main_thread():
            heard = [number for number in NAMES if signal.getsignal(number) is not signal.SIG_IGN]
            self._before = {number: signal.signal(number, self._handle) for number in heard}
        return self

    def __exit__(self, *_: object) -> None:
        """Put the former handlers back."""
        _LISTENERS.remove(self)
        for number, handler in self._before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.note(signal.Signals(number))

    @abstractmethod
    def note(self, number: signal.Signals) -> None:
        """A signal came."""

    @abstractmethod
    def hear(self, reason: str) -> None:
        """Somebody asked to stop, for a reason."""


class StopRequests(_Listener):
    """While entered, the first request is only noted; a second Ctrl-C interrupts at once, as it always does.

    Attributes:
        requested: what asked to stop, None before.
    """

    def __init__(self) -> None:
        """Nothing requested yet."""
        super().__init__()
        self.requested: str | None = None

    def note(self, number: signal.Signals) -> None:
        """Note the signal; raise for a Ctrl-C that is not the first request."""
        if number == signal.SIGINT and self.requested:
            raise KeyboardInterrupt
        self.requested = NAMES[number]

    def hear(self, reason: str) -> None:
        """Note the request."""
        self.requested = self.requested or reason


class StopAtOnce(_Listener):
    """While entered, every request raises `StoppedError` where the program is."""

    def note(self, number: signal.Signals) -> None:
        """Raise for the signal."""
        raise StoppedError(NAMES[number])

    def hear(self, reason: str) -> None:
        """Raise for the request."""
        raise StoppedError(reason)
