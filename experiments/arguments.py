"""What `run NAME` is called with, and how its words become settings."""

import dataclasses
import difflib
import shlex
from collections.abc import Collection
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING
from typing import Any

import tyro

from experiments.fields import for_tyro
from experiments.fields import from_tyro
from experiments.fields import leaves
from experiments.fields import restored as restored
from experiments.fields import with_values as with_values
from experiments.groups import find_group
from experiments.ranges import SEED
from experiments.ranges import check_number
from experiments.ranges import check_ranges
from experiments.registry import Experiment
from experiments.run_folder import UserError
from experiments.run_folder import find_run
from experiments.run_folder import read_config

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
        dry_run: check and print the settings, and stop before anything is computed or written.
    """

    settings: Any
    tiny: bool = False
    id: str | None = None
    resume: str | None = None
    allow_changed_config: bool = False
    runs_folder: Path = RUNS
    wandb: str | None = None
    dry_run: bool = False


@dataclasses.dataclass(frozen=True)
class TrainArguments(RunArguments):
    """The same, of an experiment that trains.

    Attributes:
        seeds: make a run for each of these seeds, instead of one with --seed; --resume goes on with those that are
            not complete.
    """

    seeds: tuple[int, ...] = ()


def start_arguments(experiment: "Experiment | Study", settings: Any) -> RunArguments:
    """The arguments of an experiment before anything is said on the command line."""
    return (TrainArguments if isinstance(experiment, Experiment) else RunArguments)(settings=settings)


def field_names(settings: Any) -> list[str]:
    """Fields of a dataclass, those of nested ones included, as they are written on the command line."""
    return [leaf.shown for leaf in leaves(settings)]


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
        # The last part alone finds a field of a group that was written without the group.
        last = {field.rpartition(".")[2]: field for field in reversed(known)}
        near = difflib.get_close_matches(name, [*known, *last], n=1, cutoff=0.4)
        hint = f"Did you mean --{last.get(near[0], near[0])}?" if near else f"The fields are {', '.join(known)}."
        raise UserError(f"{what} has no field --{name}. {hint}")


def parse_run(experiment: "Experiment | Study", words: Sequence[str]) -> RunArguments:
    """The arguments of `run NAME`, each number within its range.

    Raises:
        UserError: an unknown field, a number outside its range, or a run to resume that is not there.
        SystemExit: after --help, and for a value that its field cannot have.
    """
    words = _with_newest_run(experiment, words)
    start = start_arguments(experiment, experiment.tiny if "--tiny" in words else experiment.settings)
    reject_unknown_fields(words, field_names(start), f"Experiment {experiment.name}")
    arguments = _parse(experiment, words, start)
    if arguments.resume is None:
        return _with_recipe(experiment, words, arguments, start)
    # A run goes on with its own settings; what is said on the command line besides is a change.
    group = find_group(arguments.resume, arguments.runs_folder)
    saved = group.config if group else read_config(find_run(arguments.resume, arguments.runs_folder))
    if saved["experiment"] != experiment.name:
        raise UserError(
            f"Run {arguments.resume} is of experiment {saved['experiment']}, not {experiment.name}; "
            f"go on with: {PROGRAM} run {saved['experiment']} --resume {shlex.quote(arguments.resume)}"
        )
    try:
        settings = restored(experiment.tiny if saved["tiny"] else experiment.settings, saved["settings"])
    except (TypeError, ValueError) as error:
        raise UserError(f"The settings of run {arguments.resume} cannot be used: {error}") from error
    arguments = _parse(experiment, words, start_arguments(experiment, settings))
    return dataclasses.replace(arguments, tiny=saved["tiny"])


def _with_recipe(
    experiment: "Experiment | Study", words: Sequence[str], arguments: RunArguments, start: RunArguments
) -> RunArguments:
    """The arguments with the settings that go with their recipe, where the experiment has such."""
    if not isinstance(experiment, Experiment) or arguments.settings.recipe not in experiment.by_recipe:
        return arguments
    settings = with_values(start.settings, experiment.by_recipe[arguments.settings.recipe])
    return _parse(experiment, words, dataclasses.replace(start, settings=settings))


def _with_newest_run(experiment: "Experiment | Study", words: Sequence[str]) -> list[str]:
    """`--resume` without a run means the newest run of the experiment."""
    complete = []
    for word, following in zip(words, [*words, "--"][1:], strict=True):
        complete.append(word)
        if word == "--resume" and following.startswith("--"):
            complete.append(experiment.name)
    return complete


def _parse(experiment: "Experiment | Study", words: Sequence[str], start: RunArguments) -> RunArguments:
    told = for_tyro(start)
    parsed = tyro.cli(
        type(told),
        args=list(words),
        default=told,
        prog=f"{PROGRAM} run {experiment.name}",
        description=f"{experiment.claim}\n\nCost: {experiment.cost}",
        config=(tyro.conf.OmitArgPrefixes, tyro.conf.FlagCreatePairsOff),
    )
    check_ranges(parsed.settings, experiment.ranges)
    try:
        arguments = from_tyro(start, parsed)
    except ValueError as error:
        raise UserError(f"The settings do not fit: {error}") from error
    if arguments.wandb is not None and not arguments.wandb.strip():
        raise UserError(f"Field --wandb is {arguments.wandb!r}; it must be the name of a project.")
    if isinstance(arguments, TrainArguments):
        _check_seeds(arguments, {word.partition("=")[0] for word in words})
    return arguments


def _check_seeds(arguments: TrainArguments, given: Collection[str]) -> None:
    """Hold every seed to the range of a seed, each given once, and in one way."""
    if "--seeds" in given and not arguments.seeds:
        raise UserError("Field --seeds has no seeds; it must have at least one, as in --seeds 0 1 2.")
    if {"--seeds", "--seed"} <= set(given):
        raise UserError("Fields --seeds and --seed cannot be given together; each run of --seeds has its own.")
    for seed in arguments.seeds:
        check_number("seeds", seed, SEED)
    repeated = sorted({seed for seed in arguments.seeds if arguments.seeds.count(seed) > 1})
    if repeated:
        raise UserError(f"Field --seeds has {repeated[0]} more than once; every seed is a run of its own.")
