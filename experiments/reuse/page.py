"""The report of `divergence_chain`."""

from collections.abc import Mapping
from collections.abc import Sequence
from typing import Any

import numpy as np

from experiments import style
from experiments import words
from experiments.figures import legend
from experiments.reuse.arms import ARMS
from experiments.reuse.compute import GRADIENTS
from experiments.reuse.compute import MATCHED
from experiments.reuse.compute import doublings
from experiments.reuse.numbers import ORDER
from experiments.reuse.numbers import at_the_end
from experiments.reuse.numbers import gain_above
from experiments.reuse.numbers import of_family
from experiments.reuse.numbers import share_above
from experiments.reuse.settings import ReuseSettings
from experiments.reuse.worlds import FAMILIES
from experiments.reuse.worlds import RANDOM
from experiments.study import Page
from experiments.study import Results
from experiments.study import Section
from experiments.study import Table
from experiments.style import Picture
from experiments.style import new_axes

LOOKS = {
    "none": (style.MUTED, "--"),
    "ppo_clip": (style.ORANGE, "--"),
    "one_step": (style.VERMILION, "-"),
    "truncated": (style.SKY, "--"),
    "multi_step": (style.BLUE, "-"),
    "total_variation": (style.PURPLE, "-"),
    "full_entropy": (style.GREEN, "-"),
}
"""Arms of the curves; the others lie on top of one of these."""

COLOURS = {"chains": style.VERMILION, "sparse": style.BLUE, "dense": style.GREEN}
DRIFT = "TV of states, TV(d, d_old)"


def _curve(x: Sequence[int], values: np.ndarray, title: str, name: str, words_of: str, y_label: str) -> Picture:
    """Curves of the arms on the chain, [arms, x]."""
    figure, axes = new_axes("updates on the same batch", y_label)
    figure.set_size_inches(4.7, 3.9)
    for arm, (colour, dashes) in LOOKS.items():
        axes.plot(x, values[ORDER.index(arm)], color=colour, linestyle=dashes, label=ARMS[arm].label)
    legend(axes, 2)
    ends = ", ".join(f"{ARMS[arm].label} {values[ORDER.index(arm), -1]:.3f}" for arm in LOOKS)
    return Picture(name, title, f"{words_of} At the end: {ends}.", figure)


def drift_picture(settings: ReuseSettings, results: Results) -> Picture:
    """How far the states of the chain move with every reuse."""
    values = of_family(results["curves_current"], "chain")["states"][0]
    return _curve(
        range(1, settings.reuses + 1),
        values,
        "How far the states of the chain drift",
        "drift",
        f"Steps of one size, coefficient {settings.coefficient:g}, advantages of the current policy.",
        DRIFT,
    )


def shared_picture(settings: ReuseSettings, results: Results) -> Picture:
    """The same where all reuses share one whole step."""
    numbers = doublings(settings)
    picture = _curve(
        numbers,
        of_family(results["shared"], "chain")["states"][0],
        "One whole step, cut into more and more updates",
        "shared",
        "All updates together make the same step. Made in one it has no divergence yet: phi is 0 at the old policy. "
        "With two updates the full entropy overshoots.",
        DRIFT,
    )
    axes = picture.figure.axes[0]
    axes.set_xscale("log", base=2)
    axes.set_xticks(numbers, [str(number) for number in numbers])
    axes.minorticks_off()
    return picture


def return_picture(results: Results) -> Picture:
    """Return against drift along the reuses, on the chain."""
    figure, axes = new_axes(DRIFT, "J - J of the old policy")
    figure.set_size_inches(4.7, 3.9)
    part = of_family(results["curves_current"], "chain")
    for arm, (colour, dashes) in LOOKS.items():
        row = ORDER.index(arm)
        x, y = (np.append(0.0, part[quantity][0, row]) for quantity in ("states", "gain"))
        axes.plot(x, y, color=colour, linestyle=dashes, label=ARMS[arm].label)
        axes.plot(x[-1], y[-1], "o", color=colour, markersize=4)
    axes.plot(part["best_states"][0], part["best_gain"][0], "*", color=style.INK, markersize=9, label="optimum")
    legend(axes, 2)
    caption = (
        "Along the updates, one line per arm; dots: the last one; star: the policy that is best for return minus the "
        f"divergence, drift {part['best_states'][0]:.3f}, gain {part['best_gain'][0]:.3f}. Differences at equal drift "
        "are a few hundredths of the gain and are in the table."
    )
    return Picture("return", "Return for drift on the chain", caption, figure)


