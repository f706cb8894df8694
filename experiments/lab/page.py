"""Pictures and tables of training under a controlled mismatch, the same for every world and both experiments."""

from collections.abc import Collection
from collections.abc import Mapping
from collections.abc import Sequence

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from experiments import style
from experiments import words
from experiments.figures import legend
from experiments.lab.arms import LABELS
from experiments.lab.numbers import COLLAPSE
from experiments.lab.numbers import over_seeds
from experiments.lab.numbers import resolved_share
from experiments.lab.numbers import summary_of_arm
from experiments.study import Arrays
from experiments.study import Section
from experiments.study import Table
from experiments.style import Picture
from experiments.style import new_axes

COLOURS = {
    "none": style.INK,
    "ppo_clip": style.MUTED,
    "tis": style.ORANGE,
    "mis": style.SKY,
    "trm_max": style.GREEN,
    "trm_avg": style.PURPLE,
    "trm": style.BLUE,
    "dvp": style.VERMILION,
    "dvp_trm": style.VERMILION,
}
DASHES = {"dvp_trm": ":", "trm_max": "--", "trm_avg": "--"}
SMOOTHED = 40
"""Curves are means over windows of one in so many of the steps."""

Arms = Mapping[str, Arrays]


def label(arm: str) -> str:
    """An arm in words; the part of it after a colon is a setting."""
    name, _, setting = arm.partition(":")
    return LABELS[name] + (f", log rho = {setting}" if setting else "")


def _colour(arm: str, number: int) -> str:
    if ":" in arm:
        return (style.VERMILION, style.ORANGE, style.PURPLE, style.SKY, style.GREEN)[number % 5]
    return COLOURS[arm]


