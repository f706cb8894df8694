"""The report of `divergence_minatar`."""

from collections.abc import Mapping
from collections.abc import Sequence
from typing import Any

import numpy as np

from experiments import style
from experiments.bands import band
from experiments.bands import half_width
from experiments.bands import standard_error
from experiments.figures import legend
from experiments.games.numbers import POINTS
from experiments.games.numbers import PUBLISHED
from experiments.games.numbers import curve
from experiments.games.numbers import final
from experiments.games.numbers import frames
from experiments.games.numbers import has_bound
from experiments.games.settings import FRESH
from experiments.games.settings import LABELS
from experiments.games.settings import MAIN
from experiments.games.settings import Arm
from experiments.games.settings import GameSettings
from experiments.games.settings import all_arms
from experiments.games.settings import control_settings
from experiments.games.settings import named
from experiments.lab.numbers import Interval
from experiments.lab.numbers import over_seeds
from experiments.study import Page
from experiments.study import Results
from experiments.study import Section
from experiments.study import Table
from experiments.style import Picture
from experiments.style import new_axes

COLOURS = {
    FRESH: style.MUTED,
    "ppo": style.INK,
    "kl_one_step": style.ORANGE,
    "kl": style.BLUE,
    "vtrace": style.VERMILION,
    "unregularised": style.PURPLE,
    "kl_clipped": style.SKY,
    "kl_truncated": style.GREEN,
    "reverse_kl": style.PURPLE,
    "hellinger": style.VERMILION,
    "total_variation": style.GREEN,
    "entropy": style.ORANGE,
}
DASHED = ("unregularised", "hellinger", "total_variation", "entropy")
"""Those that share their colour with another arm."""


def _words(game: str) -> str:
    return game.replace("_", " ").title()


def _learning(settings: GameSettings, results: Results, game: str) -> Picture:
    """Return against frames."""
    figure, axes = new_axes("frames of each agent [thousands]", "return")
    for method in settings.arms:
        values = curve(results[named(settings, game, method).name])
        at = frames(settings, values.shape[1]) / 1000
        _band(axes, at, values, method)
    legend(axes, 2)
    caption = (
        f"{_words(game)}: mean return of the games that ended since the point before, while the policy changed; mean "
        f"over {settings.seeds} seeds with 95 % bands. {_uses(settings)}"
    )
    return Picture(f"frames_{game}", f"{_words(game)}, by frames", caption, figure)


def _by_updates(settings: GameSettings, results: Results, game: str) -> Picture:
    """Return against optimiser steps."""
    figure, axes = new_axes("updates of each agent", "return")
    for method in settings.arms:
        arm = named(settings, game, method)
        values = curve(results[arm.name])
        at = frames(settings, values.shape[1]) / (settings.parallel * settings.steps)
        _band(axes, at * control_settings(settings, arm).updates, values, method)
    axes.set_xscale("log")
    legend(axes, 2)
    caption = f"{_words(game)}: the same by the number of updates, which is what learning costs. {_uses(settings)}"
    return Picture(f"updates_{game}", f"{_words(game)}, by updates", caption, figure)


def _band(axes: Any, at: np.ndarray, values: np.ndarray, method: str) -> None:
    mean, error = values.mean(axis=0), standard_error(values)
    dashes = "--" if method in DASHED else "-"
    band(axes, at, mean, error, COLOURS[method], LABELS[method], half=half_width(len(values)), dashes=dashes)


def _uses(settings: GameSettings) -> str:
    return f"Every batch is used {settings.reuse} times, but once by “{LABELS[FRESH]}”."


