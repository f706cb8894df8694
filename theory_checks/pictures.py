"""The pictures of the report: each takes results and returns a drawing."""

import dataclasses
import io
from collections.abc import Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter

from theory_checks.chain_search import Worst
from theory_checks.chain_search import by_delta
from theory_checks.chain_search import exponent
from theory_checks.check import Result
from theory_checks.search import Found

INK, MUTED, GRID = "#1d2126", "#69707a", "#e2e5e9"
# Okabe and Ito (2008), told apart under the three common kinds of colour blindness and in grey.
BLUE, VERMILION, GREEN, ORANGE, PURPLE = "#0072b2", "#d55e00", "#009e73", "#e69f00", "#cc79a7"
SETTINGS: Any = {
    "figure.constrained_layout.use": True,
    "axes.edgecolor": MUTED,
    "axes.labelcolor": MUTED,
    "axes.titlecolor": INK,
    "axes.titlesize": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.8,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "grid.linewidth": 0.8,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.major.size": 0,
    "xtick.minor.size": 0,
    "ytick.major.size": 0,
    "ytick.minor.size": 0,
    "text.color": INK,
    "font.size": 9.5,
    "legend.fontsize": 8.5,
    "legend.frameon": False,
    "lines.linewidth": 1.7,
}


@dataclasses.dataclass(frozen=True)
class Picture:
    """A drawing with the words around it.

    Attributes:
        name: file name without its ending.
        title: what is shown.
        caption: what to read from it; read out instead of the picture.
        png: the drawing, on white.
    """

    name: str
    title: str
    caption: str
    png: bytes


def _new(rows: int, columns: int, width: float, height: float) -> tuple[Figure, np.ndarray]:
    with matplotlib.rc_context(SETTINGS):
        # A Figure of its own: pyplot would keep every one of them alive.
        figure = Figure(figsize=(width, height))
        return figure, figure.subplots(rows, columns, squeeze=False)


def _png(figure: Figure) -> bytes:
    with matplotlib.rc_context(SETTINGS):
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", dpi=160, facecolor="white", metadata={"Software": None})
    return buffer.getvalue()


_SCATTERED = {
    "Token trees, random rewards": "surrogate_error",
    "Token chains, worst reward": "token_chains",
}
_BOUNDS = (
    ("unified_printed", "best printed bound", ORANGE),
    ("unified_sharp", "best bound proved here", BLUE),
)


def bound_against_error(results: Sequence[Result]) -> Picture | None:
    """Every world as a point: what was measured, and what a bound said."""
    known = {result.check.name: result for result in results}
    panels = {
        title: [(known[f"{family}.{name}"], label, colour) for name, label, colour in _BOUNDS]
        for title, family in _SCATTERED.items()
        if all(f"{family}.{name}" in known for name, _, _ in _BOUNDS)
    }
    if not panels:
        return None
    figure, axes = _new(1, len(panels), 4.8 * len(panels), 4.2)
    for ax, (title, rows) in zip(axes[0], panels.items(), strict=True):
        ends = []
        for result, label, colour in rows:
            left, right = result.compared
            seen = (left > 1e-7) & (right > 0)
            ax.scatter(left[seen], right[seen], s=6, alpha=0.5, linewidths=0, color=colour, label=label)
            ends += [left[seen].min(), left[seen].max()]
        span = np.array([min(ends), max(ends)])
        ax.plot(span, span, color=INK, linewidth=1, linestyle="--", label="bound = error")
        ax.set(xscale="log", yscale="log", xlabel="measured |Error|", ylabel="bound", title=title)
    handles = axes[0][0].get_legend_handles_labels()
    columns = 3 if len(panels) > 1 else 1  # Three do not fit below one panel.
    figure.legend(*handles, loc="outside lower center", ncols=columns, markerscale=2.5, frameon=False)
    tightest = max((result for rows in panels.values() for result, _, _ in rows), key=lambda one: one.tightness)
    caption = (
        "Every point is one world, enumerated or recursed exactly. No point lies below the dashed line, where a bound "
        f"would be broken; the nearest one ({tightest.check.name}) reaches {tightest.tightness:.1%} of its bound."
    )
    return Picture("bound_against_error", "Bound against measured error", caption, _png(figure))


