"""The report of `empg_agents`."""

from collections.abc import Mapping
from collections.abc import Sequence
from typing import Any

import numpy as np

from experiments import style
from experiments.agents.scan import BINS
from experiments.agents.scan import KINDS
from experiments.agents.settings import BASES
from experiments.agents.settings import PARTS
from experiments.agents.settings import VARIANTS
from experiments.agents.settings import AgentSettings
from experiments.agents.settings import arms
from experiments.agents.settings import label
from experiments.bands import band
from experiments.bands import half_width
from experiments.bands import standard_error
from experiments.figures import legend
from experiments.lab.numbers import Interval
from experiments.study import Page
from experiments.study import Results
from experiments.study import Section
from experiments.study import Table
from experiments.style import Picture
from experiments.style import new_axes
from experiments.words import NONE
from jaxrl_llm.environments.worlds import split_panels

COLOURS = {
    "plain": style.INK,
    "centred": style.MUTED,
    "scale": style.ORANGE,
    "bonus": style.SKY,
    "empg": style.BLUE,
    "all_groups": style.VERMILION,
    "renyi": style.GREEN,
    "potential": style.PURPLE,
    "per_sign": style.ORANGE,
}


def _names(base: str, some: Sequence[str]) -> list[str]:
    return [f"{base}_{part}" for part in some]


def _learning(settings: AgentSettings, results: Results) -> Picture:
    """Tasks solved without modulation against batches, with bands over seeds."""
    figure, axes = new_axes("batch", "held-out tasks solved")
    for base, colour in zip(BASES, (style.VERMILION, style.INK), strict=True):
        values = _curve(results, f"{base}_plain")
        half = half_width(len(values))
        mean, error = values.mean(axis=0), standard_error(values)
        band(axes, _batches(settings), mean, error, colour, f"{base.upper()} plain", half=half)
    legend(axes, 2)
    caption = (
        "Share of the sampled episodes that solve a task of the measuring panel, mean over "
        f"{settings.seeds} seeds with 95 % bands. Seeds differ by their start much more than arms do, so arms are "
        "compared seed by seed below."
    )
    return Picture("learning", "Without modulation", caption, figure)


def _curve(results: Results, name: str) -> np.ndarray:
    """Tasks solved, [seeds, 1 + rounds], the start first."""
    start = results["start"]["solved"].mean(axis=1, keepdims=True)
    return np.concatenate([start, results[name]["solved"].mean(axis=2)], axis=1)


def _batches(settings: AgentSettings) -> np.ndarray:
    return np.arange(settings.rounds + 1) * settings.every


def _gains(settings: AgentSettings, results: Results, names: Sequence[str], title: str, picture: str) -> Picture:
    """Tasks solved minus those of the plain arm of the same base, against batches."""
    figure, axes = new_axes("batch", "tasks solved, minus plain")
    figure.set_size_inches(4.7, 2.9 + 0.2 * len(names))
    for name in names:
        base, _, part = name.partition("_")
        values = _curve(results, name) - _curve(results, f"{base}_plain")
        half = half_width(len(values))
        mean, error = values.mean(axis=0), standard_error(values)
        band(axes, _batches(settings), mean, error, COLOURS[part], label(name), half=half)
    axes.axhline(0, color=style.INK, linewidth=0.8)
    legend(axes, 1)
    caption = (
        "Held-out tasks solved minus those of the plain arm, seed by seed, mean with 95 % bands: arms of a seed start "
        "from the same policy and train on the same tasks."
    )
    return Picture(picture, title, caption, figure)


def _differences(summary: Mapping[str, Any]) -> Picture:
    """Every arm minus the plain one of its base."""
    names = [name for name in arms() if not name.endswith("_plain")]
    figure, axes = new_axes("tasks solved, minus plain", "")
    figure.set_size_inches(4.7, 0.32 * len(names) + 0.9)
    for row, name in enumerate(reversed(names)):
        gain = _gain(summary, name)
        colour = style.BLUE if gain.resolved else style.MUTED
        axes.errorbar([gain.mean], [row], xerr=[gain.half], fmt="o", color=colour, markersize=4, capsize=2)
    axes.axvline(0, color=style.INK, linewidth=0.8)
    axes.set_yticks(range(len(names)), [label(name) for name in reversed(names)])
    caption = (
        "Tasks solved at the end minus those of the same objective without modulation, paired by seed, with 95 % "
        "intervals (Student's t). Grey: the interval holds 0, so the difference is not resolved."
    )
    return Picture("differences", "What each part of EMPG changes", caption, figure)


