"""The report of `logit_dynamics_training`."""

from collections.abc import Mapping
from collections.abc import Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import NullFormatter

from experiments import style
from experiments import words
from experiments.bands import band
from experiments.bands import half_width
from experiments.bands import standard_error
from experiments.dynamics.numbers import ADAM
from experiments.dynamics.numbers import BATCH
from experiments.dynamics.numbers import TOKEN
from experiments.dynamics.numbers import formula_per_advantage
from experiments.dynamics.numbers import realised_per_advantage
from experiments.dynamics.numbers import tokens_of
from experiments.figures import legend
from experiments.study import Arrays
from experiments.study import Page
from experiments.study import Results
from experiments.study import Section
from experiments.study import Table
from experiments.style import Picture
from experiments.style import new_axes

POLICIES = {"table": "table of logits", "agent": "transformer agent", "language": "language model"}
KINDS = {TOKEN: "one token's gradient alone", BATCH: "the batch's update"}
LOOKS = {TOKEN: (style.BLUE, "o"), BATCH: (style.VERMILION, "s")}
SHOWN = 400
"""Most points of one kind in a panel."""


def scatter(name: str, part: Arrays) -> Picture:
    """Realised against predicted sizes, both per |eta A|, of the tokens of one policy."""
    figure, axes = new_axes("sqrt(1 - 2 p + C)", "|dz| / |eta A|, realised")
    figure.set_size_inches(4.7, 3.7)
    generator = np.random.default_rng(0)
    axes.set_xscale("log")
    axes.set_yscale("log")
    smallest = 1.0
    for kind in (BATCH, TOKEN):
        seeds, points = part[f"{kind}_step"].shape[:2]
        tables = [tokens_of(part, kind, *place) for place in np.ndindex(seeds, points)]
        x = np.concatenate([table["unit"] for table in tables])
        y = np.concatenate([table["realised"] / np.abs(table["step"]) for table in tables])
        some = generator.permutation(len(x))[:SHOWN]
        colour, mark = LOOKS[kind]
        smallest = min(smallest, float(x[some].min(initial=1.0)))
        axes.plot(x[some], y[some], mark, color=colour, markersize=2.6, alpha=0.45, label=KINDS[kind])
    grid = np.geomspace(smallest, 2**0.5, 50)
    axes.plot(grid, grid, color=style.INK, linewidth=1.2, linestyle="--", label="the formula")
    # Between powers of ten the numbers would run into each other.
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.yaxis.set_minor_formatter(NullFormatter())
    legend(axes, 2)
    caption = (
        f"Each mark is a sampled token that the formula moves, at some probe of any seed (a random {SHOWN} of each "
        "kind). The dashed line is the formula; marks along a line parallel to it would be one factor for all tokens."
    )
    return Picture(f"sizes_{name}", f"Realised against predicted: {POLICIES[name]}", caption, figure)


def _course(axes: Axes, steps: np.ndarray, values: np.ndarray, colour: str, label: str, dashes: str) -> np.ndarray:
    """Mean over seeds with a 95 % band, as a share of the first; returns the mean, empty where there is none. Seeds
    without an advantage in the batch of a probe have no number there, and a probe needs two that have.
    """
    usable = np.isfinite(values).sum(axis=0) >= 2
    if not usable.any():
        return np.array([])
    columns = [column[np.isfinite(column)] for column in values.T[usable]]
    mean = np.array([column.mean() for column in columns])
    half = np.array([half_width(len(column)) * standard_error(column) for column in columns])
    options = {"dashes": dashes, "marker": "o", "half": 1.0}
    band(axes, steps[usable], mean / mean[0], half / mean[0], colour, label, **options)
    return mean / mean[0]