def share_picture(settings: ReuseSettings, results: Results, advantages: str) -> Picture:
    """In how many worlds each arm gains more than one step, by kind of worlds."""
    arms = [arm for arm in MATCHED if arm != "one_step"]
    figure, axes = new_axes("share of worlds that gain more than one step", "")
    figure.set_size_inches(4.7, 1.4 + 0.45 * len(arms))
    axes.axvline(0.5, color=style.MUTED, linewidth=0.8)
    for number, family in enumerate(RANDOM):
        found = [share_above(results, family, arm, advantages) for arm in arms]
        y = np.arange(len(arms)) + 0.22 * (number - 1)
        values = np.array([share.value for share in found])
        ends = np.array([[share.value - share.low, share.high - share.value] for share in found]).T
        axes.errorbar(
            values, y, xerr=np.abs(ends), fmt="o", markersize=4, color=COLOURS[family], label=FAMILIES[family]
        )
    axes.set_yticks(np.arange(len(arms)), [ARMS[arm].label for arm in arms])
    axes.invert_yaxis()
    axes.set_xlim(-0.03, 1.03)
    legend(axes, 1)
    said = "; ".join(
        f"{ARMS[arm].label} "
        + ", ".join(f"{share_above(results, family, arm, advantages).value:.2f}" for family in RANDOM)
        for arm in arms
    )
    caption = (
        f"Every arm set so that the states drift {settings.drift:g} times as far as without divergence; "
        f"{settings.worlds} worlds of each kind, 95 % intervals. In the order of the legend: {said}."
    )
    return Picture(f"shares_{advantages}", "Who gains more at equal drift", caption, figure)


def matched_table(results: Results, advantages: str) -> Table:
    """Gain at equal drift less that of one step, in percent of it."""
    rows = []
    for arm in MATCHED:
        if arm == "one_step":
            continue
        cells = [f"{100 * gain_above(results, 'chain', arm, advantages).mean:+.1f} %"]
        for family in RANDOM:
            above, share = gain_above(results, family, arm, advantages), share_above(results, family, arm, advantages)
            cells.append(f"{100 * above.mean:+.1f} ± {100 * above.half:.1f} %")
            cells.append(f"{100 * share.value:.0f} ({100 * share.low:.0f} to {100 * share.high:.0f}) %")
        rows.append((ARMS[arm].label, *cells))
    head = ["arm", "the chain"]
    for family in RANDOM:
        head += [FAMILIES[family], "worlds"]
    return Table(head, rows)


def chain_table(results: Results) -> Table:
    """Every arm after the last reuse on the chain, at the coefficient of the objective."""
    part, rows = of_family(results["curves_current"], "chain"), []
    names = ("states", "pairs", "bound", "divergence", "gain", "distance")
    for arm in ARMS:
        rows.append((ARMS[arm].label, *(f"{at_the_end(part, arm, name)[0]:.3f}" for name in names)))
    best = [f"{part[f'best_{name}'][0]:.3f}" for name in names[:-1]]
    rows.append(("optimum", *best, "0.000"))
    return Table(("arm", "TV states", "TV pairs", "its bound", "D_F [nats]", "gain", "below optimum"), rows)


def gradient_table(results: Results) -> Table:
    """Median relative error of each policy gradient, by kind of worlds."""
    rows = []
    for name, label in GRADIENTS.items():
        medians = [np.median(of_family(results["gradients"], family)[name]) for family in FAMILIES]
        rows.append((label, *(f"{100 * value:.1f} %" if value > 1e-9 else f"{value:.0e}" for value in medians)))
    return Table(("policy gradient", *FAMILIES.values()), rows)


