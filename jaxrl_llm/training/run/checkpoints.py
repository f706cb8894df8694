"""Atomic, sealed checkpoints over Orbax: the arrays of a run and, in the same commit, what the host must
remember.
"""

import dataclasses
import json
import os
import shutil
from collections.abc import Callable
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any
from typing import TypeVar

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp

from jaxrl_llm.durable import sync
from jaxrl_llm.durable import sync_tree
from jaxrl_llm.regular import read_regular
from jaxrl_llm.training.run.errors import ChangedSettingsError
from jaxrl_llm.training.run.errors import StorageError
from jaxrl_llm.training.run.errors import TrainingError
from jaxrl_llm.training.run.numbers import is_written
from jaxrl_llm.training.run.seals import what_is_broken
from jaxrl_llm.training.run.seals import write_seal
from jaxrl_llm.training.run.state import TrainState
from jaxrl_llm.training.run.state import named_leaves
from jaxrl_llm.typing import PyTree


@dataclasses.dataclass(frozen=True)
class Progress:
    """What a checkpoint keeps beside the arrays.

    Attributes:
        step: rollout batches finished.
        settings: the run's settings as JSON values, to notice a change.
        frozen_hash: fingerprint of the parameters that are not saved because they never change.
        file_bytes: length of each file that is cut back when the run resumes, by name. [bytes]
        cursor: what the collector has to know to go on: the state of a curriculum, for example.
        file_sha256: SHA-256 of what these files held up to that length, by name.
        updates: optimiser steps applied: checkpoints with the same number hold the same policy.
        model: what the arrays are the parameters of, as `text.policy.describe_model` says it; empty in checkpoints of a
            version that did not write it down.
    """

    step: int
    settings: dict[str, Any]
    frozen_hash: str
    file_bytes: dict[str, int]
    cursor: dict[str, Any] = dataclasses.field(default_factory=dict)
    file_sha256: dict[str, str] = dataclasses.field(default_factory=dict)
    updates: int = 0
    model: dict[str, Any] = dataclasses.field(default_factory=dict)


