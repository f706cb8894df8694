"""The report of `glm_claims`: a table with a row for each claim, and a figure of the effects."""

from collections.abc import Mapping
from typing import Any

import matplotlib
import numpy as np

from experiments import style
from experiments import words
from experiments.claims.numbers import REPRODUCED
from experiments.claims.numbers import REVERSED
from experiments.claims.numbers import Row
from experiments.claims.numbers import accepted_by_bin
from experiments.claims.numbers import drafts
from experiments.claims.numbers import rows
from experiments.claims.pretraining import BINS
from experiments.claims.settings import ClaimsSettings
from experiments.claims.text import NUMBERS
from experiments.study import Page
from experiments.study import Results
from experiments.study import Section
from experiments.study import Table
from experiments.style import Picture
from experiments.style import new_axes

COLOURS = {REPRODUCED: style.GREEN, REVERSED: style.VERMILION}


def _effects(found: list[Row]) -> Picture:
    """Every effect in units of the half of its interval, so that different units share one axis."""
    figure, axes = new_axes("effect / half of its 95 % interval", "")
    figure.set_size_inches(7.6, 0.42 * len(found) + 1.0)
    for number, row in enumerate(found):
        colour = COLOURS.get(row.verdict, style.MUTED)
        # What is far from 0 is drawn at the edge: that it is resolved can be seen there too.
        place = float(np.clip(row.effect.mean / row.effect.half if row.effect.half else 0.0, -9, 9))
        axes.errorbar(place, -number, xerr=float(row.effect.half > 0), fmt="o", color=colour, capsize=3, markersize=5)
    axes.axvline(0, color=style.INK, linewidth=0.8)
    axes.set_yticks([-number for number in range(len(found))], [row.claim for row in found], fontsize=8)
    axes.set_xlim(-10.5, 10.5)
    said = "; ".join(f"{row.claim}: {row.verdict}" for row in found)
    caption = (
        "One row a claim; right of 0 is as published. A bar is the 95 % interval over seeds, paired, in units of half "
        f"of itself; an effect of more than 9 such units is drawn at 9. {said}."
    )
    return Picture("effects", "Effects", caption, figure)


def _acceptance(results: Results) -> Picture:
    """Claim 3 by bins."""
    draft = drafts(results)
    share, tokens = accepted_by_bin(draft), draft["bin_tokens"].sum(0)
    middle = (np.arange(BINS) + 0.5) * np.log(NUMBERS) / BINS
    figure, axes = new_axes("entropy of the model [nats]", "accepted drafts")
    some = tokens > 0
    axes.plot(middle[some], share[some], color=style.BLUE, marker="o", markersize=4)
    axes.set_ylim(0, 1.02)
    caption = (
        "Expected acceptance sum_v min(p_v, q_v) = 1 - TV of the token after the next, p by the model and q by its "
        "further layer, by bins of the entropy of p; all seeds, held-out text. Tokens per bin: "
        + ", ".join(f"{int(count)}" for count in tokens)
        + "."
    )
    return Picture("acceptance", "Acceptance of drafts", caption, figure)


def _table(found: list[Row]) -> Table:
    lines = []
    for row in found:
        effect = f"{words.number(row.effect.mean)} ± {words.number(row.effect.half)}"
        arms = " / ".join(words.number(arm) for arm in row.arms)
        lines.append((row.claim, row.verdict, effect, row.measure, arms, row.published))
    head = ("claim", "verdict", "effect", "of", "with / without", "published")
    return Table(head=head, rows=lines)


def claims_page(settings: ClaimsSettings, results: Results, summary: Mapping[str, Any]) -> Page:
    """What was asked, what came out, how sure it is."""
    found = rows(settings, results)
    with matplotlib.rc_context(style.SETTINGS):
        pictures = [_effects(found), _acceptance(results)]
    return Page(
        value=f"{summary['reproduced']} of {len(found)}",
        value_range=f"{summary['reversed']} reversed, {summary['not_at_this_size']} not resolved",
        sentence=(
            f"Claims whose 95 % interval over {settings.seeds} seeds, paired, lies on the side that was published."
        ),
        facts=(
            f"{settings.seeds} seeds; {settings.layers} layers of width {settings.width}, {settings.experts} experts; "
            f"{settings.pieces * settings.piece} steps of pre-training, {settings.chunks * settings.chunk} from rewards"
        ),
        sections=[
            Section(
                "Claims",
                [
                    "The rule, stated beforehand: reproduced if the interval lies above 0, reversed if below, not at "
                    f"this size if it contains 0. Of {len(found)} intervals, one in twenty leaves out 0 by chance.",
                    "With and without are means of what is compared; of claim 1 they are losses after all tokens "
                    "[nats], of claim 3 the share of drafts that is accepted.",
                    f"Chosen rates: AdamW {summary['adamw_rate']:g}, Muon {summary['muon_rate']:g}. Held-out loss "
                    f"without balance {summary['loss_without_balance']:.4f}; largest violation with the auxiliary loss "
                    f"{summary['violation_with_loss']:.2f}, with the bias {summary['violation_with_bias']:.2f}.",
                    f"Before reinforcement learning {summary['solved_at_the_start']:.3f} of the problems are "
                    f"solved, after it (token-mean, temperature 1) {summary['solved_with_token_mean']:.3f}. Rounded "
                    f"routers choose other experts for {100 * summary['flips']:.1f} % of the tokens. Temperatures end "
                    f"at {summary['temperature_at_the_end']:.2f}. Problems of the curriculum, per seed: "
                    f"{summary['moderate_problems']:.0f} moderate, {summary['hard_problems']:.0f} just out of reach.",
                ],
                pictures,
                _table(found),
            )
        ],
    )
