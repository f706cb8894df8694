"""What a run writes down: metrics, samples, timings and whole episodes, and where each file stands."""

from collections.abc import Callable
from collections.abc import Mapping
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np

from jaxrl_llm.models.tokenizers import Tokenizer
from jaxrl_llm.rollouts.collect import Experience
from jaxrl_llm.training.run.checkpoints import Progress
from jaxrl_llm.training.run.metrics import JsonLines
from jaxrl_llm.training.run.metrics import MetricWriter
from jaxrl_llm.training.run.metrics import Trackers
from jaxrl_llm.training.run.reporting import PhaseClock
from jaxrl_llm.training.run.reporting import Reporter
from jaxrl_llm.training.text.scoring import Shift
from jaxrl_llm.training.text.trainer import Prepared
from jaxrl_llm.trajectory_files import write_trajectories
from jaxrl_llm.trajectory_texts import text_stretches

OpenWriters = Callable[[int], Sequence[MetricWriter]]
"""Finished steps -> places to write the metrics of the later ones to."""

FILES = ("metrics.jsonl", "samples.jsonl", "timings.jsonl")
"""Files of a run that are cut back to the checkpoint when it resumes; only the last one holds clock readings."""


class Record:
    """The open files of a run, its trackers, and its clock."""

    def __init__(self, folder: Path, tokenizer: Tokenizer, vocab_size: int, reporter: Reporter) -> None:
        """Nothing is open yet; the clock starts."""
        self.clock = PhaseClock(reporter)
        self._folder, self._vocab_size, self._reporter = folder, vocab_size, reporter
        self._decode = partial(tokenizer.decode, skip_special_tokens=False)
        self._files: dict[str, JsonLines] = {}
        self._trackers = Trackers((), reporter.say)

    def open(self, progress: Progress, open_writers: OpenWriters | None) -> None:
        """Open every file where the run stands."""
        self._files = {
            name: JsonLines(self._folder / name, keep_bytes=progress.file_bytes.get(name, 0)) for name in FILES
        }
        self._trackers = Trackers(open_writers(progress.step) if open_writers else (), self._reporter.say)

    def flush(self) -> tuple[dict[str, int], dict[str, str]]:
        """Give everything to the disk; returns length and SHA-256 of each file."""
        for writer in (*self._files.values(), self._trackers):
            writer.flush()
        lengths = {name: file.position for name, file in self._files.items()}
        return lengths, {name: file.sha256 for name, file in self._files.items()}

    def close(self) -> None:
        """Close every file."""
        for writer in (self._trackers, *self._files.values()):
            writer.close()

    def write(self, step: int, metrics: Mapping[str, float], *, tokens: int = 0) -> None:
        """Write the finished step down; what depends on the clock goes to the timings."""
        if not metrics:
            return
        seconds = self.clock.seconds(tokens=tokens)
        seconds |= {name: value for name, value in metrics.items() if name.startswith("perf/")}
        metrics = {name: value for name, value in metrics.items() if not name.startswith("perf/")}
        self._files["metrics.jsonl"].write(step, metrics)
        self._files["timings.jsonl"].write(step, seconds)
        self._trackers.write(step, {**metrics, **{f"timing_s/{name}": value for name, value in seconds.items()}})
        self._reporter.finish_step(step, metrics, seconds)

    def write_samples(self, step: int, experience: Experience) -> None:
        """Write the samples of the collector down."""
        for sample in experience.samples:
            self._files["samples.jsonl"].append({"step": step, **sample})

    def write_episodes(self, step: int, experience: Experience, prepared: Prepared, shift: Shift) -> None:
        """Write a whole batch down, with its advantages and divergences, as `show` and the report read it."""
        kl = np.where(prepared.mask, prepared.gather(shift.kl), 0).astype(np.float32)
        write_trajectories(
            self._folder / "episodes" / str(step),
            experience.trajectories,
            texts=text_stretches(experience.trajectories, self._decode),
            extra={"advantages": prepared.advantages, "kl": kl},
            about={"step": step, "vocab_size": self._vocab_size},
        )
