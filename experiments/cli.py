"""The command line: `python -m experiments list | run NAME | report RUN | compare RUN RUN`."""

import dataclasses
import difflib
import sys
from collections.abc import Callable
from collections.abc import Sequence
from pathlib import Path

import tyro

from experiments import run_folder
from experiments.arguments import PROGRAM
from experiments.arguments import RUNS
from experiments.arguments import parse_run
from experiments.arguments import reject_unknown_fields
from experiments.registry import NAMES
from experiments.registry import get_experiment
from experiments.run_folder import UserError
from jaxrl_llm.redaction import redact

USAGE = f"""Experiments: each trains a model by reinforcement learning and writes a folder with a report.

  {PROGRAM} list                                 what experiments and runs there are
  {PROGRAM} run NAME [--tiny] [--steps 20 ...]   run one; every setting is a field (see run NAME --help)
  {PROGRAM} run NAME --resume RUN                go on with a run that was stopped
  {PROGRAM} report RUN                           write report.html again, from the run's files alone
  {PROGRAM} compare RUN RUN                      settings that differ, numbers side by side, compare.html
  {PROGRAM} results [RUN ...]                    keep the numbers of runs, and write the tables of the documents

RUN is a folder, experiment/id, an id, or an experiment's name (its newest run)."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status: 0 done, 2 cannot be done, 130 interrupted."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    try:
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
        "compare": _compare,
        "results": _results,
    }
    if words[0] not in commands:
        near = difflib.get_close_matches(words[0], commands, n=1, cutoff=0.4)
        hint = f"Did you mean {near[0]}?" if near else f"There are {', '.join(commands)}."
        raise UserError(f"There is no command {words[0]!r}. {hint}")
    return commands[words[0]](words[1:])


def _run(words: list[str]) -> int:
    from experiments.run import run_experiment

    if not words or words[0].startswith("-"):
        if words and words[0] in ("-h", "--help"):
            print(
                f"usage: {PROGRAM} run NAME [--field value ...]\n"
                f"NAME is one of {', '.join(NAMES)}; run NAME --help lists its fields."
            )
            return 0
        raise UserError(f"run needs the name of an experiment first: {', '.join(NAMES)}.")
    experiment = get_experiment(words[0])
    return run_experiment(experiment, parse_run(experiment, words[1:]), command=[*PROGRAM.split(), "run", *words])


@dataclasses.dataclass(frozen=True)
class ReportArguments:
    """Write the report of a run again, from its files alone."""

    run: tyro.conf.Positional[str]
    """A folder, experiment/id, an id, or an experiment's name (its newest run)."""
    runs_folder: Path = RUNS
    """Where runs are looked for."""


def _report(words: list[str]) -> int:
    from experiments.report import write_report

    reject_unknown_fields(words, ["runs-folder"], "report")
    arguments = tyro.cli(ReportArguments, args=words, prog=f"{PROGRAM} report")
    run = run_folder.find_run(arguments.run, arguments.runs_folder)
    print(f"report: {write_report(run)}")
    return 0


@dataclasses.dataclass(frozen=True)
class CompareArguments:
    """Set two runs side by side: the settings that differ, the numbers with their intervals, the curves in one page."""

    first: tyro.conf.Positional[str]
    """A folder, experiment/id, an id, or an experiment's name (its newest run)."""
    second: tyro.conf.Positional[str]
    """The other one."""
    output: Path | None = None
    """Where the page goes; compare.html in the second run's folder by default."""
    runs_folder: Path = RUNS
    """Where runs are looked for."""


def _compare(words: list[str]) -> int:
    from experiments.compare import compare_runs

    reject_unknown_fields(words, ["output", "runs-folder"], "compare")
    arguments = tyro.cli(CompareArguments, args=words, prog=f"{PROGRAM} compare")
    runs = [run_folder.find_run(text, arguments.runs_folder) for text in (arguments.first, arguments.second)]
    print(f"page: {compare_runs(runs[0], runs[1], arguments.output)}")
    return 0


@dataclasses.dataclass(frozen=True)
class ListArguments:
    """What experiments and runs there are."""

    runs_folder: Path = RUNS
    """Where runs are looked for."""


def _list(words: list[str]) -> int:
    from experiments.listing import print_experiments

    reject_unknown_fields(words, ["runs-folder"], "list")
    arguments = tyro.cli(ListArguments, args=words, prog=f"{PROGRAM} list")
    print_experiments(arguments.runs_folder)
    return 0


@dataclasses.dataclass(frozen=True)
class ResultsArguments:
    """Keep the numbers of runs as result files to commit, and write the tables of docs/results.md and README.md."""

    runs: tyro.conf.Positional[tuple[str, ...]] = ()
    """Runs whose numbers replace the kept ones of their experiments; none writes the tables only."""
    runs_folder: Path = RUNS
    """Where runs are looked for."""


def _results(words: list[str]) -> int:
    from experiments.results import keep
    from experiments.results import write_tables

    reject_unknown_fields(words, ["runs-folder"], "results")
    arguments = tyro.cli(ResultsArguments, args=words, prog=f"{PROGRAM} results")
    for text in arguments.runs:
        print(f"kept: {keep(run_folder.find_run(text, arguments.runs_folder))}")
    for path in write_tables():
        print(f"written: {path}")
    return 0
