"""`run`: from settings to a folder with a report."""

import dataclasses
import shlex
import shutil
from collections.abc import Callable
from collections.abc import Collection
from collections.abc import Mapping
from collections.abc import Sequence
from typing import Any

import jax
from flax import nnx

from experiments.arguments import PROGRAM
from experiments.arguments import RUNS
from experiments.arguments import RunArguments
from experiments.held_out import HeldOutAnswerer
from experiments.held_out import HeldOutEvaluation
from experiments.objective_check import FILE
from experiments.objective_check import sentences
from experiments.open_doors import Doors
from experiments.open_doors import open_doors
from experiments.progress import progress
from experiments.registry import Experiment
from experiments.report import write_report
from experiments.run_folder import RunFolder
from experiments.run_folder import UserError
from experiments.run_folder import check_id
from experiments.run_folder import describe_environment
from experiments.run_folder import find_run
from experiments.run_folder import open_folder
from experiments.run_folder import read_config
from experiments.run_folder import read_rows
from experiments.run_folder import unfinished_twin
from experiments.run_folder import write_json
from experiments.run_shapes import is_complete
from experiments.run_shapes import kept_environment
from experiments.settings import RunSettings
from experiments.settings import changed_settings
from experiments.settings import difference
from experiments.settings import flat_settings
from experiments.sources import open_collector
from experiments.sources import open_sampler
from experiments.sources import open_teacher
from experiments.study import Study
from experiments.study import damaged_parts
from experiments.study import ending
from experiments.study import forget_results
from experiments.study import get_parts
from experiments.study import kept_parts
from experiments.study import run_parts
from experiments.study import write_study_summary
from experiments.summary import write_summary
from jaxrl_llm.models.trainable import combine
from jaxrl_llm.training import MetricWriter
from jaxrl_llm.training import Parts
from jaxrl_llm.training import StorageError
from jaxrl_llm.training import TensorBoard
from jaxrl_llm.training import TrainingError
from jaxrl_llm.training import WeightsAndBiases
from jaxrl_llm.training import split_policy
from jaxrl_llm.training import state_hash
from jaxrl_llm.training import train
from jaxrl_llm.training.run.lock import only_process
from jaxrl_llm.training.run.lock import remove_if_alone
from jaxrl_llm.training.saved_run import write_model

INTERRUPTED = 130


def run_experiment(experiment: Experiment | Study, arguments: RunArguments, command: Sequence[str]) -> int:
    """Train or compute, and write the report; goes on where an earlier run of the same folder stopped.

    Args:
        experiment: what is shown.
        arguments: how, with the settings.
        command: the words that started it, to be written down.

    Returns:
        the exit status: 0 when the run is complete, 130 when it was interrupted and saved.

    Raises:
        UserError: the run cannot be made as asked; nothing has been computed, or everything computed is saved.
    """
    if arguments.dry_run:
        return _check_only(experiment, arguments)
    config = run_config(experiment, arguments)
    run = _choose_folder(arguments, config)
    again = go_on_command(run.label, arguments)
    try:
        with only_process(run.path):
            return _run_alone(experiment, arguments, run, config, command, again)
    except StorageError as error:
        raise UserError(str(error)) from error
    except (MemoryError, jax.errors.JaxRuntimeError) as error:
        if isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in str(error):
            raise UserError(
                f"Run {run.label} needs more memory than there is; make its sizes smaller, or go on elsewhere with: "
                f"{again}"
            ) from error
        raise


def _run_alone(
    experiment: Experiment | Study,
    arguments: RunArguments,
    run: RunFolder,
    config: dict[str, Any],
    command: Sequence[str],
    again: str,
) -> int:
    """What is left to do in a folder in which no other process works."""
    whole = is_complete(run, trained=isinstance(experiment, Experiment)) and not (
        isinstance(experiment, Study) and damaged_parts(run)
    )
    if whole and not changed_settings(read_config(run)["settings"], config["settings"]):
        print(f"Run {run.label} is complete; its report was written again: {write_report(run)}")
        return 0
    print(f"run {run.label} -> {run.shown}", flush=True)
    if isinstance(experiment, Study):
        return _compute(experiment, arguments, run, config | {"kind": "study"}, command, again)
    return _train(experiment, arguments, run, config, command, again)


def run_config(experiment: Experiment | Study, arguments: RunArguments) -> dict[str, Any]:
    """What config.json says of a run before it starts."""
    return {
        "experiment": experiment.name,
        "claim": experiment.claim,
        "tiny": arguments.tiny,
        "settings": flat_settings(arguments.settings),
    }


