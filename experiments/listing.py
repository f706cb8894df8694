"""`list`: what experiments and runs there are, and all that has a name on the command line."""

from collections.abc import Callable
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from experiments import doors
from experiments import run_folder
from experiments import run_shapes
from experiments import words
from experiments.named import unknown_name
from experiments.registry import NAMES
from experiments.registry import get_experiment

OVERVIEW = "overview"
Rows = Sequence[tuple[str, str]]

TABLES: dict[str, tuple[str, Callable[[], Rows]]] = {
    "recipes": ("source; with --recipe", doors.recipe_table),
    "signals": ("what it is; with --signal", doors.signal_table),
    "objectives": ("what it is; with --objective", doors.objective_table),
    "tasks": ("first prompt; with --task", doors.task_table),
    "mismatches": ("usual --mismatch-strength; with --mismatch", doors.mismatch_table),
    "engines": ("what it is; in jaxrl_llm.rollouts.engines", doors.engine_table),
}
"""What is listed by name: head of the second column, and the rows."""

KINDS = ("experiments", "runs", *TABLES)


def print_list(what: str, runs: Path, console: Console | None = None) -> None:
    """Print one table, or an overview of all.

    Args:
        what: one of `KINDS`, or `OVERVIEW`.
        runs: where runs are looked for.
        console: where it is printed.

    Raises:
        UserError: there is no such list.
    """
    console = console or Console()
    if what not in (*KINDS, OVERVIEW):
        near = str(unknown_name(what, "list", KINDS)).replace(", or give one of your own as my_module:my_name", "")
        raise run_folder.UserError(near)
    if what in ("experiments", OVERVIEW):
        print_experiments(console)
    if what in ("runs", OVERVIEW):
        print_runs(runs, console)
    if what == OVERVIEW:
        print_names(console)
    elif what in TABLES:
        head, rows = TABLES[what]
        console.print(_table(what.capitalize(), ("name", head), rows()))


def _table(title: str, head: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    """A table of texts as they are: names and prompts are a user's, not markup."""
    table = Table(*head, title=title, title_justify="left")
    for row in rows:
        table.add_row(*(escape(words.one_line(cell, 400)) for cell in row))
    return table


def print_experiments(console: Console) -> None:
    """One row per experiment."""
    rows = [(name, get_experiment(name).claim, get_experiment(name).cost) for name in NAMES]
    console.print(_table("Experiments", ("experiment", "claim", "cost"), rows))


def print_runs(runs: Path, console: Console) -> None:
    """One row per run."""
    found = run_folder.all_runs(runs)
    if not found:
        console.print(
            f"No runs in {runs} yet. Start one: python -m experiments run {NAMES[0]}", highlight=False, markup=False
        )
        return
    rows = []
    for run in found:
        try:
            summary = run_shapes.read(run.summary, "summary") if run.summary.exists() else {}
        except run_folder.UserError:
            rows.append((run.label, "", "", f"{run.summary.name} is damaged"))
            continue
        met = {True: "met", False: "missed", None: "none"}[summary["claim_met"]] if summary else "not complete"
        names = ("accuracy_before", "accuracy_after")
        shares = [words.percent(summary[name]) if name in summary else "" for name in names]
        rows.append((run.label, *shares, met))
    console.print(_table("Runs", ("run", "accuracy before", "after", "claim"), rows))


def print_names(console: Console) -> None:
    """One line per kind of thing that has names."""
    names = {
        "recipes": [name for name, _ in doors.recipe_table()],
        "signals": [name for name, _ in doors.signal_table()],
        "objectives": [name for name, _ in doors.objective_table()],
        "tasks": list(doors.task_names()),
        "mismatches": [name for name, _ in doors.mismatch_table()],
        "engines": [name for name, _ in doors.engine_table()],
    }
    rows = [(f"list {kind}", ", ".join(names[kind])) for kind in TABLES]
    table = Table("more with", "names", title="Names", title_justify="left")
    for row in rows:
        table.add_row(*map(escape, row))
    console.print(table)
