"""The figures of a report, each drawn from the rows of a run's files."""

import matplotlib
import numpy as np
from matplotlib.axes import Axes

from experiments import metric_names as names
from experiments import style
from experiments import words
from experiments.records import Record
from experiments.style import Picture
from experiments.style import new_axes

STEP = "rollout batch"
AVERAGED = 9
"""Steps in a moving average."""


def smooth(values: np.ndarray, width: int) -> np.ndarray:
    """Centred moving average; towards the ends, over what there is."""
    if len(values) < 3 or width < 2:
        return values
    kernel = np.ones(min(width, len(values)))
    return np.convolve(values, kernel, "same") / np.convolve(np.ones(len(values)), kernel, "same")


def line(axes: Axes, steps: np.ndarray, values: np.ndarray, colour: str, label: str, dashes: str = "-") -> None:
    """One metric: every step faint with its moving average on top (geometric on a log axis); a short run as it is."""
    label = words.in_figure(label)
    if len(steps) < 2 * AVERAGED:
        axes.plot(steps, values, color=colour, linestyle=dashes, label=label, marker="o", markersize=3)
        return
    averaged = np.exp(smooth(np.log(values), AVERAGED)) if axes.get_yscale() == "log" else smooth(values, AVERAGED)
    axes.plot(steps, values, color=colour, linewidth=0.7, alpha=0.35)
    axes.plot(steps, averaged, color=colour, linestyle=dashes, label=label)


def legend(axes: Axes, columns: int = 3) -> None:
    """Names of the lines above the axes, where they hide nothing."""
    axes.legend(
        loc="lower left",
        bbox_to_anchor=(-0.02, 1.0),
        ncols=columns,
        borderaxespad=0.2,
        handletextpad=0.5,
        columnspacing=1.2,
    )


