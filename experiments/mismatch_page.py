"""The report of `mismatch_anatomy`."""

from collections.abc import Callable
from collections.abc import Mapping
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from experiments import style
from experiments import words
from experiments.bands import HALF
from experiments.figures import legend
from experiments.mismatch_statistics import EDGES
from experiments.mismatch_statistics import FLAT_BUCKETS
from experiments.mismatch_statistics import LOG_MIN_P
from experiments.mismatch_statistics import bucket_errors
from experiments.mismatch_statistics import bucket_means
from experiments.mismatch_statistics import flat_means
from experiments.mismatch_statistics import flatness
from experiments.mismatch_statistics import noise_scale
from experiments.study import Page
from experiments.study import Results
from experiments.study import Section
from experiments.study import Table
from experiments.style import Picture
from experiments.style import new_axes
from jaxrl_llm.bounds import SurrogateErrorBounds
from jaxrl_llm.bounds import bound_inputs_from_tokens
from jaxrl_llm.bounds import mismatch
from jaxrl_llm.bounds import surrogate_error_bounds
from jaxrl_llm.objectives import masks

COLOURS = (style.BLUE, style.SKY, style.GREEN, style.ORANGE, style.VERMILION, style.PURPLE, style.MUTED)
MARKS = "osD^vPX"
DELTAS = np.geomspace(1e-7, 1.0, 60)
CENTRES = np.sqrt(np.append(EDGES[0] / 10, EDGES) * np.append(EDGES, 1.0))

MOMENTS = (
    "Exact moments under the engine's distribution, in the contexts that were visited. A standard deviation is that "
    "within a context, the root of the mean square over contexts: an estimator that says each context's KL exactly has "
    "0, however much contexts differ. Where the engine can sample every token k3 is unbiased for KL(mu‖pi), as k1 "
    "always is; k2 is not. Under top-p or top-k, k3 misses the trainer's mass on what is never sampled."
)

PROOFS = (
    "Of engines only: a perturbation is measured in contexts that the trainer visited, and the bounds are about those "
    "that the sampler visits. Where a sampler cannot draw a token that the trainer can, as under top-p or top-k, only "
    "D_KL, the sum of TV and what is never below them have a proof."
)


def bounds_of(part: Mapping[str, np.ndarray], horizon: int) -> SurrogateErrorBounds:
    """Every bound, estimated on contexts that the engine visited, for rewards in [0, 1].

    Infinite where there is no proof because the engine cannot sample a token that the trainer can.
    """
    arrays = (jnp.asarray(part[name]) for name in ("kl", "tv", "full_mask"))
    whole = bool(np.isfinite(part["noise"][part["full_mask"]]).all())
    return surrogate_error_bounds(bound_inputs_from_tokens(*arrays, horizon=horizon), mu_covers_pi=whole)


def _named(results: Results, kind: str) -> dict[str, dict[str, np.ndarray]]:
    return {name.removeprefix(f"{kind}_"): part for name, part in results.items() if name.startswith(f"{kind}_")}


def _engines(settings: Any, results: Results) -> dict[str, dict[str, np.ndarray]]:
    found = _named(results, "engine")
    return {name: found[name] for name in settings.engines}


def _shown(name: str) -> str:
    """A perturbation in words; a precision as it is."""
    return name if name.isupper() else name.replace("_", " ")


def _size(axes: Axes, height: float = 3.7) -> None:
    figure = axes.figure
    assert isinstance(figure, Figure)
    figure.set_size_inches(4.7, height)


