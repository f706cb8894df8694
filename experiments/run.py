"""`run`: from settings to a folder with a report."""

import contextlib
from collections.abc import Callable
from collections.abc import Mapping
from collections.abc import Sequence
from typing import Any

import jax
from flax import nnx

from experiments import metric_names as names
from experiments.arguments import PROGRAM
from experiments.arguments import RUNS
from experiments.arguments import RunArguments
from experiments.evaluation import merge_answers
from experiments.evaluation import score_answers
from experiments.held_out import HeldOutAnswerer
from experiments.progress import progress
from experiments.registry import Experiment
from experiments.report import write_report
from experiments.run_folder import RunFolder
from experiments.run_folder import UserError
from experiments.run_folder import describe_environment
from experiments.run_folder import find_run
from experiments.run_folder import open_folder
from experiments.run_folder import read_json
from experiments.run_folder import read_rows
from experiments.run_folder import unfinished_twin
from experiments.run_folder import write_json
from experiments.settings import changed_settings
from experiments.settings import difference
from experiments.settings import flat_settings
from experiments.study import Study
from experiments.study import damaged_parts
from experiments.study import ending
from experiments.study import forget_results
from experiments.study import get_parts
from experiments.study import run_parts
from experiments.study import write_study_summary
from experiments.summary import write_summary
from jaxrl_llm.environments import Task
from jaxrl_llm.training import MetricWriter
from jaxrl_llm.training import Parts
from jaxrl_llm.training import TensorBoard
from jaxrl_llm.training import TrainingError
from jaxrl_llm.training import WeightsAndBiases
from jaxrl_llm.training import split_policy
from jaxrl_llm.training import state_hash
from jaxrl_llm.training import train

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
    config = {
        "experiment": experiment.name,
        "claim": experiment.claim,
        "tiny": arguments.tiny,
        "settings": flat_settings(arguments.settings),
    }
    run = _choose_folder(arguments, config)
    again = f"{PROGRAM} run {experiment.name} --resume {run.label}"
    again += "" if arguments.runs_folder == RUNS else f" --runs-folder {arguments.runs_folder}"
    whole = not (isinstance(experiment, Study) and damaged_parts(run))
    if whole and run.summary.exists() and not changed_settings(read_json(run.config)["settings"], config["settings"]):
        print(f"Run {run.label} is complete; its report was written again: {write_report(run)}")
        return 0
    print(f"run {run.label} -> {run.shown}", flush=True)
    if isinstance(experiment, Study):
        return _compute(experiment, arguments, run, config | {"kind": "study"}, command, again)
    return _train(experiment, arguments, run, config, command, again)


