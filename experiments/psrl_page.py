"""The report of `psrl`, and the statements that its claim is made of."""

import dataclasses
import itertools
from collections.abc import Mapping
from collections.abc import Sequence
from typing import Any

import numpy as np

from experiments import style
from experiments.bands import HALF
from experiments.bands import band
from experiments.bands import standard_error
from experiments.figures import legend
from experiments.study import Page
from experiments.study import Results
from experiments.study import Section
from experiments.study import Table
from experiments.style import Picture
from experiments.style import new_axes

AGENTS = {
    "psrl": "PSRL, exact",
    "greedy": "posterior mean",
    "gaussian": "PSRL, Gaussian surrogate",
    "dirichlet": "PSRL, Dirichlet rows",
    "vtr_1": "UCRL-VTR, theory",
    "vtr_0.3": "UCRL-VTR, bonus x 0.3",
    "vtr_0.1": "UCRL-VTR, bonus x 0.1",
    "vtr_0.03": "UCRL-VTR, bonus x 0.03",
    "rlsvi_1": "RLSVI, c = 1",
    "rlsvi_0.3": "RLSVI, c = 0.3",
    "rlsvi_0.1": "RLSVI, c = 0.1",
}
EASY_AGENTS = ("psrl", "greedy", "vtr_0.1", "rlsvi_0.1")
TUNED = tuple(name for name in AGENTS if name.startswith("vtr_") and name != "vtr_1")
RLSVI = tuple(name for name in AGENTS if name.startswith("rlsvi_"))
PROOF = ("matched", "along", "true_part")
CHAIN = ("decoupled", "sharp", "printed", "prior_free")
SIGMAS = 4.0
"""Standard errors within which an identity counts as confirmed."""


@dataclasses.dataclass(frozen=True)
class Statement:
    """One measured statement of the claim."""

    name: str
    text: str
    measured: str
    holds: bool


def slope(curve: np.ndarray) -> float:
    """Exponent of K in a cumulative regret, least squares in logarithms over the last seven eighths."""
    k = np.arange(1, len(curve) + 1)
    late = k >= len(curve) / 8
    return float(np.polyfit(np.log(k[late]), np.log(np.maximum(curve[late], 1e-9)), 1)[0])


def linearity(curve: np.ndarray) -> float:
    """Regret per episode in the last half over that in the second quarter: 1 where regret is linear."""
    quarter, half = len(curve) // 4, len(curve) // 2
    early, late = curve[half - 1] - curve[quarter - 1], curve[-1] - curve[half - 1]
    return float(late / (len(curve) - half) / max(early / (half - quarter), 1e-9))


def best(results: Results, names: Sequence[str]) -> str:
    """The one of these agents with the smallest final regret."""
    return min(names, key=lambda name: results[name]["final"].mean())


def paired(first: np.ndarray, second: np.ndarray) -> tuple[float, float]:
    """Mean and standard error of second - first over seeds."""
    gap = second - first
    return float(gap.mean()), float(standard_error(gap))


def _below(results: Results, name: str, first: str, second: str) -> Statement:
    gap, error = paired(results[first]["final"], results[second]["final"])
    text = f"{AGENTS[first]} has less regret than {AGENTS[second]}"
    return Statement(name, text, f"{gap:.2f} ± {error:.2f} less", gap > HALF * error)


def _bound_statement(results: Results) -> Statement:
    part = results["psrl"]
    at = part["bound_episodes"] - 1
    share = (part["mean"][at] + HALF * part["error"][at]) / part["decoupled"]
    chain = [part[name] for name in CHAIN]
    ordered = all((low <= high * (1 + 1e-5)).all() for low, high in itertools.pairwise(chain))
    return Statement(
        "bound",
        "regret <= decoupled <= sharp <= printed <= prior-free bound, at every K",
        f"regret at most {share.max():.2f} of the decoupled bound",
        bool(share.max() <= 1 and ordered),
    )


def _identity_statement(results: Results) -> Statement:
    part = results["psrl"]
    gaps = [paired(part["final"], part["matched"]), paired(part["matched"], part["along"])]
    gaps.append(paired(np.zeros(len(part["final"])), part["true_part"]))
    scores = [abs(gap) / max(error, 1e-9) for gap, error in gaps]
    return Statement(
        "identities",
        "the identities of the proof hold within their errors",
        f"at most {max(scores):.1f} standard errors apart",
        max(scores) <= SIGMAS,
    )


def _width_statement(settings: Any, results: Results) -> Statement:
    widths = sorted(settings.widths, reverse=True)
    rows = [results[f"width_{width:g}"] for width in widths]
    falling = all(
        np.all(np.diff(values) < 0)
        for values in (
            [row["final"].mean() for row in rows],
            [row["variance"][-1].sum() for row in rows],
            [row["sharp"][-1] for row in rows],
        )
    )
    shown = ", ".join(f"{row['final'].mean():.2f}" for row in rows)
    return Statement(
        "width", "regret, variances and bound fall with the width of the prior", f"regret {shown}", falling
    )


