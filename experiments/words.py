"""Numbers as a person reads them."""

from collections.abc import Sequence

NONE = "\u2013"
"""An en dash, where there is no number."""


def percent(value: float) -> str:
    """0.594 as "59.4 %"."""
    return f"{100 * value:.1f} %"


def interval(ends: Sequence[float]) -> str:
    """[0.51, 0.672] as "51.0 to 67.2 %"."""
    return f"{100 * ends[0]:.1f} to {100 * ends[1]:.1f} %"


def points(value: float) -> str:
    """0.31 as "+31.0 points"."""
    return f"{100 * value:+.1f} points"


def point_interval(ends: Sequence[float]) -> str:
    """[0.21, 0.4] as "+21.0 to +40.0"."""
    return f"{100 * ends[0]:+.1f} to {100 * ends[1]:+.1f}"


def duration(seconds: float) -> str:
    """Seconds as "48 s", "6 min 12 s" or "2 h 05 min"."""
    whole = round(seconds)
    if whole < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{whole} s"
    minutes, rest = divmod(whole, 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"


def number(value: float | None) -> str:
    """Three significant digits."""
    return NONE if value is None else f"{value:.3g}"


def one_line(text: str, width: int = 100) -> str:
    """A text as one printable line of at most `width` letters."""
    # What cannot be printed (control characters, halves of surrogate pairs) is shown as such.
    line = "".join(letter if letter.isprintable() else "\ufffd" for letter in " ".join(text.splitlines()))
    return line if len(line) <= width else f"{line[: width - 1]}…"


def in_figure(text: str) -> str:
    """A text as matplotlib writes it as it is: a dollar sign would begin a formula, an underscore in front hide it."""
    # matplotlib leaves out of a legend what begins with an underscore.
    return ("\u200a" if text.startswith("_") else "") + one_line(text).replace("$", r"\$")