def _fields(value: Any) -> Mapping[str, Any] | None:
    """The named parts of a dataclass or mapping; None for anything else."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        named = ((field, getattr(value, field.name)) for field in dataclasses.fields(value))
        return {field.name: item for field, item in named if is_written(field, item)}
    return value if isinstance(value, Mapping) else None


def flatten_settings(settings: Any) -> dict[str, Any]:
    """A dataclass or mapping, nested or not, as one flat mapping of dotted names to JSON values."""
    flat: dict[str, Any] = {}
    for name, value in (_fields(settings) or {}).items():
        if _fields(value) is not None:
            flat |= {f"{name}.{inner}": item for inner, item in flatten_settings(value).items()}
        else:
            flat[str(name)] = json.loads(json.dumps(value, default=str))
    return flat


def settings_difference(
    saved: Mapping[str, Any], current: Mapping[str, Any], *, absent: str = "(by default, or absent)"
) -> list[str]:
    """One line for each setting that differs: its name, the saved value and the current one.

    Args:
        saved, current: flat; a field that is newer than runs that were saved is not among them at its default.
        absent: what is said for a name that is not among them.
    """
    names = sorted(set(saved) | set(current))
    values = [(name, saved.get(name, absent), current.get(name, absent)) for name in names]
    return [f"{name}: {before!r} -> {now!r}" for name, before, now in values if before != now]


def refuse_changed_settings(saved: Mapping[str, Any], current: Mapping[str, Any]) -> None:
    """Raise if a run would go on under other settings than it began with.

    Raises:
        ChangedSettingsError: listing each difference.
    """
    lines = settings_difference(saved, current)
    if lines:
        raise ChangedSettingsError(
            "This run was started with other settings:\n  "
            + "\n  ".join(lines)
            + "\nResume it with the settings it began with, allow the change explicitly, or start a new run."
        )


def _bytes_of(arrays: Mapping[str, Any]) -> int:
    return sum(leaf.size * leaf.dtype.itemsize for leaf in arrays.values())


def _is_key(leaf: Any) -> bool:
    return jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


UNFINISHED, DROPPED, ASIDE = ".unfinished-", ".dropped-", ".set-aside"
"""Of names of folders: being written, being removed (both swept away later), and damaged (kept for a person)."""

State = TypeVar("State")
"""The arrays of a run: a `TrainState`, or any other tree of arrays."""
Fits = Callable[[Progress], str | None]
"""Why a checkpoint does not fit what lies around it, as the end of a sentence; None where it does."""
Say = Callable[[str], None]


def checkpoint_steps(folder: Path) -> list[int]:
    """The steps whose checkpoints are in the folder, sound or not, the newest first."""
    try:
        names = [path.name for path in folder.iterdir()]
    except OSError:
        return []
    return sorted((int(name) for name in names if _is_step(name)), reverse=True)


def _is_step(name: str) -> bool:
    """Whether a checkpoint may have this name: a number as we write it, and short enough to be one."""
    return name.isascii() and name.isdigit() and len(name) < 19 and str(int(name)) == name


def read_progress(folder: Path, step: int) -> Progress:
    """What a sealed checkpoint keeps beside the arrays.

    Raises:
        StorageError: it is that of another step, or none.
    """
    try:
        progress = Progress(**json.loads(read_regular(folder / "progress" / "metadata")))
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise StorageError(f"what it keeps beside the arrays cannot be read ({error})") from error
    if progress.step != step:
        raise StorageError(f"it is that of step {progress.step}")
    return progress


class Checkpoints:
    """The checkpoints of one run, the newest `keep` of them.

    A checkpoint is written under a temporary name, sealed, handed to the disk and renamed when complete: a process
    killed, or a power cut, at any moment leaves the previous ones as they were.
    """

    def __init__(self, folder: Path, *, keep: int = 2) -> None:
        """Open or make the folder, and sweep away what killed processes left.

        Raises:
            ValueError: `keep` is below 1.
            StorageError: the folder cannot be written.
        """
        if keep < 1:
            raise ValueError(f"keep is {keep}; at least 1 checkpoint must be kept.")
        self.folder, self._keep = Path(folder).absolute(), keep
        self._known: set[int] = set()
        probe = self.folder / ".writable"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            probe.unlink(missing_ok=True)
            probe.write_bytes(b"0")
            probe.unlink()
            left = [path for path in self.folder.iterdir() if path.name.startswith((UNFINISHED, DROPPED))]
            left += list(self.folder.glob("*.orbax-checkpoint-tmp*"))
        except OSError as error:
            raise StorageError(f"Cannot write checkpoints to {self.folder}: {error.strerror}.") from error
        for path in left:
            shutil.rmtree(path, ignore_errors=True)
        handlers = {"state": ocp.StandardCheckpointHandler(), "progress": ocp.JsonCheckpointHandler()}
        self._checkpointer = ocp.Checkpointer(ocp.CompositeCheckpointHandler(**handlers))

    def latest(self) -> Path | None:
        """Folder of the newest checkpoint."""
        steps = checkpoint_steps(self.folder)
        return self._path(steps[0]) if steps else None

    def last_good(self, updates: int) -> str:
        """Where to go back to from a policy that is not finite, in words.

        Args:
            updates: of that policy; a checkpoint with as many holds it too.
        """
        for step in checkpoint_steps(self.folder):
            with suppress(StorageError):
                if read_progress(self._path(step), step).updates < updates:
                    newer = "" if self._path(step) == self.latest() else " (newer ones hold the same policy as now)"
                    return f"the last good checkpoint is {self._path(step)}{newer}"
        return "no checkpoint was saved before that policy" if self.latest() else "no checkpoint was saved yet"

    def _path(self, step: int) -> Path:
        return self.folder / str(step)

    def require_space(self, state: TrainState) -> None:
        """Raise before anything is computed if the disk cannot take one more checkpoint of this size.

        Raises:
            StorageError: naming both sizes.
        """
        needed, free = (
            _bytes_of(named_leaves(state.params)) + _bytes_of(named_leaves(state.opt_state)),
            shutil.disk_usage(self.folder).free,
        )
        if free < needed:
            raise StorageError(
                f"A checkpoint needs {needed / 1e6:.0f} MB but {self.folder} has {free / 1e6:.0f} MB free; "
                "free some space or choose another run folder."
            )

    def save(self, state: PyTree, progress: Progress) -> Path:
        """Write one checkpoint, atomically; saving the same step twice keeps the first.

        Raises:
            StorageError: the disk is full or the folder is gone; earlier checkpoints are as they were.
        """
        folder = self._path(progress.step)
        if progress.step in self._known:
            return folder
        arrays = {
            name: jax.random.key_data(leaf) if _is_key(leaf) else leaf for name, leaf in named_leaves(state).items()
        }
        items = ocp.args.Composite(
            state=ocp.args.StandardSave(arrays),
            progress=ocp.args.JsonSave(dataclasses.asdict(progress)),
        )
        draft = self.folder / f"{UNFINISHED}{progress.step}"
        try:
            self._checkpointer.save(draft, args=items)
            write_seal(draft)
            sync_tree(draft)
            if os.path.lexists(folder):
                self._set_aside(progress.step)
            draft.rename(folder)
            sync(self.folder)
        except Exception as error:
            # Orbax and TensorStore report a full disk under several exception types.
            for left in self.folder.glob(f"{UNFINISHED}*"):
                shutil.rmtree(left, ignore_errors=True)
            last = self.latest()
            last = "none is complete" if last in (None, folder) else f"the last good one is {last}"
            raise StorageError(f"Cannot write checkpoint {folder} ({_first_line(error)}); {last}.") from error
        self._known.add(progress.step)
        self._drop_old(progress.step)
        return folder

    def _drop_old(self, newest: int) -> None:
        """Remove all but the newest up to this step; one that cannot be removed stays, and so does what is no step of
        ours.
        """
        for step in [step for step in checkpoint_steps(self.folder) if step <= newest][self._keep :]:
            going = self.folder / f"{DROPPED}{step}"
            with suppress(OSError):
                self._path(step).rename(going)
                shutil.rmtree(going)

    def _set_aside(self, step: int) -> Path:
        """Give a checkpoint a name that no checkpoint has, and return it."""
        place, number = self.folder / f"{step}{ASIDE}", 1
        while os.path.lexists(place):
            number += 1
            place = self.folder / f"{step}{ASIDE}-{number}"
        self._path(step).rename(place)
        return place

    def restore(
        self, template: State, *, fits: Fits = lambda _: None, say: Say = lambda _: None
    ) -> tuple[State, Progress] | None:
        """The newest sound checkpoint laid out like `template` (tree, dtypes, shapes, devices), or None if there is
        none at all. Newer ones that are not sound are set aside once an older one is found that is.

        Args:
            template: the state before the first step.
            fits: whether a checkpoint fits the files that lie around it.
            say: told, a sentence each, what is not sound and what became of it.

        Raises:
            StorageError: there are checkpoints and none is sound; nothing was moved.
            TrainingError: the checkpoint holds other arrays than the template.
        """
        unsound: dict[int, str] = {}
        for step in checkpoint_steps(self.folder):
            try:
                found = self._restore(step, template, fits)
            except StorageError as error:
                unsound[step] = str(error)
                continue
            for other, reason in unsound.items():
                sentence = f"Checkpoint {self._path(other)} is not used: {reason}."
                try:
                    say(f"{sentence} It is set aside as {self._set_aside(other).name}.")
                except OSError as error:
                    raise StorageError(f"{sentence} It cannot be set aside: {error.strerror}.") from error
            self._known = {step}
            return found
        if unsound:
            reasons = " ".join(f"{self._path(step)}: {reason}." for step, reason in unsound.items())
            raise StorageError(
                f"None of the checkpoints can be gone on with. {reasons} Put back what is missing, start a run in "
                "another folder, or delete this one to begin again."
            )
        return None

    def _restore(self, step: int, template: State, fits: Fits) -> tuple[State, Progress]:
        """One checkpoint, verified.

        Raises:
            StorageError: it is not sound; the end of a sentence says why.
            TrainingError: it is sound and holds other arrays.
        """
        folder = self._path(step)
        reason = what_is_broken(folder)
        if reason:
            raise StorageError(reason)
        progress = read_progress(folder, step)
        reason = fits(progress)
        if reason:
            raise StorageError(reason)
        leaves = named_leaves(template)
        self._require_same_arrays(folder, leaves)
        abstract = {name: _abstract(leaf) for name, leaf in leaves.items()}
        try:
            restored = self._checkpointer.restore(
                folder, args=ocp.args.Composite(state=ocp.args.StandardRestore(abstract))
            )["state"]
        except Exception as error:
            # Orbax and TensorStore report what they cannot read under several exception types.
            raise StorageError(f"its arrays cannot be read ({_first_line(error)})") from error
        arrays = [
            jax.random.wrap_key_data(restored[name], impl=jax.random.key_impl(leaf))
            if _is_key(leaf)
            else restored[name]
            for name, leaf in leaves.items()
        ]
        return jax.tree.unflatten(jax.tree.structure(template), arrays), progress

    def _require_same_arrays(self, folder: Path, leaves: Mapping[str, Any]) -> None:
        try:
            saved = dict((self._checkpointer.metadata(folder).item_metadata or {})["state"])
        except Exception as error:
            raise StorageError(f"what arrays it has cannot be read ({_first_line(error)})") from error
        saved = {name: (tuple(item.shape), str(item.dtype)) for name, item in saved.items()}
        wanted = {name: _abstract(leaf) for name, leaf in leaves.items()}
        wanted = {name: (tuple(item.shape), str(item.dtype)) for name, item in wanted.items()}
        if saved == wanted:
            return
        texts = ({name: str(item) for name, item in arrays.items()} for arrays in (saved, wanted))
        lines = settings_difference(*texts, absent="(absent)")
        shown = lines[:5] + ([f"and {len(lines) - 5} more"] if len(lines) > 5 else [])
        raise TrainingError(
            f"Checkpoint {folder} holds other arrays than this model and optimiser:\n  " + "\n  ".join(shown)
        )

    def close(self) -> None:
        """Let go of the folder."""
        self._checkpointer.close()


def _first_line(error: Exception) -> str:
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__


def _abstract(leaf: Any) -> jax.ShapeDtypeStruct:
    if _is_key(leaf):
        leaf = jax.random.key_data(leaf)
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding)
