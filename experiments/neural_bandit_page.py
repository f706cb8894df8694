"""The report of `neural_bandits`."""

from collections.abc import Mapping
from typing import Any

import matplotlib
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator
from matplotlib.ticker import NullFormatter
from matplotlib.ticker import StrMethodFormatter

from experiments import style
from experiments.bands import band
from experiments.bands import half_width
from experiments.bands import standard_error
from experiments.figures import legend
from experiments.study import Page
from experiments.study import Results
from experiments.study import Section
from experiments.study import Table
from experiments.style import Picture
from experiments.style import new_axes

LABELS = {
    "hyperagent": ("HyperAgent", style.VERMILION, "-"),
    "ensemble_plus_plus": ("Ensemble++", style.ORANGE, "-"),
    "ensemble_plus": ("Ensemble+", style.GREEN, "-"),
    "epinet": ("epinet", style.PURPLE, "-"),
    "langevin": ("LMC-TS", style.SKY, "-"),
    "epsilon": ("epsilon-greedy", style.INK, "--"),
    "greedy": ("greedy", style.MUTED, "--"),
}
APART = 1.05
"""Factor between agents with the same number of parameters, so that their bars can be told apart."""

TITLES = {"quadratic": "quadratic", "vector_quadratic": "vector quadratic", "neural": "neural"}


def over_time(settings: Any, results: Results) -> Picture:
    """Cumulative regret against rounds, one panel per bandit."""
    with matplotlib.rc_context(style.SETTINGS):
        figure = Figure(figsize=(3.3 * max(len(settings.bandits), 1.5), 3.6))
        first = None
        for number, bandit in enumerate(settings.bandits):
            axes = figure.add_subplot(1, len(settings.bandits), number + 1)
            first = first or axes
            for name in settings.agents:
                label, colour, dashes = LABELS[name]
                part = results[f"{bandit}_{name}"]
                half = half_width(settings.seeds)
                band(axes, part["rounds"], part["mean"], part["error"], colour, label, dashes=dashes, half=half)
            axes.set_title(TITLES[bandit], fontsize=9.5, color=style.INK)
            axes.set_xlabel("round")
            axes.set_ylabel("cumulative regret" if number == 0 else "")
            axes.set_ylim(bottom=0)
        handles, labels = first.get_legend_handles_labels() if first else ([], [])
        figure.legend(handles, labels, loc="outside lower center", ncols=4)
    caption = (
        f"Mean over {settings.seeds} bandits of each kind with 95 % bands; exact regret against the best of the "
        f"{settings.shown} actions shown. Every agent meets the same bandits, the same actions and the same noise."
    )
    return Picture("regret", "Regret over time", caption, figure)


def over_parameters(settings: Any, results: Results) -> Picture:
    """Regret after all rounds against how many numbers are trained."""
    figure, axes = new_axes("trained parameters", f"regret after {settings.rounds} rounds")
    figure.set_size_inches(5.2, 4.2)
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    drawn: list[int] = []
    for name in settings.agents:
        label, colour, _ = LABELS[name]
        found = [results[f"vector_quadratic_{name}"]]
        found += [results[key] for key in (f"size_{name}_{size}" for size in settings.other_sizes) if key in results]
        found.sort(key=lambda part: int(part["parameters"]))
        means = [part["final"].mean() for part in found]
        errors = [half_width(settings.seeds) * standard_error(part["final"]) for part in found]
        counts = [int(part["parameters"]) for part in found]
        at = [count * APART ** drawn.count(count) for count in counts]
        drawn += counts
        axes.errorbar(at, means, yerr=errors, color=colour, marker="o", markersize=4.5, label=label, capsize=2)
    axes.set_xlim(0.85 * min(drawn), 1.25 * max(drawn))
    axes.set_ylim(bottom=0)
    legend(axes, 3)
    sizes = ", ".join(str(size) for size in sorted({settings.index_dimension, *settings.other_sizes}))
    caption = (
        f"Vector-quadratic bandit. HyperAgent and Ensemble+ at M = {sizes}; the others at M = "
        f"{settings.index_dimension} or without an index. Bars are 95 % intervals over {settings.seeds} bandits; "
        f"agents with the same number of parameters are drawn {APART - 1:.0%} apart."
    )
    return Picture("parameters", "Regret against parameters", caption, figure)


def _table(settings: Any, summary: Mapping[str, Any]) -> Table:
    rows, half = [], half_width(settings.seeds)
    for name in settings.agents:
        cells = [
            f"{summary['regret'][bandit][name]:.1f} ± {half * summary['regret_error'][bandit][name]:.1f}"
            for bandit in settings.bandits
        ]
        rows.append((LABELS[name][0], f"{summary['parameters'][name]:,}", *cells))
    return Table(head=("agent", "parameters", *(TITLES[bandit] for bandit in settings.bandits)), rows=rows)


def neural_bandit_page(settings: Any, results: Results, summary: Mapping[str, Any]) -> Page:
    """Regret over time and against parameters."""
    saved = summary["saved_against_greedy"]
    half = half_width(settings.seeds) * summary["saved_against_greedy_error"]
    return Page(
        value=f"{100 * saved:+.0f} %",
        value_range=f"{100 * (saved - half):+.0f} to {100 * (saved + half):+.0f} % regret saved",
        sentence=(
            f"What HyperAgent with M = {settings.index_dimension} saves of the regret of the same network acting "
            f"greedily, on the vector-quadratic bandit; 95 % interval over {settings.seeds} bandits, paired."
        ),
        facts=(
            f"{settings.dimension} features, {settings.shown} of {settings.actions} actions shown, {settings.rounds} "
            f"rounds, {settings.seeds} seeds"
        ),
        sections=[
            Section(
                "Regret",
                [
                    "Every agent has the same two hidden layers and learns by one gradient step per round. HyperAgent "
                    "takes the loss over all 2 M coordinate indices, Ensemble++ its exact expectation with the "
                    "features held constant in the factor; Ensemble+ has M networks with priors of scale 1, where "
                    f"those of hypermodels and epinet have scale {settings.prior_scale:g}."
                ],
                [over_time(settings, results), over_parameters(settings, results)],
                _table(settings, summary),
            )
        ],
    )