def _differences(settings: GameSettings, summary: Mapping[str, Any]) -> list[Picture]:
    """Relative score of every arm over PPO with the same reuse, where there are some."""
    methods = [name for name in settings.arms if name != FRESH and f"{name}_over_ppo" in summary["relative"]]
    if not methods:
        return []
    figure, axes = new_axes("relative score over PPO with as much reuse", "")
    figure.set_size_inches(4.7, 0.36 * len(methods) + 0.9)
    for row, method in enumerate(reversed(methods)):
        score = _score(summary, f"{method}_over_ppo")
        colour = style.BLUE if score.resolved else style.MUTED
        axes.errorbar([score.mean], [row], xerr=[score.half], fmt="o", color=colour, markersize=4, capsize=2)
    axes.axvline(0, color=style.INK, linewidth=0.8)
    axes.set_yticks(range(len(methods)), [LABELS[method] for method in reversed(methods)])
    caption = (
        "Return at the end minus that of PPO that uses every batch as often, as a share of what a skilled player "
        "(pgx's PPO after 20 million frames) scores above chance, mean over these games, paired by seed, with 95 % "
        "intervals (Student's t). Grey: the interval holds 0."
    )
    return [Picture("relative", "Against PPO with as much reuse", caption, figure)]


def _by_reuse(settings: GameSettings, summary: Mapping[str, Any], game: str) -> list[Picture]:
    """Return at the end against the uses of a batch, where there are several."""
    reuses = sorted({*settings.reuses, settings.reuse})
    if not settings.reuses:
        return []
    figure, axes = new_axes("uses of each batch", "return at the end")
    axes.set_xscale("log", base=2)
    for method in MAIN:
        arms = [Arm(game, FRESH if (method, n) == ("ppo", 1) else method, n, settings.sticky) for n in reuses]
        shown = [
            (n, summary["arms"][arm.name]) for n, arm in zip(reuses, arms, strict=True) if arm.name in summary["arms"]
        ]
        axes.errorbar(
            [n for n, _ in shown],
            [numbers["end"] for _, numbers in shown],
            yerr=[numbers["end_half_interval"] for _, numbers in shown],
            color=COLOURS[method],
            label=LABELS[method],
            marker="o",
            markersize=4,
            capsize=2,
        )
    axes.set_xticks(reuses, [str(n) for n in reuses])
    legend(axes, 2)
    caption = f"{_words(game)}: mean over {settings.seeds} seeds with 95 % intervals, by how often a batch is used."
    return [Picture(f"reuse_{game}", f"{_words(game)}, by uses of a batch", caption, figure)]


def _score(summary: Mapping[str, Any], name: str) -> Interval:
    return Interval(summary["relative"][name]["mean"], summary["relative"][name]["half_interval"])


def _drift(settings: GameSettings, results: Results, game: str) -> Picture:
    """Divergence of successive policies against frames."""
    figure, axes = new_axes("frames of each agent [thousands]", "KL from the policy before [nats]")
    axes.set_yscale("log")
    for method in settings.arms:
        part = results[named(settings, game, method).name]
        pieces = np.array_split(part["occupancy_divergence"], min(POINTS, part["ended"].shape[1]), axis=1)
        # Nothing came before the first policy.
        pieces[0] = pieces[0][:, 1:] if pieces[0].shape[1] > 1 else np.full((settings.seeds, 1), np.nan)
        values = np.stack([piece.mean(axis=1) for piece in pieces], axis=1)
        _band(axes, frames(settings, values.shape[1]) / 1000, values, method)
    legend(axes, 2)
    caption = (
        f"{_words(game)}: KL(π ‖ π_old) of each policy from the one before, in the states that the new one meets: the "
        "Bregman divergence of their occupancies for the conditional entropy. It falls with the step size, to 0."
    )
    return Picture(f"drift_{game}", f"{_words(game)}: how far each policy goes", caption, figure)


def _shares(settings: GameSettings, results: Results, game: str) -> Picture:
    """Effective sample size against frames."""
    figure, axes = new_axes("frames of each agent [thousands]", "effective share of the sample")
    for method in settings.arms:
        part = results[named(settings, game, method).name]
        pieces = np.array_split(part["effective_share"], min(POINTS, part["ended"].shape[1]), axis=1)
        values = np.stack([piece.mean(axis=1) for piece in pieces], axis=1)
        _band(axes, frames(settings, values.shape[1]) / 1000, values, method)
    legend(axes, 2)
    caption = (
        f"{_words(game)}: (Σρ)² / (n Σρ²) of the ratios in a minibatch, mean over updates: 1 where the data are the "
        "policy's own, small where a few steps outweigh the others."
    )
    return Picture(f"share_{game}", f"{_words(game)}: what old data are still worth", caption, figure)


