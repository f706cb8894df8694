"""An experiment that computes instead of training: named parts, each kept once it is done, then numbers and a page.

It has the run folder, settings, progress and report of every experiment. A part is a function without arguments that
returns named arrays; `parts/<name>.npz` is written when it ends, so that a run that was stopped goes on after its last
finished part. One that takes long is `Resumable`: it has a folder for checkpoints of its own.
"""

import dataclasses
import shutil
import time
from collections.abc import Callable
from collections.abc import Mapping
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from experiments.arguments import RunArguments
from experiments.kept_arrays import KeptArrayError
from experiments.kept_arrays import read_arrays
from experiments.progress import progress
from experiments.ranges import Ranges
from experiments.registry import Expectation
from experiments.run_folder import RunFolder
from experiments.run_folder import UserError
from experiments.run_folder import read_json
from experiments.run_folder import write_json
from experiments.settings import changed_settings
from experiments.settings import flat_settings
from experiments.style import Picture
from jaxrl_llm.durable import sync
from jaxrl_llm.exploration import PosteriorError
from jaxrl_llm.training.run.errors import TrainingError
from jaxrl_llm.training.run.interrupts import StopAtOnce
from jaxrl_llm.training.run.interrupts import StoppedError
from jaxrl_llm.training.run.reporting import Reporter

Arrays = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Resumable:
    """A part that goes on by itself where it was stopped.

    Attributes:
        compute: (a folder of its own, what is told in a word or two how far it is) -> named arrays; the folder is
            removed once they are kept.
    """

    compute: Callable[[Path, Callable[[str], None]], Mapping[str, Any]]


Parts = Mapping[str, Callable[[], Mapping[str, Any]] | Resumable]
Results = Mapping[str, Arrays]
SECONDS = "seconds"
"""Every part also keeps how long it took, under this name."""


@dataclasses.dataclass(frozen=True)
class Table:
    """A table of a page: the first column is text, the others are numbers."""

    head: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclasses.dataclass(frozen=True)
class Section:
    """A part of a page.

    Attributes:
        title: heading.
        paragraphs: text below it.
        pictures: figures.
        table: numbers, if there are any.
    """

    title: str
    paragraphs: Sequence[str]
    pictures: Sequence[Picture] = ()
    table: Table | None = None


@dataclasses.dataclass(frozen=True)
class Page:
    """What a report says besides claim, settings and machine.

    Attributes:
        value: the number that matters, in large.
        value_range: its interval or unit, smaller.
        sentence: what that number is.
        facts: what was run, in one line.
        sections: the rest.
    """

    value: str
    value_range: str
    sentence: str
    facts: str
    sections: Sequence[Section]


@dataclasses.dataclass(frozen=True)
class Study:
    """One claim that is shown by computing.

    Attributes:
        name: name of its file.
        claim: the claim, one sentence.
        cost: what it costs on a machine that is named.
        settings: as the claim is made; any frozen dataclass of numbers and names.
        tiny: a twin that runs in seconds and claims nothing.
        expectation: when the claim counts as met.
        parts: settings -> name -> what computes that part.
        summarise: (settings, results) -> numbers of the summary.
        page: (settings, results, summary) -> the report.
        ranges: what the fields of the settings may be; those that are not there must be finite.
    """

    name: str
    claim: str
    cost: str
    settings: Any
    tiny: Any
    expectation: Expectation
    parts: Callable[[Any], Parts]
    summarise: Callable[[Any, Results], dict[str, Any]]
    page: Callable[[Any, Results, Mapping[str, Any]], Page]
    ranges: Ranges = dataclasses.field(default_factory=dict)


def _path(run: RunFolder, name: str) -> Path:
    return run.path / "parts" / f"{name}.npz"


def _read_part(path: Path) -> Arrays:
    """The arrays of a part, see `kept_arrays`.

    Raises:
        KeptArrayError: they cannot be read, or do not say how long they took.
    """
    arrays = read_arrays(path)
    seconds = arrays.get(SECONDS)
    if seconds is None or seconds.shape != () or seconds.dtype.kind != "f" or not np.isfinite(seconds):
        raise KeptArrayError(f"Cannot read {path}: it has no number {SECONDS!r}, which every part has.")
    return arrays


def read_results(run: RunFolder) -> Results:
    """The parts that are done.

    Raises:
        UserError: one of them cannot be read.
    """
    try:
        return {path.stem: _read_part(path) for path in sorted((run.path / "parts").glob("*.npz"))}
    except KeptArrayError as error:
        raise UserError(f"{error} Run the experiment again with --resume {run.label}: it is computed again.") from error


def damaged_parts(run: RunFolder) -> dict[str, str]:
    """The parts that are there and cannot be read, each with a sentence that says why."""
    damaged = {}
    for path in sorted((run.path / "parts").glob("*.npz")):
        try:
            _read_part(path)
        except KeptArrayError as error:
            damaged[path.stem] = str(error)
    return damaged


def _own_folder(run: RunFolder, name: str) -> Path:
    return run.path / "parts" / f"{name}.checkpoints"


def forget_results(run: RunFolder) -> None:
    """Remove the parts of a run whose settings were changed."""
    for folder in (run.path / "parts").glob("*.checkpoints"):
        shutil.rmtree(folder)
    for path in (run.path / "parts").glob("*.npz"):
        path.unlink()


