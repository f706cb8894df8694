"""The temperature of the next phase: the largest that costs next to nothing on held-out problems."""

import dataclasses
import math
from collections.abc import Mapping

from jaxrl_llm.training.phases.plateau import Plateau


def largest_near_best(scores: Mapping[float, float], *, tolerance: float = 0.01) -> float:
    """max { T : score(T) >= best - tolerance |best| }, best the largest score.

    Source: GLM-4.5 (arXiv 2508.06471, section 3), "within 1 %". The report leaves open whether that is relative (as
    here; for a score below 0 the bound lies below it too), against what (here the best of this grid), the grid, and how
    many answers a score rests on. Where each score is off by at most d, the true one of what is chosen is at least
    best - tolerance |best| - (2 + tolerance) d, with the largest true one as the best.

    Args:
        scores: of each temperature, larger is better.
        tolerance: share of the best score that may be lost.

    Raises:
        ValueError: no scores, one that is no finite number, or a tolerance outside [0, 1).
    """
    if not scores:
        raise ValueError("scores is empty; it must have the score of one temperature or more.")
    if not 0 <= tolerance < 1:
        raise ValueError(f"tolerance is {tolerance}; it must be in [0, 1).")
    for temperature, score in scores.items():
        if not math.isfinite(score):
            raise ValueError(f"the score of temperature {temperature} is {score}; it must be a finite number.")
    best = max(scores.values())
    return max(temperature for temperature, score in scores.items() if score >= best - tolerance * abs(best))


@dataclasses.dataclass(frozen=True)
class TemperatureState:
    """What is sampled at now, and the rewards since that began: numbers, which can be saved by the caller."""

    temperature: float
    rewards: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "rewards", tuple(self.rewards))  # JSON has lists


@dataclasses.dataclass(frozen=True)
class TemperatureControl:
    """Whenever the mean reward has a plateau, the temperature is chosen anew.

        state = control.observe(state, mean reward of the step)
        if control.due(state):
            state = control.choose(state, {T: score on held-out problems for T in control.grid})

    Attributes:
        grid: temperatures to choose among, rising.
        plateau: the rule.
        tolerance: see `largest_near_best`.

    Raises:
        ValueError: a grid that is empty, does not rise or has a temperature that cannot learn (0 or less).
    """

    grid: tuple[float, ...]
    plateau: Plateau = dataclasses.field(default_factory=Plateau)
    tolerance: float = 0.01

    def __post_init__(self) -> None:
        rises = bool(self.grid) and list(self.grid) == sorted(set(self.grid))
        if not rises or not 0 < self.grid[0] <= self.grid[-1] < math.inf:
            raise ValueError(f"grid is {self.grid}; it must be finite temperatures above 0, rising.")
        if not 0 <= self.tolerance < 1:
            raise ValueError(f"tolerance is {self.tolerance}; it must be in [0, 1).")

    def observe(self, state: TemperatureState, reward: float) -> TemperatureState:
        """The state after a step with this mean reward.

        Raises:
            ValueError: it is no finite number.
        """
        return dataclasses.replace(state, rewards=self.plateau.seen(state.rewards, reward))

    def due(self, state: TemperatureState) -> bool:
        """Whether the temperatures are to be scored."""
        return self.plateau.reached(state.rewards)

    def choose(self, state: TemperatureState, scores: Mapping[float, float]) -> TemperatureState:
        """The state at the start of the next phase.

        Raises:
            ValueError: the temperatures are not due, or the scores are not those of the grid.
        """
        if not self.due(state):
            raise ValueError("the reward has no plateau yet; temperatures are chosen where `due` says so.")
        if sorted(scores) != list(self.grid):
            raise ValueError(f"scores has the temperatures {sorted(scores)}; it must have those of grid, {self.grid}.")
        return TemperatureState(largest_near_best(scores, tolerance=self.tolerance))