def _table(settings: GameSettings, results: Results, summary: Mapping[str, Any], arms: Sequence[Arm]) -> Table:
    rows = []
    for arm in arms:
        numbers = summary["arms"][arm.name]
        base = Arm(arm.game, "ppo", arm.reuse, arm.sticky)
        gain = ""
        if arm.method not in ("ppo", FRESH) and base.name in results:
            gain = _said(over_seeds(final(results[arm.name]) - final(results[base.name])))
        allowed = ""
        if has_bound(settings, arm):
            gained, half = (numbers[name] / settings.coefficient for name in ("gain", "gain_half_interval"))
            allowed = f"{gained:.4f} ± {half:.4f}"
        skipped = f" ({numbers['skipped']:.0f} skipped)" if numbers["skipped"] else ""
        rows.append(
            (
                f"{_words(arm.game)}: {arm.label}",
                str(arm.reuse),
                f"{arm.sticky:g}",
                f"{numbers['updates']:,}{skipped}",
                f"{numbers['end']:.2f} ± {numbers['end_half_interval']:.2f}",
                gain,
                "unknown"
                if numbers["over_the_run"] is None
                else f"{numbers['over_the_run']:.2f} ± {numbers['over_the_run_half_interval']:.2f}",
                f"{numbers['occupancy_divergence']:.4f} ± {numbers['occupancy_divergence_half_interval']:.4f}",
                allowed,
                f"{numbers['policy_tv']:.3f}",
                f"{numbers['effective_share']:.3f}",
                f"{numbers['entropy']:.2f}",
                f"{numbers['frames_per_second']:,.0f}",
            )
        )
    head = (
        "arm",
        "uses of a batch",
        "sticky",
        "updates",
        "return at the end",
        "minus PPO with as much reuse",
        "mean return over the run",
        "KL from the policy before [nats]",
        "KL allowed, were the objective maximised [nats]",
        "TV from the policy before",
        "effective share",
        "entropy at the end [nats]",
        "frames/s of all seeds",
    )
    return Table(head=head, rows=rows)


def _said(gain: Interval, digits: int = 2) -> str:
    return f"{gain.mean:+.{digits}f} ± {gain.half:.{digits}f}{'' if gain.resolved else ' (not resolved)'}"


def _published(settings: GameSettings, summary: Mapping[str, Any]) -> Table:
    """PPO here beside what others print."""
    shown = [method for method in (FRESH, "ppo") if method in settings.arms]
    rows = []
    for game in settings.games:
        ours = [summary["arms"][named(settings, game, method).name]["end"] for method in shown]
        printed = (str(PUBLISHED[game].get(name, "")) for name in ("actor-critic", "gymnax", "pgx"))
        rows.append((_words(game), f"{summary['chance'][game]:.2f}", *(f"{end:.1f}" for end in ours), *printed))
    head = (
        "return",
        "chance",
        *(f"{LABELS[method]}, {summary['frames'] / 1e6:.2g} million frames" for method in shown),
        "actor-critic of MinAtar's paper, 5 million",
        "PPO of gymnax-blines, 10 million, not sticky",
        "PPO of pgx, 20 million",
    )
    return Table(head=head, rows=rows)