def _drift_section(settings: ReuseSettings, results: Results, summary: Mapping[str, Any]) -> Section:
    at = {family: summary["same_coefficient"]["current"][family] for family in FAMILIES}
    ratios = ", ".join(f"{at[family]['drift_ratio']:.3f} in {label}" for family, label in FAMILIES.items())
    less = ", ".join(f"{at[family]['less_drift']:.2f}" for family in RANDOM)
    better = ", ".join(f"{at[family]['better_objective']:.2f}" for family in RANDOM)
    order = ", ".join(FAMILIES[family] for family in RANDOM)
    return Section(
        "The same coefficient for all",
        [
            f"At the coefficient {settings.coefficient:g} the drift of multi-step over that of one step is {ratios}. "
            f"It drifts less in a share of {less} of the worlds ({order}), and ends with the higher <r, mu> - "
            f"coefficient D_F in {better}: that is what its gradient is of.",
            f"The drift never exceeds discount / (1 - discount) E TV(pi, pi_old): over all policies met it comes to "
            f"{summary['drift_over_bound']:.2f} of it at most. At the old policy phi is 0, so that the first update is "
            "the same with and without divergence: a divergence acts only where a batch is used again.",
        ],
        [drift_picture(settings, results), shared_picture(settings, results), return_picture(results)],
        chain_table(results),
    )


def _equal_section(settings: ReuseSettings, results: Results, summary: Mapping[str, Any]) -> Section:
    return Section(
        "The same drift for all, advantages of the current policy",
        [
            f"After {settings.reuses} updates every arm has let the states drift {settings.drift:g} times as far as no "
            "divergence does, because its coefficient was set so (without divergence: its step size). Numbers are the "
            "gain in return less that of one step, in percent of its mean, and in how many worlds it is larger. "
            f"{summary['unmatched']} settings of all could not be found. PPO's clip and total variation are left out: "
            "their drift jumps.",
            "The sum as the public code truncates it stays within a percent of one step: the expectation of "
            "min(1, rho) log rho changes its sign when the two policies are exchanged, so that it is no divergence, "
            "and what is charged for the future may be of either sign (errata F8.5).",
        ],
        [share_picture(settings, results, "current")],
        matched_table(results, "current"),
    )


def _old_section(settings: ReuseSettings, results: Results) -> Section:
    return Section(
        "The same with the advantages of the old policy",
        [
            "PPO's way: advantages are those of the old policy in every update. The charge for the future then is one "
            "of the current policy, beside values that are not."
        ],
        [share_picture(settings, results, "old")],
        matched_table(results, "old"),
    )


def _gradient_section(settings: ReuseSettings, results: Results, summary: Mapping[str, Any]) -> Section:
    return Section(
        "Whose gradient it is",
        [
            "Policy gradients of the pseudo-reward against autodiff of the divergence of occupancies, at the optimum "
            f"for the coefficient {settings.coefficient:g}; medians of |found - exact| / |exact|. Multi-step is the "
            "gradient of D_F for the conditional entropy, and with log d/d_old that of the full entropy, to "
            f"{summary['identity_largest_error']:.0e} in every world. Without log d/d_old it is multi-step again, "
            "number for number, and as a gradient of the full entropy it is wrong by the last row.",
            "An update on an old batch also has the states of the old policy: that error stays, whatever is charged.",
        ],
        [],
        gradient_table(results),
    )


def page(settings: ReuseSettings, results: Results, summary: Mapping[str, Any]) -> Page:
    """Multi-step beside one step at equal drift, and what else moves the states."""
    found = {family: share_above(results, family, "multi_step") for family in RANDOM}
    worst = min(found, key=lambda family: found[family].low)
    share = found[worst]
    others = ", ".join(
        f"{FAMILIES[family]} {words.percent(found[family].value)}" for family in RANDOM if family != worst
    )
    dropped = ", ".join(words.percent(share_above(results, family, "full_entropy").value) for family in RANDOM)
    order = ", ".join(FAMILIES[family] for family in RANDOM)
    return Page(
        value=words.percent(share.value),
        value_range=words.interval((share.low, share.high)),
        sentence=(
            f"of {FAMILIES[worst]} have more return with the multi-step divergence than with the one-step one where "
            f"the states drift alike, 95 % interval; {others}. With the ratio of state densities it is {dropped} "
            f"({order})."
        ),
        facts=f"{settings.worlds} worlds of each kind and a chain, {settings.reuses} updates, {len(ARMS)} arms, exact",
        sections=[
            _equal_section(settings, results, summary),
            _drift_section(settings, results, summary),
            _old_section(settings, results),
            _gradient_section(settings, results, summary),
        ],
    )