def law(settings: Any, results: Results) -> Picture:
    """|d| of the sampled tokens against p, with the bounds, for the finest and the coarsest precision."""
    engines = _engines(settings, results)
    shown = [name for name in ("BF16", "Q4_1") if name in engines] or list(engines)[-2:]
    figure = Figure(figsize=(4.5 * len(shown), 3.9))
    grid = 1 - np.geomspace(1, 1e-4, 300)
    for number, name in enumerate(shown):
        part = engines[name]
        axes = figure.add_subplot(1, len(shown), number + 1)
        p = np.exp(part["log_pi"])[part["mask"]]
        change = np.abs(part["log_mu"] - part["log_pi"])[part["mask"]]
        rest = np.maximum(1 - p, 1e-4)
        axes.loglog(
            rest, np.maximum(change, 1e-7), "o", color=style.BLUE, alpha=0.35, markersize=3, label="a sampled token"
        )
        mean = np.average(flat_means(part)[np.isfinite(flat_means(part))])
        axes.plot(1 - grid, mean * (1 - grid), color=style.GREEN, label=f"mean: {mean:.2g} (1 - p)")
        noise = float(np.median(part["noise"][part["full_mask"]]))
        first = 2 * noise * (1 - grid)
        axes.plot(1 - grid, first, color=style.VERMILION, linestyle="--", label=f"2 e (1 - p), e = {noise:.2g}")
        exact = -np.asarray(mismatch.log_prob_change_range(jnp.asarray(grid), max_noise=noise)[0])
        axes.plot(1 - grid, exact, color=style.INK, linestyle=":", label="exact range, lower side")
        axes.set_xlabel("1 - p")
        axes.set_ylabel("|log p' - log p| [nats]" if number == 0 else "")
        axes.set_title(name, fontsize=9.5, color=style.INK, loc="right")
        axes.set_ylim(max(1e-7, change[change > 0].min() / 3), max(exact.max(), change.max()) * 2)
        axes.legend(loc="lower right", fontsize=7.5)
    share = [
        words.percent(float(engines[name]["above_printed"][engines[name]["full_mask"]].mean())) for name in engines
    ]
    caption = (
        "Every sampled token. e is half the range of log p'/p over the vocabulary in a context (its median is drawn): "
        "the smallest bound on the difference of logits that is true. With the e of each context, the printed law "
        f"|d| <= 2 e (1 - p) fails for {', '.join(share)} of the sampled tokens in {', '.join(engines)}."
    )
    return Picture("law", "Change of the log-prob against 1 - p", caption, figure)


def flat(parts: Mapping[str, Mapping[str, np.ndarray]], name: str, title: str) -> Picture:
    """Mean |d| / (1 - p) by bucket of p."""
    figure, axes = new_axes("p of the token", "mean |d| / (1 - p) [nats]")
    _size(axes, 3.9)
    axes.set_xscale("log")
    axes.set_yscale("log")
    largest = 0.0
    for number, (label, part) in enumerate(parts.items()):
        means = bucket_means(dict(part), "ratio")
        largest = max(largest, float(np.nanmax(means)))
        style_ = {"color": COLOURS[number % 7], "marker": MARKS[number % 7], "markersize": 3.5}
        axes.plot(CENTRES, np.where(means > 1e-9, means, np.nan), label=_shown(label), linewidth=1.3, **style_)
    legend(axes, 3)
    flats = ", ".join(f"{_shown(label)} {flatness(part):.2f}" for label, part in parts.items())
    caption = (
        "A horizontal line is the (1 - p) law. Expectation over the tokens that the engine samples, summed over the "
        f"whole vocabulary. Smallest over largest of four wide buckets: {flats}."
    )
    return Picture(name, title, caption, figure)


def _resolved(part: Mapping[str, np.ndarray]) -> bool:
    """Whether the contexts are many enough to see a bias of order s^2 under noise of order s."""
    real = part["full_mask"]
    mass = part["bucket_mass"][real].sum(axis=0)
    errors = bucket_errors(dict(part), "bias")
    return bool(np.sqrt((errors**2 * mass**2).sum()) / mass.sum() < noise_scale(dict(part)) ** 2)


