"""What a run tells whoever watches it."""

import time
from collections.abc import Iterator
from collections.abc import Mapping
from contextlib import contextmanager
from typing import Protocol


class Reporter(Protocol):
    """Told what happens while it happens: a progress bar, plain lines, or nothing."""

    def begin(self, *, first_step: int, steps: int) -> None:
        """The run starts, or goes on after `first_step` steps, towards `steps`."""
        ...

    def phase(self, name: str) -> None:
        """A phase of the current step starts: "rollout", "score", "update", "bounds" or "evaluate"."""
        ...

    def finish_step(self, step: int, metrics: Mapping[str, float], seconds: Mapping[str, float]) -> None:
        """Step number `step` (1 is the first) is done; 0 is the evaluation before the first."""
        ...

    def say(self, message: str) -> None:
        """One sentence for a person: resumed, saved, interrupted."""
        ...


class Quiet:
    """A reporter that says nothing."""

    def begin(self, *, first_step: int, steps: int) -> None:
        """Nothing."""

    def phase(self, name: str) -> None:
        """Nothing."""

    def finish_step(self, step: int, metrics: Mapping[str, float], seconds: Mapping[str, float]) -> None:
        """Nothing."""

    def say(self, message: str) -> None:
        """Nothing."""


class PhaseClock:
    """Seconds that each phase of a step took. They are written down and never decide anything."""

    def __init__(self, reporter: Reporter) -> None:
        """Tell the reporter about each phase."""
        self._reporter = reporter
        self.start()

    def start(self) -> None:
        """A new step starts."""
        self._started = time.perf_counter()
        self._seconds: dict[str, float] = {}

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Count the seconds of the body under this name."""
        self._reporter.phase(name)
        before = time.perf_counter()
        yield
        self._seconds[name] = self._seconds.get(name, 0.0) + time.perf_counter() - before

    def seconds(self, *, tokens: int) -> dict[str, float]:
        """Seconds of each phase, of the rest ("other") and of the step ("total"), and real tokens per second."""
        total = time.perf_counter() - self._started
        other = total - sum(self._seconds.values())
        return {**self._seconds, "other": other, "total": total, "tokens_per_second": tokens / total}