def _gain(summary: Mapping[str, Any], name: str, other: str = "plain") -> Interval:
    mean = summary[f"{name}_minus_{other}"]
    return Interval(mean, mean - summary[f"{name}_minus_{other}_low"])


def _sizes(settings: AgentSettings, results: Results) -> Picture:
    """|A| |e_a - p| by the entropy of the context, before and after modulation."""
    figure, axes = new_axes("entropy of the context [nats]", "mean size of the logit update")
    figure.set_size_inches(4.7, 3.3)
    middle = np.log(len(settings.world.actions)) * (np.arange(BINS) + 0.5) / BINS
    part = results["dapo_empg"]
    count = part["bin_count"].sum(axis=(0, 1, 2))
    some = count > 0
    for name, colour, text in (("plain", style.INK, "plain advantage"), ("arm", style.BLUE, "EMPG's advantage")):
        total = part[f"bin_{name}"].sum(axis=(0, 1, 2))
        axes.plot(middle[some], total[some] / count[some], color=colour, marker="o", markersize=4, label=text)
    legend(axes, 2)
    caption = (
        "Mean of |A| |e_a - p|, the size of the update that the policy gradient asks of the logits (per unit of step "
        "size), over all actions of DAPO with EMPG in groups that differ, by the entropy of their context: with the "
        "advantage of the group, and with EMPG's, in which scale, bonus and centring act together."
    )
    return Picture("sizes", "Size of the updates by entropy", caption, figure)


def _entropies(settings: AgentSettings, results: Results) -> Picture:
    """Entropy minus that of the plain arm, against batches."""
    figure, axes = new_axes("batch", "entropy, minus plain [nats]")
    figure.set_size_inches(4.7, 3.5)
    batches = np.arange(settings.rounds * settings.every) + 1
    plain = results["dapo_plain"]["entropy"].reshape(settings.seeds, -1)
    for name in _names("dapo", tuple(PARTS)[1:]):
        values = results[name]["entropy"].reshape(settings.seeds, -1) - plain
        half, colour = half_width(len(values)), COLOURS[name.partition("_")[2]]
        band(axes, batches, values.mean(axis=0), standard_error(values), colour, label(name), half=half)
    axes.axhline(0, color=style.INK, linewidth=0.8)
    legend(axes, 2)
    caption = (
        "Mean entropy of the contexts in which the agent acted while it trained, minus that of DAPO without "
        f"modulation, seed by seed, with 95 % bands. Without modulation it goes from {plain[:, 0].mean():.2f} to "
        f"{plain[:, -1].mean():.2f} nats."
    )
    return Picture("entropies", "Entropy", caption, figure)


def _table(summary: Mapping[str, Any], samples: int) -> Table:
    rows = []
    for name, numbers in summary["arms"].items():
        plain = summary["arms"][f"{name.partition('_')[0]}_plain"]
        gain = "" if name.endswith("_plain") else _said(_gain(summary, name))
        control = "" if name.endswith(("_plain", "_centred")) else _said(_gain(summary, name, "centred"))
        rows.append(
            (
                label(name),
                f"{numbers['solved']:.3f} ± {numbers['solved_half_interval']:.3f}",
                f"{numbers['solved_once']:.3f}",
                f"{numbers['solved_greedy']:.3f}",
                gain,
                control,
                f"{numbers['entropy']:.2f}",
                f"{numbers['valid']:.2f}",
                f"{numbers['turns']:.1f}",
                f"{numbers['last_step'] - plain['last_step']:+.2f}",
                f"{numbers['mutual_information']:.2f}",
            )
        )
    head = (
        "arm",
        "solved, pass@1",
        f"pass@{samples}",
        "greedy",
        "minus plain",
        "minus centred",
        "entropy [nats]",
        "valid actions",
        "turns",
        "advantage of last step minus others, minus plain",
        "I(task; first action) [nats]",
    )
    return Table(head=head, rows=rows)


def _said(gain: Interval) -> str:
    return f"{gain.mean:+.3f} ± {gain.half:.3f}{'' if gain.resolved else ' (not resolved)'}"