def bias(parts: Mapping[str, Mapping[str, np.ndarray]]) -> Picture:
    """Signed bias of sampled tokens and the part of it that selection makes, measured and predicted, over s^2."""
    figure = Figure(figsize=(9.2, 3.9))
    left, right = figure.subplots(1, 2)
    ratios, hidden = [], [name for name, part in parts.items() if not _resolved(part)]
    for number, (label, part) in enumerate(parts.items()):
        scale = noise_scale(dict(part)) ** 2
        look = {"color": COLOURS[number % 7], "markersize": 4.5}
        panels = [(right, "selection", "variance")] + ([(left, "bias", "law")] if label not in hidden else [])
        for axes, measured, predicted in panels:
            means, errors = bucket_means(dict(part), measured) / scale, bucket_errors(dict(part), measured) / scale
            shown = (_shown(label) if axes is right else None, COLOURS[number % 7])
            axes.errorbar(
                CENTRES, means, yerr=HALF * errors, fmt=MARKS[number % 7], label=shown[0], elinewidth=0.7, **look
            )
            axes.plot(CENTRES, bucket_means(dict(part), predicted), color=shown[1], linestyle="--", linewidth=1.1)
        real = part["full_mask"]
        totals = [part[f"bucket_{name}"][real].sum(axis=0)[:6].sum() for name in ("selection", "variance")]
        ratios.append(f"{_shown(label)} {totals[0] / totals[1] / scale:.2f}")
    if len(hidden) == len(parts):
        left.text(0.5, 0.5, "not resolved", transform=left.transAxes, ha="center", color=style.MUTED)
    for axes, title in ((left, "bias E[d | sampled] / s²"), (right, "selection E[(1 - p/p') d | sampled] / s²")):
        axes.set_xscale("log")
        axes.axhline(0, color=style.MUTED, linewidth=0.8)
        axes.set_xlabel("p of the token")
        axes.set_title(title, fontsize=9.5, color=style.INK, loc="left")
        middle = np.concatenate([line.get_ydata() for line in axes.lines if line.get_linestyle() == "--"] or [[0, 1]])
        axes.set_ylim(min(-1.5, np.nanmin(middle) - 1.5), max(3.0, np.nanmax(middle) + 2))
    figure.legend(*right.get_legend_handles_labels(), loc="outside upper left", ncols=6)
    caption = (
        "Marks: expectation over tokens that the engine samples, 95 % over contexts. Dashed, with s of each engine "
        "from its mean KL: s² (1/2 - 2 p + 3/2 C) of independent Gaussian noise of the logits on the left, and on "
        "the right the part of it that comes from being sampled by the engine and not by the trainer, "
        "s² (1 - 2 p + C), in which noise of order s cancels. "
        + (f"Left out on the left, where too few contexts resolve it: {', '.join(hidden)}. " if hidden else "")
        + f"Selection, measured over predicted, for p < 0.1: {', '.join(ratios)}."
    )
    return Picture("bias", "Signed bias of sampled tokens", caption, figure)


TESTS = (
    ("largest KL [nats]", "kl", masks.accept_by_maximum, masks.accept_by_sampled_maximum),
    ("mean KL [nats]", "kl", masks.accept_by_average, masks.accept_by_sampled_average),
    ("largest TV", "tv", masks.accept_by_maximum, None),
)
"""Name of the statistic, of which divergence, the exact test and the one that reads the sampled tokens only."""


def acceptance(parts: Mapping[str, Mapping[str, np.ndarray]], settings: Any) -> Picture:
    """Accepted sequences against delta, by the exact tests and by those of the sampled tokens."""
    figure = Figure(figsize=(11.0, 3.9))
    grid = figure.subplots(1, len(TESTS), sharey=True)
    wrong: dict[str, list[str]] = {}
    for axes, (title, divergence, exact, sampled) in zip(grid, TESTS, strict=True):
        axes.set_xscale("log")
        axes.set_xlabel("delta")
        axes.set_title(title, fontsize=9.5, color=style.INK, loc="left")
        for number, (label, part) in enumerate(parts.items()):
            real, colour = jnp.asarray(part["full_mask"]), COLOURS[number % 7]
            accepted = _accepted(exact, jnp.asarray(part[divergence]), real)
            axes.plot(DELTAS, 100 * accepted.mean(axis=1), color=colour, label=label)
            if sampled is not None:
                ratio = jnp.asarray(np.where(part["full_mask"], part["full_log_pi"] - part["full_log_mu"], 0))
                guessed = _accepted(sampled, ratio, real)
                axes.plot(DELTAS, 100 * guessed.mean(axis=1), color=colour, linestyle="--", linewidth=1.1)
                wrong.setdefault(title, []).append(f"{label} {100 * (accepted != guessed).mean(axis=1).max():.0f} %")
    grid[0].axvline(settings.delta, color=style.MUTED, linewidth=1, linestyle=":")
    grid[0].set_ylabel("% of sequences accepted")
    grid[0].set_ylim(-3, 103)
    figure.legend(*grid[0].get_legend_handles_labels(), loc="outside upper left", ncols=5)
    disputed = "; ".join(f"{title.removesuffix(' [nats]')}: {', '.join(shares)}" for title, shares in wrong.items())
    caption = (
        "Solid: the largest KL(mu‖pi) of a token (TRM-Max), the mean one (TRM-Avg) or the largest TV is at most delta, "
        "exactly. Dashed: the same with the sampled tokens, k2 for the largest KL and k3 for the mean one. "
        f"Dotted: {settings.delta:g}, the threshold of the paper's runs. At the worst delta exact and sampled test "
        f"disagree about so many sequences: {disputed}."
    )
    return Picture("acceptance", "Trust region masking: acceptance against delta", caption, figure)


def _accepted(test: Callable[..., Any], values: Any, real: Any) -> np.ndarray:
    """[deltas, sequences]."""
    return np.stack([np.asarray(test(values, real, threshold=float(delta))) for delta in DELTAS])


