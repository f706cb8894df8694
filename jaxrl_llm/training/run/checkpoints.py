"""Atomic checkpoints over Orbax: the arrays of a `TrainState` and, in the same commit, what the host must remember."""

import dataclasses
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp

from jaxrl_llm.training.run.errors import ChangedSettingsError
from jaxrl_llm.training.run.errors import StorageError
from jaxrl_llm.training.run.errors import TrainingError
from jaxrl_llm.training.run.state import TrainState
from jaxrl_llm.training.run.state import named_leaves


@dataclasses.dataclass(frozen=True)
class Progress:
    """What a checkpoint keeps beside the arrays.

    Attributes:
        step: rollout batches finished.
        settings: the run's settings as JSON values, to notice a change.
        frozen_hash: fingerprint of the parameters that are not saved because they never change.
        file_bytes: length of each file that is cut back when the run resumes, by name. [bytes]
        cursor: what the collector has to know to go on: the state of a curriculum, for example.
    """

    step: int
    settings: dict[str, Any]
    frozen_hash: str
    file_bytes: dict[str, int]
    cursor: dict[str, Any] = dataclasses.field(default_factory=dict)


def _fields(value: Any) -> Mapping[str, Any] | None:
    """The named parts of a dataclass or mapping; None for anything else."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
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


def settings_difference(saved: Mapping[str, Any], current: Mapping[str, Any]) -> list[str]:
    """One line for each setting that differs: its name, the saved value and the current one."""
    absent = "(absent)"
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


class Checkpoints:
    """The checkpoints of one run, the newest `keep` of them.

    A checkpoint is written under a temporary name and renamed when complete: a process killed at any moment leaves the
    previous ones as they were, and an incomplete one is removed when the folder is opened again.
    """

    def __init__(self, folder: Path, *, keep: int = 2) -> None:
        """Open or make the folder.

        Raises:
            ValueError: `keep` is below 1.
            StorageError: the folder cannot be written.
        """
        if keep < 1:
            raise ValueError(f"keep is {keep}; at least 1 checkpoint must be kept.")
        self.folder = Path(folder).absolute()
        probe = self.folder / ".writable"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            probe.write_bytes(b"0")
            probe.unlink()
        except OSError as error:
            raise StorageError(f"Cannot write checkpoints to {self.folder}: {error.strerror}.") from error
        options = ocp.CheckpointManagerOptions(
            max_to_keep=keep,
            enable_async_checkpointing=False,
            cleanup_tmp_directories=True,
            create=False,
        )
        handlers = {"state": ocp.StandardCheckpointHandler(), "progress": ocp.JsonCheckpointHandler()}
        self._manager = ocp.CheckpointManager(self.folder, options=options, item_handlers=handlers)

    def latest(self) -> Path | None:
        """Folder of the newest complete checkpoint."""
        step = self._manager.latest_step()
        return None if step is None else self.folder / str(step)

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

    def save(self, state: TrainState, progress: Progress) -> Path:
        """Write one checkpoint, atomically; saving the same step twice keeps the first.

        Raises:
            StorageError: the disk is full or the folder is gone; earlier checkpoints are as they were.
        """
        folder = self.folder / str(progress.step)
        if progress.step in self._manager.all_steps():
            return folder
        arrays = {
            name: jax.random.key_data(leaf) if _is_key(leaf) else leaf for name, leaf in named_leaves(state).items()
        }
        items = ocp.args.Composite(
            state=ocp.args.StandardSave(arrays),
            progress=ocp.args.JsonSave(dataclasses.asdict(progress)),
        )
        try:
            self._manager.save(progress.step, args=items)
            self._manager.wait_until_finished()
        except Exception as error:
            # Orbax and TensorStore report a full disk under several exception types.
            previous = self._manager.latest_step()
            last = (
                "none is complete"
                if previous in (None, progress.step)
                else f"the last good one is {self.folder / str(previous)}"
            )
            reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            raise StorageError(f"Cannot write checkpoint {folder} ({reason}); {last}.") from error
        return folder

    def restore(self, template: TrainState) -> tuple[TrainState, Progress] | None:
        """The newest checkpoint laid out like `template` (tree, dtypes, shapes, devices), or None if there is none.

        Raises:
            TrainingError: the checkpoint holds other arrays than the template.
        """
        step = self._manager.latest_step()
        if step is None:
            return None
        leaves = named_leaves(template)
        self._require_same_arrays(step, leaves)
        abstract = {name: _abstract(leaf) for name, leaf in leaves.items()}
        items = ocp.args.Composite(state=ocp.args.StandardRestore(abstract), progress=ocp.args.JsonRestore())
        restored = self._manager.restore(step, args=items)
        arrays = [
            jax.random.wrap_key_data(restored["state"][name], impl=jax.random.key_impl(leaf))
            if _is_key(leaf)
            else restored["state"][name]
            for name, leaf in leaves.items()
        ]
        return jax.tree.unflatten(jax.tree.structure(template), arrays), Progress(**restored["progress"])

    def _require_same_arrays(self, step: int, leaves: Mapping[str, Any]) -> None:
        saved = self._manager.item_metadata(step)["state"]
        saved = {name: (tuple(item.shape), str(item.dtype)) for name, item in dict(saved).items()}
        wanted = {name: _abstract(leaf) for name, leaf in leaves.items()}
        wanted = {name: (tuple(item.shape), str(item.dtype)) for name, item in wanted.items()}
        if saved == wanted:
            return
        lines = settings_difference({k: str(v) for k, v in saved.items()}, {k: str(v) for k, v in wanted.items()})
        shown = lines[:5] + ([f"and {len(lines) - 5} more"] if len(lines) > 5 else [])
        raise TrainingError(
            f"Checkpoint {self.folder / str(step)} holds other arrays than this model and optimiser:\n  "
            + "\n  ".join(shown)
        )

    def close(self) -> None:
        """Let go of the folder."""
        self._manager.close()


def _abstract(leaf: Any) -> jax.ShapeDtypeStruct:
    if _is_key(leaf):
        leaf = jax.random.key_data(leaf)
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding)