def smooth(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """[seeds, windows] means over windows of steps, and the middle step of each."""
    width = max(1, values.shape[1] // SMOOTHED)
    count = values.shape[1] // width
    windows = values[:, : count * width].reshape(len(values), count, width)
    return np.arange(count) * width + (width + 1) / 2, windows.mean(axis=2)


def _curves(
    arms: Arms, quantity: str, title: str, *, log: bool = False, shown: Collection[str] | None = None
) -> Figure:
    """Of all arms or those that are shown; an arm has the same colour in every picture."""
    figure, axes = new_axes("step", title)
    figure.set_size_inches(4.7, 3.6)
    if log:
        axes.set_yscale("log")
    for number, (arm, part) in enumerate(arms.items()):
        if shown is not None and arm not in shown:
            continue
        steps, values = smooth(part[quantity])
        intervals = [over_seeds(column) for column in values.T]
        mean, half = (np.array([getattr(one, name) for one in intervals]) for name in ("mean", "half"))
        colour = _colour(arm, number)
        axes.plot(steps, mean, color=colour, linestyle=DASHES.get(arm, "-"), label=label(arm))
        # Rewards and shares lie in [0, 1]; an interval around their mean need not.
        low = np.maximum(mean - half, 0.2 * mean if log else 0.0)
        axes.fill_between(
            steps, low, mean + half if log else np.minimum(mean + half, 1.0), color=colour, alpha=0.13, linewidth=0
        )
    legend(axes, 2)
    return figure


def reward_picture(world: str, arms: Arms) -> Picture:
    """J of the trained policy, exactly."""
    figure = _curves(arms, "reward", "J of the trained policy")
    rates = [f"{label(arm)} {100 * summary_of_arm(part)['collapse_rate']:.0f} %" for arm, part in arms.items()]
    caption = (
        "Exact expected reward of the policy that is trained, mean over seeds with 95 % bands. Share of seeds that "
        f"collapsed (end below {COLLAPSE:g} of their best): " + ", ".join(rates) + "."
    )
    return Picture(f"{world}_reward", "Reward", caption, figure)


def gap_picture(world: str, arms: Arms) -> Picture:
    """How far trainer and sampler are apart."""
    figure = _curves(arms, "log_ppl_abs_diff", "log-abs-PPL gap [nats]", log=True)
    caption = (
        "Mean over responses of |mean over tokens of log pi - log mu|: the distance between trainer and sampler on the "
        "sampled tokens (rollout_corr/log_ppl_abs_diff)."
    )
    return Picture(f"{world}_gap", "Gap between trainer and sampler", caption, figure)


def wasted_picture(world: str, arms: Arms) -> Picture:
    """What rejection costs."""
    some = [arm for arm, part in arms.items() if part["wasted"].any()]
    figure = _curves(arms, "wasted", "share of tokens", shown=some or arms)
    costs = [f"{label(arm)} {100 * part['wasted'].mean():.1f} %" for arm, part in arms.items()]
    caption = (
        "Tokens that were sampled and scored and then have no weight in the update: rejected sequences, and tokens "
        "outside the safe set. On average " + ", ".join(costs) + "."
    )
    return Picture(f"{world}_wasted", "Compute lost to rejection", caption, figure)


def supports(part: Arrays) -> str:
    """What it means for the bounds that the two policies cannot draw the same tokens; nothing where they can."""
    uncovered, infinite = 1 - part["covered"].mean(), 1 - np.isfinite(part["sequence_kl"]).mean()
    if not uncovered and not infinite:
        return ""
    return (
        f" Both are pruned, each on its own safe set. In {100 * uncovered:.0f} % of the steps mu cannot draw all that "
        "pi can: bounds that need it have no proof there and are left out, and the estimate misses that part of the "
        f"error. In {100 * infinite:.0f} % pi cannot draw all that mu can: D_KL is infinite; the sum of TV remains."
    )


def bounds_picture(world: str, arm: str, part: Arrays, *, inputs: str) -> Picture:
    """Bounds against the exact error of the surrogate, for one arm."""
    figure, axes = new_axes("step", "units of reward")
    figure.set_size_inches(4.7, 3.6)
    axes.set_yscale("log")
    for name, colour, dashes, text in (
        ("unified_printed", style.VERMILION, "-", "smallest bound, printed"),
        ("unified_sharp", style.BLUE, "-", "smallest bound, sharp"),
        ("threshold", style.INK, "--", "trivial bound"),
        ("error", style.GREEN, "-", "|error|, exact"),
    ):
        steps, values = smooth(np.abs(part[name]))
        axes.plot(steps, np.maximum(values.mean(0), 1e-7), color=colour, linestyle=dashes, label=text)
    legend(axes, 2)
    share, resolved = part["vacuous"].mean(), resolved_share(part)
    caption = (
        f"{label(arm)}. Error = J(pi) - J(mu) - L', pi trained and mu sampling; {inputs}. The smallest sharp bound is "
        f"vacuous (at or above the trivial one) in {100 * share:.0f} % of the steps. The estimate of the error from "
        f"the samples of one step leaves out zero in {100 * resolved:.0f} % of them"
        + ("." if resolved > 0.5 else ": not resolved.")
        + supports(part)
    )
    # A colon is no part of a file name everywhere.
    name = f"{world}_bounds_{arm.replace(':-', '_')}"
    return Picture(name, f"Bounds against the error: {label(arm)}", caption, figure)


def estimated(part: Arrays) -> str:
    """The sampled error of the surrogate over all steps of a part, with its interval, or that it is not resolved."""
    # Steps are independent given their policies; seeds are independent: the mean over steps of a seed is one number.
    interval = over_seeds(part["error_sampled"].mean(axis=1))
    return f"{interval.mean:+.4f} ± {interval.half:.4f}" if interval.resolved else "not resolved"


def arms_table(arms: Arms) -> Table:
    """One row per arm."""
    rows = []
    for arm, part in arms.items():
        numbers = summary_of_arm(part)
        rows.append(
            (
                label(arm),
                f"{numbers['reward']:.3f} ± {numbers['reward_half_interval']:.3f}",
                f"{numbers['reward_of_sampler']:.3f}",
                f"{100 * numbers['collapse_rate']:.0f} %",
                words.number(numbers["log_ppl_abs_diff"]),
                f"{100 * numbers['acceptance']:.1f} %",
                f"{100 * numbers['wasted_tokens']:.1f} %",
                f"{part['error'].mean():+.4f}",
                estimated(part),
                words.number(numbers["bound_sharp_median"]),
                f"{100 * numbers['vacuous_share']:.0f} %",
            )
        )
    head = (
        "arm",
        "J at the end",
        "J of sampler",
        "collapsed",
        "log-PPL gap",
        "accepted",
        "tokens lost",
        "error, exact",
        "error, sampled",
        "sharp bound",
        "vacuous",
    )
    return Table(head=head, rows=rows)


def world_section(
    title: str, world: str, arms: Arms, paragraphs: Sequence[str], *, inputs: str, bounds_of: Sequence[str]
) -> Section:
    """Everything about the arms in one world."""
    # Ticks are made while drawing and take their look from the settings at that time.
    with matplotlib.rc_context(style.SETTINGS):
        pictures = [reward_picture(world, arms), gap_picture(world, arms), wasted_picture(world, arms)]
        pictures += [bounds_picture(world, arm, arms[arm], inputs=inputs) for arm in bounds_of if arm in arms]
    return Section(title, paragraphs, pictures, arms_table(arms))
