"""The loop of a control run: so many iterations, look at them, save, until the end."""

from collections.abc import Callable
from collections.abc import Mapping
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any
from typing import NamedTuple
from typing import Protocol

import jax
import jax.numpy as jnp
import numpy as np

from jaxrl_llm.training.control.settings import ControlSettings
from jaxrl_llm.training.run.checkpoints import Checkpoints
from jaxrl_llm.training.run.checkpoints import Progress
from jaxrl_llm.training.run.checkpoints import checkpoint_steps
from jaxrl_llm.training.run.checkpoints import flatten_settings
from jaxrl_llm.training.run.checkpoints import read_progress
from jaxrl_llm.training.run.checkpoints import refuse_changed_settings
from jaxrl_llm.training.run.errors import NonFiniteError
from jaxrl_llm.training.run.errors import StorageError


class Named(Protocol):
    """A game, of whichever kind."""

    @property
    def name(self) -> str:
        """With what its rules depend on."""
        ...

    @property
    def actions(self) -> tuple[str, ...]:
        """The name of each action."""
        ...


class Trainer(Protocol):
    """What can be trained: `GameTrainer`, or `HostTrainer`."""

    @property
    def game(self) -> Named:
        """What is played."""
        ...

    @property
    def settings(self) -> ControlSettings:
        """The numbers."""
        ...

    @property
    def measures(self) -> tuple[str, ...]:
        """The names of the metrics."""
        ...

    def init(self, seeds: Any) -> Any:
        """The state of every seed before the first iteration."""
        ...

    def run(self, state: Any, iterations: int) -> tuple[Any, Mapping[str, Any]]:
        """So many iterations, and the metrics [seeds, iterations] of each."""
        ...


class Trained(NamedTuple):
    """What a run ends with.

    state: of the trainer. metrics: [seeds, iterations] by name.
    """

    state: Any
    metrics: Mapping[str, np.ndarray]


def train(
    trainer: Trainer,
    seeds: Sequence[int],
    *,
    every: int,
    folder: Path | str | None = None,
    say: Callable[[str], None] = lambda _: None,
) -> Trained:
    """Train every seed to the end; with a folder, go on from its newest checkpoint, to the last bit.

    Args:
        trainer: what is trained, for `settings.iterations`.
        seeds: of all random numbers, one for each run.
        every: iterations between two looks at the numbers, and between two checkpoints.
        folder: of the checkpoints; nothing is saved without one.
        say: told, after each look, how far it is.

    Raises:
        ValueError: `every` is below 1, or there is no seed.
        ChangedSettingsError: the folder's run has other settings, another game, or a game with other actions.
        NonFiniteError: a return is not finite, or no update of an iteration could be made.
        StorageError: a checkpoint cannot be written, or none can be read.
    """
    if every < 1 or not seeds:
        raise ValueError(f"every is {every} and seeds are {list(seeds)}; every must be 1 or more, and one seed there.")
    total, kept = trainer.settings.iterations, describe(trainer, seeds, every)
    state = trainer.init(jnp.asarray(seeds))
    metrics = {name: np.zeros((len(seeds), total), np.float32) for name in trainer.measures}
    if folder is None:
        return _go_on(trainer, seeds, every, kept, state, metrics, 0, None, say)
    checkpoints = Checkpoints(Path(folder))
    try:
        (state, metrics), done = _restored(checkpoints, (state, metrics), kept, say)
        return _go_on(trainer, seeds, every, kept, state, metrics, done, checkpoints, say)
    finally:
        checkpoints.close()


def _go_on(
    trainer: Trainer,
    seeds: Sequence[int],
    every: int,
    kept: dict[str, Any],
    state: Any,
    metrics: dict[str, np.ndarray],
    done: int,
    checkpoints: Checkpoints | None,
    say: Callable[[str], None],
) -> Trained:
    """From `done` iterations to the last."""
    total = trainer.settings.iterations
    while done < total:
        count = min(every, total - done)
        state, piece = trainer.run(state, count)
        for name, values in jax.device_get(piece).items():
            metrics[name][:, done : done + count] = values
        _require_finite(metrics, trainer, seeds, slice(done, done + count), checkpoints)
        done += count
        if checkpoints is not None:
            updates = done * trainer.settings.updates
            checkpoints.save((state, metrics), Progress(done, kept, frozen_hash="", file_bytes={}, updates=updates))
        say(f"{done / total:.0%}")
    return Trained(state, metrics)


def describe(trainer: Trainer, seeds: Sequence[int], every: int) -> dict[str, Any]:
    """What a run must agree in with the checkpoint that it goes on from, by name."""
    # Games on the host begin anew after `every` iterations, and a loop of another length is another program.
    game = {"game": trainer.game.name, "actions": list(trainer.game.actions), "seeds": list(seeds), "every": every}
    return flatten_settings(game) | flatten_settings(trainer.settings)


def _restored(
    checkpoints: Checkpoints, start: tuple[Any, dict[str, np.ndarray]], kept: dict[str, Any], say: Callable[[str], None]
) -> tuple[tuple[Any, dict[str, np.ndarray]], int]:
    """State and metrics of the newest sound checkpoint with its iterations, or those that a run starts with."""
    for step in checkpoint_steps(checkpoints.folder):
        with suppress(StorageError):
            # Before the arrays are compared, whose sentence would name shapes where the reason is a setting.
            refuse_changed_settings(read_progress(checkpoints.folder / str(step), step).settings, kept)
    state, metrics = start
    found = checkpoints.restore((state, jax.tree.map(jnp.asarray, metrics)), say=say)
    if found is None:
        return start, 0
    (state, metrics), progress = found
    say(f"goes on after iteration {progress.step}")
    return (state, {name: np.array(values) for name, values in metrics.items()}), progress.step


def _require_finite(
    metrics: Mapping[str, np.ndarray],
    trainer: Trainer,
    seeds: Sequence[int],
    looked_at: slice,
    checkpoints: Checkpoints | None,
) -> None:
    """Raise if a return is no number, or if an iteration could make none of its updates.

    Raises:
        NonFiniteError: naming iteration and seed.
    """
    returns, skipped = (metrics[name][:, looked_at] for name in ("returns", "skipped"))
    stuck = skipped >= trainer.settings.updates
    broken = np.argwhere(~np.isfinite(returns) | stuck)
    if not len(broken):
        return
    seed, place = broken[np.argmin(broken[:, 1])]
    what = (
        "no update could be made: the loss or its gradient is not finite"
        if stuck[seed, place]
        else f"the games' returns are {returns[seed, place]}"
    )
    iteration = looked_at.start + int(place)
    last = "" if checkpoints is None else f"; {checkpoints.last_good(iteration * trainer.settings.updates)}"
    raise NonFiniteError(f"In iteration {iteration + 1} of {trainer.game.name} (seed {seeds[seed]}) {what}{last}.")
