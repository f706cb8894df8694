"""`compare`: runs side by side, as tables on the terminal and a page with the curves.

Of three runs and more, those that differ in their seed only are one column and one curve: a mean and its interval over
seeds. Everything is compared with the first run, or its siblings.
"""

from collections.abc import Mapping
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from experiments import metric_names as names
from experiments import records
from experiments import style
from experiments import words
from experiments.bands import band
from experiments.bands import half_width
from experiments.bands import standard_error
from experiments.figures import AVERAGED
from experiments.figures import STEP
from experiments.figures import legend
from experiments.figures import line
from experiments.figures import positive
from experiments.figures import smooth
from experiments.records import Record
from experiments.report import render
from experiments.report import shown_picture
from experiments.run_folder import RunFolder
from experiments.run_folder import UserError
from experiments.siblings import Difference
from experiments.siblings import Siblings
from experiments.siblings import alone
from experiments.siblings import differences
from experiments.siblings import over_seeds
from experiments.siblings import siblings
from experiments.style import Picture
from experiments.style import new_axes

CURVES = {
    names.REWARD: ("Reward", "mean reward"),
    names.HELD_OUT: ("Held-out accuracy", "share right"),
    names.LENGTH: ("Length of the answers", "tokens per answer"),
    names.ENTROPY: ("Entropy", "nats per token"),
    names.MISMATCH: ("Mismatch of sampler and trainer, KL per token (k3)", "nats"),
    names.ACCEPTED: ("Accepted by the trust region", "share of answers"),
    names.KL_MEAN: ("KL of one update, per token", "nats"),
    names.ERROR: ("Error of the surrogate, measured", "units of reward"),
    names.UNIFIED_SHARP: ("Smallest bound, sharp", "units of reward"),
    names.UNIFIED_PRINTED: ("Smallest bound, with the paper's constants", "units of reward"),
}
COLOURS = (style.BLUE, style.VERMILION, style.GREEN, style.PURPLE, style.ORANGE, style.SKY)
DASHES = ("-", "--", "-.", ":")
LOGARITHMIC = (names.MISMATCH, names.KL_MEAN, names.UNIFIED_SHARP, names.UNIFIED_PRINTED)

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


def compare_runs(*runs: RunFolder, output: Path | None = None, console: Console | None = None) -> str:
    """Print what differs and write the page; returns where it is.

    Args:
        runs: two or more; the others are compared with the first.
        output: the page; compare.html in the folder of the last run where None.
        console: what is printed to.

    Raises:
        UserError: fewer than two runs, one of them is not a run, or the page cannot be written.
    """
    if len(runs) < 2:
        raise UserError(f"compare needs two runs or more, got {len(runs)}.")
    read = [records.read(run) for run in runs]
    groups = alone(read) if len(read) == 2 else siblings(read)
    labels = [group.label for group in groups]
    settings, numbers = differing_settings(groups), compared_numbers(groups)
    changes = difference_rows([found for other in groups[1:] for found in differences(groups[0], other)])
    console = console or Console()
    console.print(_table("Settings that differ", labels, settings or [("none", *[""] * len(labels))]))
    console.print(_table("Numbers (95 % intervals)", labels, numbers))
    if changes:
        console.print(_table(f"Differences from {labels[0]} (95 % intervals)", DIFFERENCE[1:], changes))
    path = output or runs[-1].path / "compare.html"
    with matplotlib.rc_context(style.SETTINGS):
        pictures = [shown_picture(picture) for picture in overlay(groups)]
    context = {"labels": labels, "settings": settings, "numbers": numbers, "pictures": pictures}
    page = render("compare.html.j2", {**context, "differences": changes, "difference_head": DIFFERENCE})
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(page, encoding="utf-8", errors="replace")
    except OSError as error:
        raise UserError(f"Cannot write {path}: {error.strerror}.") from error
    return str(path)


DIFFERENCE = ("", "of", "difference", "verdict", "how")
"""Heads of the table of differences."""


def _table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    # Names and settings are a user's, not markup.
    table = Table("", *(escape(words.one_line(name)) for name in columns), title=title, title_justify="left")
    for row in rows:
        table.add_row(*(escape(words.one_line(cell)) for cell in row))
    return table


def difference_rows(found: Sequence[Difference]) -> list[tuple[str, ...]]:
    """(what, of, difference with interval, verdict, how) of each difference, in words."""
    return [
        (
            one.what,
            one.of,
            f"{words.points(one.value)}  [{words.point_interval((one.low, one.high))}]",
            one.verdict,
            one.how,
        )
        for one in found
    ]


def differing_settings(groups: Sequence[Siblings]) -> list[tuple[str, ...]]:
    """(name, value in each group) of each setting, and of commit and machine, that differ; several where runs do."""
    sides = [[_settings(record) for record in group.records] for group in groups]
    flat = [side for group in sides for side in group]
    rows = []
    for name in dict.fromkeys(name for side in flat for name in side):
        cells = [list(dict.fromkeys(str(side.get(name, "(absent)")) for side in group)) for group in sides]
        if len({value for cell in cells for value in cell}) > 1:
            rows.append((name, *[", ".join(cell) for cell in cells]))
    return rows