def statements(settings: Any, results: Results) -> list[Statement]:
    """The statements of the claim, each with what was measured."""
    tuned = best(results, TUNED)
    exponent, greedy = slope(results["psrl"]["mean"]), linearity(results["greedy"]["mean"])
    narrow, full = results["rank_one"]["final"].mean(), results["width_1"]["final"].mean()
    return [
        _bound_statement(results),
        Statement("slope", "regret grows no faster than sqrt(K)", f"exponent {exponent:.2f}", exponent <= 0.5),
        _identity_statement(results),
        _below(results, "tuned", "psrl", tuned),
        _below(results, "theory", tuned, "vtr_1"),
        _below(results, "rlsvi", "psrl", best(results, RLSVI)),
        _below(results, "greedy", "psrl", "greedy"),
        Statement(
            "linear",
            "the regret of the posterior mean grows linearly",
            f"per episode, {greedy:.2f} times as much in the last half as in the second quarter",
            greedy >= 0.8,
        ),
        _width_statement(settings, results),
        Statement("rank", "a prior of rank 1 has less regret", f"{narrow:.2f} against {full:.2f}", bool(narrow < full)),
    ]


def agents_figure(settings: Any, results: Results) -> Picture:
    """Cumulative Bayes regret of the agents."""
    figure, axes = new_axes("episodes K", "cumulative Bayes regret")
    figure.set_size_inches(4.7, 4.2)
    axes.set_xscale("log")
    axes.set_yscale("log")
    k = np.arange(1, settings.episodes + 1)
    styles = {
        "psrl": (style.BLUE, "-"),
        "greedy": (style.MUTED, "-"),
        "gaussian": (style.SKY, "--"),
        "dirichlet": (style.SKY, ":"),
        "vtr_1": (style.VERMILION, "-"),
        best(results, TUNED): (style.VERMILION, "--"),
        "rlsvi_1": (style.GREEN, "-"),
        best(results, RLSVI): (style.GREEN, "--"),
    }
    for name, (colour, dashes) in styles.items():
        band(axes, k, results[name]["mean"], results[name]["error"], colour, AGENTS[name], dashes=dashes)
    legend(axes, 2)
    caption = (
        f"Mean over {settings.seeds} MDPs drawn from the prior with 95 % bands; regret by dynamic programming. Every "
        "agent meets the same MDPs. Dashed optimism and dashed RLSVI are the best scales of those tried."
    )
    return Picture("agents", "Where exploration is needed", caption, figure)


def bounds_figure(settings: Any, results: Results) -> Picture:
    """The regret of PSRL below the chain of its bounds."""
    figure, axes = new_axes("episodes K", "Bayes regret of PSRL")
    figure.set_size_inches(4.7, 3.7)
    axes.set_xscale("log")
    axes.set_yscale("log")
    part = results["psrl"]
    k = part["bound_episodes"]
    band(axes, k, part["mean"][k - 1], part["error"][k - 1], style.BLUE, "measured")
    for name, label, colour, dashes in (
        ("decoupled", "decoupled", style.GREEN, "-"),
        ("sharp", "prior-dependent, sharp", style.ORANGE, "-"),
        ("printed", "prior-dependent", style.VERMILION, "--"),
        ("prior_free", "prior-free", style.INK, ":"),
    ):
        axes.plot(k, part[name], color=colour, linestyle=dashes, label=label)
    largest = (settings.horizon - 1) * k
    axes.plot(k, largest, color=style.MUTED, linestyle="-.", linewidth=1, label="(H - 1) K, any agent")
    legend(axes, 2)
    caption = (
        "Decoupled: sum over steps of sqrt(r K times the summed posterior variances met). A bound says something where "
        f"it is below the grey line, which no agent can exceed. At K = {settings.episodes}: measured "
        f"{part['mean'][-1]:.1f}, decoupled {part['decoupled'][-1]:.0f}, sharp {part['sharp'][-1]:.0f}, printed "
        f"{part['printed'][-1]:.0f}, prior-free {part['prior_free'][-1]:.0f}."
    )
    return Picture("bounds", "Regret and its bounds", caption, figure)


def easy_figure(settings: Any, results: Results) -> Picture:
    """The counter-example."""
    figure, axes = new_axes("episodes K", "cumulative Bayes regret")
    figure.set_size_inches(4.7, 3.3)
    k = np.arange(1, settings.episodes + 1)
    colours = (style.BLUE, style.MUTED, style.VERMILION, style.GREEN)
    for name, colour in zip(EASY_AGENTS, colours, strict=True):
        part = results[f"easy_{name}"]
        band(axes, k, part["mean"], part["error"], colour, AGENTS[name])
    legend(axes, 2)
    caption = (
        "Random base kernels: every action tells something about theta, so that an agent which never explores on "
        "purpose learns as well, and does not pay for exploring."
    )
    return Picture("easy", "Where exploration is free", caption, figure)


