"""Where a run stands: the newest checkpoint that is sound and fits the files beside it."""

import hashlib
import json
from collections.abc import Callable
from collections.abc import Sequence
from pathlib import Path

from jaxrl_llm.durable import sync
from jaxrl_llm.regular import open_regular
from jaxrl_llm.regular import read_regular
from jaxrl_llm.training.run.checkpoints import ASIDE
from jaxrl_llm.training.run.checkpoints import Checkpoints
from jaxrl_llm.training.run.checkpoints import Progress
from jaxrl_llm.training.run.errors import StorageError
from jaxrl_llm.training.run.state import TrainState

METRICS = "metrics.jsonl"
NEWEST = "newest.json"
"""Says which checkpoint was the last to be written, so that one that is gone is missed."""


def write_newest(folder: Path, step: int) -> None:
    """Write down that a checkpoint of this step was written.

    Raises:
        StorageError: the folder cannot be written.
    """
    draft = folder / f".{NEWEST}.part"
    try:
        draft.unlink(missing_ok=True)
        draft.write_text(json.dumps({"step": step}) + "\n", encoding="utf-8")
        sync(draft)
        draft.replace(folder / NEWEST)
    except OSError as error:
        raise StorageError(f"Cannot write {folder / NEWEST}: {error.strerror}.") from error


def _newest(folder: Path) -> int:
    """The step of the last checkpoint that was written; 0 where that is not known."""
    try:
        step = json.loads(read_regular(folder / NEWEST))["step"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return 0
    return step if type(step) is int else 0


def _finished_steps(path: Path) -> int:
    """The last step of a file of metrics; lines that say nothing of a step do not count."""
    last = 0
    try:
        lines = read_regular(path).splitlines()
    except OSError:
        return 0
    for line in lines:
        try:
            step = json.loads(line)["step"]
        except (ValueError, KeyError, TypeError, RecursionError):
            continue
        last = max(last, step if type(step) is int else 0)
    return last


def file_problem(folder: Path, names: Sequence[str], progress: Progress) -> str | None:
    """Whether the files of a run still begin with what they held at a checkpoint; if not, the end of a sentence."""
    for name in names:
        path, length = folder / name, progress.file_bytes.get(name, 0)
        if not length:
            continue
        try:
            with open_regular(path) as file:
                content = file.read(length)
        except OSError as error:
            return f"{path}, which had {length} bytes then, cannot be read ({error.strerror})"
        if len(content) < length:
            return f"{path} has {len(content)} bytes and had {length} then"
        if hashlib.sha256(content).hexdigest() != progress.file_sha256.get(name):
            return f"{path} was changed since: its first {length} bytes are not those it had then"
    return None


def find_standing(
    folder: Path,
    checkpoints: Checkpoints,
    template: TrainState,
    *,
    names: Sequence[str],
    checkpoint_every: int,
    say: Callable[[str], None],
) -> tuple[TrainState, Progress] | None:
    """State and progress to go on from; None for a run that begins.

    Args:
        folder: of the run.
        checkpoints: of the run.
        template: the state before the first step.
        names: of the files that are cut back to the checkpoint.
        checkpoint_every: steps between checkpoints.
        say: told what was found.

    Raises:
        StorageError: steps were finished and there is no sound checkpoint of any of them.
        TrainingError: the checkpoint holds other arrays.
    """
    found = checkpoints.restore(template, fits=lambda progress: file_problem(folder, names, progress), say=say)
    newest = _newest(folder)
    if found is not None:
        step = found[1].step
        if newest > step and not any(checkpoints.folder.glob(f"{newest}{ASIDE}*")):
            say(f"Checkpoint {checkpoints.folder / str(newest)}, the newest that was written, is missing.")
        return found
    finished = _finished_steps(folder / METRICS)
    if newest or finished > checkpoint_every:
        raise StorageError(
            f"{folder} has {max(finished, newest)} finished steps and no checkpoint of them in {checkpoints.folder}, "
            "where at least one was written; it is not begun again over them. Put the checkpoints back, start a run in "
            "another folder (--id), or delete this one to begin again."
        )
    if finished:
        say(f"The run stopped after step {finished}, before its first checkpoint; it begins again.")
    return None
