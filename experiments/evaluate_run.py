"""`evaluate`: a run's policy on the held-out problems, greedy and sampled, as pass@k with intervals over problems."""

import dataclasses
import time
from collections.abc import Mapping
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import tyro
from flax import nnx
from rich.console import Console

from experiments import run_folder
from experiments.arguments import PROGRAM
from experiments.arguments import RUNS
from experiments.arguments import field_names
from experiments.arguments import reject_unknown_fields
from experiments.arguments import restored
from experiments.evaluation_table import GREEDY
from experiments.evaluation_table import SCORINGS
from experiments.evaluation_table import file_name
from experiments.evaluation_table import table
from experiments.held_out import HeldOutSampler
from experiments.pass_at_k import estimate
from experiments.registry import Experiment
from experiments.registry import get_experiment
from experiments.run_folder import RunFolder
from experiments.run_folder import UserError
from experiments.run_folder import read_json
from experiments.run_folder import write_json
from experiments.settings import RunSettings
from jaxrl_llm import SavedRun
from jaxrl_llm import load_run
from jaxrl_llm.environments import Task
from jaxrl_llm.rollouts import SamplingSettings
from jaxrl_llm.training import StorageError

METHOD = (
    "95 %, over distinct problems: normal with the problem as the cluster, in Wilson's form (with one answer per "
    "problem: Wilson's)"
)


@dataclasses.dataclass(frozen=True)
class EvaluateArguments:
    """Answer the held-out problems with a checkpoint, greedily and by sampling, and say pass@k with intervals."""

    run: tyro.conf.Positional[str]
    """A folder, experiment/id, an id, or an experiment's name (its newest run)."""
    samples: int = 16
    """Sampled answers to each problem."""
    k: tuple[int, ...] = ()
    """The k of pass@k, each at most --samples; none is 1, 4, 16, ... up to --samples."""
    temperature: float = 1.0
    """Of the sampled answers; 0 asks for the greedy ones alone."""
    top_k: int | None = None
    """Sample from so many most likely tokens only."""
    top_p: float | None = None
    """Sample from the nucleus of this mass only, after --top-k."""
    min_p: float | None = None
    """Sample from tokens of at least this probability relative to the most likely one only, after --top-p."""
    seed: int = 0
    """Of the sampled answers."""
    step: int | None = None
    """The checkpoint of this step; the newest by default, 0 is the model before training."""
    runs_folder: Path = RUNS
    """Where runs are looked for."""


def command(arguments: Sequence[str]) -> int:
    """`evaluate` with these words; returns the exit status.

    Raises:
        UserError: it cannot be done as asked.
    """
    known = [name for name in field_names(EvaluateArguments(run="")) if name != "run"]
    reject_unknown_fields(arguments, known, "evaluate")
    asked = tyro.cli(EvaluateArguments, args=list(arguments), prog=f"{PROGRAM} evaluate")
    run = run_folder.find_run(asked.run, asked.runs_folder)
    result = evaluate_run(run, asked)
    Console().print(table(result))
    print(f"written: {run.shown}/{file_name(result)}")
    # It draws, and what draws takes seconds to import.
    from experiments.report import write_report

    print(f"report: {write_report(run)}")
    return 0


def evaluate_run(run: RunFolder, asked: EvaluateArguments) -> dict[str, Any]:
    """Sample, score and write `evaluation-....json`; returns what was written.

    Raises:
        UserError: the run trains no model or has no such checkpoint, or the numbers cannot be.
    """
    sampling, ks = _numbers(asked)
    settings, task = trained_settings(run)
    try:
        saved = load_run(run.path, step=asked.step)
    except StorageError as error:
        raise UserError(str(error)) from error
    start = time.monotonic()
    greedy = _scores(saved, settings, task, SamplingSettings(temperature=0.0), 1, asked.seed)
    drawn = None if sampling.greedy else _scores(saved, settings, task, sampling, asked.samples, asked.seed)
    rows = []
    for index, problem in enumerate(task.held_out()):
        about = {"identity": problem.identity, "prompt": problem.prompt, "answer": problem.answer}
        row: dict[str, Any] = about | {GREEDY: greedy[index][0]}
        if drawn is not None:
            row["sampled"] = {name: sum(score[name] for score in drawn[index]) for name in SCORINGS}
        rows.append(row)
    result = {
        "step": saved.step,
        "samples": 0 if drawn is None else asked.samples,
        "k": ks,
        "sampling": None if drawn is None else dataclasses.asdict(sampling),
        "seed": asked.seed,
        "held_out_problems": len({row["identity"] for row in rows}),
        "results": estimates(rows, 0 if drawn is None else asked.samples, ks),
        "interval_method": METHOD,
        "seconds": time.monotonic() - start,
        "problems": rows,
    }
    write_json(run.path / file_name(result), result)
    return result


