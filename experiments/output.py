"""Standard output that may be closed while a run goes on, as `| head` or a lost terminal closes it."""

import contextlib
import io
import os
import sys
from collections.abc import Iterator
from typing import TextIO

from jaxrl_llm.training.run.interrupts import ask_to_stop

CLOSED = "an output that was closed"


class Guarded(io.TextIOBase):
    """Writes to a stream until nobody reads it; then asks the run to stop, and writes to another one."""

    def __init__(self, stream: TextIO, instead: TextIO) -> None:
        """`stream` is written to, `instead` once that is closed."""
        self._stream, self._instead = stream, instead
        self.closed_by_reader = False

    @property
    def encoding(self) -> str:
        """Of the stream."""
        return self._stream.encoding

    def isatty(self) -> bool:
        """Whether a person sees it."""
        return not self.closed_by_reader and self._stream.isatty()

    def fileno(self) -> int:
        """Of the stream."""
        return self._stream.fileno()

    def writable(self) -> bool:
        """Always."""
        return True

    def write(self, text: str) -> int:
        """Write a text; what the stream's encoding cannot say is written as an escape."""
        try:
            self._target.write(text)
        except UnicodeEncodeError:
            self._target.write(text.encode(self.encoding, "backslashreplace").decode(self.encoding))
        except OSError as error:
            self._lost(error, text)
        return len(text)

    def flush(self) -> None:
        """Flush the stream."""
        try:
            self._target.flush()
        except OSError as error:
            self._lost(error, "")

    @property
    def _target(self) -> TextIO:
        return self._instead if self.closed_by_reader else self._stream

    def _lost(self, error: OSError, text: str) -> None:
        """A pipe without a reader or a terminal that is gone; nothing more is written there, not at exit either."""
        if self.closed_by_reader:
            return
        self.closed_by_reader = True
        with contextlib.suppress(OSError, ValueError):
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self._stream.fileno())
            os.close(nowhere)
        with contextlib.suppress(OSError):
            self._instead.write(text)
        ask_to_stop(CLOSED)


@contextlib.contextmanager
def guarded_output() -> Iterator[None]:
    """While entered, a closed standard output ends a run as SIGTERM does, and its last sentence goes to the errors."""
    guarded = Guarded(sys.stdout, sys.stderr)
    with contextlib.redirect_stdout(guarded):
        try:
            yield
        finally:
            guarded.flush()