def _settings(record: Record) -> dict[str, Any]:
    machine = {key: record.environment.get(key) for key in ("git_commit", "processor", "device")}
    return {"experiment": record.run.experiment, **record.settings, **machine}


def compared_numbers(groups: Sequence[Siblings]) -> list[tuple[str, ...]]:
    """(what, value in each group) for each number of the summaries, with its interval."""
    found = [record for group in groups for record in group.records]
    labels = NUMBERS
    if any(record.config.get("kind") == "study" for record in found):
        together = {name: value for record in found for name, value in record.summary.items()}
        labels = {name: name.replace("_", " ") for name, value in together.items() if isinstance(value, (int, float))}
    return [(label, *[_group_number(group, name) for group in groups]) for name, label in labels.items()]


def _group_number(group: Siblings, name: str) -> str:
    if len(group.records) == 1:
        return _number(group.records[0].summary, name)
    values = [record.summary[name] for record in group.records if name in record.summary]
    missing = len(group.records) - len(values)
    suffix = f" ({missing} of {len(group.records)} not complete)" if missing else ""
    if not values:
        return "not complete"
    if name == "claim_met":
        known = [value for value in values if value is not None]
        return f"{sum(known)} of {len(known)} yes{suffix}" if known else f"no claim{suffix}"
    if len(set(values)) == 1 and f"{name}_interval" not in group.records[0].summary:
        return _plain(values[0]) + suffix
    if len(values) == 1:
        return f"{_share(name, values[0])}{suffix}"
    estimate = over_seeds(values)
    return f"{_share(name, estimate.value)}  [{_share_interval(name, (estimate.low, estimate.high))}]{suffix}"


def _number(summary: Mapping[str, Any], name: str) -> str:
    if name not in summary:
        return "not complete"
    value, ends = summary[name], summary.get(f"{name}_interval")
    if name == "claim_met":
        return {True: "yes", False: "no", None: "no claim"}[value]
    return _plain(value) if ends is None else f"{_share(name, value)}  [{_share_interval(name, ends)}]"


def _plain(value: float) -> str:
    return f"{value:,.4g}" if isinstance(value, float) and not value.is_integer() else f"{value:,.0f}"


def _is_share(name: str) -> bool:
    return name.startswith(("accuracy_", "strict_"))


def _share(name: str, value: float) -> str:
    if not _is_share(name):
        return _plain(value)
    return words.points(value) if name.endswith("_gain") else words.percent(value)


def _share_interval(name: str, ends: Sequence[float]) -> str:
    if not _is_share(name):
        return f"{_plain(float(ends[0]))} to {_plain(float(ends[1]))}"
    return words.point_interval(ends) if name.endswith("_gain") else words.interval(ends)


def overlay(groups: Sequence[Siblings]) -> list[Picture]:
    """One figure per curve that any run has."""
    pictures = []
    for name, (title, unit) in CURVES.items():
        if not any(len(record.column(name)[0]) for group in groups for record in group.records):
            continue
        figure, axes = new_axes(STEP, unit)
        if name in LOGARITHMIC:
            axes.set_yscale("log")
        for number, group in enumerate(groups):
            look = COLOURS[number % len(COLOURS)], DASHES[number % len(DASHES)]
            if len(group.records) == 1:
                line(axes, *_column(group.records[0], name), look[0], group.label, look[1])
            else:
                _band(axes, group, name, *look)
        legend(axes, 1)
        pictures.append(Picture(name.replace("/", "-"), title, _caption(groups), figure))
    return pictures


def _caption(groups: Sequence[Siblings]) -> str:
    if len(groups) == 2 and all(len(group.records) == 1 for group in groups):
        said = f"Solid: {groups[0].label}; dashed: {groups[1].label}."
    else:
        said = f"{'; '.join(group.label for group in groups)}."
    if any(len(group.records) > 1 for group in groups):
        said += " Of several seeds: the mean, and its 95 % interval by Student's t."
    return f"{said} Moving averages over {AVERAGED} batches."


def _column(record: Record, name: str) -> tuple[np.ndarray, np.ndarray]:
    steps, values = record.column(name)
    return positive(steps, values) if name in LOGARITHMIC else (steps, values)


def _band(axes: Axes, group: Siblings, name: str, colour: str, dashes: str) -> None:
    """Mean and 95 % band over seeds at the steps that all runs of the group have."""
    columns = [_column(record, name) for record in group.records]
    steps = columns[0][0]
    for others, _ in columns[1:]:
        steps = np.intersect1d(steps, others)
    if not len(steps):
        return
    rows = np.array([values[np.isin(at, steps)] for at, values in columns])
    if len(steps) >= 2 * AVERAGED:
        rows = np.array([smooth(row, AVERAGED) for row in rows])
    limits = axes.dataLim.frozen()
    band(
        axes, steps, rows.mean(0), standard_error(rows), colour, group.label, dashes=dashes, half=half_width(len(rows))
    )
    # Two seeds have a band of 13 standard errors; it may leave the picture, the runs may not.
    axes.dataLim.set(limits)
    axes.update_datalim(np.column_stack([np.tile(steps, len(rows)), rows.ravel()]))
    axes.autoscale_view()
