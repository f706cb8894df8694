"""SIGTERM and Ctrl-C ask a run to stop at the next safe point, where everything computed so far can be saved."""

import signal
import threading
from types import FrameType
from typing import Any
from typing import Self

NAMES = {signal.SIGTERM: "SIGTERM", signal.SIGINT: "Ctrl-C"}


class StopRequests:
    """While entered, the first SIGTERM or Ctrl-C is only noted; a second Ctrl-C interrupts at once, as it always does.

    Outside the main thread, where Python installs no handlers, nothing is noted.
    """

    def __init__(self) -> None:
        """Nothing requested yet."""
        self.requested: str | None = None
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Self:
        """Install the handlers."""
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._note) for number in NAMES}
        return self

    def __exit__(self, *_: object) -> None:
        """Put the former handlers back."""
        for number, handler in self._before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self.requested:
            raise KeyboardInterrupt
        self.requested = NAMES[signal.Signals(number)]
