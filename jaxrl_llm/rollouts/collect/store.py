"""Batches of experience on disk, so that what was sampled once need not be sampled again."""

import json
import shutil
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from jaxrl_llm.durable import sync
from jaxrl_llm.regular import read_regular
from jaxrl_llm.rollouts.collect.protocol import BatchShape
from jaxrl_llm.rollouts.collect.protocol import Brings
from jaxrl_llm.rollouts.collect.protocol import CollectError
from jaxrl_llm.rollouts.collect.protocol import Collector
from jaxrl_llm.rollouts.collect.protocol import Experience
from jaxrl_llm.rollouts.collect.protocol import PolicySnapshot
from jaxrl_llm.rollouts.collect.protocol import brought_by
from jaxrl_llm.trajectory_files import TrajectoryFileError
from jaxrl_llm.trajectory_files import read_episodes
from jaxrl_llm.trajectory_files import write_trajectories
from jaxrl_llm.typing import PRNGKey


class Store:
    """One folder per step, written whole or not at all (`trajectory_files`)."""

    def __init__(self, folder: Path) -> None:
        """Nothing is read or written yet."""
        self.folder = Path(folder)

    def save(self, step: int, experience: Experience) -> None:
        """Write a batch; that of the same step is replaced.

        Raises:
            CollectError: it cannot be written, or is no valid experience.
        """
        rows = len(experience.trajectories.group_ids)
        per_row = {name: np.asarray(column).tolist() for name, column in experience.per_row.items()}
        about = {
            "step": step,
            "metrics": {name: float(value) for name, value in experience.metrics.items()},
            "samples": [dict(sample) for sample in experience.samples],
            "cursor": dict(experience.cursor),
            "texts": list(experience.texts),
            "per_row": per_row,
        }
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            if (self.folder / str(step)).exists():
                # Of a run that was stopped after it: what is written anew holds more files than trajectories alone.
                shutil.rmtree(self.folder / str(step))
            records = [{"per_row": {name: column[row] for name, column in per_row.items()}} for row in range(rows)]
            write_trajectories(self.folder / str(step), experience.trajectories, records=records)
            # Last: a batch without this file is not there.
            draft = self.folder / str(step) / "experience.draft"
            draft.unlink(missing_ok=True)
            draft.write_text(json.dumps(about), encoding="utf-8")
            sync(draft)
            draft.replace(draft.with_name("experience.json"))
            sync(draft.parent)
        except (OSError, TypeError, ValueError) as error:
            raise CollectError(f"The batch of step {step + 1} cannot be kept in {self.folder}: {error}") from error

    def load(self, step: int) -> Experience | None:
        """The batch of a step as it was saved; None where there is none, or it is damaged."""
        try:
            about = json.loads(read_regular(self.folder / str(step) / "experience.json"))
            trajectories = read_episodes(self.folder / str(step)).trajectories
            return Experience(
                trajectories=trajectories,
                per_row={name: np.asarray(column) for name, column in about["per_row"].items()},
                metrics=about["metrics"],
                samples=tuple(about["samples"]),
                texts=tuple(about["texts"]),
                cursor=about["cursor"],
            )
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError, TrajectoryFileError):
            return None

    def forget(self, before: int) -> None:
        """Remove the batches of steps below `before`."""
        for path in self.folder.glob("*"):
            if path.name.isdigit() and int(path.name) < before:
                with suppress(OSError):
                    shutil.rmtree(path)


class KeptCollector:
    """Writes every batch down before it is learned, and reads it instead of sampling it again: with a sampler that is
    not repeatable, a run that was stopped still goes on with the very batches it had.
    """

    def __init__(self, collector: Collector, store: Store) -> None:
        """Keep the batches of `collector` in `store`."""
        self._collector, self._store = collector, store

    @property
    def shape(self) -> BatchShape:
        """See `Collector.shape`."""
        return self._collector.shape

    @property
    def brings(self) -> Brings:
        """What the collector brings."""
        return brought_by(self._collector)

    def collect(self, policy: PolicySnapshot, key: PRNGKey, step: int, cursor: Mapping[str, Any]) -> Experience:
        """See `Collector.collect`."""
        kept, shape = self._store.load(step), self._collector.shape
        # Of other sizes where the run goes on with changed settings.
        if kept is not None and kept.trajectories.tokens.shape == (shape.rows, shape.width):
            return kept
        experience = self._collector.collect(policy, key, step, cursor)
        self._store.save(step, experience)
        return experience
