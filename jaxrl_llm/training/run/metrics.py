"""Where a run's numbers go: JSON lines first, TensorBoard and Weights & Biases beside them.

`metrics.jsonl` holds no clock reading, so the files of an interrupted and of an uninterrupted run are equal byte for
byte. Seconds are written to a file of their own.
"""

import json
import math
import os
from collections.abc import Iterable
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from typing import Protocol

from jaxrl_llm.training.run.errors import StorageError
from jaxrl_llm.training.run.errors import TrainingError


class MetricWriter(Protocol):
    """A place where the numbers of a step are written."""

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Record the values of one step."""
        ...

    def flush(self) -> None:
        """Make sure that what was written outlives the process."""
        ...

    def close(self) -> None:
        """Flush and let go of the file or connection."""
        ...


def _plain(value: Any) -> Any:
    """A JSON value; what is not a finite number becomes null, since JSON has no word for it."""
    if isinstance(value, (str, bool, int)) or value is None:
        return value
    if isinstance(value, Mapping):
        return {str(name): _plain(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    number = float(value)
    return number if math.isfinite(number) else None


class JsonLines:
    """An append-only file of JSON objects, one a line, that can be cut back to an earlier length.

    A line is handed to the operating system as soon as it is written, so a killed process loses none; `flush` waits for
    the disk.
    """

    def __init__(self, path: Path, *, keep_bytes: int = 0) -> None:
        """Open for appending, and drop everything after the first `keep_bytes` bytes.

        Raises:
            StorageError: the file cannot be opened, or is shorter than `keep_bytes`.
        """
        self.path = path
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = open(path, "ab", buffering=0)  # noqa: SIM115  (open for as long as this object)
            # Devices and pipes have no length to cut.
            if path.is_file():
                length = path.stat().st_size
                if length < keep_bytes:
                    self._file.close()
                    raise StorageError(
                        f"{path} has {length} bytes, but the checkpoint was saved when it had {keep_bytes}: "
                        "it was changed since. Put the file back or start a new run."
                    )
                self._file.truncate(keep_bytes)
        except OSError as error:
            raise StorageError(f"Cannot write {path}: {error.strerror}.") from error

    @property
    def position(self) -> int:
        """Length of the file. [bytes]"""
        return os.fstat(self._file.fileno()).st_size

    def append(self, row: Mapping[str, Any]) -> None:
        """Write one object as one line.

        Raises:
            StorageError: the disk is full or gone.
        """
        line = json.dumps(_plain(row), allow_nan=False) + "\n"
        try:
            self._file.write(line.encode())
        except OSError as error:
            raise StorageError(f"Cannot write {self.path}: {error.strerror}.") from error

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Write `{"step": step, name: value, ...}` with the names in order."""
        self.append({"step": step, **{name: values[name] for name in sorted(values)}})

    def flush(self) -> None:
        """Wait until the disk has it."""
        try:
            os.fsync(self._file.fileno())
        except OSError as error:
            raise StorageError(f"Cannot write {self.path}: {error.strerror}.") from error

    def close(self) -> None:
        """Close the file."""
        self._file.close()


class TensorBoard:
    """Event files that TensorBoard reads, written by tensorboardX."""

    def __init__(self, folder: Path, *, first_step: int = 0) -> None:
        """Open an event file; TensorBoard hides what earlier files say about steps from `first_step` on.

        Raises:
            TrainingError: tensorboardX is not installed.
        """
        try:
            from tensorboardX import SummaryWriter
        except ImportError as error:
            raise TrainingError("TensorBoard files need tensorboardX: pip install 'jaxrl_llm[experiments]'.") from error
        try:
            self._writer = SummaryWriter(str(folder), purge_step=first_step or None)
        except OSError as error:
            raise StorageError(f"Cannot write {folder}: {error.strerror}.") from error

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Record the numbers among the values."""
        for name, value in values.items():
            if not isinstance(value, str):
                self._writer.add_scalar(name, float(value), step)

    def flush(self) -> None:
        """Write what is buffered."""
        self._writer.flush()

    def close(self) -> None:
        """Close the event file."""
        self._writer.close()


class WeightsAndBiases:
    """A run on Weights & Biases; resuming with the same `run_id` goes on with the same page."""

    def __init__(self, project: str, run_id: str, config: Mapping[str, Any]) -> None:
        """Start or resume a run.

        Raises:
            TrainingError: wandb is not installed.
        """
        try:
            import wandb  # pyright: ignore[reportMissingImports]
        except ImportError as error:
            raise TrainingError("Weights & Biases needs its package: pip install 'jaxrl_llm[wandb]'.") from error
        self._run = wandb.init(project=project, id=run_id, resume="allow", config=dict(config))

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Record the values."""
        self._run.log(dict(values), step=step)

    def flush(self) -> None:
        """Nothing to do: the client sends on its own."""

    def close(self) -> None:
        """End the run."""
        self._run.finish()


def write_all(writers: Iterable[MetricWriter], step: int, values: Mapping[str, float]) -> None:
    """Give the values of one step to every writer."""
    for writer in writers:
        writer.write(step, values)
