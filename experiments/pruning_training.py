"""Dynamic vocabulary pruning under a controlled mismatch: does it stabilise, what does it cost, which threshold.

Claim      CLAIM
Command    python -m experiments run pruning_training          (all nine arms: --arms all)
Cost       COST
Expected   EXPECTED

The same two worlds, mismatch and training as `trm_training`, at several thresholds rho of the safe set { a : p_a >= rho
max p }. An arm that prunes has its sampler prune as well, each on the safe set of its own logits; tokens that the
trainer would not have kept have weight 0. J is then the reward of the pruned policy, which is the one that is deployed.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from experiments.lab.arms import LABELS
from experiments.lab.arms import PRUNING
from experiments.lab.numbers import difference_at_the_end
from experiments.lab.numbers import summary_of_arm
from experiments.lab.page import label
from experiments.lab.page import world_section
from experiments.lab.settings import WORLDS
from experiments.lab.settings import LabSettings
from experiments.lab.settings import check
from experiments.lab.settings import train_part
from experiments.registry import Expectation
from experiments.study import Arrays
from experiments.study import Page
from experiments.study import Parts
from experiments.study import Results
from experiments.study import Section
from experiments.study import Study
from experiments.study import Table
from experiments.trm_training import INPUTS
from experiments.trm_training import TINY as TRM_TINY
from experiments.trm_training import TITLES


@dataclasses.dataclass(frozen=True)
class PruningSettings(LabSettings):
    """What is trained, under which mismatch, how often, and which thresholds of pruning are compared.

    Attributes:
        log_min_ps: thresholds relative to the most likely token; the largest prunes most. [nats]
    """

    log_min_ps: tuple[float, ...] = (-13.0, -6.0, -3.0)


def arms(settings: PruningSettings) -> tuple[str, ...]:
    """The arms that are trained; those that prune once for each threshold."""
    kinds = ("none", "tis", "dvp") if settings.arms == "default" else tuple(LABELS)
    named: list[str] = []
    for kind in kinds:
        named += [f"{kind}:{threshold:g}" for threshold in settings.log_min_ps] if kind in PRUNING else [kind]
    return tuple(named)


def _part(world: str, name: str) -> str:
    # A colon is no part of a file name everywhere.
    return f"{world}_{name.replace(':-', '_')}"


def parts(settings: PruningSettings) -> Parts:
    """One part per world and arm.

    Raises:
        ValueError: a setting that cannot be.
    """
    check(settings)
    if not settings.log_min_ps or max(settings.log_min_ps) >= 0:
        raise ValueError(f"Field --log-min-ps is {settings.log_min_ps}; it needs thresholds, all below 0.")
    return {_part(world, name): train_part(world, name, settings) for world in WORLDS for name in arms(settings)}


def of_world(world: str, settings: PruningSettings, results: Results) -> Mapping[str, Arrays]:
    """The arms of one world."""
    return {name: results[_part(world, name)] for name in arms(settings)}


def strongest(settings: PruningSettings) -> str:
    """The arm that prunes at the largest threshold."""
    return f"dvp:{max(settings.log_min_ps):g}"


def summarise(settings: PruningSettings, results: Results) -> dict[str, Any]:
    """Every arm in numbers, and what pruning gains over no correction and over TIS, paired by seed."""
    summary: dict[str, Any] = {}
    for world in WORLDS:
        trained = of_world(world, settings, results)
        summary[world] = {
            name: {**summary_of_arm(part), "pruned_mass": float(part["pruned_mass"].mean())}
            for name, part in trained.items()
        }
        for other in ("none", "tis"):
            for threshold in settings.log_min_ps:
                gain = difference_at_the_end(trained[f"dvp:{threshold:g}"], trained[other])
                summary[f"{world}_dvp_{-threshold:g}_minus_{other}"] = gain.mean
                summary[f"{world}_dvp_{-threshold:g}_minus_{other}_low"] = gain.low
        best = difference_at_the_end(trained[strongest(settings)], trained["none"])
        summary[f"{world}_pruning_minus_none"], summary[f"{world}_pruning_minus_none_low"] = best.mean, best.low
    return summary


def bias_table(settings: PruningSettings, world: str, results: Results) -> Table:
    """What pruning takes away, and what it saves, per threshold."""
    trained = of_world(world, settings, results)
    rows = []
    for threshold in settings.log_min_ps:
        name = f"dvp:{threshold:g}"
        part = trained[name]
        against = [difference_at_the_end(part, trained[other]) for other in ("none", "tis")]
        rows.append(
            (
                f"log rho = {threshold:g}",
                f"{part['pruned_mass'].mean():.2g}",
                f"{100 * part['wasted'].mean():.2f} %",
                *(f"{gain} {'' if gain.resolved else '(not resolved)'}".strip() for gain in against),
            )
        )
    return Table(
        head=("threshold", "E sum (1 - Z), bound on |J - J_S|", "tokens lost", "J minus none", "J minus TIS"), rows=rows
    )


def page(settings: PruningSettings, results: Results, summary: Mapping[str, Any]) -> Page:
    """Both worlds, then the thresholds."""
    gain, low = summary["sums_pruning_minus_none"], summary["sums_pruning_minus_none_low"]
    sections = []
    for world in WORLDS:
        own, trained = settings.of(world), of_world(world, settings, results)
        best = max(trained, key=lambda name: summary[world][name]["reward"])
        gaps = [(label(name), float(np.mean(part["log_ppl_abs_diff"]))) for name, part in trained.items()]
        sections.append(
            world_section(
                TITLES[world].format(horizon=settings.ladder_horizon),
                world,
                trained,
                [
                    f"Sampler: weights {own.lag} steps old, N(0, {own.noise:g}²) noise in every logit. Highest reward "
                    f"at the end: {label(best)}. Gap between trainer and sampler, mean over all steps: "
                    + ", ".join(f"{name} {gap:.3g}" for name, gap in gaps)
                    + " nats."
                ],
                inputs=INPUTS[world],
                bounds_of=(strongest(settings),),
            )
        )
        sections.append(
            Section(
                "What the thresholds cost and gain: " + world,
                ["Differences of the reward at the end, paired by seed, with 95 % intervals."],
                table=bias_table(settings, world, results),
            )
        )
    return Page(
        value=f"{gain:+.3f}",
        value_range=f"{low:+.3f} to {2 * gain - low:+.3f} of the reward",
        sentence=(
            f"Reward at the end with pruning at log rho = {max(settings.log_min_ps):g} minus that without a "
            f"correction, on sums, 95 % interval over {settings.seeds} seeds, paired."
        ),
        facts=(
            f"{settings.seeds} seeds, {settings.ladder_steps} and {settings.sums_steps} steps, "
            f"{len(arms(settings))} arms"
        ),
        sections=sections,
    )


SETTINGS = PruningSettings()

TINY = PruningSettings(**{**dataclasses.asdict(TRM_TINY), "log_min_ps": (-6.0,)})

EXPERIMENT = Study(
    name="pruning_training",
    claim="CLAIM",
    cost="COST",
    settings=SETTINGS,
    tiny=TINY,
    expectation=Expectation("sums_pruning_minus_none_low", at_least=0.0),
    parts=parts,
    summarise=summarise,
    page=page,
)
