"""The report of `glm_hybrid_reasoner`."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from experiments import style
from experiments.figures import legend
from experiments.reasoner.bench import MODES
from experiments.reasoner.bench import bench_of
from experiments.reasoner.chains import MODULUS
from experiments.reasoner.numbers import LONG
from experiments.reasoner.numbers import by_steps
from experiments.reasoner.numbers import claims
from experiments.reasoner.numbers import mean_of
from experiments.reasoner.numbers import of_stage
from experiments.reasoner.settings import ReasonerSettings
from experiments.reasoner.stages import STAGES
from experiments.reasoner.stages import part_name
from experiments.study import Page
from experiments.study import Results
from experiments.study import Section
from experiments.study import Table
from experiments.style import Picture
from experiments.style import new_axes
from jaxrl_llm.models.blueprint import active_parameters
from jaxrl_llm.models.blueprint import num_parameters

COLOURS = {"thinking": style.BLUE, "direct": style.VERMILION, "tools": style.GREEN}
LABELS = {"thinking": "chains, thinking", "direct": "chains, no thinking", "tools": "tools"}
STAGE_LABELS = {
    "pretrain": "text",
    "thinking": "cold start 1",
    "hybrid": "cold start 2",
    "reasoner": "expert: reasons",
    "tooler": "expert: tools",
    "unified": "distilled",
    "general": "general RL",
}
STAGE_COLOURS = {"reasoner": style.BLUE, "tooler": style.GREEN, "general": style.PURPLE}
CLAIMS = {
    "reasoner_minus_cold_start": (
        "Reinforcement makes the reasoning expert better: success minus that of the cold start",
        "> 0",
    ),
    "tooler_minus_cold_start": ("The tool expert minus the cold start, questions with tools", "> 0"),
    "one_model_minus_reasoner": (
        "The one model minus the reasoning expert, chains with thinking",
        "≥ -2 standard errors",
    ),
    "one_model_minus_tooler": ("The one model minus the tool expert, questions with tools", "≥ -2 standard errors"),
    "thinking_minus_direct": (f"The one model with thinking minus without, chains of {LONG} steps and more", "> 0"),
    "tokens_thinking_minus_direct": ("What thinking costs: tokens of an answer with it minus without", "> 0"),
    "leaked_thinking": ("Answers of the one model asked for without thinking that have words of it", "< 0.01"),
}


def _stages(settings: ReasonerSettings, results: Results) -> Picture:
    """Success by stage and mode."""
    figure, axes = new_axes("", "held-out questions solved")
    figure.set_size_inches(7.2, 3.4)
    places = np.arange(len(STAGES))
    for number, mode in enumerate(MODES):
        found = [mean_of(of_stage(settings, results, stage, f"{mode}_reward")) for stage in STAGES]
        axes.bar(
            places + 0.27 * (number - 1),
            [one.mean for one in found],
            0.25,
            yerr=[one.half for one in found],
            color=COLOURS[mode],
            ecolor=style.MUTED,
            capsize=2,
            label=LABELS[mode],
        )
    axes.set_xticks(places, [STAGE_LABELS[stage] for stage in STAGES], rotation=20, ha="right")
    axes.set_ylim(0, 1.02)
    legend(axes, 3)
    caption = (
        "Share of sampled answers that are right, at temperature 1, on the same held-out questions at every stage, "
        "with 95 % intervals. Both experts begin from the second phase of the cold start; so does the distilled model, "
        "which learns from their answers."
    )
    return Picture("stages", "The chain, stage by stage", caption, figure)


def _steps(settings: ReasonerSettings, results: Results) -> Picture:
    """Success by the length of the chain."""
    figure, axes = new_axes("steps of the chain", "solved")
    steps = np.arange(1, settings.operations + 1)
    for mode in ("thinking", "direct"):
        for stage, dashes in (("hybrid", ":"), ("general", "-")):
            found = by_steps(settings, results, stage, mode)
            label = f"{LABELS[mode].removeprefix('chains, ')}, {STAGE_LABELS[stage]}"
            half = [one.half for one in found]
            mean = [one.mean for one in found]
            axes.errorbar(steps, mean, yerr=half, color=COLOURS[mode], linestyle=dashes, capsize=2, label=label)
    axes.axhline(1 / MODULUS, color=style.MUTED, linewidth=0.8)
    axes.set_xticks(steps)
    axes.set_ylim(0, 1.02)
    legend(axes, 2)
    caption = "By steps of the chain, with 95 % intervals over questions; the grey line is a guess."
    return Picture("steps", "Where thinking helps", caption, figure)


def _tokens(settings: ReasonerSettings, results: Results) -> Picture:
    """Tokens of an answer by stage and mode."""
    figure, axes = new_axes("", "tokens of an answer")
    figure.set_size_inches(7.2, 3.1)
    places = np.arange(len(STAGES))
    for number, mode in enumerate(MODES):
        height = [of_stage(settings, results, stage, f"{mode}_tokens").mean() for stage in STAGES]
        axes.bar(places + 0.27 * (number - 1), height, 0.25, color=COLOURS[mode], label=LABELS[mode])
    axes.set_xticks(places, [STAGE_LABELS[stage] for stage in STAGES], rotation=20, ha="right")
    legend(axes, 3)
    caption = "Mean tokens that the model writes for a question, the token that ends an answer among them."
    return Picture("tokens", "What an answer costs", caption, figure)


def _learning(settings: ReasonerSettings, results: Results) -> Picture:
    """Reward against batches, of the stages of reinforcement."""
    figure, axes = new_axes("batch", "mean reward")
    for stage, colour in STAGE_COLOURS.items():
        seeds = range(settings.seed, settings.seed + settings.seeds)
        curve = np.mean([results[part_name(stage, seed)]["curve_reward"] for seed in seeds], axis=0)
        axes.plot(np.arange(1, len(curve) + 1), curve, color=colour, label=STAGE_LABELS[stage])
    axes.set_ylim(0, 1.02)
    legend(axes, 3)
    caption = (
        "Reward of the answers that each stage of reinforcement learned from. In the last stage chains, half of them "
        "without thinking, and tools take turns, hence the zigzag."
    )
    return Picture("learning", "Reinforcement", caption, figure)


def _balance(settings: ReasonerSettings, results: Results) -> Picture:
    """Violation of the balance of experts through all stages."""
    figure, axes = new_axes("optimiser step or batch, all stages in a row", "largest load over the mean, minus 1")
    figure.set_size_inches(7.2, 3.0)
    start = 0
    for number, stage in enumerate(STAGES):
        curve = results[part_name(stage, settings.seed)]["curve_violation"]
        colour = (style.INK, style.MUTED)[number % 2]
        axes.plot(start + np.arange(len(curve)), curve, color=colour, linewidth=1.1)
        place = {"xycoords": ("data", "axes fraction"), "fontsize": 7, "rotation": 25, "color": style.MUTED}
        axes.annotate(STAGE_LABELS[stage], (start, 1), **place)
        start += len(curve)
    axes.set_ylim(bottom=0)
    caption = (
        "Largest violation of even loads, mean over layers, first seed. The correction biases of routers move while "
        "the model imitates, and are frozen in reinforcement."
    )
    return Picture("balance", "Load of the experts", caption, figure)


def _table(settings: ReasonerSettings, results: Results) -> Table:
    rows = []
    for name, (number, holds) in claims(settings, results).items():
        text, wanted = CLAIMS[name]
        rows.append([text, str(number), f"{number.error:.3f}", wanted, "yes" if holds else "no"])
    return Table(["claim", "measured, 95 % interval", "standard error", "wanted", "holds"], rows)


def _conversations(settings: ReasonerSettings, results: Results) -> list[str]:
    part = results[part_name("general", settings.seed)]
    return [f"{LABELS[mode].capitalize()}: {str(part[f'{mode}_example'])!r}" for mode in MODES]


def reasoner_page(settings: ReasonerSettings, results: Results, summary: Mapping[str, Any]) -> Page:
    """The whole report."""
    settings = settings.whole
    config = settings.config(bench_of(settings, settings.seed).tokenizer.vocab_size)
    first, last = summary["stages"]["hybrid"], summary["stages"]["general"]
    experts = config.experts
    assert experts is not None
    return Page(
        value=f"{summary['claims_met']} of {summary['claims']}",
        value_range="claims hold",
        sentence=(
            "Of a model that goes through the whole chain of GLM-4.5's post-training: two experts by reinforcement, "
            "distilled into one model that thinks or does not, as it is asked."
        ),
        facts=(
            f"{num_parameters(config):,} parameters, {active_parameters(config):,} of them active in the layers; "
            f"{experts.count} experts, {experts.chosen} chosen and one shared; {settings.seeds} "
            f"{'seed' if settings.seeds == 1 else 'seeds'}"
        ),
        sections=[
            Section(
                "The chain",
                [
                    "Text of the tasks; a cold start in two phases from a teacher who errs; reinforcement of an expert "
                    "that works out chains of sums and products modulo 5 on a scratchpad, and of one that calls a "
                    "table and a calculator; both distilled into one model by their filtered answers, no question with "
                    "and without thinking; reinforcement on everything at the end.",
                    f"After the cold start {first['thinking']:.2f} of the chains are solved with thinking, "
                    f"{first['direct']:.2f} without, and {first['tools']:.2f} of the questions with tools; at the end "
                    f"{last['thinking']:.2f}, {last['direct']:.2f} and {last['tools']:.2f}.",
                ],
                [_stages(settings, results), _learning(settings, results)],
                _table(settings, results),
            ),
            Section(
                "Thinking on and off",
                [
                    "Conversations of the one model with held-out questions, token for token:",
                    *_conversations(settings, results),
                ],
                [_steps(settings, results), _tokens(settings, results)],
            ),
            Section("Experts of the mixture", [], [_balance(settings, results)]),
        ],
    )