def go_on_command(label: str, arguments: RunArguments) -> str:
    """The command that goes on with a run or a group, as a shell takes it."""
    experiment = label.partition("/")[0]
    words = [*PROGRAM.split(), "run", experiment, "--resume", label]
    return shlex.join(words if arguments.runs_folder == RUNS else [*words, "--runs-folder", str(arguments.runs_folder)])


def _check_only(experiment: Experiment | Study, arguments: RunArguments) -> int:
    """`--dry-run`: everything that can be checked without a model, then the settings."""
    if arguments.id is not None:
        check_id(arguments.id)
    if isinstance(experiment, Study):
        count = len(get_parts(experiment, arguments.settings))
        said = f"{count} parts would be computed"
    else:
        doors = open_doors(experiment, arguments.settings)
        if doors.stale:
            print(doors.stale)
        said = f"{arguments.settings.train.steps} steps would be taken"
    for name, value in flat_settings(arguments.settings).items():
        print(f"{name} = {value}")
    print(f"These settings of {experiment.name} can be used: {said}. Nothing was computed or written.")
    return 0


def _compute(
    study: Study, arguments: RunArguments, run: RunFolder, config: dict[str, Any], command: Sequence[str], again: str
) -> int:
    """The parts of a study that are missing, its numbers and its report."""
    try:
        parts = get_parts(study, arguments.settings)
    except UserError:
        _remove_if_new(run)
        raise
    if run.config.exists() and changed_settings(read_config(run)["settings"], config["settings"]):
        forget_results(run)
    _write_down(run, config, command)
    stopped_by = run_parts(run, parts)
    if stopped_by is not None:
        print(f"\nStopped by {stopped_by}: {kept_parts(run, parts)}. Go on with: {again}")
        return INTERRUPTED
    print(ending(write_study_summary(run, study, arguments)))
    print(f"report: {write_report(run)}")
    return 0


def _train(
    experiment: Experiment,
    arguments: RunArguments,
    run: RunFolder,
    config: dict[str, Any],
    command: Sequence[str],
    again: str,
) -> int:
    """Train, evaluate before and after, and write the report."""
    doors, parts, answerer = _prepare(experiment, arguments, run)
    before = {path.name for path in run.path.iterdir()}
    _write_down(run, config | {"trained": _trained(parts), "stale": doors.stale}, command)
    _describe_model(run, parts, arguments.settings)
    if doors.check is not None:
        write_json(run.path / FILE, doors.check)
        print("\n".join(sentences(doors.check)))
    evaluate = HeldOutEvaluation(run, doors.task, answerer, arguments.settings.train.steps)
    _, learned, frozen = split_policy(parts.model, parts.trainable)
    evaluate.mend_before(combine(learned, frozen))
    # Training takes their buffers over.
    del learned, frozen
    try:
        sources = open_sampler(arguments.settings.sources, parts, arguments.settings.train)
        with sources as sampler, progress() as reporter:
            outcome = train(
                dataclasses.replace(parts, sampler=sampler),
                arguments.settings.train,
                run.path,
                evaluate=evaluate,
                reporter=reporter,
                open_writers=_writers(run, arguments, config),
                allow_changed_settings=arguments.allow_changed_config,
                how_to_resume=f"Go on with: {again}",
            )
    except TrainingError as error:
        raise UserError(str(error)) from error
    except (UserError, ValueError) as error:
        if any(row["step"] for row in read_rows(run.path / "metrics.jsonl")):
            raise
        # Nothing was learned: the settings do not fit each other, and the sentence says how.
        if run.config.name not in before:
            _forget(run, before)
        raise error if isinstance(error, UserError) else UserError(str(error)) from error
    except KeyboardInterrupt:
        print(f"\nInterrupted in the middle of a step. Go on from the last checkpoint with: {again}")
        return INTERRUPTED
    if not outcome.finished:
        return INTERRUPTED
    evaluate.mend_after(outcome.model_state)
    summary = write_summary(run, experiment, arguments, state_sha256=state_hash(outcome.state))
    print(_ending(summary))
    print(f"report: {write_report(run)}")
    return 0


def _choose_folder(arguments: RunArguments, config: Mapping[str, Any]) -> RunFolder:
    """The folder of the run, new or to be gone on with, writable and with the same settings.

    Raises:
        UserError: it cannot be written, or its run has other settings and that was not allowed.
    """
    if arguments.resume is not None:
        found = find_run(arguments.resume, arguments.runs_folder)
        run = open_folder(found.path.parent.parent, found.experiment, found.path.name)
    else:
        twin = (
            None
            if arguments.id
            else unfinished_twin(arguments.runs_folder, str(config["experiment"]), config["settings"])
        )
        if twin is not None:
            print(
                "This is a new run; there is an unfinished one with the same settings: "
                f"--resume {twin.label} goes on with it."
            )
        run = open_folder(arguments.runs_folder, str(config["experiment"]), arguments.id)
    if not run.config.exists():
        return run
    saved = read_config(run)["settings"]
    if changed_settings(saved, config["settings"]) and not arguments.allow_changed_config:
        raise UserError(
            f"Run {run.label} was started with other settings:{difference(saved, config['settings'])}\n"
            "Leave them as they were, give the run another --id, or go on all the same with --allow-changed-config."
        )
    return run