def regulation(name: str, part: Arrays) -> Picture:
    """Predicted and realised sizes per advantage, as shares of those at the first probe."""
    figure, axes = new_axes("update", "mean size, first probe = 1")
    figure.set_size_inches(4.7, 3.5)
    said, largest = [], 1.0
    for sizes, colour, label, dashes in (
        (formula_per_advantage(part), style.INK, "the formula", "--"),
        (realised_per_advantage(part, TOKEN), LOOKS[TOKEN][0], "one token alone", "-"),
        (realised_per_advantage(part, BATCH), LOOKS[BATCH][0], "the batch's update", "-"),
    ):
        course = _course(axes, part["probe_steps"], sizes, colour, label, dashes)
        said.append(f"{label} {course[-1]:.2f}" if len(course) else f"{label} {words.NONE}")
        largest = max([largest, *course.tolist()])
    # A band of few seeds may be wider than all that is to be seen.
    axes.set_ylim(0, 1.3 * largest)
    legend(axes, 3)
    reward = part["reward"]
    tail = max(1, reward.shape[1] // 10)
    caption = (
        f"{POLICIES[name].capitalize()}: mean |dz| over all sampled tokens, divided by their mean |eta A|; mean over "
        f"seeds with 95 % bands. At the last probe: {', '.join(said)}. Reward: {reward[:, :tail].mean():.2f} in "
        f"the first tenth of training, {reward[:, -tail:].mean():.2f} in the last."
    )
    return Picture(f"regulation_{name}", f"Self-regulation: {POLICIES[name]}", caption, figure)


def _cell(numbers: Mapping[str, Any], name: str, form: str = ".3g") -> str:
    value, half = numbers.get(name), numbers.get(f"{name}_half")
    if value is None:
        return words.NONE
    return format(value, form) + ("" if half is None else f" ± {half:.2g}")


def _columns(summary: Mapping[str, Any]) -> list[tuple[str, Mapping[str, Any], str]]:
    found = []
    for name, title in POLICIES.items():
        for kind, label in ((TOKEN, "one token"), (BATCH, "batch"), (ADAM, "Adam")):
            if f"{kind}_rank_correlation" in summary[name]:
                found.append((f"{title.split()[0]}, {label}", summary[name], kind))
    return found


SIZE_ROWS = {
    "rank_correlation": "rank correlation, realised and formula",
    "centred_rank_correlation": "the same without the common shift",
    "partial_correlation": "correlation of logs without |A|",
    "slope": "slope of the logs",
    "ratio": "median of realised / formula",
    "spread": "95 % over 5 % quantile of that",
    "centred": "median share of a change that is no common shift",
    "realised_over_first": "median of realised / first order",
    "last_over_first": "realised per |A|, last probe / first",
}
RISING_ROWS = {
    "rising_formula": "updates with A > 0 that raise another action: formula",
    "rising": "the same, in the network",
    "agreeing": "other actions whose sign is that of the formula",
    "agreeing_mass": "the same, by probability",
}


def statistics_table(summary: Mapping[str, Any], rows: Mapping[str, str]) -> Table:
    """One row per statistic, one column per policy and kind of update."""
    columns = _columns(summary)
    made = [(text, *(_cell(numbers, f"{kind}_{name}") for _, numbers, kind in columns)) for name, text in rows.items()]
    return Table(head=("", *(title for title, _, _ in columns)), rows=made)


def _control(summary: Mapping[str, Any]) -> Sequence[str]:
    table, agent, language = (summary[name] for name in POLICIES)
    return [
        "The control: where the logits are the parameters, one token moves them by the formula, to a relative error of "
        f"{table['first_order_relative_error']:.1g} to first order and to {table['realised_error']:.1g} in float32 "
        "logits before and after. The batch's update of a table is the sum over all visits of a context, so that "
        "even there its size is no longer that of one token.",
        "In a network one token's change is eta A K (e_c - p), K the tangent kernel of its context. Median extreme "
        f"eigenvalues of K: agent {words.number(agent['kernel_low'])} and {words.number(agent['kernel_high'])}; the "
        f"largest of the language model {words.number(language['kernel_high'])} (power iteration; its smallest is 0, "
        "as its head has more rows than columns and does not learn). Realised over formula, to first order, lies "
        f"between them for {words.percent(agent['kernel_range_kept'])} of the agent's tokens and "
        f"{words.percent(language['kernel_range_kept'])} of the language model's.",
        "The rest of a context's change comes from other tokens: the median size of a token's own part, over that of "
        f"the whole, is {_cell(table, 'own')} in the table, {_cell(agent, 'own')} in the agent "
        f"and {_cell(language, 'own')} in the language model, at a median cosine of "
        f"{_cell(table, 'own_cosine')}, {_cell(agent, 'own_cosine')} and {_cell(language, 'own_cosine')}. Tokens "
        "without an advantage, which the formula leaves where they are, move by "
        f"{_cell(table, 'without_advantage')}, {_cell(agent, 'without_advantage')} and "
        f"{_cell(language, 'without_advantage')} of what the others do.",
    ]


READING = (
    "Numbers are computed in each batch that is probed, then averaged over the probes of a seed; ± is the 95 % "
    "interval over seeds (Student's t). The language model is one run, so that its numbers have none. A correlation "
    "without |A| is that of log realised and log sqrt(1 - 2 p + C) after what log |A| explains of both is taken away. "
    "Adam has no eta that the formula could take: its ratio means nothing, its order and its slope do."
)


def dynamics_page(settings: Any, results: Results, summary: Mapping[str, Any]) -> Page:
    """Sizes, their course, and which other actions rise."""
    agent = summary["agent"]
    with matplotlib.rc_context(style.SETTINGS):
        first = [scatter(name, dict(results[name])) for name in POLICIES]
        course = [regulation(name, dict(results[name])) for name in ("table", "agent")]
    return Page(
        value=_cell(agent, "batch_rank_correlation", ".2f").split(" ")[0],
        value_range=f"rank correlation, 95 % half-interval {words.number(agent['batch_rank_correlation_half'])}",
        sentence=(
            "Between the formula and what the batch's update does to the logits of the transformer agent; 1 would be "
            "the formula's order. One token's gradient alone: "
            f"{_cell(agent, 'token_rank_correlation', '.2f')}."
        ),
        facts=(
            f"{settings.seeds} seeds of table and agent, {settings.table_steps} and {settings.agent_steps} plain "
            f"gradient steps; one run of {settings.language_model}, {settings.language_steps} steps of Adam"
        ),
        sections=[
            Section("Does the size follow the formula?", _control(summary), first),
            Section("In numbers", [READING], table=statistics_table(summary, SIZE_ROWS)),
            Section(
                "Does it shrink as the policy grows confident?",
                [
                    "The claim of self-regulation: a confident policy takes small steps. Shown per advantage, since "
                    "advantages become fewer too as a policy learns. Last probe over first, by the formula: "
                    + "; ".join(
                        f"{title} {_cell(summary[name], 'formula_last_over_first')}" for name, title in POLICIES.items()
                    )
                    + "."
                ],
                course,
            ),
            Section(
                "Do other actions rise with a rewarded one?",
                [
                    "By the formula others with p_k < C - p_c rise though A > 0. In the network: by the change of "
                    "their log-probabilities to first order, for one token's gradient and for the batch's update."
                ],
                table=statistics_table(summary, RISING_ROWS),
            ),
        ],
    )