def tightness(results: Sequence[Result]) -> Picture | None:
    """How near every instance of every inequality came to its bound, by family."""
    families: dict[str, list[np.ndarray]] = {}
    for result in results:
        if result.ratios.size:
            families.setdefault(result.check.family, []).append(np.clip(result.ratios, 0.0, 1.0))
    if not families:
        return None
    columns = min(len(families), 4)
    rows = -(-len(families) // columns)
    figure, axes = _new(rows, columns, 2.6 * columns, 2.0 * rows + 0.3)
    for ax in axes.ravel()[len(families) :]:
        ax.set_visible(False)
    for ax, (family, ratios) in zip(axes.ravel(), families.items(), strict=False):
        values = np.concatenate(ratios)
        ax.hist(values, bins=np.linspace(0, 1, 26).tolist(), color=BLUE)
        ax.axvline(1, color=VERMILION, linewidth=1)
        # From 1 on, so that a bin with one instance shows.
        ax.set(yscale="log", ylim=(0.7, None), xlim=(0, 1.02), title=f"{family.replace('_', ' ')} ({len(ratios)})")
        ax.yaxis.set_minor_formatter(NullFormatter())
    for ax in axes[-1]:
        ax.set_xlabel("left / right")
    for ax in axes[:, 0]:
        ax.set_ylabel("instances")
    caption = (
        "Left side over right side of every instance, by family (in brackets: how many inequalities; identities are "
        "left out). Beyond the line at 1 a statement would be violated; a family that never comes near it would not "
        "be sharp."
    )
    return Picture("tightness", "How tight the bounds are", caption, _png(figure))


def growth(grown: Sequence[Worst]) -> Picture | None:
    """The worst error found against the horizon, next to the bounds."""
    if not grown:
        return None
    panels = by_delta(grown)
    figure, axes = _new(1, len(panels), 3.6 * len(panels), 3.9)
    for ax, (delta, rows) in zip(axes[0], panels.items(), strict=True):
        _growth_panel(ax, delta, rows)
    axes[0][0].set_ylabel("units of reward")
    figure.legend(*axes[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=5, frameon=False)
    slopes = ", ".join(f"{exponent(rows):.2f} at {delta:g}" for delta, rows in panels.items())
    caption = (
        "The largest error found for a fixed KL per token, over independent tokens (circles) and over chains moved by "
        f"gradient ascent (crosses). Fitted exponent of T: {slopes} nats per token. The printed bounds grow like "
        "T^1.5 before their cap; T times the KL per token is never exceeded and nearly reached."
    )
    return Picture("growth", "How the error grows with the horizon", caption, _png(figure))


def _growth_panel(ax: Axes, delta: float, rows: Sequence[Worst]) -> None:
    horizons = [one.horizon for one in rows]
    lines = (
        ("Pinsker-marginal, printed", PURPLE, [one.printed["pinsker_marginal_kl"] for one in rows]),
        ("mixed KL, printed", ORANGE, [one.printed["mixed_kl"] for one in rows]),
        ("T delta", GREEN, [one.sharp["sequence_kl"] for one in rows]),
    )
    for label, colour, values in lines:
        ax.plot(horizons, values, color=colour, label=label)
    ax.plot(horizons, [one.independent for one in rows], "o", color=BLUE, markersize=5, label="independent tokens")
    ax.plot(horizons, [one.searched for one in rows], "x", color=VERMILION, markersize=6, label="searched chains")
    ax.set(xscale="log", yscale="log", xlabel="T, tokens", title=f"KL per token {delta:g}: T^{exponent(rows):.2f}")
    ticks = horizons[:: 2 if len(horizons) < 8 else 4]
    ax.set_xticks(ticks, [str(horizon) for horizon in ticks])
    ax.minorticks_off()


def searched(found: Sequence[Found]) -> Picture | None:
    """The tightest world of each bound and shape."""
    if not found:
        return None
    bounds = list(dict.fromkeys(one.bound for one in found))
    shapes = list(dict.fromkeys((one.vocabulary, one.horizon) for one in found))
    figure, axes = _new(1, 1, 8.0, 0.42 * len(bounds) + 1.1)
    ax = axes[0][0]
    places = np.arange(len(bounds))[::-1]
    for index, (shape, colour) in enumerate(zip(shapes, (BLUE, VERMILION, GREEN, ORANGE), strict=False)):
        ratios = [
            one.ratio
            for bound in bounds
            for one in found
            if (one.bound, one.vocabulary, one.horizon) == (bound, *shape)
        ]
        height = 0.8 / len(shapes)
        offset = 0.4 - height * (index + 0.5)
        ax.barh(places + offset, ratios, height * 0.85, color=colour, label=f"V = {shape[0]}, T = {shape[1]}")
    ax.axvline(1, color=INK, linewidth=1, linestyle="--")
    ax.set_yticks(places, [bound.replace("_", " ") for bound in bounds])
    ax.set(xlabel="largest |Error| / sharp bound", xlim=(0, 1.02))
    ax.grid(visible=False, axis="y")
    figure.legend(*ax.get_legend_handles_labels(), loc="outside upper center", ncols=len(shapes), frameon=False)
    caption = (
        "The tightest worlds that gradient ascent finds, over policies and with the worst reward. A bar at 1 means "
        "that the constant cannot be lowered for that shape."
    )
    return Picture("searched", "The tightest worlds", caption, _png(figure))
