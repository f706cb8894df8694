"""The command line: `python -m experiments list | run NAME | report RUN | evaluate RUN | ...`."""

import dataclasses
import difflib
import sys
from collections.abc import Callable
from collections.abc import Sequence
from pathlib import Path

import tyro

from experiments import listing
from experiments import run_folder
from experiments.arguments import PROGRAM
from experiments.arguments import RUNS
from experiments.arguments import parse_run
from experiments.arguments import reject_unknown_fields
from experiments.groups import find_runs
from experiments.output import guarded_output
from experiments.registry import NAMES
from experiments.registry import get_experiment
from experiments.run_folder import UserError
from jaxrl_llm.redaction import redact

USAGE = f"""Experiments: each trains a model by reinforcement learning and writes a folder with a report.

  {PROGRAM} list                                 what experiments, runs, recipes, tasks ... there are
  {PROGRAM} run NAME [--tiny] [--steps 20 ...]   run one; every setting is a field (see run NAME --help)
  {PROGRAM} run NAME --seeds 0 1 2               the same with several seeds, a run for each
  {PROGRAM} run NAME --dry-run [...]             check the settings and compute nothing
  {PROGRAM} run NAME --resume RUN                go on with a run that was stopped
  {PROGRAM} report RUN                           write report.html again, from the run's files alone
  {PROGRAM} show RUN [--step 20] [--row 3]       episodes: reward, advantage and KL divergence of each token
  {PROGRAM} evaluate RUN [--samples 16]          held-out problems, greedy and sampled: pass@k with intervals
  {PROGRAM} export RUN FOLDER --to hf|gguf       the trained model for other programs
  {PROGRAM} compare RUN RUN [RUN ...]            settings that differ, numbers and differences, compare.html
  {PROGRAM} results [RUN ...]                    keep the numbers of runs, and write the tables of the documents

RUN is a folder, experiment/id, an id, or an experiment's name (its newest run); to compare, the runs of --seeds too."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status: 0 done, 2 cannot be done, 130 interrupted."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    try:
        with guarded_output():
            return _dispatch(words)
    except KeyboardInterrupt:
        print("\nInterrupted.", file=sys.stderr)
        return 130
    except UserError as error:
        print(f"error: {redact(str(error))}", file=sys.stderr)
        return 2


def _dispatch(words: list[str]) -> int:
    if not words or words[0] in ("-h", "--help", "help"):
        print(USAGE)
        return 0
    commands: dict[str, Callable[[list[str]], int]] = {
        "list": _list,
        "run": _run,
        "report": _report,
        "show": _show,
        "compare": _compare,
        "evaluate": _evaluate,
        "export": _export,
        "results": _results,
    }
    if words[0] not in commands:
        near = difflib.get_close_matches(words[0], commands, n=1, cutoff=0.4)
        hint = f"Did you mean {near[0]}?" if near else f"There are {', '.join(commands)}."
        raise UserError(f"There is no command {words[0]!r}. {hint}")
    return commands[words[0]](words[1:])


def _run(words: list[str]) -> int:
    from experiments.run_seeds import run_all

    if not words or words[0].startswith("-"):
        if words and words[0] in ("-h", "--help"):
            print(
                f"usage: {PROGRAM} run NAME [--field value ...]\n"
                f"NAME is one of {', '.join(NAMES)}; run NAME --help lists its fields."
            )
            return 0
        raise UserError(f"run needs the name of an experiment first: {', '.join(NAMES)}.")
    experiment = get_experiment(words[0])
    return run_all(experiment, parse_run(experiment, words[1:]), command=[*PROGRAM.split(), "run", *words])


@dataclasses.dataclass(frozen=True)
class ReportArguments:
    """Write the report of a run again, from its files alone."""

    run: tyro.conf.Positional[str]
    """A folder, experiment/id, an id, or an experiment's name (its newest run)."""
    runs_folder: Path = RUNS
    """Where runs are looked for."""


