"""The report of `deep_sea`."""

from collections.abc import Mapping
from collections.abc import Sequence
from typing import Any

import numpy as np

from experiments import style
from experiments.bands import half_width
from experiments.bands import standard_error
from experiments.figures import legend
from experiments.study import Page
from experiments.study import Results
from experiments.study import Section
from experiments.study import Table
from experiments.style import Picture
from experiments.style import new_axes


def ratios(sizes: Sequence[int], results: Results) -> np.ndarray:
    """Mean episodes until solved over N^2 / 2; infinite where a seed was not solved."""
    found = []
    for size in sizes:
        part = results[f"hyperagent_{size}"]
        found.append(part["episodes"].mean() / (size**2 / 2) if part["solved"].all() else np.inf)
    return np.array(found)


def power(sizes: Sequence[int], results: Results) -> float:
    """b of episodes = a N^b, least squares in logarithms."""
    means = [results[f"hyperagent_{size}"]["episodes"].mean() for size in sizes]
    return float(np.polyfit(np.log(sizes), np.log(means), 1)[0]) if len(sizes) > 1 else float("nan")


def size_figure(settings: Any, results: Results) -> Picture:
    """Episodes until solved against N, both agents."""
    figure, axes = new_axes("size N", "episodes until solved")
    figure.set_size_inches(4.7, 3.7)
    axes.set_xscale("log")
    axes.set_yscale("log")
    shown = np.array(sorted({*settings.sizes, *settings.baseline_sizes}), float)
    axes.plot(shown, shown**2 / 2, color=style.INK, linestyle=":", label="N² / 2")
    low = shown[shown <= max(settings.baseline_sizes)]
    axes.plot(low, 2.0**low, color=style.MUTED, linestyle="-.", linewidth=1, label="2^N, random actions")
    for prefix, sizes, label, colour in (
        ("hyperagent", settings.sizes, f"HyperAgent, M = {settings.index_dimension}", style.BLUE),
        ("epsilon_greedy", settings.baseline_sizes, "epsilon-greedy Q-learning", style.VERMILION),
    ):
        means = []
        for size in sizes:
            part = results[f"{prefix}_{size}"]
            means.append(part["episodes"].mean())
            axes.plot(
                np.full(len(part["episodes"]), size), part["episodes"], ".", color=colour, alpha=0.3, markersize=5
            )
        axes.plot(sizes, means, color=colour, marker="o", markersize=4, label=label)
    ticks = sorted({*settings.sizes, *settings.baseline_sizes} - {8, 40})
    axes.set_xticks(ticks, [str(size) for size in ticks])
    axes.minorticks_off()
    legend(axes, 2)
    caption = (
        f"Mean and single runs of {settings.seeds} grids, each with random action maps. Epsilon-greedy (epsilon = 0.5) "
        f"stops unsolved at {settings.baseline_episodes:,} episodes. HyperAgent's episodes grow as N to the power "
        f"{power(settings.sizes, results):.2f}."
    )
    return Picture("size", "Episodes until DeepSea is solved", caption, figure)


def _table(settings: Any, results: Results) -> Table:
    rows = []
    for prefix, sizes, label in (
        ("hyperagent", settings.sizes, "HyperAgent"),
        ("epsilon_greedy", settings.baseline_sizes, "epsilon-greedy"),
    ):
        for size in sizes:
            part = results[f"{prefix}_{size}"]
            mean, error = part["episodes"].mean(), standard_error(part["episodes"])
            rows.append(
                (
                    label,
                    str(size),
                    f"{part['solved'].mean():.0%}",
                    f"{mean:,.0f} ± {half_width(settings.seeds) * error:,.0f}",
                    f"{mean / (size**2 / 2):.2f}",
                )
            )
    return Table(head=("agent", "N", "solved", "episodes (95 %)", "over N² / 2"), rows=rows)


def deep_sea_page(settings: Any, results: Results, summary: Mapping[str, Any]) -> Page:
    """How episodes grow with the size."""
    shares = ratios(settings.sizes, results)
    failed = [size for size in settings.baseline_sizes if not results[f"epsilon_greedy_{size}"]["solved"].all()]
    others = (
        f"Epsilon-greedy leaves N = {failed[0]} unsolved on some grids after {settings.baseline_episodes:,} episodes."
        if failed
        else "Epsilon-greedy solves every size that it was given."
    )
    return Page(
        value=f"{shares.max():.2f}",
        value_range="of N² / 2 episodes at the hardest size",
        sentence=(
            f"HyperAgent with M = {settings.index_dimension} solves N = {min(settings.sizes)} to "
            f"{max(settings.sizes)}; its episodes grow as N to the power {power(settings.sizes, results):.2f}. {others}"
        ),
        facts=f"M = {settings.index_dimension}, {settings.seeds} grids per size",
        sections=[
            Section(
                "Episodes against size",
                [
                    "One of 2^N sequences of moves reaches the goal, and every right move costs a little. Solved: 100 "
                    "returns in a row are optimal."
                ],
                [size_figure(settings, results)],
                _table(settings, results),
            )
        ],
    )
