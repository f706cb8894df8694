"""From the metrics of an arm, [seeds, steps], to what is reported: means over seeds with 95 % intervals."""

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from experiments.bands import half_width
from experiments.bands import standard_error
from experiments.intervals import Estimate
from experiments.intervals import paired_difference
from experiments.study import Arrays

TAIL = 10
"""The end of a run is its last tenth."""

COLLAPSE = 0.7
"""A seed collapsed if its reward at the end is below this share of the best that it had over any window so long."""


class Interval(NamedTuple):
    """A mean over seeds and the half-width of its 95 % interval (Student's t; infinite for one seed)."""

    mean: float
    half: float

    @property
    def low(self) -> float:
        """Lower end."""
        return self.mean - self.half

    @property
    def resolved(self) -> bool:
        """Whether the interval leaves out zero."""
        return abs(self.mean) > self.half

    def __str__(self) -> str:
        """As in a table."""
        return f"{self.mean:.3f} ± {self.half:.3f}"


def over_seeds(values: np.ndarray) -> Interval:
    """The interval of the mean of one number per seed."""
    count = len(values)
    if count < 2:
        return Interval(float(values.mean()), float("inf"))
    return Interval(float(values.mean()), half_width(count) * float(standard_error(values)))


def window(steps: int) -> int:
    """Steps of the end of a run."""
    return max(1, steps // TAIL)


def at_the_end(values: np.ndarray) -> np.ndarray:
    """Mean over the last tenth, one per seed."""
    return values[:, -window(values.shape[1]) :].mean(axis=1)


def collapsed(rewards: np.ndarray) -> np.ndarray:
    """Which seeds collapsed: their end is below `COLLAPSE` times their best window, or not a number.

    Args:
        rewards: J(pi), [seeds, steps].
    """
    width = window(rewards.shape[1])
    smooth = np.apply_along_axis(lambda row: np.convolve(row, np.ones(width) / width, "valid"), 1, rewards)
    best = np.where(np.isnan(smooth), -np.inf, smooth).max(axis=1)
    # Negated, so that what is not a number counts as collapsed.
    return ~(at_the_end(rewards) >= COLLAPSE * best)


def resolved_share(part: Arrays) -> float:
    """In how many steps the sampled error of the surrogate is told apart from zero (95 %)."""
    error, half = part["error_sampled"], 1.96 * part["error_sampled_se"]
    return float((np.abs(error) > half).mean())


def summary_of_arm(part: Arrays) -> Mapping[str, float]:
    """The numbers of one arm, for summary.json."""
    end, sampler = (over_seeds(at_the_end(part[name])) for name in ("reward", "reward_sampler"))
    change = over_seeds(at_the_end(part["reward"]) - part["reward"][:, 0])
    return {
        "reward": end.mean,
        "reward_half_interval": end.half,
        "change": change.mean,
        "change_half_interval": change.half,
        "reward_of_sampler": sampler.mean,
        "best_reward": float(part["reward"].max(axis=1).mean()),
        "collapse_rate": float(collapsed(part["reward"]).mean()),
        "log_ppl_abs_diff": float(part["log_ppl_abs_diff"].mean()),
        "kl_mean": float(part["kl_mean"].mean()),
        "kl_max_median": float(np.median(part["kl_max"])),
        "acceptance": float(part["acceptance"].mean()),
        "wasted_tokens": float(part["wasted"].mean()),
        "error_abs": float(np.abs(part["error"]).mean()),
        "error_resolved_share": resolved_share(part),
        "bound_sharp_median": float(np.median(part["unified_sharp"])),
        "bound_printed_median": float(np.median(part["unified_printed"])),
        "vacuous_share": float(part["vacuous"].mean()),
        "bound_below_error_share": float((np.abs(part["error"]) > part["unified_sharp"] + 1e-5).mean()),
    }


def difference_at_the_end(part: Arrays, other: Arrays) -> Interval:
    """Reward at the end minus that of another arm, paired by seed: both arms start from the same policies."""
    return over_seeds(at_the_end(part["reward"]) - at_the_end(other["reward"]))


def collapses_prevented(part: Arrays, other: Arrays) -> Estimate:
    """Share of the seeds that collapsed in another arm minus that in this one, paired by seed."""
    ours, theirs = (collapsed(arm["reward"]).astype(float) for arm in (part, other))
    return paired_difference(ours, theirs)