def _regret_table(settings: Any, results: Results) -> Table:
    at = [k for k in (50, 100, 200, 400) if k <= settings.episodes] or [settings.episodes]
    rows = []
    for prefix, names in (("", AGENTS), ("easy_", EASY_AGENTS)):
        for name in names:
            part = results[prefix + name]
            cells = [f"{part['mean'][k - 1]:.2f} ± {part['error'][k - 1]:.2f}" for k in at]
            rows.append((AGENTS[name] + (", easy" if prefix else ""), *cells, f"{slope(part['mean']):.2f}"))
    return Table(head=("agent", *(f"K = {k}" for k in at), "exponent of K"), rows=rows)


def _proof_table(results: Results) -> Table:
    part = results["psrl"]
    texts = {
        "final": "V*(M) - V(M) of the policy: regret",
        "matched": "V(M_k) - V(M): posterior matching",
        "along": "sum <X, theta_k - theta>: simulation",
        "true_part": "sum <X, theta - mean>: zero",
    }
    rows = [(text, f"{part[name].mean():.3f}", f"{standard_error(part[name]):.3f}") for name, text in texts.items()]
    return Table(head=("summed over episodes", "mean", "standard error"), rows=rows)


def _varied_table(settings: Any, results: Results) -> Table:
    rows = []
    named = [(f"width_{width:g}", f"width {width:g}") for width in sorted(settings.widths, reverse=True)]
    named.append(("rank_one", "rank 1"))
    named += [(f"horizon_{horizon}", f"H = {horizon}") for horizon in settings.horizons]
    named += [(f"dimension_{dimension}", f"d = {dimension}") for dimension in settings.dimensions]
    for name, label in named:
        part = results[name]
        numbers = [part["variance"][-1].sum(), *(part[bound][-1] for bound in CHAIN)]
        regret = f"{part['final'].mean():.2f} ± {part['error'][-1]:.2f}"
        rows.append((label, regret, *(f"{number:.3g}" for number in numbers)))
    return Table(head=("prior", "regret", "sum of variances", "decoupled", "sharp", "printed", "prior-free"), rows=rows)


def _exponents(settings: Any, results: Results) -> str:
    """Powers of H and d in regret and bound, in words."""
    at = settings.varied_episodes - 1
    texts = []
    for letter, here, others, prefix in (
        ("H", settings.horizon, settings.horizons, "horizon"),
        ("d", settings.dimension, settings.dimensions, "dimension"),
    ):
        if not others:
            continue
        sizes = np.array([here, *others], float)
        rows = [results["width_1"]] + [results[f"{prefix}_{size}"] for size in others]
        powers = [
            np.polyfit(np.log(sizes), np.log([float(pick(row)) for row in rows]), 1)[0]
            for pick in (lambda row: row["mean"][at], lambda row: row["sharp"][-1], lambda row: row["prior_free"][-1])
        ]
        texts.append(
            f"Regret grows as {letter}^{powers[0]:.2f}, the sharp bound as {letter}^{powers[1]:.2f}, the prior-free "
            f"one as {letter}^{powers[2]:.2f}."
        )
    return " ".join(texts)


def psrl_page(settings: Any, results: Results, summary: Mapping[str, Any]) -> Page:
    """Statements, regrets, bounds, what the prior changes, and the counter-example."""
    held = statements(settings, results)
    regret, error = results["psrl"]["mean"][-1], results["psrl"]["error"][-1]
    tuned, second = best(results, TUNED), best(results, RLSVI)
    table = Table(
        head=("statement", "measured", "holds"),
        rows=[(one.text, one.measured, "yes" if one.holds else "no") for one in held],
    )
    return Page(
        value=f"{regret:.1f}",
        value_range=f"± {HALF * error:.1f} Bayes regret of PSRL after {settings.episodes} episodes",
        sentence=(
            f"Against {results['greedy']['mean'][-1]:.1f} of the posterior mean, {results[tuned]['mean'][-1]:.1f} of "
            f"the best scaled UCRL-VTR, {results['vtr_1']['mean'][-1]:.1f} with the bonus of theory, and "
            f"{results[second]['mean'][-1]:.1f} of the best RLSVI. The sharp prior-dependent bound is "
            f"{results['psrl']['sharp'][-1]:.0f}. {sum(one.holds for one in held)} of {len(held)} statements hold."
        ),
        facts=(
            f"H = {settings.horizon}, d = {settings.dimension}, {settings.actions} actions, {settings.atoms} atoms, "
            f"{settings.episodes} episodes, {settings.seeds} seeds"
        ),
        sections=[
            Section("Statements", [], table=table),
            Section(
                "Regret",
                [
                    "One action leads to a medium state surely, the others to a good or a bad one; only what is tried "
                    f"is learned. UCRL-VTR with the bonus of theory was optimistic throughout in "
                    f"{summary['optimistic_runs']:.0%} of the runs (theory: at least 95 %)."
                ],
                [agents_figure(settings, results), bounds_figure(settings, results)],
                _regret_table(settings, results),
            ),
            Section("The steps of the proof", [], table=_proof_table(results)),
            Section(
                "What the prior, H and d change",
                [f"After {settings.varied_episodes} episodes. {_exponents(settings, results)}"],
                table=_varied_table(settings, results),
            ),
            Section(
                "The counter-example",
                ["The same comparison in random linear mixtures: never a test of exploration by itself."],
                [easy_figure(settings, results)],
            ),
        ],
    )
