"""The report of `hybrid_imitation_rl`."""

from collections.abc import Mapping
from collections.abc import Sequence
from typing import Any

import numpy as np

from experiments import style
from experiments import words
from experiments.bands import band
from experiments.bands import half_width
from experiments.bands import standard_error
from experiments.figures import legend
from experiments.hybrid.arms import ARMS
from experiments.hybrid.arms import WARM_UP
from experiments.hybrid.numbers import Rest
from experiments.hybrid.numbers import difference
from experiments.hybrid.numbers import gap
from experiments.hybrid.numbers import lost_reward
from experiments.hybrid.numbers import places
from experiments.hybrid.numbers import rest
from experiments.hybrid.numbers import retuned
from experiments.hybrid.numbers import sampled_gap
from experiments.hybrid.numbers import z_scores
from experiments.hybrid.settings import EXACT
from experiments.hybrid.settings import RESTING
from experiments.hybrid.settings import HybridSettings
from experiments.hybrid.variance import ESTIMATORS
from experiments.hybrid.variance import UNBIASED
from experiments.lab.numbers import over_seeds
from experiments.study import Page
from experiments.study import Results
from experiments.study import Section
from experiments.study import Table
from experiments.style import Picture
from experiments.style import new_axes

LOOKS = {
    "rl": (style.MUTED, "--"),
    "offline": (style.ORANGE, "--"),
    "on_policy": (style.ORANGE, "-"),
    "kl_loss": (style.VERMILION, "-"),
    "hybrid_0": (style.SKY, ":"),
    "hybrid_0.5": (style.SKY, "--"),
    "hybrid_0.9": (style.SKY, "-"),
    "hybrid": (style.BLUE, "-"),
    "rao_blackwell": (style.GREEN, "-"),
    "reinforce": (style.INK, "-"),
    "linear": (style.ORANGE, "-"),
    "cosine": (style.PURPLE, "-"),
    "log_linear": (style.GREEN, "-"),
}
SCHEDULED = ("hybrid", "linear", "cosine", "log_linear")
MAIN = ("rl", "offline", "on_policy", "kl_loss", "hybrid_0.9", "hybrid", "rao_blackwell", "reinforce")
GAP = "J - J* [nats]"
FORMS = {"reinforce": style.INK, "hybrid": style.BLUE, "rao_blackwell": style.GREEN}
DASHES = {"none": ":", "reward": "--", "step": "-"}


def exact_picture(settings: HybridSettings, results: Results) -> Picture:
    """J - J* of every exact gradient, and where it must come to rest."""
    figure, axes = new_axes("update", GAP)
    figure.set_size_inches(4.7, 3.9)
    axes.set_yscale("log")
    shown = [name for name in EXACT if name not in SCHEDULED[1:] and name != "rl"]
    for name in shown:
        values = gap(settings, results, results[f"exact_{name}"])[0]
        colour, dashes = LOOKS[name]
        axes.plot(np.arange(len(values)), values, color=colour, linestyle=dashes, label=ARMS[name].label)
        if name in RESTING and name != "hybrid":
            axes.axhline(rest(results, name).gap, color=colour, linestyle=dashes, linewidth=0.7, alpha=0.6)
    legend(axes, 2)
    caption = (
        "Exact gradients, no sampling, Adam with a step size that falls to 0. Thin lines: J - J* of the policy at "
        "which the field of the same look vanishes, by backward induction. At the end: "
        + ", ".join(f"{ARMS[name].label} {_end(settings, results, name):.2g}" for name in shown)
        + "."
    )
    return Picture("exact", "What training without noise converges to", caption, figure)


def _end(settings: HybridSettings, results: Results, name: str) -> float:
    return float(gap(settings, results, results[f"exact_{name}"])[0, -1])


def frontier_picture(settings: HybridSettings, results: Results) -> Picture:
    """Reward against the KL to the teacher of the policies at which the fields vanish, by lambda."""
    figure, axes = new_axes("KL to the teacher, whole episodes [nats]", "expected reward")
    figure.set_size_inches(4.7, 3.7)
    known = results["resting"]
    for row, name in reversed(list(enumerate(RESTING))):
        colour, dashes = LOOKS[name]
        order = np.argsort((*settings.weights, settings.reward_weight))
        kl, reward = known["kl"][row][order], known["reward"][row][order]
        axes.plot(kl, reward, color=colour, linestyle=dashes, label=ARMS[name].label)
        axes.plot(known["kl"][row, -1], known["reward"][row, -1], "o", color=colour, markersize=5)
    axes.plot(0, known["teacher_reward"], "s", color=style.MUTED, markersize=5, label="teacher")
    axes.set_xlim(-0.05, 1.15 * float(known["kl"][RESTING.index("kl_loss"), -1]) + 0.6)
    legend(axes, 2)
    row = rest(results, "kl_loss")
    caption = (
        f"One point per lambda, from {min(settings.weights):g} to {max(settings.weights):g}; dots: lambda = "
        f"{settings.reward_weight:g}. The exact field rests on the frontier: no policy has more reward at its KL. At "
        f"lambda = {settings.reward_weight:g} KL loss + reward has reward {row.reward:.3f} at KL {row.kl:.2f}, "
        f"{lost_reward(results, 'kl_loss'):.3f} less than the optimum of that KL."
    )
    return Picture("frontier", "Reward for KL", caption, figure)


