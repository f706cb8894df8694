"""From the parts of `hybrid_imitation_rl` to what is reported."""

from collections.abc import Mapping
from typing import Any
from typing import NamedTuple

import numpy as np

from experiments.hybrid.arms import ARMS
from experiments.hybrid.settings import EXACT
from experiments.hybrid.settings import RESTING
from experiments.hybrid.settings import HybridSettings
from experiments.hybrid.variance import ESTIMATORS
from experiments.hybrid.variance import UNBIASED
from experiments.lab.numbers import Interval
from experiments.lab.numbers import over_seeds
from experiments.study import Arrays
from experiments.study import Results


def gap(settings: HybridSettings, results: Results, part: Arrays) -> np.ndarray:
    """J - J*, the KL from the law of the policy to that of the optimum [nats]; [seeds, updates + 1]."""
    return part["kl"] - settings.reward_weight * part["reward"] - results["resting"]["best"]


def sampled_gap(settings: HybridSettings, results: Results, name: str) -> np.ndarray:
    """J - J* of an arm that was trained from episodes."""
    return gap(settings, results, results[f"sampled_{name}"])


def difference(settings: HybridSettings, results: Results, name: str, other: str) -> Interval:
    """J of an arm minus that of another after the last update, paired by seed."""
    return over_seeds(sampled_gap(settings, results, name)[:, -1] - sampled_gap(settings, results, other)[:, -1])


class Rest(NamedTuple):
    """What the policy at which a field vanishes is worth: J - J*, KL to the teacher, reward."""

    gap: float
    kl: float
    reward: float


def rest(results: Results, name: str) -> Rest:
    """Of an arm of `RESTING` at the lambda of the objective, which stands last among the weights."""
    row = RESTING.index(name)
    return Rest(*(float(results["resting"][part][row, -1]) for part in ("distance", "kl", "reward")))


def lost_reward(results: Results, name: str) -> float:
    """Reward of the optimum with the same KL to the teacher, interpolated over the weights, minus that of an arm.

    The frontier begins at the teacher and is concave, so that a chord lies below it and the loss is not overstated. NaN
    for a KL beyond that of the largest weight.
    """
    row, known = rest(results, name), results["resting"]
    kl, reward = known["kl"][RESTING.index("hybrid")], known["reward"][RESTING.index("hybrid")]
    kl, reward = np.append(kl, 0.0), np.append(reward, known["teacher_reward"])
    order = np.argsort(kl)
    return float(np.interp(row.kl, kl[order], reward[order], right=np.nan)) - row.reward


def retuned(settings: HybridSettings, results: Results, name: str) -> tuple[float, float]:
    """(the weight of the reward at which an arm rests nearest to the optimum of J, J - J* there)."""
    gaps = results["resting"]["distance"][RESTING.index(name)]
    best = int(np.argmin(gaps))
    return float((*settings.weights, settings.reward_weight)[best]), float(gaps[best])


def places(settings: HybridSettings) -> tuple[str, ...]:
    """Where variances are measured, in words."""
    return (*(f"update {point}" if point else "start" for point in settings.points), "optimum")


def z_scores(results: Results) -> dict[str, np.ndarray]:
    """By estimator: mean of (estimate - grad J) along what a KL loss leaves out, in standard errors, at each place."""
    part = results["variance"]
    scores = part["along"] / part["along_error"]
    return {name: scores[:, number] for number, name in enumerate(ESTIMATORS)}


def _sampled(settings: HybridSettings, results: Results) -> Mapping[str, Any]:
    found = {}
    for name in ARMS:
        part, gaps = results[f"sampled_{name}"], sampled_gap(settings, results, name)
        end, against = over_seeds(gaps[:, -1]), difference(settings, results, name, "hybrid")
        found[name] = {
            "gap": end.mean,
            "gap_half_interval": end.half,
            "gap_at_a_quarter": float(gaps[:, settings.updates // 4].mean()),
            "reward": float(part["reward"][:, -1].mean()),
            "kl": float(part["kl"][:, -1].mean()),
            "minus_hybrid": against.mean,
            "minus_hybrid_half_interval": against.half,
        }
    return found


def summarise(settings: HybridSettings, results: Results) -> dict[str, Any]:
    """Every arm in numbers: where it rests, where it ends, how its gradient scatters."""
    known, scores = results["resting"], z_scores(results)
    apart = difference(settings, results, "kl_loss", "hybrid")
    weight, nearest = retuned(settings, results, "kl_loss")
    variance = results["variance"]
    return {
        "best": float(known["best"]),
        "teacher_gap": float(known["teacher_kl"] - settings.reward_weight * known["teacher_reward"] - known["best"]),
        "teacher_reward": float(known["teacher_reward"]),
        "resting": {name: rest(results, name)._asdict() for name in RESTING},
        "kl_loss_lost_reward_at_equal_kl": lost_reward(results, "kl_loss"),
        "kl_loss_best_weight": weight,
        "kl_loss_gap_at_best_weight": nearest,
        "exact": {name: float(gap(settings, results, results[f"exact_{name}"])[0, -1]) for name in EXACT},
        "sampled": _sampled(settings, results),
        "kl_loss_minus_hybrid": apart.mean,
        "kl_loss_minus_hybrid_low": apart.low,
        "variance": {
            place: {name: float(value) for name, value in zip(ESTIMATORS, row, strict=True)}
            for place, row in zip(places(settings), variance["variance"], strict=True)
        },
        "unbiased_largest_score": float(max(np.abs(scores[name]).max() for name in UNBIASED)),
        "kl_loss_smallest_score": float(np.abs(scores["kl_loss_step"]).min()),
        "distance_range": [float(variance["distance"].min()), float(variance["distance"].max())],
    }
