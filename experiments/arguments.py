"""What `run NAME` is called with, and how its words become settings."""

import dataclasses
import difflib
from collections.abc import Mapping
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING
from typing import Any

import tyro

from experiments.registry import Experiment
from experiments.run_folder import UserError
from experiments.run_folder import find_run
from experiments.run_folder import read_json

if TYPE_CHECKING:
    from experiments.study import Study

PROGRAM = "python -m experiments"
RUNS = Path("runs")


@dataclasses.dataclass(frozen=True)
class RunArguments:
    """How a run is made; what is trained is said by the settings.

    Attributes:
        settings: the settings of the run.
        tiny: start from the settings of the tiny twin, which runs in seconds and claims nothing.
        id: name of the run's folder, the time by default; a run of that name is gone on with.
        resume: go on with this run, with its settings: a folder, experiment/id or an id; alone, with the newest run.
        allow_changed_config: go on although settings differ from those the run was started with.
        runs_folder: where the folders of runs are made.
        wandb: also send the numbers to this Weights & Biases project (pip install 'jaxrl_llm[wandb]').
    """

    settings: Any
    tiny: bool = False
    id: str | None = None
    resume: str | None = None
    allow_changed_config: bool = False
    runs_folder: Path = RUNS
    wandb: str | None = None


def field_names(settings: Any) -> list[str]:
    """Fields of a dataclass, those of nested ones included, as they are written on the command line."""
    names = []
    for field in dataclasses.fields(settings):
        value = getattr(settings, field.name)
        names += field_names(value) if dataclasses.is_dataclass(value) else [field.name.replace("_", "-")]
    return names


def reject_unknown_fields(words: Sequence[str], known: Sequence[str], what: str) -> None:
    """Raise for the first `--field` that does not exist.

    Raises:
        UserError: naming the nearest field.
    """
    allowed = {name for field in known for name in (field, f"no-{field}")} | {"help"}
    for word in words:
        name = word[2:].split("=", 1)[0].replace("_", "-")
        if not word.startswith("--") or name in allowed:
            continue
        near = difflib.get_close_matches(name, known, n=1, cutoff=0.4)
        hint = f"Did you mean --{near[0]}?" if near else f"The fields are {', '.join(known)}."
        raise UserError(f"{what} has no field --{name}. {hint}")


def with_values(settings: Any, values: Mapping[str, Any]) -> Any:
    """The settings with the values of a saved run, by name; what was not saved keeps its value."""
    changes = {}
    for field in dataclasses.fields(settings):
        value = getattr(settings, field.name)
        if dataclasses.is_dataclass(value):
            changes[field.name] = with_values(value, values)
        elif field.name in values:
            saved = values[field.name]
            changes[field.name] = tuple(saved) if isinstance(saved, list) else saved
    return dataclasses.replace(settings, **changes)


def parse_run(experiment: "Experiment | Study", words: Sequence[str]) -> RunArguments:
    """The arguments of `run NAME`.

    Raises:
        UserError: an unknown field, or a run to resume that is not there.
        SystemExit: after --help, and for a value that its field cannot have.
    """
    words = _with_newest_run(experiment, words)
    start = RunArguments(settings=experiment.tiny if "--tiny" in words else experiment.settings)
    reject_unknown_fields(words, field_names(start), f"Experiment {experiment.name}")
    arguments = _parse(experiment, words, start)
    if arguments.resume is None:
        return arguments
    # A run goes on with its own settings; what is said on the command line besides is a change.
    saved = read_json(find_run(arguments.resume, arguments.runs_folder).config)
    if saved["experiment"] != experiment.name:
        raise UserError(
            f"Run {arguments.resume} is of experiment {saved['experiment']}, not {experiment.name}; "
            f"go on with: {PROGRAM} run {saved['experiment']} --resume {arguments.resume}"
        )
    settings = with_values(experiment.tiny if saved["tiny"] else experiment.settings, saved["settings"])
    return _parse(experiment, words, RunArguments(settings=settings, tiny=saved["tiny"]))


def _with_newest_run(experiment: "Experiment | Study", words: Sequence[str]) -> list[str]:
    """`--resume` without a run means the newest run of the experiment."""
    complete = []
    for word, following in zip(words, [*words, "--"][1:], strict=True):
        complete.append(word)
        if word == "--resume" and following.startswith("--"):
            complete.append(experiment.name)
    return complete


def _parse(experiment: "Experiment | Study", words: Sequence[str], start: RunArguments) -> RunArguments:
    return tyro.cli(
        RunArguments,
        args=list(words),
        default=start,
        prog=f"{PROGRAM} run {experiment.name}",
        description=f"{experiment.claim}\n\nCost: {experiment.cost}",
        config=(tyro.conf.OmitArgPrefixes, tyro.conf.FlagCreatePairsOff),
    )
