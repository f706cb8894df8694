"""Dynamic vocabulary pruning keeps reward that training with a stale and noisy sampler loses.

Claim      With a stale and noisy sampler, a transformer that learns sums with a pruned vocabulary ends with more
           reward than without a correction.
Command    python -m experiments run pruning_training          (all nine arms: --arms all)
Cost       8 minutes beside other work on a 2-core AMD EPYC, 6.5 minutes of processor time
Expected   pruning_minus_none_low >= 0.0 in summary.json: the lower end of the 95 % interval of that difference, over 16
           seeds, paired (+0.157, from +0.087 to +0.227, at the largest threshold)

The mismatch, the training and the sums of `trm_training` (its ladder has 16 tokens and no tail to prune), at several
thresholds rho of the safe set { a : p_a >= rho max p }. An arm that prunes has its sampler prune as well, each on the
safe set of its own logits; tokens that the trainer would not have kept have weight 0. J is then the reward of the
pruned policy, which is the one that is deployed, and the error and its bounds are those of the two pruned policies:
where mu draws what pi has pruned D_KL is infinite, and where it cannot draw what pi keeps some bounds have no proof.

The gain is that of the truncated correction, which the pruning arms share with TIS: what pruning itself adds is not
resolved at any threshold (dvp_*_minus_tis in summary.json: +0.016, -0.010 and -0.027 at -13, -6 and -3, half-intervals
0.032 to 0.041), and the more is pruned the less it is. No arm learns under this mismatch: the reward falls by 0.26
without a correction, by 0.08 with TIS and by 0.06 to 0.14 with pruning; it falls least with the weakest.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from experiments.lab.arms import LABELS
from experiments.lab.arms import PRUNING
from experiments.lab.numbers import difference_at_the_end
from experiments.lab.numbers import summary_of_arm
from experiments.lab.page import label
from experiments.lab.page import world_section
from experiments.lab.settings import RANGES as LAB_RANGES
from experiments.lab.settings import LabSettings
from experiments.lab.settings import check
from experiments.lab.settings import train_part
from experiments.ranges import Range
from experiments.ranges import Ranges
from experiments.ranges import check_ranges
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

WORLD = "sums"


@dataclasses.dataclass(frozen=True)
class PruningSettings(LabSettings):
    """What is trained, under which mismatch, how often, and which thresholds of pruning are compared.

    Attributes:
        log_min_ps: thresholds relative to the most likely token; the largest prunes most. [nats]
    """

    log_min_ps: tuple[float, ...] = (-13.0, -6.0, -3.0)


RANGES: Ranges = LAB_RANGES | {"log_min_ps": Range(-1000, 0, below=True)}


def arms(settings: PruningSettings) -> tuple[str, ...]:
    """The arms that are trained; those that prune once for each threshold."""
    kinds = ("none", "tis", "dvp") if settings.arms == "default" else tuple(LABELS)
    named: list[str] = []
    for kind in kinds:
        named += [f"{kind}:{threshold:g}" for threshold in settings.log_min_ps] if kind in PRUNING else [kind]
    return tuple(named)


def _part(name: str) -> str:
    # A colon is no part of a file name everywhere.
    return name.replace(":-", "_")


def parts(settings: PruningSettings) -> Parts:
    """One part per arm.

    Raises:
        ValueError: a setting that cannot be.
    """
    check(settings)
    check_ranges(settings, RANGES)
    if not settings.log_min_ps:
        raise ValueError("Field --log-min-ps is empty; it needs thresholds, all below 0.")
    return {_part(name): train_part(WORLD, name, settings) for name in arms(settings)}


def by_arm(settings: PruningSettings, results: Results) -> Mapping[str, Arrays]:
    """The metrics of each arm."""
    return {name: results[_part(name)] for name in arms(settings)}


def strongest(settings: PruningSettings) -> str:
    """The arm that prunes at the largest threshold."""
    return f"dvp:{max(settings.log_min_ps):g}"


def summarise(settings: PruningSettings, results: Results) -> dict[str, Any]:
    """Every arm in numbers, and what pruning gains over no correction and over TIS, paired by seed."""
    trained = by_arm(settings, results)
    summary: dict[str, Any] = {
        "arms": {
            name: {**summary_of_arm(part), "pruned_mass": float(part["pruned_mass"].mean())}
            for name, part in trained.items()
        }
    }
    for other in ("none", "tis"):
        for threshold in settings.log_min_ps:
            gain = difference_at_the_end(trained[f"dvp:{threshold:g}"], trained[other])
            summary[f"dvp_{-threshold:g}_minus_{other}"] = gain.mean
            summary[f"dvp_{-threshold:g}_minus_{other}_low"] = gain.low
        best = difference_at_the_end(trained[strongest(settings)], trained[other])
        summary[f"pruning_minus_{other}"], summary[f"pruning_minus_{other}_low"] = best.mean, best.low
    return summary


def threshold_table(settings: PruningSettings, results: Results) -> Table:
    """What pruning takes away, and what it saves, per threshold."""
    trained = by_arm(settings, results)
    rows = []
    for threshold in settings.log_min_ps:
        part = trained[f"dvp:{threshold:g}"]
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
    """The arms, then the thresholds."""
    gain, low = summary["pruning_minus_none"], summary["pruning_minus_none_low"]
    own, trained = settings.of(WORLD), by_arm(settings, results)
    best = max(trained, key=lambda name: summary["arms"][name]["reward"])
    gaps = [f"{label(name)} {part['log_ppl_abs_diff'].mean():.3g}" for name, part in trained.items()]
    return Page(
        value=f"{gain:+.3f}",
        value_range=f"{low:+.3f} to {2 * gain - low:+.3f} of the reward",
        sentence=(
            f"Reward at the end with pruning at log rho = {max(settings.log_min_ps):g} minus that without a "
            f"correction, on sums, 95 % interval over {settings.seeds} seeds, paired."
        ),
        facts=f"{settings.seeds} seeds, {own.steps} steps, {len(arms(settings))} arms",
        sections=[
            world_section(
                TITLES[WORLD],
                WORLD,
                trained,
                [
                    f"Sampler: weights {own.lag} steps old, N(0, {own.noise:g}²) noise in every logit. Highest reward "
                    f"at the end: {label(best)}. Gap between trainer and sampler, mean over all steps: "
                    + ", ".join(gaps)
                    + " nats."
                ],
                inputs=INPUTS[WORLD],
                bounds_of=(strongest(settings),),
            ),
            Section(
                "What the thresholds cost and gain",
                [
                    "An arm with pruning also has the truncated correction of TIS, so that what pruning itself adds is "
                    "the last column. Differences of the reward at the end, paired by seed, with 95 % intervals."
                ],
                table=threshold_table(settings, results),
            ),
        ],
    )


SETTINGS = PruningSettings()

TINY = PruningSettings(**{**dataclasses.asdict(TRM_TINY), "log_min_ps": (-6.0,)})

EXPERIMENT = Study(
    name="pruning_training",
    claim="Dynamic vocabulary pruning keeps reward that training with a stale and noisy sampler loses.",
    cost="8 minutes beside other work on a 2-core AMD EPYC, 6.5 minutes of processor time",
    settings=SETTINGS,
    tiny=TINY,
    expectation=Expectation("pruning_minus_none_low", at_least=0.0),
    parts=parts,
    summarise=summarise,
    page=page,
    ranges=RANGES,
)