def _curves(settings: HybridSettings, results: Results, names: Sequence[str], name: str, title: str) -> Picture:
    figure, axes = new_axes("update", GAP)
    figure.set_size_inches(4.7, 3.9)
    axes.set_yscale("log")
    for arm in names:
        values = sampled_gap(settings, results, arm)
        colour, dashes = LOOKS[arm]
        axes_x = np.arange(values.shape[1])
        error, half = standard_error(values), half_width(len(values))
        band(axes, axes_x, values.mean(0), error, colour, ARMS[arm].label, dashes=dashes, half=half)
    legend(axes, 2)
    ends = [f"{ARMS[arm].label} {sampled_gap(settings, results, arm)[:, -1].mean():.3f}" for arm in names]
    caption = (
        f"Exact J - J* of the trained policy, mean over {settings.seeds} seeds with 95 % bands; {settings.group_size} "
        f"episodes of each of {settings.tasks} tasks per update. At the end: " + ", ".join(ends) + "."
    )
    return Picture(name, title, caption, figure)


def variance_picture(settings: HybridSettings, results: Results) -> Picture:
    """The trace of the covariance of the unbiased estimates, along training."""
    figure, axes = new_axes("", "trace of the covariance")
    figure.set_size_inches(4.7, 4.6)
    axes.set_yscale("log")
    x = np.arange(len(places(settings)))
    for number, (name, (label, _)) in enumerate(ESTIMATORS.items()):
        if name not in UNBIASED:
            continue
        form, _, baseline = name.rpartition("_")
        values = results["variance"]["variance"][:, number]
        axes.plot(x, values, color=FORMS[form], linestyle=DASHES[baseline], marker="o", markersize=3, label=label)
    axes.set_xticks(x, places(settings))
    legend(axes, 1)
    caption = (
        f"Of the gradient from one batch, over {settings.batches:,} batches, at policies of the exact run and at the "
        f"optimum: {_best(settings, results)}."
    )
    return Picture("variance", "How much the estimates scatter", caption, figure)


def _best(settings: HybridSettings, results: Results) -> str:
    """Which unbiased estimate scatters least, at each place."""
    names, rows = list(ESTIMATORS), results["variance"]["variance"]
    least = []
    for place, row in zip(places(settings), rows, strict=True):
        best = min(UNBIASED, key=lambda name: row[names.index(name)])
        least.append(f"{place}: {ESTIMATORS[best][0]} ({row[names.index(best)]:.2g})")
    return "the smallest estimate at " + "; ".join(least)


def resting_table(settings: HybridSettings, results: Results) -> Table:
    """Where each field vanishes, exactly, and where the exact run ended."""
    rows = []
    for name in EXACT:
        part = results[f"exact_{name}"]
        found = rest(results, name) if name in RESTING else None
        shown = [f"{value:.4f}" for value in found] if found else [words.NONE] * len(Rest._fields)
        end = _end(settings, results, name)
        rows.append(
            (ARMS[name].label, *shown, f"{end:.2g}", f"{part['reward'][0, -1]:.3f}", f"{part['kl'][0, -1]:.3f}")
        )
    head = ("arm", "rests at J - J*", "KL there", "reward there", "exact run: J - J*", "reward", "KL")
    return Table(head, rows)


def sampled_table(settings: HybridSettings, results: Results) -> Table:
    """Every arm at the end, against `hybrid`, paired by seed."""
    rows = []
    for name, arm in ARMS.items():
        part, values = results[f"sampled_{name}"], sampled_gap(settings, results, name)
        against = difference(settings, results, name, "hybrid")
        said = words.NONE if name == "hybrid" else f"{against.mean:+.3f} ± {against.half:.3f}"
        if name != "hybrid" and not against.resolved:
            said += " (not resolved)"
        rows.append(
            (
                arm.label,
                str(over_seeds(values[:, -1])),
                said,
                f"{values[:, settings.updates // 4].mean():.3f}",
                f"{part['reward'][:, -1].mean():.3f}",
                f"{part['kl'][:, -1].mean():.3f}",
            )
        )
    head = ("arm", "J - J* at the end", "minus hybrid", "at a quarter", "reward", "KL to teacher")
    return Table(head, rows)


def variance_table(settings: HybridSettings, results: Results) -> Table:
    """Trace of the covariance and exact bias of every estimator, at every place."""
    part, scores = results["variance"], z_scores(results)
    rows = []
    for number, (name, (label, _)) in enumerate(ESTIMATORS.items()):
        cells = []
        for place in range(len(places(settings))):
            bias = part["bias"][place, number]
            cells.append(f"{part['variance'][place, number]:.3g}" + (f" / {bias:.2g}" if name not in UNBIASED else ""))
        distance = part["distance"][:, number]
        rows.append(
            (label, *cells, f"{distance.min():.2f} to {distance.max():.2f}", f"{np.abs(scores[name]).max():.1f}")
        )
    head = ("estimate", *places(settings), "n distance² / variance", "largest |score|")
    return Table(head, rows)


