"""Where a run's numbers go: JSON lines first, TensorBoard and Weights & Biases beside them.

`metrics.jsonl` holds no clock reading, so the files of an interrupted and of an uninterrupted run are equal byte for
byte. Seconds are written to a file of their own.
"""

import hashlib
import json
import math
import os
import socket
import time
from collections.abc import Callable
from collections.abc import Iterable
from collections.abc import Mapping
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any
from typing import Protocol

from jaxrl_llm.regular import require_regular
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
            with suppress(FileNotFoundError):
                require_regular(path, devices=True)
            self._file = open(path, "ab", buffering=0)  # noqa: SIM115  (open for as long as this object)
            self._digest = hashlib.sha256()
            # Devices have no length to cut.
            if path.is_file():
                length = path.stat().st_size
                if length < keep_bytes:
                    self._file.close()
                    raise StorageError(
                        f"{path} has {length} bytes, but the checkpoint was saved when it had {keep_bytes}: "
                        "it was changed since. Put the file back or start a new run."
                    )
                self._file.truncate(keep_bytes)
                with path.open("rb") as kept:
                    self._digest = hashlib.file_digest(kept, "sha256")
        except OSError as error:
            raise StorageError(f"Cannot write {path}: {error.strerror}.") from error

    @property
    def position(self) -> int:
        """Length of the file. [bytes]"""
        return os.fstat(self._file.fileno()).st_size

    @property
    def sha256(self) -> str:
        """SHA-256 of what the file should hold."""
        return self._digest.hexdigest()

    def append(self, row: Mapping[str, Any]) -> None:
        """Write one object as one line.

        Raises:
            StorageError: the disk is full or gone.
        """
        line = (json.dumps(_plain(row), allow_nan=False) + "\n").encode()
        self._digest.update(line)
        try:
            # A disk that is nearly full takes a part of it.
            while line:
                line = line[self._file.write(line) :]
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
        """Close the file.

        Raises:
            StorageError: the disk did not take what was written.
        """
        try:
            self._file.close()
        except OSError as error:
            raise StorageError(f"Cannot write {self.path}: {error.strerror}.") from error


class TensorBoard:
    """Event files that TensorBoard reads, in the format of tensorboardX; written at once, so that a full disk is an
    error of the write and not of a thread that nobody hears.
    """

    def __init__(self, folder: Path, *, first_step: int = 0) -> None:
        """The event file is made with the first write; TensorBoard hides what earlier files say about steps from
        `first_step` on.

        Raises:
            TrainingError: tensorboardX is not installed.
        """
        try:
            import tensorboardX.proto.event_pb2
            import tensorboardX.record_writer
            import tensorboardX.summary
        except ImportError as error:
            raise TrainingError("TensorBoard files need tensorboardX: pip install 'jaxrl_llm[experiments]'.") from error
        self._events, self._records = tensorboardX.proto.event_pb2, tensorboardX.record_writer
        self._scalar = tensorboardX.summary.scalar
        self._folder, self._first_step, self._file = Path(folder), first_step, None

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Record the numbers among the values.

        Raises:
            StorageError: the disk is full or gone.
        """
        numbers = {name: float(value) for name, value in values.items() if not isinstance(value, str)}
        events = [self._event(step=step, summary=self._scalar(name, value)) for name, value in numbers.items()]
        if self._file is None:
            events = [*self._opening(), *events]
        try:
            self._append(b"".join(map(self._record, events)))
        except OSError as error:
            raise StorageError(f"Cannot write {self._folder}: {error.strerror}.") from error

    def _opening(self) -> list[Any]:
        """What an event file begins with."""
        session = self._events.SessionLog
        purge = [self._event(step=self._first_step, session_log=session(status=session.START))]
        return [self._event(file_version="brain.Event:2"), *(purge if self._first_step else [])]

    def _event(self, **fields: Any) -> Any:
        return self._events.Event(wall_time=time.time(), **fields)

    def _record(self, event: Any) -> bytes:
        """Length, its checksum, the event, its checksum."""
        content, checksum = event.SerializeToString(), self._records.masked_crc32c
        length = len(content).to_bytes(8, "little")
        return b"".join(
            [length, checksum(length).to_bytes(4, "little"), content, checksum(content).to_bytes(4, "little")]
        )

    def _append(self, content: bytes) -> None:
        if self._file is None:
            self._folder.mkdir(parents=True, exist_ok=True)
            name = f"events.out.tfevents.{time.time_ns() // 1000:017d}.{os.getpid()}.{socket.gethostname()}"
            self._file = open(self._folder / name, "xb", buffering=0)  # noqa: SIM115  (open as long as this object)
        while content:
            content = content[self._file.write(content) :]

    def flush(self) -> None:
        """Wait until the disk has it.

        Raises:
            StorageError: it does not take it.
        """
        if self._file is None:
            return
        try:
            os.fsync(self._file.fileno())
        except OSError as error:
            raise StorageError(f"Cannot write {self._folder}: {error.strerror}.") from error

    def close(self) -> None:
        """Close the event file.

        Raises:
            StorageError: the disk did not take what was written.
        """
        if self._file is None:
            return
        try:
            self._file.close()
        except OSError as error:
            raise StorageError(f"Cannot write {self._folder}: {error.strerror}.") from error


class WeightsAndBiases:
    """A run on Weights & Biases; resuming with the same `run_id` goes on with the same page."""

    def __init__(self, project: str, run_id: str, config: Mapping[str, Any]) -> None:
        """The page is opened with the first write.

        Raises:
            TrainingError: wandb is not installed.
        """
        try:
            import wandb  # pyright: ignore[reportMissingImports]
        except ImportError as error:
            raise TrainingError("Weights & Biases needs its package: pip install 'jaxrl_llm[wandb]'.") from error
        self._open = partial(wandb.init, project=project, id=run_id, resume="allow", config=dict(config))
        self._run: Any = None

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Record the values."""
        if self._run is None:
            self._run = self._open()
        self._run.log(dict(values), step=step)

    def flush(self) -> None:
        """Nothing to do: the client sends on its own."""

    def close(self) -> None:
        """End the run."""
        if self._run is not None:
            self._run.finish()


class Trackers:
    """Further places for the metrics, none of which can stop a run: one that fails is said once and left out."""

    def __init__(self, writers: Iterable[MetricWriter], say: Callable[[str], None]) -> None:
        """Write to all of them; `say` is told of failures."""
        self._writers, self._say = list(writers), say

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Give the values of one step to each."""
        self._each(lambda writer: writer.write(step, values))

    def flush(self) -> None:
        """Flush each."""
        self._each(lambda writer: writer.flush())

    def close(self) -> None:
        """Close each."""
        self._each(lambda writer: writer.close())
        self._writers = []

    def _each(self, do: Callable[[MetricWriter], None]) -> None:
        for writer in list(self._writers):
            try:
                do(writer)
            except Exception as error:
                # A tracker is somebody else's program: it may raise anything.
                self._writers.remove(writer)
                with suppress(Exception):
                    writer.close()
                text = " ".join(str(error).split()) or type(error).__name__
                self._say(f"{type(writer).__name__} is left out from here on: {text.removesuffix('.')}.")