def _prepare(experiment: Experiment, arguments: RunArguments, run: RunFolder) -> tuple[Doors, Parts, HeldOutAnswerer]:
    """What the settings name, the model with its objective, and what answers the held-out problems.

    Raises:
        UserError: one of them is not there, or they do not fit; the folder is removed again if the run is new.
    """
    settings = arguments.settings
    try:
        doors = open_doors(experiment, settings)
        model, tokenizer = experiment.build(settings)
        model, mesh = settings.laid_out(model)
        parts = Parts(
            model=doors.trainable.prepare(model, rngs=nnx.Rngs(settings.train.seed)),
            trainable=doors.trainable,
            tokenizer=tokenizer,
            task=doors.task,
            collector=open_collector(settings.sources, tokenizer, settings.train),
            recipe=doors.recipe,
            objective=doors.objective,
            signal=doors.signal,
            teacher=open_teacher(settings.sources, tokenizer),
            mesh=mesh,
            perturbation=doors.perturbation,
        )
        return doors, parts, HeldOutAnswerer(parts, doors.task, settings.train)
    except (ValueError, OSError, ModuleNotFoundError, TrainingError, UserError) as error:
        _remove_if_new(run)
        raise error if isinstance(error, UserError) else UserError(str(error)) from error


def _remove_if_new(run: RunFolder) -> None:
    remove_if_alone(run.path)


def _forget(run: RunFolder, before: Collection[str]) -> None:
    """Remove what was written into the folder of a new run that learned nothing, and the folder if nothing is left."""
    for path in run.path.iterdir():
        if path.name not in before:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    _remove_if_new(run)


def _trained(parts: Parts) -> str:
    """Which parameters learn, in words."""
    _, learned, frozen = split_policy(parts.model, parts.trainable)
    trained, rest = (sum(leaf.size for leaf in jax.tree.leaves(tree)) for tree in (learned, frozen))
    layers, top = len(parts.model.layers), parts.trainable.top
    where = "all layers" if top is None else f"the top {top} of {layers} layers"
    how = "low-rank adapters on " if parts.trainable.adapters else ""
    return f"{how}{where} learn, {trained:,} of {trained + rest:,} parameters"


def _write_down(run: RunFolder, config: Mapping[str, Any], command: Sequence[str]) -> None:
    """config.json and environment.json; a run that goes on keeps what it began with and lists each later start."""
    environment = describe_environment(list(command))
    if run.config.exists():
        first = kept_environment(run)
        starts = [
            *first.get("continued", ()),
            {name: environment[name] for name in ("started", "command", "git_commit", "device")},
        ]
        environment = {**environment, **first, "continued": starts}
    write_json(run.config, config)
    write_json(run.environment, environment)
    if run.summary.is_file():
        # A change of settings or damage leads here: the old summary is not of this run any more.
        run.summary.unlink()


def _describe_model(run: RunFolder, parts: Parts, settings: RunSettings) -> None:
    """model.json, from which `jaxrl_llm.load_run` makes the model again."""
    source = None if settings.model == "random" else settings.model
    try:
        write_model(run.path, parts.model, parts.trainable, parts.tokenizer, source=source, seed=settings.train.seed)
    except TrainingError as error:
        raise UserError(str(error)) from error


def _writers(run: RunFolder, arguments: RunArguments, config: Mapping[str, Any]) -> Callable[[int], list[MetricWriter]]:
    def open_writers(done: int) -> list[MetricWriter]:
        writers: list[MetricWriter] = [TensorBoard(run.path / "tensorboard", first_step=done + 1 if done else 0)]
        if arguments.wandb:
            writers.append(WeightsAndBiases(arguments.wandb, run.label.replace("/", "-"), config["settings"]))
        return writers

    return open_writers


def _ending(summary: Mapping[str, Any]) -> str:
    before, after = summary["accuracy_before"], summary["accuracy_after"]
    low, high = summary["accuracy_gain_interval"]
    met = {True: "claim met", False: "claim missed", None: "a tiny run claims nothing"}[summary["claim_met"]]
    gain = f"gain {after - before:+.3f}, 95 % interval {low:+.3f} to {high:+.3f}"
    return f"held-out accuracy {before:.3f} -> {after:.3f} ({gain}): {met}"