def get_parts(study: Study, settings: Any) -> Parts:
    """What is to be computed.

    Raises:
        UserError: the settings do not fit each other, or a package is missing.
    """
    try:
        return study.parts(settings)
    except (ValueError, ImportError) as error:
        raise UserError(str(error)) from error


def _set_aside(run: RunFolder, damaged: Mapping[str, str]) -> None:
    """Give damaged parts another name, so that they count as missing, and say so."""
    for name, sentence in damaged.items():
        path = _path(run, name)
        try:
            path.replace(path.with_suffix(".damaged"))
        except OSError as error:
            raise UserError(f"{sentence} It cannot be set aside: {error.strerror}.") from error
        print(f"{sentence} It is set aside and computed again.", flush=True)


def run_parts(run: RunFolder, parts: Parts) -> str | None:
    """Compute the parts that are missing or damaged, and keep each.

    Returns:
        None when all are there now; else what asked to stop.

    Raises:
        UserError: the folder cannot be written, an agent's posterior is none any more, or training cannot go on.
    """
    (run.path / "parts").mkdir(exist_ok=True)
    _set_aside(run, damaged_parts(run))
    missing = {name: part for name, part in parts.items() if not _path(run, name).exists()}
    done = len(parts) - len(missing)
    try:
        with StopAtOnce(), progress() as reporter:
            reporter.begin(first_step=done, steps=len(parts))
            for number, (name, part) in enumerate(missing.items(), start=done + 1):
                reporter.phase(name)
                start = time.perf_counter()
                computed, earlier = _computed(run, name, part, reporter)
                values = {key: np.asarray(value) for key, value in computed.items()}
                seconds = earlier + time.perf_counter() - start
                unfinished = _path(run, name).with_suffix(".unfinished")
                unfinished.unlink(missing_ok=True)
                with unfinished.open("wb") as file:
                    np.savez_compressed(file, allow_pickle=False, **values, **{SECONDS: np.asarray(seconds)})
                sync(unfinished)
                unfinished.replace(_path(run, name))
                shutil.rmtree(_own_folder(run, name), ignore_errors=True)
                reporter.finish_step(number, {}, {"total": seconds})
    except OSError as error:
        raise UserError(f"Cannot write into {run.path / 'parts'}: {error.strerror}.") from error
    except PosteriorError as error:
        raise UserError(f"The posterior of an agent broke: {error}") from error
    except TrainingError as error:
        raise UserError(str(error)) from error
    except StoppedError as stopped:
        return stopped.reason
    return None


def _computed(
    run: RunFolder, name: str, part: Callable[[], Mapping[str, Any]] | Resumable, reporter: Reporter
) -> tuple[Mapping[str, Any], float]:
    """The arrays of a part, and the seconds that it had taken before it was stopped."""
    if not isinstance(part, Resumable):
        return part(), 0.0
    folder, start = _own_folder(run, name), time.perf_counter()
    folder.mkdir(exist_ok=True)
    spent, earlier = folder / "seconds.txt", 0.0
    with suppress(ValueError):
        earlier = float(spent.read_text()) if spent.exists() else 0.0

    def say(said: str) -> None:
        reporter.phase(f"{name}, {said}")
        spent.write_text(str(earlier + time.perf_counter() - start))

    return part.compute(folder, say), earlier


def kept_parts(run: RunFolder, parts: Parts) -> str:
    """Which parts of a run that was stopped are there."""
    kept = [name for name in parts if _path(run, name).exists()]
    names = ", ".join(kept if len(kept) <= 6 else [*kept[:3], "...", kept[-1]])
    said = f"{len(kept)} of {len(parts)} parts are kept in {run.path / 'parts'}"
    return f"{said} ({names})" if kept else f"{said}; the one that was being computed is not done"


def write_study_summary(run: RunFolder, study: Study, arguments: RunArguments) -> dict[str, Any]:
    """The numbers of a run whose parts are all done, as summary.json.

    Raises:
        UserError: a part cannot be read, or the summary cannot be written.
    """
    settings, results, expected = arguments.settings, read_results(run), study.expectation
    claimed = flat_settings(study.tiny if arguments.tiny else study.settings)
    summary: dict[str, Any] = {"experiment": study.name, "run": run.path.name, "claim": study.claim}
    summary |= study.summarise(settings, results)
    summary |= {
        "seconds": float(sum(part[SECONDS] for part in results.values())),
        "expected": {"quantity": expected.quantity, "at_least": expected.at_least},
        "changed_settings": changed_settings(claimed, read_json(run.config)["settings"]),
    }
    summary["claim_met"] = None if arguments.tiny else expected.check(summary)
    write_json(run.summary, summary)
    return summary


def ending(summary: Mapping[str, Any]) -> str:
    """The result in one line."""
    quantity, least = summary["expected"]["quantity"], summary["expected"]["at_least"]
    met = {True: "claim met", False: "claim missed", None: "a tiny run claims nothing"}[summary["claim_met"]]
    value = "not measured" if summary[quantity] is None else f"{summary[quantity]:.4g}"
    return f"{quantity.replace('_', ' ')} {value}, expected at least {least:g}: {met}"
