"""With a stale and noisy sampler, Trust Region Masking ends with more reward than training without a correction.

Claim      With a stale and noisy sampler, a transformer that learns sums with Trust Region Masking ends with more
           reward than without a correction.
Command    python -m experiments run trm_training          (all nine arms: --arms all)
Cost       7 minutes beside other work on a 2-core AMD EPYC, 7 minutes of processor time
Expected   sums_trm_minus_none_low >= 0.0 in summary.json: the lower end of the 95 % interval of that difference, over
           seeds, paired; decided before the 16 seeds were run

The sampler is wrong in a known way: its weights are some steps old and its logits carry noise that belongs to the
context (`rollouts.perturb`), so that it is a policy of its own and every divergence is exact. Two worlds: a ladder of
512 tokens per response, a Markov chain in which J, the surrogate, its error and the inputs of the bounds are exact, but
for D_TV, which is bounded from above; and sums of two digits for a byte-level transformer, where J and the error are
exact and the bounds read the sampled contexts. All arms share advantages, aggregation, optimiser, start and mismatch.
Seeds are vmapped, steps are scanned.

What came out: +0.091 (0.035 to 0.147) on sums, so the claim is met; it is met by the 11 seeds that had never been seen
before it was made as well (+0.107, half-interval 0.080). TIS does better and rejects nothing: it ends above TRM by
0.093 (0.025 to 0.161). Of the seeds 0.12 collapse with TIS (they end below 0.7 of their best), 0.50 with TRM and 0.69
without a correction; more with TRM than with TIS is resolved, fewer than without a correction is not. No arm learns
sums under this mismatch: from 0.42 the reward falls by 0.26 without a correction, by 0.17 with TRM, by 0.08 with TIS.
On the ladder TRM against no correction is not resolved (-0.031, half-interval 0.091); TIS is better by 0.086 (0.068).

The mismatch was looked for, not found at once: on ladders of 128 to 512 tokens, noise of 0.5 to 2 nats alone left the
arms close to each other, and so did a lag of 8 steps at learning rates up to 0.15. A lag at a learning rate that moves
the policy far in that many steps separates them on sums; on the ladder every policy gets stuck on some rung, however
its gradient is corrected. Chosen after looking: the ladder's lag was moved from 16 to 8, and TRM's thresholds on sums
were loosened from 0.6 and 0.1 to 2.0 and 0.5 after a scan. An earlier claim, that TRM prevents most collapses, rested
on five seeds and was not repeated by five others.

On SmolLM2, checkpointed, with the mismatch as a setting of the default experiment (TRM's exact masks then see it):
python -m experiments run smollm2_arithmetic --mismatch int8_weights --steps 200
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from experiments.lab.arms import DEFAULT_ARMS
from experiments.lab.arms import LABELS
from experiments.lab.numbers import COLLAPSE
from experiments.lab.numbers import collapses_prevented
from experiments.lab.numbers import difference_at_the_end
from experiments.lab.numbers import summary_of_arm
from experiments.lab.page import world_section
from experiments.lab.settings import RANGES
from experiments.lab.settings import WORLDS
from experiments.lab.settings import LabSettings
from experiments.lab.settings import check
from experiments.lab.settings import train_part
from experiments.registry import Expectation
from experiments.study import Arrays
from experiments.study import Page
from experiments.study import Parts
from experiments.study import Results
from experiments.study import Study

OTHERS = ("none", "tis")
"""What TRM is compared with."""

TITLES = {
    "ladder": "A ladder, {horizon} tokens per response: J, error and divergences exact",
    "sums": "Sums of two digits, a byte-level transformer",
}
INPUTS = {
    "ladder": "error and inputs of the bounds exact, maxima over all states, but for D_TV, bounded from above",
    "sums": "error exact, inputs of the bounds from the sampled contexts: estimates, not certificates",
}


def arms(settings: LabSettings) -> tuple[str, ...]:
    """The arms that are trained."""
    return DEFAULT_ARMS if settings.arms == "default" else tuple(LABELS)


def parts(settings: LabSettings) -> Parts:
    """One part per world and arm.

    Raises:
        ValueError: a setting that cannot be.
    """
    check(settings)
    return {f"{world}_{name}": train_part(world, name, settings) for world in WORLDS for name in arms(settings)}


def of_world(world: str, settings: LabSettings, results: Results) -> Mapping[str, Arrays]:
    """The arms of one world."""
    return {name: results[f"{world}_{name}"] for name in arms(settings)}


def summarise(settings: LabSettings, results: Results) -> dict[str, Any]:
    """Every arm in numbers, and what TRM gains over no correction and over TIS, paired by seed."""
    summary: dict[str, Any] = {}
    for world in WORLDS:
        trained = of_world(world, settings, results)
        summary[world] = {name: summary_of_arm(part) for name, part in trained.items()}
        for other in OTHERS:
            gain = difference_at_the_end(trained["trm"], trained[other])
            summary[f"{world}_trm_minus_{other}"] = gain.mean
            summary[f"{world}_trm_minus_{other}_low"] = gain.low
            fewer = collapses_prevented(trained["trm"], trained[other])
            summary[f"{world}_collapses_prevented_of_{other}"] = fewer.value
            summary[f"{world}_collapses_prevented_of_{other}_interval"] = [fewer.low, fewer.high]
    return summary


def page(settings: LabSettings, results: Results, summary: Mapping[str, Any]) -> Page:
    """Both worlds, and what they say together."""
    sections = []
    for world in WORLDS:
        own = settings.of(world)
        sections.append(
            world_section(
                TITLES[world].format(horizon=settings.ladder_horizon),
                world,
                of_world(world, settings, results),
                [
                    f"Sampler: weights {own.lag} steps old, N(0, {own.noise:g}²) noise in every logit. TRM accepts a "
                    f"response if its largest KL is at most {own.mask_maximum:g} and its mean KL at most "
                    f"{own.mask_average:g} nats.",
                    *_said(world, summary),
                ],
                inputs=INPUTS[world],
                bounds_of=("none", "trm"),
            )
        )
    gain, low = summary["sums_trm_minus_none"], summary["sums_trm_minus_none_low"]
    return Page(
        value=f"{gain:+.3f}",
        value_range=f"{low:+.3f} to {2 * gain - low:+.3f} of the reward",
        sentence=(
            "Reward at the end with Trust Region Masking minus that without a correction, on sums, 95 % interval over "
            f"{settings.seeds} seeds, paired{'' if low > 0 or 2 * gain - low < 0 else ': not resolved'}."
        ),
        facts=(
            f"{settings.seeds} seeds, {settings.ladder_steps} and {settings.sums_steps} steps, "
            f"{len(arms(settings))} arms"
        ),
        sections=sections,
    )


def _verdict(low: float, high: float) -> str:
    """Of a gain of TRM with this interval."""
    return "TRM is better" if low > 0 else "TRM is worse" if high < 0 else "not resolved"


def _said(world: str, summary: Mapping[str, Any]) -> list[str]:
    """What TRM buys, what it costs, and when its certificate says anything, in words made from the numbers."""
    numbers = summary[world]
    trm, gains, collapses = numbers["trm"], [], []
    for other in OTHERS:
        gain, low = summary[f"{world}_trm_minus_{other}"], summary[f"{world}_trm_minus_{other}_low"]
        half, verdict = gain - low, _verdict(low, 2 * gain - low)
        gains.append(f"{gain:+.3f} ± {half:.3f} against {LABELS[other]} ({verdict})")
        low, high = summary[f"{world}_collapses_prevented_of_{other}_interval"]
        rate, fewer = numbers[other]["collapse_rate"], summary[f"{world}_collapses_prevented_of_{other}"]
        collapses.append(
            f"{100 * rate:.0f} % with {LABELS[other]}, {100 * fewer:+.0f} points more ({100 * low:+.0f} to "
            f"{100 * high:+.0f}: {_verdict(low, high)})"
        )
    changes = ", ".join(
        f"{numbers[arm]['change']:+.3f} ± {numbers[arm]['change_half_interval']:.3f} with {LABELS[arm]}"
        for arm in (*OTHERS, "trm")
    )
    return [
        f"From the start of training to its end the reward changes by {changes}.",
        f"What TRM buys: reward at the end {' and '.join(gains)}. Of its seeds {100 * trm['collapse_rate']:.0f} % "
        f"collapsed, ending below {COLLAPSE:g} of their best; {' and '.join(collapses)}. What it costs: it rejects "
        f"{100 * (1 - trm['acceptance']):.0f} % of the responses, {100 * trm['wasted_tokens']:.0f} % of the tokens "
        "that were sampled and scored.",
        f"The certificate: the smallest sharp bound is vacuous in {100 * trm['vacuous_share']:.0f} % of the steps with "
        f"TRM (median bound {trm['bound_sharp_median']:.3g}, as printed {trm['bound_printed_median']:.3g}; mean "
        f"|error| {trm['error_abs']:.3g}).",
    ]


SETTINGS = LabSettings()

TINY = dataclasses.replace(
    SETTINGS,
    seeds=2,
    ladder_horizon=24,
    ladder_rungs=4,
    ladder_vocabulary=5,
    ladder_traps=1,
    ladder_answers=8,
    ladder_steps=12,
    ladder_lag=2,
    sums_prompts=4,
    sums_group_size=4,
    sums_width=8,
    sums_imitation_steps=4,
    sums_steps=6,
    sums_lag=1,
)

EXPERIMENT = Study(
    name="trm_training",
    claim=(
        "With a stale and noisy sampler, Trust Region Masking ends with more reward than training without a correction."
    ),
    cost="7 minutes beside other work on a 2-core AMD EPYC, 7 minutes of processor time",
    settings=SETTINGS,
    tiny=TINY,
    expectation=Expectation("sums_trm_minus_none_low", at_least=0.0),
    parts=parts,
    summarise=summarise,
    page=page,
    ranges=RANGES,
)
