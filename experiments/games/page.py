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
from experiments.games.numbers import named
from experiments.games.settings import FRESH
from experiments.games.settings import LABELS
from experiments.games.settings import Arm
from experiments.games.settings import GameSettings
from experiments.games.settings import all_arms
from experiments.games.settings import control_settings
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
    "unregularised": style.MUTED,
    "kl_clipped": style.SKY,
    "kl_truncated": style.GREEN,
    "reverse_kl": style.PURPLE,
    "hellinger": style.SKY,
    "total_variation": style.GREEN,
    "entropy": style.VERMILION,
}
DASHED = ("kl_clipped", "kl_truncated", "hellinger", "total_variation", "entropy")


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
        f"{_words(game)}: mean return of the games that ended since the point before, mean over {settings.seeds} seeds "
        f"with 95 % bands. {_uses(settings)}"
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


def _differences(settings: GameSettings, summary: Mapping[str, Any]) -> Picture:
    """Relative score of every arm over PPO with the same reuse."""
    methods = [method for method in settings.arms if f"{method}_over_ppo" in summary["relative"]]
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
        "scores above chance, mean over games, paired by seed, with 95 % intervals (Student's t). Grey: the interval "
        "holds 0."
    )
    return Picture("relative", "Against PPO with as much reuse", caption, figure)


def _score(summary: Mapping[str, Any], name: str) -> Interval:
    return Interval(summary["relative"][name]["mean"], summary["relative"][name]["half_interval"])


def _drift(settings: GameSettings, results: Results, game: str) -> Picture:
    """Divergence of successive policies against frames."""
    figure, axes = new_axes("frames of each agent [thousands]", "divergence of successive occupancies [nats]")
    axes.set_yscale("log")
    for method in settings.arms:
        part = results[named(settings, game, method).name]
        pieces = np.array_split(part["occupancy_divergence"][:, 1:], min(POINTS, part["ended"].shape[1] - 1), axis=1)
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
        rows.append(
            (
                f"{_words(arm.game)}: {arm.label}",
                str(arm.reuse),
                f"{numbers['updates']:,}",
                f"{numbers['end']:.2f} ± {numbers['end_half_interval']:.2f}",
                f"{numbers['mean']:.2f} ± {numbers['mean_half_interval']:.2f}",
                gain,
                f"{numbers['occupancy_divergence']:.4f} ± {numbers['occupancy_divergence_half_interval']:.4f}",
                f"{numbers['allowed_divergence']:.3f} ± {numbers['allowed_divergence_half_interval']:.3f}"
                if control_settings(settings, arm).method.divergence != "none"
                else "",
                f"{numbers['effective_share']:.3f}",
                f"{numbers['entropy']:.2f}",
                f"{numbers['frames_per_second']:,.0f}",
            )
        )
    head = (
        "arm",
        "uses of a batch",
        "updates",
        "return at the end",
        "mean of the curve",
        "at the end, minus PPO with as much reuse",
        "divergence from the policy before [nats]",
        "at most, at the maximum [nats]",
        "effective share",
        "entropy at the end [nats]",
        "frames/s of all seeds",
    )
    return Table(head=head, rows=rows)


def _said(gain: Interval) -> str:
    return f"{gain.mean:+.2f} ± {gain.half:.2f}{'' if gain.resolved else ' (not resolved)'}"


def _published(settings: GameSettings, results: Results, summary: Mapping[str, Any]) -> Table:
    rows = []
    for game in settings.games:
        best = max(float(final(results[named(settings, game, method).name]).mean()) for method in settings.arms)
        printed = PUBLISHED[game]
        rows.append(
            (
                _words(game),
                f"{summary['chance'][game]:.2f}",
                f"{best:.1f}",
                *(str(printed.get(name, "")) for name in ("actor-critic", "gymnax", "pgx")),
            )
        )
    head = (
        "return",
        "chance",
        f"best arm here, {summary['frames'] / 1e6:.2g} million frames",
        "actor-critic of MinAtar's paper, 5 million",
        "PPO of gymnax-blines, 10 million, not sticky",
        "PPO of pgx, 20 million",
    )
    return Table(head=head, rows=rows)


def minatar_page(settings: GameSettings, results: Results, summary: Mapping[str, Any]) -> Page:
    """What was asked, what came out, how sure it is."""
    score = Interval(summary["kl_over_ppo"], summary["kl_over_ppo"] - summary["kl_over_ppo_low"])
    said = [
        f"{LABELS[name.partition('_over_')[0]]} over {LABELS[name.partition('_over_')[2]]}: "
        f"{_said(_score(summary, name))}"
        for name in summary["relative"]
    ]
    shown = [named(settings, game, method) for game in settings.games for method in settings.arms]
    others = [arm for arm in all_arms(settings) if arm not in shown]
    sections = [
        Section(
            "Returns",
            [f"Relative scores, mean over games, with 95 % intervals over seeds. {'; '.join(said)}."],
            [
                *(_learning(settings, results, game) for game in settings.games),
                *(_by_updates(settings, results, game) for game in settings.games),
                _differences(settings, summary),
            ],
            _table(settings, results, summary, shown),
        )
    ]
    if others:
        sections.append(
            Section(
                "Other arms, other reuse, no sticky actions",
                [
                    "Every other method with the reuse of the claim; the main ones with other reuse and without sticky "
                    "actions."
                ],
                table=_table(settings, results, summary, others),
            )
        )
    sections += [
        Section(
            "How far each policy goes, and what old data are worth",
            [
                "If an update reached the maximum of its objective, the divergence times its coefficient would be at "
                "most what the policy gained, as staying gains 0: the last but three columns of the table above, in "
                "advantages of size 1. The gain is the mean temporal difference of the values before the update on "
                "data of the policy after it, so it is as good as the values are. States are counted as they are met, "
                "not discounted. Of the states themselves the theorem says TV(d, d_old) ≤ c/(1-c) E TV(π, π_old), "
                "which at a discount of c = 0.99 is above 1, so vacuous, from a mean TV of 0.0101 on.",
            ],
            [
                *(_drift(settings, results, game) for game in settings.games),
                *(_shares(settings, results, game) for game in settings.games),
            ],
        ),
        Section(
            "Beside what others print",
            [
                "Their runs are 25 to 100 times as long, and their networks, step limits and numbers of seeds differ: "
                "these are what the games allow, not what these agents should have after so few frames.",
            ],
            table=_published(settings, results, summary),
        ),
    ]
    return Page(
        value=f"{score.mean:+.3f}",
        value_range=f"{score.low:+.3f} to {score.mean + score.half:+.3f} relative score",
        sentence=(
            f"Return at the end with the multi-step KL minus PPO's, every batch used {settings.reuse} times, as a "
            f"share of a skilled player's, 95 % interval over {settings.seeds} seeds, paired"
            f"{'' if score.resolved else ': not resolved'}."
        ),
        facts=(
            f"{len(all_arms(settings))} arms, {settings.seeds} seeds, {summary['frames']:,} frames each, "
            f"{', '.join(_words(game) for game in settings.games)}"
        ),
        sections=sections,
    )
