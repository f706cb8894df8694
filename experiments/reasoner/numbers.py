"""From what was measured of each stage to what is claimed: means, and differences with their standard errors."""

from collections.abc import Mapping
from collections.abc import Sequence
from typing import Any
from typing import NamedTuple

import numpy as np

from experiments.bands import half_width
from experiments.reasoner.bench import MODES
from experiments.reasoner.settings import ReasonerSettings
from experiments.reasoner.stages import STAGES
from experiments.reasoner.stages import part_name
from experiments.study import Results

FEW_SEEDS = 3
"""From so many seeds on, an interval is over seeds; below, over questions."""
LONG = 3
"""Steps from which a chain needs the scratchpad."""
LEAK_LIMIT = 0.01


class Difference(NamedTuple):
    """A mean, its standard error, and the half-width of its 95 % interval."""

    mean: float
    error: float
    half: float

    @property
    def low(self) -> float:
        """Lower end."""
        return self.mean - self.half

    def __str__(self) -> str:
        """As in a table."""
        return f"{self.mean:+.3f} ± {self.half:.3f}"


def mean_of(values: np.ndarray) -> Difference:
    """The mean of [seeds, questions], with the error over seeds where there are several, else over questions.

    What is measured of a question is a mean over its answers, so the question is the unit.
    """
    per_unit = values.mean(axis=1) if len(values) >= FEW_SEEDS else values.mean(axis=0)
    error = float(per_unit.std(ddof=1) / len(per_unit) ** 0.5)
    return Difference(float(values.mean()), error, half_width(len(per_unit)) * error)


def of_stage(settings: ReasonerSettings, results: Results, stage: str, name: str) -> np.ndarray:
    """[seeds, questions]: means over the answers to each question."""
    seeds = range(settings.seed, settings.seed + settings.seeds)
    return np.stack([results[part_name(stage, seed)][name].mean(axis=1) for seed in seeds])


def operations(results: Results, settings: ReasonerSettings) -> np.ndarray:
    """Steps of each measured chain; the same questions for every stage and seed."""
    return results[part_name(STAGES[0], settings.seed)]["operations"]


def by_steps(settings: ReasonerSettings, results: Results, stage: str, mode: str) -> list[Difference]:
    """Success on chains of 1, 2, .. steps."""
    solved, steps = of_stage(settings, results, stage, f"{mode}_reward"), operations(results, settings)
    return [mean_of(solved[:, steps == count]) for count in range(1, settings.operations + 1)]


def claims(settings: ReasonerSettings, results: Results) -> dict[str, tuple[Difference, bool]]:
    """Each claim by its name: the number that it rests on, and whether it holds."""

    def against(stage: str, other: str, mode: str) -> Difference:
        name = f"{mode}_reward"
        return mean_of(of_stage(settings, results, stage, name) - of_stage(settings, results, other, name))

    def within(difference: Difference) -> bool:
        return difference.mean + 2 * difference.error >= 0

    long = operations(results, settings) >= min(LONG, settings.operations)
    last = {name: of_stage(settings, results, "general", name) for name in _names()}
    thinks = mean_of((last["thinking_reward"] - last["direct_reward"])[:, long])
    costs = mean_of(last["thinking_tokens"] - last["direct_tokens"])
    leak = mean_of(np.concatenate([last["direct_leak"], last["tools_leak"]], axis=1))
    found = {
        "reasoner_minus_cold_start": against("reasoner", "hybrid", "thinking"),
        "tooler_minus_cold_start": against("tooler", "hybrid", "tools"),
        "one_model_minus_reasoner": against("general", "reasoner", "thinking"),
        "one_model_minus_tooler": against("general", "tooler", "tools"),
        "thinking_minus_direct": thinks,
        "tokens_thinking_minus_direct": costs,
        "leaked_thinking": leak,
    }
    holds = {name: number.low > 0 for name, number in found.items()}
    holds |= {name: within(found[name]) for name in ("one_model_minus_reasoner", "one_model_minus_tooler")}
    holds["leaked_thinking"] = leak.mean < LEAK_LIMIT
    return {name: (number, bool(holds[name])) for name, number in found.items()}


def _names() -> list[str]:
    return [f"{mode}_{what}" for mode in MODES for what in ("reward", "tokens", "leak")]


def summarise(settings: ReasonerSettings, results: Results) -> dict[str, Any]:
    """Every stage in numbers, and what is claimed of them."""
    settings = settings.whole
    summary: dict[str, Any] = {"stages": {}, "seeds": settings.seeds}
    for stage in STAGES:
        numbers: dict[str, float | None] = {}
        for mode in MODES:
            solved = mean_of(of_stage(settings, results, stage, f"{mode}_reward"))
            numbers |= {mode: solved.mean, f"{mode}_half_interval": solved.half}
            for what in ("tokens", "leak"):
                numbers[f"{mode}_{what}"] = float(of_stage(settings, results, stage, f"{mode}_{what}").mean())
        for name in ("violation", "router_entropy", "dead"):
            numbers[name] = at_the_end(_parts(settings, results, stage), name)
        summary["stages"][stage] = numbers
    found = claims(settings, results)
    for name, (number, holds) in found.items():
        summary |= {name: number.mean, f"{name}_half_interval": number.half, f"{name}_holds": holds}
    return summary | {"claims_met": sum(holds for _, holds in found.values()), "claims": len(found)}


def at_the_end(parts: Sequence[Mapping[str, np.ndarray]], name: str) -> float | None:
    """Mean over the last tenth of a stage, over its steps that had it; None where none had, as nothing was learned."""
    curves = np.stack([part[f"curve_{name}"] for part in parts])
    last = curves[:, -max(1, curves.shape[1] // 10) :]
    return float(last[np.isfinite(last)].mean()) if np.isfinite(last).any() else None


def _parts(settings: ReasonerSettings, results: Results, stage: str) -> list[Mapping[str, np.ndarray]]:
    return [results[part_name(stage, seed)] for seed in range(settings.seed, settings.seed + settings.seeds)]