def ends(values: np.ndarray) -> tuple[float, float]:
    """Mean of the first and of the last tenth."""
    few = max(1, len(values) // 10)
    return float(values[:few].mean()), float(values[-few:].mean())


def _between_ends(values: np.ndarray, form: str) -> str:
    first, last = (format(value, form) for value in ends(values))
    return f"{first} at the start, {last} at the end"


def reward(record: Record) -> Picture | None:
    """Training reward and held-out accuracy."""
    steps, rewards = record.column(names.REWARD)
    if not len(steps):
        return None
    figure, axes = new_axes(STEP, "share right, or reward")
    line(axes, steps, rewards, style.BLUE, "training reward (sampled)")
    caption = f"Mean reward of the sampled answers: {_between_ends(rewards, '.2f')}."
    held_steps, held = record.column(names.HELD_OUT)
    if len(held_steps):
        axes.plot(held_steps, held, color=style.VERMILION, marker="o", markersize=4, label="held-out accuracy (greedy)")
        caption += f" Greedy answers to problems never trained on: {held[0]:.2f} at first, {held[-1]:.2f} at last."
    axes.set_ylim(-0.02, max(1.02, float(rewards.max()) * 1.05))
    legend(axes, 2)
    return Picture("reward", "Reward and held-out accuracy", caption, figure)


def length(record: Record) -> Picture | None:
    """Response length."""
    steps, lengths = record.column(names.LENGTH)
    if not len(steps):
        return None
    figure, axes = new_axes(STEP, "tokens per answer")
    line(axes, steps, lengths, style.BLUE, "mean")
    axes.set_ylim(0, 1.1 * float(lengths.max()))
    return Picture(
        "length",
        "Length of the answers",
        f"Tokens per sampled answer, the end token included: {_between_ends(lengths, '.1f')}.",
        figure,
    )


def entropy(record: Record) -> Picture | None:
    """Entropy per token."""
    steps, values = record.column(names.ENTROPY)
    if not len(steps):
        return None
    figure, axes = new_axes(STEP, "nats per token")
    line(axes, steps, values, style.GREEN, "mean")
    axes.set_ylim(0, 1.1 * float(values.max()) or 1)
    caption = (
        "Exact entropy of the next-token distribution over the whole vocabulary, mean over sampled contexts, in nats: "
        f"{_between_ends(values, '.2f')}."
    )
    return Picture("entropy", "Entropy", caption, figure)


def shift(record: Record) -> Picture | None:
    """KL and TV per token between the policies before and after the update."""
    lines = [
        (names.KL_MEAN, style.BLUE, "KL, mean", "-"),
        (names.KL_MAX, style.BLUE, "KL, largest", ":"),
        (names.TV_MEAN, style.ORANGE, "TV, mean", "-"),
        (names.TV_MAX, style.ORANGE, "TV, largest", ":"),
    ]
    if not len(record.column(names.KL_MEAN)[0]):
        return None
    figure, axes = new_axes(STEP, "KL [nats], TV [prob]")
    axes.set_yscale("log")
    for name, colour, label, dashes in lines:
        steps, values = positive(*record.column(name))
        line(axes, steps, values, colour, label, dashes)
    legend(axes, 4)
    kl, tv = (float(np.median(record.column(name)[1])) for name in (names.KL_MEAN, names.TV_MEAN))
    caption = (
        "How far one rollout batch moves the policy: exact divergences over the whole vocabulary between the policy "
        "before the update, with the sampler's weights where they are perturbed, and the one after it, on the sampled "
        "contexts. "
        f"Median of the means: KL {kl:.2g} nats, TV {tv:.2g}."
    )
    return Picture("shift", "KL and TV of one update, per token", caption, figure)


def acceptance(record: Record) -> Picture | None:
    """Share of sequences that the trust-region mask accepts."""
    steps, accepted = record.column(names.ACCEPTED)
    if not len(steps):
        return None
    accepted = 100 * accepted
    figure, axes = new_axes(STEP, "% of sequences accepted")
    line(axes, steps, accepted, style.PURPLE, "accepted")
    axes.axhline(70, color=style.MUTED, linewidth=1, linestyle="--")
    axes.text(steps[0], 69, "above 70 % is recommended", color=style.MUTED, fontsize=8.5, va="top")
    axes.set_ylim(min(60.0, float(accepted.min()) - 5), 101)
    caption = (
        "Trust Region Masking drops a whole sequence when the exact KL of one of its tokens, or their mean, is above "
        f"its threshold. Accepted over all optimiser steps: {accepted.mean():.1f} % on average, {accepted.min():.1f} % "
        "in the worst batch."
    )
    return Picture("acceptance", "Trust-region acceptance", caption, figure)


def bounds(record: Record) -> Picture | None:
    """The paper's bound and the sharp one against the measured error of the surrogate, on a log axis."""
    if not len(record.column(names.UNIFIED_PRINTED)[0]):
        return None
    figure, axes = new_axes(STEP, "units of reward")
    figure.set_size_inches(4.7, 4.1)
    axes.set_yscale("log")
    for name, colour, dashes, label in (
        (names.UNIFIED_PRINTED, style.VERMILION, "-", "smallest bound, as printed"),
        (names.UNIFIED_SHARP, style.BLUE, "-", "smallest bound, sharp"),
        (names.THRESHOLD, style.INK, "--", "trivial bound: a bound at or above it is vacuous"),
    ):
        steps, values = positive(*record.column(name))
        line(axes, steps, values, colour, label, dashes)
    _measured_error(axes, record)
    legend(axes, 1)
    return Picture("bounds", "Bounds against the measured error of the surrogate", _bounds_caption(record), figure)


def positive(steps: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """What a log axis can show: a step that changed nothing has divergence and bound 0."""
    return steps[values > 0], values[values > 0]


def _measured_error(axes: Axes, record: Record) -> None:
    steps, error, spread = record.together(names.ERROR, names.ERROR_SE)
    size, half = np.abs(error), 1.96 * spread
    resolved = size > half
    unresolved = ~resolved & (size + half > 0)
    if unresolved.any():
        axes.plot(
            steps[unresolved],
            (size + half)[unresolved],
            "v",
            color=style.MUTED,
            markerfacecolor="none",
            markersize=3.5,
            markeredgewidth=0.8,
            label="not resolved from zero: upper end of the interval",
        )
    if resolved.any():
        axes.errorbar(
            steps[resolved],
            size[resolved],
            yerr=half[resolved],
            fmt="o",
            color=style.GREEN,
            markersize=3,
            elinewidth=0.8,
            label="|measured error|, 95 % interval",
        )


def _bounds_caption(record: Record) -> str:
    steps, error, spread = record.together(names.ERROR, names.ERROR_SE)
    resolved = int((np.abs(error) > 1.96 * spread).sum())
    return (
        "Error = J(after) - J(sampler) - L', the part of the gain that the surrogate gets wrong, estimated from the "
        f"same samples by its ratio form. It is told apart from zero in {resolved} of {len(steps)} batches. "
        "Estimate on visited contexts, not a certificate."
    )


def time_split(record: Record) -> Picture | None:
    """Seconds of each step by what they were spent on, stacked."""
    present = [name for name in names.TIMES if len(record.column(name)[0])]
    if not present:
        return None
    steps, *values = record.together(*present)
    labels = [names.TIMES[name] for name in present]
    figure, axes = new_axes(STEP, "seconds per batch")
    colours = (style.BLUE, style.ORANGE, style.GREEN, style.PURPLE, style.SKY)
    axes.stackplot(steps, values, labels=labels, colors=colours[: len(values)], alpha=0.85, linewidth=0)
    # The first steps compile; they would flatten all the others.
    total = np.sum(values, axis=0)
    axes.set_ylim(0, float(np.quantile(total, 0.95)) * 1.3)
    legend(axes, 5)
    medians = [float(np.median(value)) for value in values]
    caption = "Median per batch: " + ", ".join(
        f"{label} {median:.2f} s" for label, median in zip(labels, medians, strict=True)
    )
    caption += ". The first batches also compile and may leave the picture."
    return Picture("time", "Where the time goes", caption, figure)


def draw_all(record: Record) -> dict[str, Picture]:
    """Every figure for which the run has numbers, by name."""
    drawers = (reward, length, entropy, shift, acceptance, bounds, time_split)
    # Ticks are made while drawing and take their look from the settings at that time.
    with matplotlib.rc_context(style.SETTINGS):
        pictures = [drawer(record) for drawer in drawers]
    return {picture.name: picture for picture in pictures if picture is not None}