def _resting_section(settings: HybridSettings, results: Results, summary: Mapping[str, Any]) -> Section:
    row, best = rest(results, "kl_loss"), rest(results, "hybrid")
    weight, nearest = retuned(settings, results, "kl_loss")
    return Section(
        "Where each gradient comes to rest, exactly",
        [
            "J = KL of whole episodes to the teacher - lambda times reward. The optimum is the teacher tilted by "
            f"exp(lambda R). J - J* is the KL from the law of the episodes to that of the optimum. lambda = "
            f"{settings.reward_weight:g}; the teacher earns {summary['teacher_reward']:.3f} and is at "
            f"{summary['teacher_gap']:.3f}.",
            "A gradient with a dense part vanishes at one policy, pi_T exp(-E[G]) in every state, found by backward "
            f"induction. That of KL loss + reward, which drops the KL of later steps, has J - J* = {row.gap:.3f}: "
            f"reward {row.reward:.3f} at KL {row.kl:.3f}, where the optimum has {best.reward:.3f} at {best.kl:.3f}. "
            f"With another lambda in its place, the nearest of those tried, {weight:g}, leaves {nearest:.3f} without "
            "noise. A discount below 1 rests elsewhere as well; here it discounts the reward too.",
        ],
        [exact_picture(settings, results), frontier_picture(settings, results)],
        resting_table(settings, results),
    )


def _sampled_section(settings: HybridSettings, results: Results) -> Section:
    def against(name: str) -> str:
        found = difference(settings, results, name, "hybrid")
        said = "" if found.resolved else ", not resolved"
        return f"{ARMS[name].label} {found.mean:+.3f} ± {found.half:.3f}{said}"

    schedules = "; ".join(against(name) for name in SCHEDULED[1:])
    return Section(
        "The same from sampled episodes",
        [
            f"Every arm takes {settings.updates} updates, has the same step sizes, the same numbers of episodes and a "
            "baseline that is the mean of the others of the group at the same step. Differences of J after the last "
            f"update are paired by seed, with 95 % intervals. Against hybrid: {against('kl_loss')}; "
            f"{against('hybrid_0.9')}; {against('rao_blackwell')}; {against('reinforce')}. All at the same lambda.",
            f"The schedules raise lambda to its final value in the first {100 * WARM_UP:.0f} % of the updates; they "
            f"are this project's, those of the note are unknown. Against a constant lambda: {schedules}.",
        ],
        [
            _curves(settings, results, MAIN, "sampled", "Training from episodes"),
            _curves(settings, results, SCHEDULED, "schedules", "Schedules of the reward weight"),
        ],
        sampled_table(settings, results),
    )


def _variance_section(settings: HybridSettings, results: Results, summary: Mapping[str, Any]) -> Section:
    low, high = summary["distance_range"]
    return Section(
        "Variance of the estimates",
        [
            "Trace of the covariance of one batch's gradient; after a stroke the norm of the exact bias, where the "
            "estimate has one. All estimates read the same episodes. Reward baseline: mean return of the others of the "
            "group; step baseline: mean coefficient of the others at the same step.",
            "At the optimum the sum of l from a step on, minus lambda R, is the same for every episode from a given "
            "state: that is what REINFORCE multiplies its scores with. Integrating l of the own step out, or replacing "
            "later l by their means k, takes that cancellation away, so that neither need lower the variance there.",
            f"Means against exact expectations: n |mean - expectation|² / variance is 1 on average for an estimate "
            f"without bias; it lies between {low:.2f} and {high:.2f}. Along what a KL loss leaves out of the gradient, "
            f"the mean of the nine estimates of grad J is off by at most {summary['unbiased_largest_score']:.1f} of "
            f"its standard errors ({len(UNBIASED) * len(places(settings))} comparisons), that of KL loss + reward by "
            f"at least {summary['kl_loss_smallest_score']:.0f}.",
        ],
        [variance_picture(settings, results)],
        variance_table(settings, results),
    )


def page(settings: HybridSettings, results: Results, summary: Mapping[str, Any]) -> Page:
    """What the sparse half buys: another resting point; and what it costs in variance."""
    apart, low = summary["kl_loss_minus_hybrid"], summary["kl_loss_minus_hybrid_low"]
    verdict = "" if low > 0 or 2 * apart - low < 0 else ": not resolved"
    return Page(
        value=f"{apart:+.3f}",
        value_range=f"{low:+.3f} to {2 * apart - low:+.3f} nats of J",
        sentence=(
            "J at the end of training with KL loss + reward minus that with the dense and the sparse gradient, at the "
            f"same lambda, 95 % interval over {settings.seeds} seeds, paired{verdict}. Without noise the two are "
            f"{rest(results, 'kl_loss').gap:.3f} apart."
        ),
        facts=f"{settings.tasks} tasks, {settings.seeds} seeds, {settings.updates} updates, {len(ARMS)} arms",
        sections=[
            _resting_section(settings, results, summary),
            _sampled_section(settings, results),
            _variance_section(settings, results, summary),
        ],
    )
