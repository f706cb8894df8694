"""From the metrics of an arm, [seeds, iterations], to what is reported."""

from collections.abc import Mapping
from typing import Any
from typing import NamedTuple

import numpy as np

from experiments.games.settings import FRESH
from experiments.games.settings import Arm
from experiments.games.settings import GameSettings
from experiments.games.settings import all_arms
from experiments.games.settings import control_settings
from experiments.games.settings import named
from experiments.lab.numbers import Interval
from experiments.lab.numbers import over_seeds
from experiments.study import Arrays
from experiments.study import Results

POINTS = 20
"""Of a learning curve: the games that ended between two of them are one number."""
PUBLISHED = {
    "asterix": {"actor-critic": 19, "gymnax": 15, "pgx": 23.5},
    "breakout": {"actor-critic": 17.5, "gymnax": 28, "pgx": 50},
    "freeway": {"actor-critic": 47, "gymnax": 58, "pgx": 63.5},
    "seaquest": {"actor-critic": 15, "pgx": 54},
    "space_invaders": {"actor-critic": 185, "gymnax": 131, "pgx": 149},
}
"""Returns that others print, the first and the last read off plots: the actor-critic of MinAtar's paper after 5 million
frames, sticky; PPO of gymnax-blines after 10 million, not sticky; PPO of pgx after 20 million, sticky."""
BEST_OF = "pgx"
"""Whose return stands for a skilled player in the relative score."""


class Drift(NamedTuple):
    """How far a policy is from the one before, in means over a run.

    divergence: of the occupancies, E_{s ~ pi} KL(pi || pi_old) [nats]. tv: E_{s ~ pi} TV(pi, pi_old) [prob]. gain: what
    a step earns more than under the policy before, in advantages of size 1.
    """

    divergence: Interval
    tv: Interval
    gain: Interval


def curve(part: Arrays, points: int = POINTS) -> np.ndarray:
    """[seeds, points]: mean return of the games that ended since the point before; NaN where none did."""
    pieces = np.array_split(np.arange(part["returns"].shape[1]), min(points, part["returns"].shape[1]))
    ended = np.stack([part["ended"][:, piece].sum(axis=1) for piece in pieces], axis=1)
    total = np.stack([part["returns"][:, piece].sum(axis=1) for piece in pieces], axis=1)
    return np.where(ended > 0, total / np.maximum(ended, 1), np.nan)


def frames(settings: GameSettings, points: int) -> np.ndarray:
    """The last frame of each point of a curve."""
    pieces = np.array_split(np.arange(settings.whole.iterations), points)
    return np.array([piece[-1] + 1 for piece in pieces]) * settings.parallel * settings.steps


def final(part: Arrays) -> np.ndarray:
    """One per seed: mean return of whole games that the learned policy plays."""
    return part["whole"].mean(axis=1)


def over_the_run(part: Arrays) -> np.ndarray:
    """One per seed: the mean of the learning curve, which is high for those that learn soon."""
    return mean_of_known(curve(part))


def mean_of_known(values: np.ndarray) -> np.ndarray:
    """Mean over the last axis of what is a number; NaN where nothing is."""
    known = np.isfinite(values)
    return np.where(known, values, 0).sum(axis=-1) / np.where(known.any(axis=-1), known.sum(axis=-1), np.nan)


def relative(results: Results, arm: Arm, base: Arm) -> np.ndarray:
    """One per seed: the paper's relative score, (ours - theirs) / (max(skilled, theirs) - chance), at the end.

    The skilled player is `PUBLISHED`, as no human scores of MinAtar are known to us.
    """
    ours, theirs = final(results[arm.name]), final(results[base.name])
    chance = float(final(results[f"{arm.game}.chance"])[0])
    return (ours - theirs) / (max(PUBLISHED[arm.game][BEST_OF], float(theirs.mean())) - chance)


def drift(part: Arrays) -> Drift:
    """Of successive policies. The gain is the mean temporal difference under the new policy less that under the old,
    of the same values: the performance difference, with states as often as they are met.
    """
    gain = part["surprise_before"][:, 1:] - part["surprise"][:, :-1]
    return Drift(
        over_seeds(part["occupancy_divergence"][:, 1:].mean(axis=1)),
        over_seeds(part["occupancy_tv"][:, 1:].mean(axis=1)),
        over_seeds((gain / np.maximum(part["scale"][:, :-1], 1e-8)).mean(axis=1)),
    )


def has_bound(settings: GameSettings, arm: Arm) -> bool:
    """Whether the divergence that is measured is the one that the arm's objective holds small."""
    method = control_settings(settings, arm).method
    return method.divergence == "kl" and method.coefficient > 0


def over_games(settings: GameSettings, results: Results, method: str, base: str) -> Interval:
    """Relative score of a method over another, mean over games; seed by seed."""
    scores = [relative(results, named(settings, game, method), named(settings, game, base)) for game in settings.games]
    return over_seeds(np.mean(scores, axis=0))


def summarise(settings: GameSettings, results: Results) -> dict[str, Any]:
    """Every arm in numbers, and the relative scores of the methods."""
    arms, settings = all_arms(settings), settings.whole
    summary: dict[str, Any] = {
        "frames": settings.iterations * settings.parallel * settings.steps,
        "chance": {game: float(final(results[f"{game}.chance"])[0]) for game in settings.games},
        "arms": {arm.name: _numbers(settings, results, arm) for arm in arms},
        "relative": {},
    }
    for base in ("ppo", "kl_one_step", FRESH):
        for method in settings.arms:
            known = {f"{method}_over_{base}", f"{base}_over_{method}"} & {*summary["relative"]}
            if base in settings.arms and method != base and not known:
                score = over_games(settings, results, method, base)
                summary["relative"][f"{method}_over_{base}"] = {"mean": score.mean, "half_interval": score.half}
    claimed = summary["relative"].get("kl_over_ppo")
    summary["kl_over_ppo_low"] = None if claimed is None else claimed["mean"] - claimed["half_interval"]
    return summary


def _numbers(settings: GameSettings, results: Results, arm: Arm) -> Mapping[str, Any]:
    part = results[arm.name]
    values, moved = curve(part), drift(part)
    end, mean = over_seeds(final(part)), over_seeds(over_the_run(part))
    return {
        "end": end.mean,
        "end_half_interval": end.half,
        "over_the_run": _known(mean.mean),
        "over_the_run_half_interval": _known(mean.half),
        "updates": settings.iterations * control_settings(settings, arm).updates,
        "occupancy_divergence": moved.divergence.mean,
        "occupancy_divergence_half_interval": moved.divergence.half,
        "policy_tv": moved.tv.mean,
        "gain": moved.gain.mean,
        "gain_half_interval": moved.gain.half,
        "effective_share": float(part["effective_share"].mean()),
        "entropy": float(part["entropy"][:, -1].mean()),
        "skipped": float(part["skipped"].sum()),
        "curve": [_known(value) for value in values.mean(axis=0)],
        "curve_half_intervals": [_known(over_seeds(column).half) for column in values.T],
        "frames_per_second": float(part["returns"].size * settings.parallel * settings.steps / part["seconds"]),
    }


def _known(value: float) -> float | None:
    """To three digits after the point; None for what is no number, which JSON does not have."""
    return round(float(value), 3) if np.isfinite(value) else None
