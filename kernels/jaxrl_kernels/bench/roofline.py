"""The bench's results as a roofline: python -m jaxrl_kernels.bench.roofline results/<device>.json roofline.png

A point is a program: its rate of matrix-product work against that work per byte of the arrays it names, arguments and
results once and temporaries twice (written and read). The flat roof is the rate of the bare product in the same run,
the slanted one the rate of a copy, if one was measured. matplotlib is needed here alone.
"""

import json
import re
import sys
from pathlib import Path
from typing import Any
from typing import NamedTuple

import matplotlib as mpl
from matplotlib.figure import Figure

from jaxrl_kernels.bench.cases import PRODUCTS

INK, MUTED, GRID = "#1d2126", "#69707a", "#e2e5e9"
COLOURS = {"naive": "#d55e00", "token_statistics": "#0072b2", "token_loss": "#009e73"}
"""Told apart under the common kinds of colour blindness."""

MARKERS = {"forward": "o", "gradient": "s"}

STYLE: Any = {
    "figure.constrained_layout.use": True,
    "font.size": 9.5,
    "text.color": INK,
    "axes.labelcolor": MUTED,
    "axes.edgecolor": MUTED,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "grid.color": GRID,
}


class Point(NamedTuple):
    """One program: flop per byte, and GFLOP per CPU second."""

    program: str
    intensity: float
    rate: float


def points(shape: str, programs: dict) -> list[Point]:
    """The programs of one shape, named as `bench.cases.Shape.name` does, that have a rate in flop."""
    rows, width, vocabulary = (int(part[1:]) for part in shape.split("_")[:3])
    itemsize = {"float32": 4, "bfloat16": 2}[shape.split("_")[3]]
    head = itemsize * width * (rows + vocabulary)
    found = []
    for name, measured in programs.items():
        if "gflop_per_cpu_second" not in measured or name not in PRODUCTS:
            continue
        # Policy and reference are read; the cotangents of the policy's two arrays are written.
        heads = 1 if name == "product" else 3 if name.startswith("gradient") else 2
        moved = heads * head + 2 * measured["temporaries_mib"] * 2**20
        flop = PRODUCTS[name] * 2.0 * rows * width * vocabulary
        found.append(Point(name, flop / moved, measured["gflop_per_cpu_second"]))
    return found


def copy_rate(results: dict) -> float | None:
    """GB per CPU second of a copy of float32 arrays, if the run had one."""
    for name, shape in results["shapes"].items():
        if name.endswith("float32") and "copy" in shape["programs"]:
            return shape["programs"]["copy"]["gb_per_cpu_second"]
    return None


def draw(results: dict, shape: str) -> Figure:
    """The roofline of one shape."""
    found = points(shape, results["shapes"][shape]["programs"])
    roof = next(point.rate for point in found if point.program == "product")
    slope = copy_rate(results)
    with mpl.rc_context(STYLE):
        figure = Figure((6.4, 3.8), dpi=160)
        axes = figure.add_subplot(xscale="log", yscale="log")
        axes.grid(which="major", linewidth=0.8)
        low, high = 4.0, 6000.0
        ridge = low if slope is None else roof / slope
        axes.plot([max(low, ridge), high], [roof, roof], color=INK, linewidth=1.4)
        axes.text(high, roof * 1.04, f"bare product, {roof:.0f} GFLOP", ha="right", va="bottom")
        if slope is not None and ridge > low:
            axes.plot([low, ridge], [low * slope, roof], color=INK, linewidth=1.4)
            axes.text(low * 1.15, low * slope, f"copy,\n{slope:.1f} GB", ha="left", va="top")
        for point in found:
            if point.program == "product":
                continue
            group, program = point.program.split("/")
            label = f"{program}, {group}: {point.rate:.0f} GFLOP, {point.rate / roof:.0%}"
            marker: Any = {"marker": MARKERS[group], "markersize": 7, "linestyle": "none", "color": COLOURS[program]}
            axes.plot(point.intensity, point.rate, label=label, **marker)
        axes.legend(loc="lower right", frameon=False, title="rate, and share of the bare product's", fontsize=9)
        axes.set_xlim(low, high)
        axes.set_ylim(12, roof * 1.3)
        ticks = [tick for tick in (10, 20, 50, 100, 200, 500, 1000) if 12 <= tick <= roof * 1.3]
        axes.set_yticks(ticks, [str(tick) for tick in ticks])
        axes.minorticks_off()
        axes.set_xlabel("matrix-product work per byte of arrays [flop / byte]")
        axes.set_ylabel("GFLOP per CPU second")
        axes.set_title(f"{results['device']}: {shape.replace('_', ' ')}", loc="left", fontsize=9.5, color=INK)
    return figure


if __name__ == "__main__":
    measurements = json.loads(Path(sys.argv[1]).read_text())
    first = next(name for name in measurements["shapes"] if re.match(r"N\d+_D", name))
    draw(measurements, first).savefig(sys.argv[2])
