"""From the parts of `divergence_chain` to what is reported."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from experiments.intervals import Estimate
from experiments.intervals import accuracy
from experiments.lab.numbers import Interval
from experiments.lab.numbers import over_seeds
from experiments.reuse.arms import ARMS
from experiments.reuse.compute import ADVANTAGES
from experiments.reuse.compute import GRADIENTS
from experiments.reuse.compute import MATCHED
from experiments.reuse.exact import objective
from experiments.reuse.settings import ReuseSettings
from experiments.reuse.worlds import FAMILIES
from experiments.reuse.worlds import RANDOM
from experiments.study import Arrays
from experiments.study import Results

ORDER = list(ARMS)


def of_family(part: Arrays, family: str) -> Arrays:
    """The rows of a part that are worlds of a kind."""
    rows = part["family"] == list(FAMILIES).index(family)
    return {name: values[rows] for name, values in part.items() if values.shape[:1] == rows.shape}


def _matched(results: Results, family: str, advantages: str, arm: str, quantity: str) -> np.ndarray:
    """A measure of an arm at the common drift, where it and the one-step arm were set to it; that of one step below."""
    part, names = of_family(results[f"equal_{advantages}"], family), MATCHED
    row, base = names.index(arm), names.index("one_step")
    met = part["reached"][:, row] & part["reached"][:, base]
    return part[quantity][met][:, [row, base]].T


def share_above(results: Results, family: str, arm: str, advantages: str = "current") -> Estimate:
    """Share of the worlds in which an arm gains more return than one step does at the same drift."""
    found, base = _matched(results, family, advantages, arm, "gain")
    if not found.size:
        return Estimate(float("nan"), 0.0, 1.0, 0)
    return accuracy((found > base).astype(float))


def gain_above(results: Results, family: str, arm: str, advantages: str = "current") -> Interval:
    """The mean difference of those gains, as a share of the mean gain of one step."""
    found, base = _matched(results, family, advantages, arm, "gain")
    if not found.size:
        return Interval(float("nan"), float("inf"))
    return over_seeds((found - base) / base.mean())


def unmatched(results: Results) -> int:
    """Worlds times arms that could not be set to the drift."""
    parts = [of_family(results[f"equal_{advantages}"], family) for advantages in ADVANTAGES for family in FAMILIES]
    return int(sum((~part["reached"]).sum() for part in parts))


def at_the_end(part: Arrays, arm: str, quantity: str) -> np.ndarray:
    """A measure of an arm after the last reuse, [worlds]."""
    return part[quantity][:, ORDER.index(arm), -1]


def same_coefficient(settings: ReuseSettings, part: Arrays) -> Mapping[str, Any]:
    """Multi-step beside one step at the coefficient of the objective, after the last reuse."""

    def value(arm: str) -> np.ndarray:
        gain, charged = (at_the_end(part, arm, name) for name in ("gain", "divergence"))
        return objective(gain, charged, discount=settings.discount, coefficient=settings.coefficient)

    many, one = (at_the_end(part, arm, "states") for arm in ("multi_step", "one_step"))
    return {
        "less_drift": float((many < one).mean()),
        "drift_ratio": float(many.mean() / one.mean()),
        "better_objective": float((value("multi_step") > value("one_step")).mean()),
        "distance": {arm: float(at_the_end(part, arm, "distance").mean()) for arm in ARMS},
        "drift": {arm: float(at_the_end(part, arm, "states").mean()) for arm in ARMS},
        "gain": {arm: float(at_the_end(part, arm, "gain").mean()) for arm in ARMS},
        "optimum_drift": float(part["best_states"].mean()),
        "optimum_gain": float(part["best_gain"].mean()),
    }


def _shares(results: Results, advantages: str) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for arm in MATCHED:
        if arm == "one_step":
            continue
        shares = {family: share_above(results, family, arm, advantages) for family in RANDOM}
        found[arm] = {
            family: {
                "share": share.value,
                "low": share.low,
                "high": share.high,
                "gain_above": gain_above(results, family, arm, advantages).mean,
                "gain_above_half_interval": gain_above(results, family, arm, advantages).half,
            }
            for family, share in shares.items()
        }
    return found


def summarise(settings: ReuseSettings, results: Results) -> dict[str, Any]:
    """How often multi-step gains more at equal drift; what each arm does at one coefficient; what holds exactly."""
    parts = [of_family(results[f"curves_{advantages}"], family) for advantages in ADVANTAGES for family in FAMILIES]
    errors = {
        name: {family: float(np.median(of_family(results["gradients"], family)[name])) for family in FAMILIES}
        for name in GRADIENTS
    }
    exact = [
        of_family(results["gradients"], family)[name].max()
        for family in FAMILIES
        for name in ("multi_step", "full_entropy")
    ]
    lows = {arm: [share_above(results, family, arm).low for family in RANDOM] for arm in ("multi_step", "full_entropy")}
    return {
        "multi_step_share_low": float(min(lows["multi_step"])),
        "full_entropy_share_low": float(min(lows["full_entropy"])),
        "equal_drift": {advantages: _shares(results, advantages) for advantages in ADVANTAGES},
        "chain_gain_above": {
            advantages: {arm: gain_above(results, "chain", arm, advantages).mean for arm in MATCHED}
            for advantages in ADVANTAGES
        },
        "unmatched": unmatched(results),
        "same_coefficient": {
            advantages: {
                family: same_coefficient(settings, of_family(results[f"curves_{advantages}"], family))
                for family in FAMILIES
            }
            for advantages in ADVANTAGES
        },
        "bound_smallest_margin": float(min((part["bound"] - part["states"]).min() for part in parts)),
        "drift_over_bound": float(max((part["states"] / np.maximum(part["bound"], 1e-12)).max() for part in parts)),
        "gradient_errors": errors,
        "identity_largest_error": float(max(exact)),
    }