def _by_length(settings: AgentSettings, results: Results) -> Table:
    """Tasks solved by the number of actions that a shortest solution takes."""
    lengths = settings.world.solution_length[split_panels(settings.world)[1].seeds]
    shown = sorted(set(lengths.tolist()))
    rows = []
    for name, values in [("start", results["start"]["solved"][:, None])] + [
        (name, results[name]["solved"]) for name in ("grpo_plain", "grpo_empg", "dapo_plain", "dapo_empg")
    ]:
        end = values[:, -max(1, values.shape[1] // 10) :].mean(axis=(0, 1))
        text = "before training" if name == "start" else label(name)
        rows.append((text, *(f"{end[lengths == length].mean():.2f}" for length in shown)))
    return Table(head=("arm", *(f"{length} actions" for length in shown)), rows=rows)


def _kinds(results: Results) -> Table:
    rows = []
    for name in ("dapo_plain", "dapo_scale", "dapo_bonus", "dapo_empg"):
        # 0 is the mean over a batch that had no such action.
        last = [results[name][f"entropy_{kind}"][:, -1] for kind in KINDS]
        rows.append((label(name), *(f"{x[x > 0].mean():.2f}" if (x > 0).any() else NONE for x in last)))
    return Table(head=("entropy in the last round [nats]", "moves", "takes", "opens", "no action"), rows=rows)


def empg_page(settings: AgentSettings, results: Results, summary: Mapping[str, Any]) -> Page:
    """What was asked, what came out, how sure it is."""
    gain = _gain(summary, "dapo_empg")
    resolved = [name for name in arms() if not name.endswith("_plain") and _gain(summary, name).resolved]
    said = [f"{label(name)} {_said(_gain(summary, name))}" for name in resolved]
    learned = " and ".join(
        f"{base.upper()} {summary[f'{base}_minus_start']:+.3f} (at least {summary[f'{base}_minus_start_low']:+.3f})"
        for base in BASES
    )
    return Page(
        value=f"{gain.mean:+.3f}",
        value_range=f"{gain.low:+.3f} to {gain.mean + gain.half:+.3f} of the tasks",
        sentence=(
            "Held-out tasks solved at the end with EMPG minus those without it (DAPO), 95 % interval over "
            f"{settings.seeds} seeds, paired{'' if gain.resolved else ': not resolved'}."
        ),
        facts=(
            f"{len(arms())} arms, {settings.seeds} seeds, {settings.rounds * settings.every} batches of "
            f"{settings.tasks} tasks x {settings.group_size} episodes, {settings.world.name}"
        ),
        sections=[
            Section(
                "Tasks solved",
                [
                    f"Before reinforcement learning {summary['start']['solved']:.3f} of the held-out tasks are solved; "
                    f"without modulation training changes that by {learned}.",
                    "Differences that are resolved: "
                    + (", ".join(said) if said else "none")
                    + f". Of the {len(arms()) - len(BASES)} that are shown, one in twenty would look so by chance.",
                    "EMPG ends by subtracting the mean over all steps, which changes the advantage by itself. Against "
                    "the control that only does this, EMPG makes "
                    + " and ".join(
                        f"{_said(_gain(summary, f'{base}_empg', 'centred'))} with {base.upper()}" for base in BASES
                    )
                    + ".",
                ],
                [
                    _learning(settings, results),
                    _differences(summary),
                    _gains(settings, results, _names("dapo", tuple(PARTS)[1:]), "DAPO", "gains_dapo"),
                    _gains(settings, results, _names("grpo", tuple(PARTS)[1:]), "GRPO", "gains_grpo"),
                    _gains(settings, results, _names("dapo", ("empg", *VARIANTS)), "Variants", "gains_variants"),
                ],
                _table(summary, settings.samples),
            ),
            Section(
                "Tasks by the length of their solution",
                ["Share of the sampled episodes that solve a task, by the actions of its shortest solution."],
                table=_by_length(settings, results),
            ),
            Section(
                "What the modulation does",
                [
                    "In the table above, the advantage of the last step of an episode minus that of its other steps, "
                    "against the plain arm: the bonus lowers it, as a last step has no next one to be clear about.",
                ],
                [_sizes(settings, results), _entropies(settings, results)],
                _kinds(results),
            ),
        ],
    )