def _returns(settings: GameSettings, results: Results, summary: Mapping[str, Any], shown: Sequence[Arm]) -> Section:
    ends = [
        f"{_words(game)} "
        + ", ".join(f"{summary['arms'][arm.name]['end']:.1f} ({arm.label})" for arm in shown if arm.game == game)
        for game in settings.games
    ]
    scores = [
        f"{LABELS[name.partition('_over_')[0]]} over {LABELS[name.partition('_over_')[2]]}: "
        f"{_said(_score(summary, name), 3)}"
        for name in summary["relative"]
    ]
    paragraphs = [
        f"Returns at the end: {'; '.join(ends)}. Chance scores "
        + ", ".join(f"{summary['chance'][game]:.1f} in {_words(game)}" for game in settings.games)
        + "."
    ]
    if scores:
        paragraphs.append(
            f"Relative scores, mean over games, with 95 % intervals over seeds: {'; '.join(scores)}. Of so many "
            "differences one in twenty looks resolved by chance. Arms of a seed share their first weights and first "
            "games; other games may differ."
        )
    paragraphs.append(
        f"The return at the end is that of {settings.parallel} whole games of each seed, played after training. The "
        "step size 0.001 and the coefficient 1 are those of the paper's code, for every arm; nothing was tuned. PPO "
        "is its clip on the same advantages of V-trace."
    )
    return Section(
        "Returns",
        paragraphs,
        [
            *(_learning(settings, results, game) for game in settings.games),
            *(_by_updates(settings, results, game) for game in settings.games),
            *(picture for game in settings.games for picture in _by_reuse(settings, summary, game)),
            *_differences(settings, summary),
        ],
        _table(settings, results, summary, shown),
    )


def _drifts(settings: GameSettings, results: Results) -> Section:
    return Section(
        "How far each policy goes, and what old data are worth",
        [
            "If an update reached the maximum of its objective, the KL of the occupancies times the coefficient would "
            "be at most what the policy gained, as staying gains 0: “KL allowed” in the table. The gain is the "
            "performance difference by the temporal differences of one network's values under both policies, in "
            "advantages of size 1, with states as often as they are met, not discounted; policies that made the older "
            "batches are further away than the one before.",
            "Of the states the theorem says TV(d, d_old) ≤ c/(1-c) E TV(π, π_old) with a discount of c = 0.99: above "
            "1, so vacuous, from a mean TV of 0.0101 on.",
            "“Multi-step” sums the divergence through ratios capped at 1, as the paper's code does, to the end of a "
            "row of steps. That sum is no divergence, and in exact worlds it acts like one step "
            "(`divergence_chain`, errata F8.5). The entropy of the whole occupancy with its ratio of state densities "
            "dropped, as people would use it, is the same arm.",
        ],
        [
            *(_drift(settings, results, game) for game in settings.games),
            *(_shares(settings, results, game) for game in settings.games),
        ],
    )


def minatar_page(settings: GameSettings, results: Results, summary: Mapping[str, Any]) -> Page:
    """What was asked, what came out, how sure it is."""
    arms, settings = all_arms(settings), settings.whole
    shown = [named(settings, game, method) for game in settings.games for method in settings.arms]
    others = [arm for arm in arms if arm not in shown]
    sections = [_returns(settings, results, summary, shown)]
    if others:
        said = "The main arms with other numbers of uses, or without sticky actions."
        sections.append(Section("Other uses of a batch", [said], table=_table(settings, results, summary, others)))
    sections += [
        _drifts(settings, results),
        Section(
            "Beside what others print",
            [
                "At so few frames nobody prints returns. Their runs are longer, and networks, step limits and numbers "
                "of seeds differ; the first and the last are read off plots, and Seaquest of the first is of a version "
                "with an error. So these are what the games allow, not what these agents should have.",
            ],
            table=_published(settings, summary),
        ),
    ]
    compared = "kl_over_ppo" in summary["relative"]
    score = _score(summary, "kl_over_ppo") if compared else Interval(0.0, 0.0)
    return Page(
        value=f"{score.mean:+.3f}" if compared else "not compared",
        value_range=f"{score.low:+.3f} to {score.mean + score.half:+.3f} relative score" if compared else "",
        sentence=(
            f"Return at the end with the multi-step KL minus PPO's, every batch used {settings.reuse} times, as a "
            "share of what pgx's PPO scores above chance after 20 million frames, 95 % interval over "
            f"{settings.seeds} seeds, paired{'' if score.resolved else ': not resolved'}."
            if compared
            else "The multi-step KL and PPO are not both among the arms."
        ),
        facts=(
            f"{len(arms)} arms, {settings.seeds} seeds, {summary['frames']:,} frames each, "
            f"{', '.join(_words(game) for game in settings.games)}"
        ),
        sections=sections,
    )
