"""`list`: what experiments and runs there are."""

from pathlib import Path

from rich.console import Console
from rich.table import Table

from experiments import run_folder
from experiments import words
from experiments.registry import NAMES
from experiments.registry import get_experiment


def print_experiments(runs: Path, console: Console | None = None) -> None:
    """Print one row per experiment and one per run."""
    console = console or Console()
    table = Table("experiment", "claim", "cost", title="Experiments", title_justify="left", show_lines=False)
    for name in NAMES:
        experiment = get_experiment(name)
        table.add_row(name, experiment.claim, experiment.cost)
    console.print(table)
    found = run_folder.all_runs(runs)
    if not found:
        console.print(f"No runs in {runs} yet. Start one: python -m experiments run {NAMES[0]}", highlight=False)
        return
    table = Table("run", "accuracy before", "after", "claim", title="Runs", title_justify="left")
    for run in found:
        summary = run_folder.read_json(run.summary) if run.summary.exists() else {}
        met = {True: "met", False: "missed", None: "none"}[summary["claim_met"]] if summary else "not complete"
        names = ("accuracy_before", "accuracy_after")
        shares = [words.percent(summary[name]) if name in summary else "" for name in names]
        table.add_row(run.label, *shares, met)
    console.print(table)