def _compute(
    study: Study, arguments: RunArguments, run: RunFolder, config: dict[str, Any], command: Sequence[str], again: str
) -> int:
    """The parts of a study that are missing, its numbers and its report."""
    try:
        parts = get_parts(study, arguments.settings)
    except UserError:
        _remove_if_new(run)
        raise
    if run.config.exists() and changed_settings(read_json(run.config)["settings"], config["settings"]):
        forget_results(run)
    _write_down(run, config, command)
    if not run_parts(run, parts):
        print(f"\nInterrupted. Go on after the last finished part with: {again}")
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
    task, parts, answerer = _prepare(experiment, arguments, run)
    _write_down(run, config | {"trained": _trained(parts)}, command)
    evaluate = HeldOutEvaluation(run, task, answerer, arguments.settings.train.steps)
    try:
        with progress() as reporter:
            outcome = train(
                parts,
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
    except ValueError as error:
        if read_rows(run.path / "metrics.jsonl"):
            raise
        # Nothing was computed: the settings do not fit each other, and the sentence says how.
        raise UserError(str(error)) from error
    except KeyboardInterrupt:
        print(f"\nInterrupted in the middle of a step. Go on from the last checkpoint with: {again}")
        return INTERRUPTED
    if not outcome.finished:
        return INTERRUPTED
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
    saved = read_json(run.config)["settings"]
    if changed_settings(saved, config["settings"]) and not arguments.allow_changed_config:
        raise UserError(
            f"Run {run.label} was started with other settings:{difference(saved, config['settings'])}\n"
            "Leave them as they were, give the run another --id, or go on all the same with --allow-changed-config."
        )
    return run


def _prepare(experiment: Experiment, arguments: RunArguments, run: RunFolder) -> tuple[Task, Parts, HeldOutAnswerer]:
    """Task, model with objective, and what answers the held-out problems.

    Raises:
        UserError: one of them is not there, or they do not fit; the folder is removed again if the run is new.
    """
    settings = arguments.settings
    try:
        task, recipe, trainable = settings.get_task(), settings.get_recipe(), settings.get_trainable()
        model, tokenizer = experiment.build(settings)
        model = trainable.prepare(model, rngs=nnx.Rngs(settings.train.seed))
        engine = settings.get_perturbation()
        parts = Parts(
            model=model, trainable=trainable, tokenizer=tokenizer, task=task, recipe=recipe, perturbation=engine
        )
        return task, parts, HeldOutAnswerer(parts, task, settings.train)
    except (ValueError, OSError, ModuleNotFoundError, UserError) as error:
        _remove_if_new(run)
        raise error if isinstance(error, UserError) else UserError(str(error)) from error


def _remove_if_new(run: RunFolder) -> None:
    with contextlib.suppress(OSError):
        # Succeeds for an empty folder only.
        run.path.rmdir()


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
        first = read_json(run.environment) if run.environment.exists() else {}
        starts = [
            *first.get("continued", ()),
            {name: environment[name] for name in ("started", "command", "git_commit", "device")},
        ]
        environment = {**environment, **first, "continued": starts}
    write_json(run.config, config)
    write_json(run.environment, environment)
    if run.summary.exists():
        # Only a change of settings leads here: the old summary is not of this run any more.
        run.summary.unlink()


def _writers(run: RunFolder, arguments: RunArguments, config: Mapping[str, Any]) -> Callable[[int], list[MetricWriter]]:
    def open_writers(done: int) -> list[MetricWriter]:
        writers: list[MetricWriter] = [TensorBoard(run.path / "tensorboard", first_step=done)]
        if arguments.wandb:
            writers.append(WeightsAndBiases(arguments.wandb, run.label.replace("/", "-"), config["settings"]))
        return writers

    return open_writers


class HeldOutEvaluation:
    """Measures the policy on the held-out problems, and keeps its first and last answers in samples.json."""

    def __init__(self, run: RunFolder, task: Task, answerer: HeldOutAnswerer, steps: int) -> None:
        """Nothing is answered yet."""
        self._run, self._task, self._answerer, self._steps = run, task, answerer, steps

    def __call__(self, step: int, model_state: nnx.State) -> Mapping[str, float]:
        """Answer all problems; returns both accuracies."""
        rows = score_answers(self._task, self._answerer(model_state))
        if step == 0:
            write_json(self._run.samples, {"answers": merge_answers(rows, None)})
        elif step == self._steps:
            before = [{**row, **row["before"]} for row in read_json(self._run.samples)["answers"]]
            write_json(self._run.samples, {"answers": merge_answers(before, rows)})
        count = len(rows)
        return {
            names.HELD_OUT: sum(row["lenient"] for row in rows) / count,
            names.HELD_OUT_STRICT: sum(row["strict"] for row in rows) / count,
        }


def _ending(summary: Mapping[str, Any]) -> str:
    before, after = summary["accuracy_before"], summary["accuracy_after"]
    low, high = summary["accuracy_gain_interval"]
    met = {True: "claim met", False: "claim missed", None: "a tiny run claims nothing"}[summary["claim_met"]]
    gain = f"gain {after - before:+.3f}, 95 % interval {low:+.3f} to {high:+.3f}"
    return f"held-out accuracy {before:.3f} -> {after:.3f} ({gain}): {met}"