def pruning(parts: Mapping[str, Mapping[str, np.ndarray]]) -> Picture:
    """Mass outside the safe set, and what the two sides' sets differ by, against the threshold."""
    figure, axes = new_axes("log rho [nats]", "probability per token")
    _size(axes, 3.9)
    axes.set_yscale("log")
    first = next(iter(parts.values()))
    pruned = first["pruned_mass"][first["full_mask"]].mean(axis=0)
    axes.plot(LOG_MIN_P, np.maximum(pruned, 1e-12), color=style.INK, label="pruned mass 1 - Z")
    flips = []
    for number, (label, part) in enumerate(parts.items()):
        wasted = part["wasted_mass"][part["full_mask"]].mean(axis=0)
        flip = part["flips"][part["full_mask"]].mean(axis=0)
        axes.plot(
            LOG_MIN_P,
            np.where(wasted > 1e-10, wasted, np.nan),
            color=COLOURS[number % 7],
            marker=MARKS[number % 7],
            markersize=3,
            linewidth=1.2,
            label=f"wasted, {label}",
        )
        flips.append(f"{label} {flip[np.searchsorted(LOG_MIN_P, -13.0)]:.2g}")
    legend(axes, 3)
    at = float(pruned[np.searchsorted(LOG_MIN_P, -13.0)])
    caption = (
        "Wasted: probability that the engine, pruned by its own set, samples a token outside the trainer's set. At "
        f"log rho = -13 the trainer prunes {at:.2g} per token, and so many entries of the vocabulary lie in one set "
        f"only: {', '.join(flips)}."
    )
    return Picture("pruning", "Safe sets of both sides", caption, figure)


def certificate(parts: Mapping[str, Mapping[str, np.ndarray]], settings: Any, summary: Mapping[str, Any]) -> Picture:
    """Smallest printed and sharp bound of every engine against the trivial one, and the worst measured error."""
    figure, axes = new_axes("", "units of the reward's span")
    _size(axes, 4.1)
    axes.set_yscale("log")
    places = np.arange(len(parts))
    numbers = [summary[f"engine_{name}"] for name in parts]
    for key, colour, mark, label in (
        ("unified_printed", style.VERMILION, "^", "smallest bound, as printed"),
        ("unified_sharp", style.BLUE, "o", "smallest bound, sharp"),
        ("worst_surrogate_error", style.GREEN, "D", "worst reward's error, measured"),
    ):
        values = np.array([number[key] for number in numbers])
        axes.plot(places, np.where(values > 0, values, np.nan), mark, color=colour, markersize=6, label=label)
    axes.axhline(1, color=style.INK, linestyle="--", linewidth=1, label="the span: vacuous above")
    axes.axhline(
        0.5, color=style.MUTED, linestyle=":", linewidth=1, label="half of it: vacuous above, if L' = 0 and J = 1/2"
    )
    axes.set_xticks(places, list(parts))
    axes.set_xlim(-0.5, len(parts) - 0.5)
    legend(axes, 1)
    ends = ", ".join(
        f"{name} {number['tokens_until_vacuous']:,.0f}" for name, number in zip(parts, numbers, strict=True)
    )
    caption = (
        f"For responses of {settings.response_length} tokens, on visited contexts: estimates, never certificates. At "
        f"the mean KL per token measured here the best bound, D_KL, reaches the span at a length of {ends} tokens."
    )
    return Picture("certificate", "Bounds on the surrogate's error", caption, figure)


def estimators(parts: Mapping[str, Mapping[str, np.ndarray]]) -> Table:
    """How k1, k2 and k3 judge the KL of one context, exactly."""
    rows = []
    for name, part in parts.items():
        real = part["full_mask"]
        kl = part["kl"][real].mean()
        noise = [f"{np.sqrt(part[f'k{n}_variance'][real].mean()) / kl:.1f}" for n in (1, 2, 3)]
        below = words.percent(float(part["k1_negative"][real].mean()))
        row = (_shown(name), f"{kl:.2g}", f"{part['kl'][real].max():.2g}", *noise)
        rows.append((*row, f"{part['k2'][real].mean() / kl - 1:+.3f}", below))
    head = ("", "mean KL", "largest KL", "sd k1 / KL", "sd k2 / KL", "sd k3 / KL", "bias of k2 / KL", "k1 below 0")
    return Table(head=head, rows=rows)


