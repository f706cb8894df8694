"""What a run's files say, read once; everything that is shown of a run comes from here."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from experiments import metric_names as names
from experiments import run_folder
from experiments import run_shapes
from experiments.run_folder import RunFolder

Row = dict[str, Any]


LARGEST = 1e100
"""Of the numbers that a report shows."""


@dataclasses.dataclass(frozen=True)
class Record:
    """The files of one run; those of a run that is not complete may be empty.

    Attributes:
        run: its folder.
        config: config.json.
        environment: environment.json.
        metrics: rows of metrics.jsonl.
        timings: rows of timings.jsonl.
        samples: samples.json.
        summary: summary.json.
        evaluations: what `evaluate` wrote, evaluation-*.json.
    """

    run: RunFolder
    config: dict[str, Any]
    environment: dict[str, Any]
    metrics: Sequence[Row]
    timings: Sequence[Row]
    samples: dict[str, Any]
    summary: dict[str, Any]
    evaluations: Sequence[dict[str, Any]] = ()

    @property
    def settings(self) -> dict[str, Any]:
        """The settings of the run, by name."""
        return self.config["settings"]

    @property
    def batches(self) -> int:
        """Rollout batches finished; a row of step 0 only evaluates."""
        return sum(names.REWARD in row for row in self.metrics)

    def column(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        """Steps at which something was a number, and those numbers; a name is in one of the two files of rows.

        Infinities, NaN and what is as good as infinite are left out: nothing can be drawn or added up with them.
        """
        steps, values = [], []
        for row in (*self.metrics, *self.timings):
            if isinstance(row.get(name), (int, float)) and abs(row[name]) < LARGEST:
                steps.append(row["step"])
                values.append(row[name])
        return np.array(steps, int), np.array(values, float)

    def together(self, *wanted: str) -> tuple[np.ndarray, ...]:
        """The steps at which all of them are numbers, and the numbers of each."""
        columns = [self.column(name) for name in wanted]
        steps = columns[0][0]
        for others, _ in columns[1:]:
            steps = np.intersect1d(steps, others)
        return steps, *(values[np.isin(at, steps)] for at, values in columns)


def read(run: RunFolder) -> Record:
    """Read the files of a run.

    Raises:
        UserError: the folder is not a run, or one of its files cannot be read.
    """

    def optional(name: str) -> dict[str, Any]:
        path = run.path / f"{name}.json"
        return run_shapes.read(path, name) if path.exists() else {}

    return Record(
        run=run,
        config=run_shapes.read(run.config, "config"),
        environment=optional("environment"),
        metrics=run_folder.read_rows(run.path / "metrics.jsonl"),
        timings=run_folder.read_rows(run.path / "timings.jsonl"),
        samples=optional("samples"),
        summary=optional("summary"),
        evaluations=[run_folder.read_json(path) for path in sorted(run.path.glob("evaluation-*.json"))],
    )