def _report(words: list[str]) -> int:
    reject_unknown_fields(words, ["runs-folder"], "report")
    arguments = tyro.cli(ReportArguments, args=words, prog=f"{PROGRAM} report")
    run = run_folder.find_run(arguments.run, arguments.runs_folder)
    # What draws and computes takes seconds to import; a run that is not there is said at once.
    from experiments.report import write_report

    print(f"report: {write_report(run)}")
    return 0


@dataclasses.dataclass(frozen=True)
class ShowArguments:
    """Print episodes that a run wrote down: all rows of a step, or one row token by token."""

    run: tyro.conf.Positional[str]
    """A folder, experiment/id, an id, or an experiment's name (its newest run)."""
    step: int | None = None
    """The step; the newest one by default."""
    row: int | None = None
    """The row that is shown token by token."""
    runs_folder: Path = RUNS
    """Where runs are looked for."""


def _show(words: list[str]) -> int:
    reject_unknown_fields(words, ["step", "row", "runs-folder"], "show")
    arguments = tyro.cli(ShowArguments, args=words, prog=f"{PROGRAM} show")
    run = run_folder.find_run(arguments.run, arguments.runs_folder)
    from experiments.show import show

    with run_folder.named_damage(run):
        show(run, arguments.step, arguments.row)
    return 0


@dataclasses.dataclass(frozen=True)
class CompareArguments:
    """Set runs side by side: the settings that differ, the numbers with their intervals, the curves in one page.

    Of three runs and more, those that differ in their seed only are shown as one: a mean and its interval over seeds.
    """

    runs: tyro.conf.Positional[tuple[str, ...]]
    """Two runs or more, the first of which the others are compared with: folders, experiment/id, ids, or names of
    experiments (their newest runs). The name of a group made by --seeds stands for all its runs."""
    output: Path | None = None
    """Where the page goes; compare.html in the last run's folder by default."""
    runs_folder: Path = RUNS
    """Where runs are looked for."""


def _compare(words: list[str]) -> int:
    reject_unknown_fields(words, ["output", "runs-folder"], "compare")
    arguments = tyro.cli(CompareArguments, args=words, prog=f"{PROGRAM} compare")
    runs = find_runs(arguments.runs, arguments.runs_folder)
    if len(runs) < 2:
        raise UserError(f"compare was given {len(runs)} run{'s' * (len(runs) != 1)}; it must be at least two.")
    from experiments.compare import compare_runs

    with run_folder.named_damage(*runs):
        print(f"page: {compare_runs(*runs, output=arguments.output)}")
    return 0


def _evaluate(words: list[str]) -> int:
    from experiments.evaluate_run import command

    return command(words)


def _export(words: list[str]) -> int:
    from experiments.export import command

    return command(words)


@dataclasses.dataclass(frozen=True)
class ListArguments:
    """What experiments and runs there are, and all that has a name on the command line."""

    what: tyro.conf.Positional[str] = listing.OVERVIEW
    """One of experiments, runs, recipes, signals, objectives, tasks, mismatches, engines; an overview by default."""
    runs_folder: Path = RUNS
    """Where runs are looked for."""


def _list(words: list[str]) -> int:
    reject_unknown_fields(words, ["runs-folder"], "list")
    arguments = tyro.cli(ListArguments, args=words, prog=f"{PROGRAM} list")
    listing.print_list(arguments.what, arguments.runs_folder)
    return 0


@dataclasses.dataclass(frozen=True)
class ResultsArguments:
    """Keep the numbers of runs as result files to commit, and write the tables of docs/results.md and README.md."""

    runs: tyro.conf.Positional[tuple[str, ...]] = ()
    """Runs whose numbers replace the kept ones of their experiments; none writes the tables only."""
    runs_folder: Path = RUNS
    """Where runs are looked for."""


def _results(words: list[str]) -> int:
    reject_unknown_fields(words, ["runs-folder"], "results")
    arguments = tyro.cli(ResultsArguments, args=words, prog=f"{PROGRAM} results")
    runs = [run_folder.find_run(text, arguments.runs_folder) for text in arguments.runs]
    from experiments.results import keep
    from experiments.results import write_tables

    for run in runs:
        print(f"kept: {keep(run)}")
    for path in write_tables():
        print(f"written: {path}")
    return 0
