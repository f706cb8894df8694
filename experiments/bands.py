"""Curves with bands, and heat maps, for experiments that average over seeds."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from scipy import stats

from experiments import style

HALF = 1.96
"""Half-width of a 95 % interval, in standard errors, of a mean over many seeds; `half_width` is for few."""


def half_width(count: int) -> float:
    """Half-width of a 95 % interval of the mean of `count` numbers, in standard errors, by Student's t: 3.18 for 4."""
    return float(stats.t.ppf(0.975, count - 1))


def standard_error(values: Any, axis: int = 0) -> Any:
    """Standard error of a mean over seeds: sqrt( sum (x - mean)^2 / (n - 1) / n ).

    Args:
        values: at least two along the axis; of numpy or of JAX.
        axis: that of the seeds.

    Returns:
        as the values, without that axis.
    """
    return values.std(axis, ddof=1) / values.shape[axis] ** 0.5


def band(
    axes: Axes,
    x: np.ndarray,
    mean: np.ndarray,
    error: np.ndarray,
    colour: str,
    label: str,
    *,
    dashes: str = "-",
    marker: str = "",
    half: float = HALF,
) -> None:
    """A mean with its 95 % band over seeds, `half` standard errors to either side."""
    axes.plot(x, mean, color=colour, linestyle=dashes, label=label, marker=marker, markersize=4)
    low = mean - half * error
    if axes.get_yscale() == "log":
        low = np.maximum(low, 1e-3 * mean)
    axes.fill_between(x, low, mean + half * error, color=colour, alpha=0.18, linewidth=0)


def heat_maps(panels: Sequence[tuple[str, np.ndarray]], names: Sequence[str], *, rows: str, columns: str) -> Figure:
    """Square tables of numbers side by side, coloured by one logarithmic scale; small is light."""
    logs = [np.log(values) for _, values in panels]
    low, high = min(log.min() for log in logs), max(log.max() for log in logs)
    figure = Figure(figsize=(2.9 * len(panels) + 1.1, 3.5))
    for number, ((title, values), log) in enumerate(zip(panels, logs, strict=True)):
        axes = figure.add_subplot(1, len(panels), number + 1)
        axes.grid(False)
        axes.imshow(log, cmap="Blues", vmin=low, vmax=high + 0.35 * (high - low) + 1e-9)
        for (row, column), value in np.ndenumerate(values):
            axes.text(column, row, f"{value:.0f}", ha="center", va="center", fontsize=8, color="#1d2127")
        axes.set_xticks(range(len(names)), names, rotation=40, ha="right", fontsize=8)
        axes.set_yticks(range(len(names)), names if number == 0 else [""] * len(names), fontsize=8)
        axes.set_xlabel(columns)
        axes.set_ylabel(rows if number == 0 else "")
        axes.set_title(title, fontsize=9.5, color=style.INK)
        axes.spines[:].set_visible(False)
    return figure
