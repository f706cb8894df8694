"""The one look of all figures: colours for colour-blind readers, and SVG that follows a page's light or dark theme."""

import dataclasses
import functools
import io
import re
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

INK = "#1d2126"
MUTED = "#69707a"
GRID = "#e2e5e9"
PAPER = "#fefefe"
# Okabe and Ito (2008), told apart under the three common kinds of colour blindness and in grey.
BLUE = "#0072b2"
VERMILION = "#d55e00"
GREEN = "#009e73"
ORANGE = "#e69f00"
PURPLE = "#cc79a7"
SKY = "#56b4e9"

DARK = {
    INK: "#e8eaed",
    MUTED: "#9aa3ad",
    GRID: "#353b43",
    PAPER: "#15181c",
    BLUE: "#4ba3e3",
    VERMILION: "#ff8a4c",
    GREEN: "#2fcb9c",
    ORANGE: "#f5b941",
    PURPLE: "#e39cc4",
    SKY: "#8fd0f7",
}
"""What each colour becomes on a dark page."""

NAMES = {
    INK: "ink",
    MUTED: "muted",
    GRID: "grid",
    PAPER: "paper",
    BLUE: "blue",
    VERMILION: "vermilion",
    GREEN: "green",
    ORANGE: "orange",
    PURPLE: "purple",
    SKY: "sky",
}

SETTINGS: Any = {
    "figure.figsize": (4.7, 2.9),
    "figure.dpi": 100,
    "figure.constrained_layout.use": True,
    "figure.facecolor": "none",
    "savefig.facecolor": "none",
    "axes.facecolor": "none",
    "axes.edgecolor": MUTED,
    "axes.labelcolor": MUTED,
    "axes.titlecolor": INK,
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
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 9.5,
    "axes.labelsize": 9.5,
    "legend.fontsize": 9,
    "legend.frameon": False,
    "legend.handlelength": 1.6,
    "lines.linewidth": 1.8,
    "lines.solid_capstyle": "round",
    "svg.hashsalt": "jaxrl_llm",
    "svg.fonttype": "path",
}


@dataclasses.dataclass(frozen=True)
class Picture:
    """A figure with the words around it.

    Attributes:
        name: file name without its ending.
        title: what is shown, as a heading.
        caption: what to read from it, with numbers; shown below, and read out instead of the picture.
        figure: the drawing.
    """

    name: str
    title: str
    caption: str
    figure: Figure

    @functools.cached_property
    def svg(self) -> str:
        """The drawing as the text of an SVG file, the same for the same drawing."""
        with matplotlib.rc_context(SETTINGS):
            buffer = io.StringIO()
            self.figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
        return buffer.getvalue()


def new_axes(x_label: str, y_label: str) -> tuple[Figure, Axes]:
    """An empty figure with one pair of axes, in the project's style."""
    with matplotlib.rc_context(SETTINGS):
        # A Figure of its own: pyplot would keep every one of them alive.
        figure = Figure()
        axes = figure.add_subplot()
        axes.set_xlabel(x_label)
        axes.set_ylabel(y_label)
    return figure, axes


def inline_svg(picture: Picture) -> str:
    """The figure as an SVG element for a page: themed colours, ids of its own, a description for screen readers."""
    text = picture.svg
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    for colour, name in NAMES.items():
        text = re.sub(colour, f"var(--{name})", text, flags=re.IGNORECASE)
    text = re.sub(r'(\bid="|xlink:href="#|url\(#)', rf"\g<1>{picture.name}-", text)
    # Width and height give way to the page; the viewBox keeps the proportions.
    head, rest = text.split(">", 1)
    head = re.sub(r' (width|height)="[^"]*"', "", head)
    description = re.sub(r"<[^>]+>", "", picture.caption).replace('"', "'")
    return f'{head} role="img" aria-label="{description}">{rest}'


def save(picture: Picture, folder: Path) -> None:
    """Write the figure as PNG (on white, for pages that show only that) and SVG."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{picture.name}.svg").write_text(picture.svg, encoding="utf-8")
    (folder / f"{picture.name}.png").write_bytes(png_bytes(picture.figure))


def png_bytes(figure: Figure, *, dots_per_inch: int = 200) -> bytes:
    """The figure as a PNG on white."""
    with matplotlib.rc_context(SETTINGS):
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", dpi=dots_per_inch, facecolor="white", metadata={"Software": None})
    return buffer.getvalue()


def css_variables(theme: dict[str, str] | None = None) -> str:
    """The palette as CSS custom properties; `theme` replaces colours."""
    return " ".join(f"--{name}: {(theme or {}).get(colour, colour)};" for colour, name in NAMES.items())
