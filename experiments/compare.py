"""`compare`: two runs side by side, as a table on the terminal and a page with both curves."""

from pathlib import Path
from typing import Any

import matplotlib
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from experiments import metric_names as names
from experiments import records
from experiments import style
from experiments import words
from experiments.figures import AVERAGED
from experiments.figures import STEP
from experiments.figures import legend
from experiments.figures import line
from experiments.figures import positive
from experiments.records import Record
from experiments.report import render
from experiments.report import shown_picture
from experiments.run_folder import RunFolder
from experiments.run_folder import UserError
from experiments.style import Picture
from experiments.style import new_axes

CURVES = {
    names.REWARD: ("Reward", "mean reward"),
    names.HELD_OUT: ("Held-out accuracy", "share right"),
    names.LENGTH: ("Length of the answers", "tokens per answer"),
    names.ENTROPY: ("Entropy", "nats per token"),
    names.KL_MEAN: ("KL of one update, per token", "nats"),
    names.UNIFIED_SHARP: ("Smallest bound, sharp", "units of reward"),
}
LOGARITHMIC = (names.KL_MEAN, names.UNIFIED_SHARP)

NUMBERS = {
    "accuracy_before": "held-out accuracy before",
    "accuracy_after": "held-out accuracy after",
    "accuracy_gain": "gain",
    "strict_before": "strict accuracy before",
    "strict_after": "strict accuracy after",
    "held_out_problems": "held-out problems",
    "steps": "rollout batches",
    "seconds_training": "seconds of training",
    "claim_met": "claim met",
}


def compare_runs(
    first: RunFolder, second: RunFolder, output: Path | None = None, console: Console | None = None
) -> str:
    """Print the differences and write the page; returns where it is.

    Raises:
        UserError: one of them is not a run, or the page cannot be written.
    """
    pair = (records.read(first), records.read(second))
    labels = (first.label, second.label)
    settings, numbers = differing_settings(*pair), compared_numbers(*pair)
    console = console or Console()
    console.print(_table("Settings that differ", labels, settings or [("none", "", "")]))
    console.print(_table("Numbers (95 % intervals)", labels, numbers))
    path = output or second.path / "compare.html"
    with matplotlib.rc_context(style.SETTINGS):
        pictures = [shown_picture(picture) for picture in overlay(*pair)]
    page = render("compare.html.j2", {"labels": labels, "settings": settings, "numbers": numbers, "pictures": pictures})
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(page, encoding="utf-8", errors="replace")
    except OSError as error:
        raise UserError(f"Cannot write {path}: {error.strerror}.") from error
    return str(path)


def _table(title: str, labels: tuple[str, str], rows: list[tuple[str, str, str]]) -> Table:
    # Names and settings are a user's, not markup.
    table = Table("", *(escape(words.one_line(label)) for label in labels), title=title, title_justify="left")
    for row in rows:
        table.add_row(*(escape(words.one_line(cell)) for cell in row))
    return table


def differing_settings(first: Record, second: Record) -> list[tuple[str, str, str]]:
    """(name, first value, second value) of each setting, and of commit and machine, that differ."""
    rows = []
    sides = [
        {
            "experiment": record.run.experiment,
            **record.settings,
            **{key: record.environment.get(key) for key in ("git_commit", "processor", "device")},
        }
        for record in (first, second)
    ]
    for name in dict.fromkeys([*sides[0], *sides[1]]):
        values = [side.get(name, "(absent)") for side in sides]
        if values[0] != values[1]:
            rows.append((name, str(values[0]), str(values[1])))
    return rows


def compared_numbers(first: Record, second: Record) -> list[tuple[str, str, str]]:
    """(what, first, second) for each number of the two summaries, with its interval."""
    labels = NUMBERS
    if "study" in (first.config.get("kind"), second.config.get("kind")):
        both = {**first.summary, **second.summary}
        labels = {name: name.replace("_", " ") for name, value in both.items() if isinstance(value, (int, float))}
    return [(label, _number(first.summary, name), _number(second.summary, name)) for name, label in labels.items()]


def _number(summary: dict[str, Any], name: str) -> str:
    if name not in summary:
        return "not complete"
    value, ends = summary[name], summary.get(f"{name}_interval")
    if name == "claim_met":
        return {True: "yes", False: "no", None: "no claim"}[value]
    if ends is None:
        return f"{value:,.4g}" if isinstance(value, float) and not value.is_integer() else f"{value:,.0f}"
    if name.endswith("_gain"):
        return f"{words.points(value)}  [{words.point_interval(ends)}]"
    return f"{words.percent(value)}  [{words.interval(ends)}]"


def overlay(first: Record, second: Record) -> list[Picture]:
    """One figure per curve that either run has."""
    pictures = []
    for name, (title, unit) in CURVES.items():
        columns = [record.column(name) for record in (first, second)]
        if not any(len(steps) for steps, _ in columns):
            continue
        figure, axes = new_axes(STEP, unit)
        if name in LOGARITHMIC:
            axes.set_yscale("log")
        looks = ((first, style.BLUE, "-"), (second, style.VERMILION, "--"))
        for (steps, values), (record, colour, dashes) in zip(columns, looks, strict=True):
            if name in LOGARITHMIC:
                steps, values = positive(steps, values)
            line(axes, steps, values, colour, record.run.label, dashes)
        legend(axes, 1)
        caption = f"Solid: {first.run.label}; dashed: {second.run.label}. Moving averages over {AVERAGED} batches."
        pictures.append(Picture(name.replace("/", "-"), title, caption, figure))
    return pictures
