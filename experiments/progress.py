"""What a person sees while a run goes on: a live bar on a terminal, plain lines elsewhere."""

import contextlib
import sys
import time
from collections.abc import Iterator
from collections.abc import Mapping
from typing import TextIO

from rich.console import Console
from rich.progress import BarColumn
from rich.progress import MofNCompleteColumn
from rich.progress import Progress
from rich.progress import TextColumn
from rich.progress import TimeElapsedColumn
from rich.progress import TimeRemainingColumn

from experiments import metric_names as names
from jaxrl_llm.training import Reporter

PLAIN_SECONDS = 10.0
"""A plain line is written at the first and last step, and otherwise this often. [s]"""

SHOWN = {names.REWARD: "reward", names.KL_MEAN: "KL", names.ACCEPTED: "accepted"}
"""Metrics of a step that are shown, and their short names; the newest held-out accuracy follows."""


def shown_values(metrics: Mapping[str, float], held_out: float | None) -> str:
    """The numbers that are shown, with short names."""
    found = {label: metrics[name] for name, label in SHOWN.items() if name in metrics}
    if held_out is not None:
        found["held-out"] = held_out
    return "  ".join(
        f"{label} {value:.2e}" if 0 < abs(value) < 0.001 else f"{label} {value:.3f}" for label, value in found.items()
    )


class LiveBar:
    """A bar with the newest numbers, the time spent and the time left; for terminals."""

    def __init__(self, console: Console) -> None:
        self._progress = Progress(
            TextColumn("[bold]{task.fields[phase]:<8}"),
            BarColumn(bar_width=20),
            MofNCompleteColumn(),
            TextColumn("{task.fields[values]}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=console,
            # Compilation makes the first batch slow; a window of the last minute forgets it.
            speed_estimate_period=60,
        )
        self._task = self._progress.add_task("training", total=None, values="", phase="compiles")
        self._held_out: float | None = None

    def begin(self, *, first_step: int, steps: int) -> None:
        """Show the bar."""
        self._progress.update(self._task, total=steps, completed=first_step)
        self._progress.start()

    def phase(self, name: str) -> None:
        """Say what is going on."""
        self._progress.update(self._task, phase=name)

    def finish_step(self, step: int, metrics: Mapping[str, float], seconds: Mapping[str, float]) -> None:
        """Move the bar, and leave a line after an evaluation."""
        if names.HELD_OUT in metrics:
            self._held_out = metrics[names.HELD_OUT]
            self.say(evaluation_line(step, metrics))
        self._progress.update(self._task, completed=step, values=shown_values(metrics, self._held_out))

    def say(self, message: str) -> None:
        """Print above the bar."""
        self._progress.console.print(message, highlight=False, markup=False, soft_wrap=True)

    def stop(self) -> None:
        """Leave the bar as it is."""
        self._progress.stop()


class PlainLines:
    """One line now and then, without control characters; for files and pipes."""

    def __init__(self, stream: TextIO, *, seconds: float = PLAIN_SECONDS) -> None:
        self._stream, self._seconds = stream, seconds
        self._steps = self._first = 0
        self._start = self._last = float("-inf")
        self._held_out: float | None = None

    def begin(self, *, first_step: int, steps: int) -> None:
        """Remember where it starts."""
        self._steps, self._first, self._start = steps, first_step, time.monotonic()

    def phase(self, name: str) -> None:
        """Nothing: a line per phase would be too many."""

    def finish_step(self, step: int, metrics: Mapping[str, float], seconds: Mapping[str, float]) -> None:
        """Write a line if the last one is old enough, and after each evaluation."""
        if names.HELD_OUT in metrics:
            self._held_out = metrics[names.HELD_OUT]
            self.say(evaluation_line(step, metrics))
        now = time.monotonic()
        if step == self._first or (now - self._last < self._seconds and step < self._steps):
            return
        self._last = now
        spent = now - self._start
        left = spent / (step - self._first) * (self._steps - step)
        self.say(
            f"step {step}/{self._steps}  {shown_values(metrics, self._held_out)}"
            f"  {spent:.0f} s, about {left:.0f} s left"
        )

    def say(self, message: str) -> None:
        """Write a line."""
        print(message, file=self._stream, flush=True)

    def stop(self) -> None:
        """Nothing to do."""


def evaluation_line(step: int, metrics: Mapping[str, float]) -> str:
    """The held-out accuracy in one line."""
    lenient, strict = metrics[names.HELD_OUT], metrics[names.HELD_OUT_STRICT]
    return f"held-out accuracy after {step} steps: {lenient:.3f} (strict {strict:.3f})"


@contextlib.contextmanager
def progress(stream: TextIO | None = None) -> Iterator[Reporter]:
    """A reporter: a live bar where `stream` (by default standard output) is a terminal, plain lines elsewhere."""
    output = stream or sys.stdout
    console = Console(file=output)
    live = console.is_terminal and not console.is_dumb_terminal
    reporter = LiveBar(console) if live else PlainLines(output)
    try:
        yield reporter
    finally:
        reporter.stop()