def bound_table(parts: Mapping[str, Mapping[str, np.ndarray]], settings: Any) -> Table:
    """Every sharp bound of every engine; a star where it is vacuous."""

    def cell(value: float) -> str:
        # The span is 1.
        return f"{value:.2g}{' *' if value >= 1 else ''}" if np.isfinite(value) else "no proof"

    found = {name: bounds_of(part, settings.response_length) for name, part in parts.items()}
    some = next(iter(found.values()))
    rows = []
    for bound in some.sharp:
        rows.append((bound.replace("_", " "), *(cell(float(one.sharp[bound])) for one in found.values())))
    for bound in ("classical", "mixed_kl", "adaptive"):
        cells = (cell(float(one.printed[bound])) for one in found.values())
        rows.append((f"{bound.replace('_', ' ')}, as printed", *cells))
    return Table(head=("bound (* vacuous)", *found), rows=rows)


def _reading(settings: Any, results: Results, summary: Mapping[str, Any]) -> Sequence[str]:
    engines = _engines(settings, results)
    two_sided = max(float(part["largest_two_sided"][part["full_mask"]].max()) for part in engines.values())
    printed = max(float(part["largest_printed"][part["full_mask"]].max()) for part in engines.values())
    scales = ", ".join(f"{name} {summary[f'engine_{name}']['noise_scale']:.2g}" for name in engines)
    flats = []
    for name in engines:
        numbers = summary[f"engine_{name}"]
        low, high = numbers["flatness_interval"]
        means = ", ".join("-" if mean is None else f"{mean:.2g}" for mean in numbers["flat_means"])
        flats.append(f"{name} {numbers['flatness']:.2f} ({low:.2f} to {high:.2f}; means {means})")
    return [
        "Smallest over largest mean of |d| / (1 - p) in the four buckets, with 95 % intervals by bootstrap over "
        f"responses: {'; '.join(flats)}.",
        f"The largest |d| over 2 e (1 - p) of any entry of the vocabulary is {printed:.3f}, and over the two-sided "
        f"bound 2 e (1 - min(p, p')) it is {two_sided:.3f}, which a theorem keeps at 1.",
        f"The logit noise that the mean KL speaks of, as a standard deviation s [nats]: {scales}. A hard e is several "
        "times as large, so the law holds as an average well inside its bound.",
    ]


def mismatch_page(settings: Any, results: Results, summary: Mapping[str, Any]) -> Page:
    """The law, the bias, what the estimators and masks make of it, and the bounds."""
    engines, perturbed = _engines(settings, results), _named(results, "perturbation")
    noisy = {name: part for name, part in perturbed.items() if np.isfinite(part["noise"][part["full_mask"]]).all()}
    weights = {name: part for name, part in noisy.items() if name.endswith(("weights", "cache"))}
    others = {name: part for name, part in perturbed.items() if name not in weights}
    gaussian = {name: part for name, part in perturbed.items() if name == "gaussian_noise"}
    with matplotlib.rc_context(style.SETTINGS):
        first = [law(settings, results), flat(engines, "flat_engines", "Flat in p? Engines")]
        second = [
            flat(chosen, name, title)
            for chosen, name, title in (
                (weights, "flat_weights", "Flat in p? Rounded weights and caches"),
                (others, "flat_logits", "Flat in p? Noise, slips and rounded logits"),
            )
            if chosen
        ]
        later = [bias(engines | gaussian), acceptance(engines, settings), pruning(engines)]
        last = certificate(engines, settings, summary)
    return Page(
        value=f"{summary['flatness']:.2f}",
        value_range="smallest over largest bucket mean of |d| / (1 - p), worst precision",
        sentence="1 would be the (1 - p) law exactly; the buckets are " + ", ".join(FLAT_BUCKETS) + ".",
        facts=(
            f"{settings.model}, {settings.sequences} responses of at most {settings.response_length} tokens per "
            f"engine, {settings.full_sequences} of them compared over the whole vocabulary, "
            f"{sum(int(part['dropped']) for part in results.values())} dropped for log-probs that are not finite"
        ),
        sections=[
            Section("Is the (1 - p) law obeyed?", _reading(settings, results, summary), [*first, *second]),
            Section("Are sampled tokens over-estimated?", [], later[:1]),
            Section(
                "Which estimators and masks misjudge?",
                [MOMENTS],
                [later[1]],
                estimators(engines | perturbed),
            ),
            Section("What pruning sees", [], [later[2]]),
            Section("When is the certificate not vacuous?", [PROOFS], [last], bound_table(engines, settings)),
        ],
    )