def _numbers(asked: EvaluateArguments) -> tuple[SamplingSettings, list[int]]:
    """How answers are sampled, and the k."""
    try:
        sampling = SamplingSettings(
            temperature=asked.temperature, top_k=asked.top_k, top_p=asked.top_p, min_p=asked.min_p
        )
    except ValueError as error:
        raise UserError(f"Answers cannot be sampled so: {error}.") from error
    if asked.samples < 1:
        raise UserError(f"Field --samples is {asked.samples}; it must be at least 1.")
    if sampling.greedy:
        if any(k != 1 for k in asked.k):
            raise UserError(f"Field --k is {asked.k}; a greedy policy (--temperature 0) has one answer, so k is 1.")
        return sampling, [1]
    ks = sorted(set(asked.k)) or [4**power for power in range(20) if 4**power <= asked.samples]
    if ks[0] < 1 or ks[-1] > asked.samples:
        wrong = ks[0] if ks[0] < 1 else ks[-1]
        raise UserError(f"Field --k has {wrong}; of --samples {asked.samples} answers 1 to {asked.samples} are drawn.")
    return sampling, ks


def trained_settings(run: RunFolder) -> tuple[RunSettings, Task]:
    """The settings of a run that trained a model, and its task.

    Raises:
        UserError: it is a study, which computes only, or its experiment or task is not there any more.
    """
    config = read_json(run.config)
    experiment = get_experiment(config["experiment"])
    if not isinstance(experiment, Experiment):
        raise UserError(f"Run {run.label} is of a study, which computes and keeps no model.")
    settings = restored(experiment.tiny if config["tiny"] else experiment.settings, config["settings"])
    return settings, settings.get_task()


def _scores(
    saved: SavedRun, settings: RunSettings, task: Task, sampling: SamplingSettings, samples: int, seed: int
) -> list[list[dict[str, Any]]]:
    """Text and both scores of every answer, by problem."""
    sampler = HeldOutSampler(
        saved.model,
        saved.tokenizer,
        task,
        prompt_length=settings.train.prompt_length,
        response_length=settings.train.response_length,
        sampling=sampling,
        samples=samples,
    )
    scored = []
    for problem, texts in zip(task.held_out(), sampler(nnx.state(saved.model), seed=seed), strict=True):
        scores = [task.score(problem, text) for text in texts]
        scored.append(
            [
                {"text": text, "lenient": bool(score.lenient), "strict": bool(score.strict)}
                for text, score in zip(texts, scores, strict=True)
            ]
        )
    return scored


def estimates(rows: Sequence[Mapping[str, Any]], samples: int, ks: Sequence[int]) -> list[dict[str, Any]]:
    """Each number with its interval: greedy accuracy, and pass@k of the sampled answers, under both scorings."""
    identities = [row["identity"] for row in rows]
    results = []
    for scoring in SCORINGS:
        asked = [(GREEDY, 1, 1, [int(row[GREEDY][scoring]) for row in rows])]
        if samples:
            right = [row["sampled"][scoring] for row in rows]
            asked += [(f"pass@{k}", samples, k, right) for k in ks]
        for name, count, k, correct in asked:
            found = estimate(correct, identities, samples=count, k=k)
            interval = [found.low, found.high]
            results.append({"name": name, "scoring": scoring, "value": found.value, "interval": interval})
    return results
