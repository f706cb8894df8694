"""Pass rates with intervals clustered by problem, and a curriculum over them."""

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from dataclasses import replace

from jaxrl_llm.environments.tasks import Score
from jaxrl_llm.environments.tasks import Task

NORMAL_95 = 1.959963984540054


@dataclass(frozen=True)
class PassRate:
    """Means over answers; each half width is of a 95 % interval and treats all answers to one problem as one cluster.

    Attributes:
        answers: how many answers were scored.
        problems: how many distinct identities they belong to.
        reward: mean reward [per answer].
        lenient: fraction with the right final answer.
        strict: fraction that is right as a whole.
        lenient_half_width, strict_half_width: of the intervals around the two.
    """

    answers: int
    problems: int
    reward: float
    lenient: float
    strict: float
    lenient_half_width: float
    strict_half_width: float


def pass_rate(scores: Sequence[Score], identities: Sequence[str]) -> PassRate:
    """The pass rate of scored answers.

    The standard error of a mean of clustered values is that of a ratio estimator: with x_i the values, m their mean, n
    their number, K the number of clusters and r_k = sum over cluster k of (x_i - m),

        se^2 = K / (K - 1) * sum_k r_k^2 / n^2.

    Args:
        scores: one per answer.
        identities: `Problem.identity` of each answer's problem.

    Raises:
        ValueError: no scores, or the two lengths differ.
    """
    if not scores or len(scores) != len(identities):
        raise ValueError(f"scores has {len(scores)} entries and identities {len(identities)}; equal and not 0 needed.")
    lenient = [float(score.lenient) for score in scores]
    strict = [float(score.strict) for score in scores]
    return PassRate(
        answers=len(scores),
        problems=len(set(identities)),
        reward=sum(score.reward for score in scores) / len(scores),
        lenient=sum(lenient) / len(scores),
        strict=sum(strict) / len(scores),
        lenient_half_width=_half_width(lenient, identities),
        strict_half_width=_half_width(strict, identities),
    )


def _half_width(values: Sequence[float], identities: Sequence[str]) -> float:
    """1.96 clustered standard errors of the mean; infinite where a single cluster leaves it unknown."""
    mean = sum(values) / len(values)
    residuals: dict[str, float] = defaultdict(float)
    for value, identity in zip(values, identities, strict=True):
        residuals[identity] += value - mean
    clusters = len(residuals)
    if clusters < 2:
        return math.inf
    variance = clusters / (clusters - 1) * sum(residual**2 for residual in residuals.values()) / len(values) ** 2
    return NORMAL_95 * math.sqrt(variance)


@dataclass(frozen=True)
class CurriculumState:
    """Where a run stands in its curriculum: three integers, to be saved with the checkpoint."""

    level: int = 0
    answers: int = 0
    passed: int = 0


@dataclass(frozen=True)
class Curriculum:
    """Tasks in order of difficulty; the next one starts when the pass rate over a window of answers is high enough.

    Attributes:
        levels: the tasks, easiest first.
        promote_at: the pass rate that moves up.
        demote_below: the pass rate that moves down again; 0 never does.
        window: answers that are counted before each decision.
    """

    levels: tuple[Task, ...]
    promote_at: float = 0.8
    demote_below: float = 0.0
    window: int = 256

    def __post_init__(self) -> None:
        if not self.levels:
            raise ValueError("levels is empty; a curriculum must have at least one task.")
        if not 0.0 <= self.demote_below < self.promote_at <= 1.0:
            raise ValueError(
                f"demote_below is {self.demote_below} and promote_at {self.promote_at}; "
                "0 <= demote_below < promote_at <= 1 must hold."
            )
        if self.window < 1:
            raise ValueError(f"window is {self.window}; it must be at least 1.")

    def task(self, state: CurriculumState) -> Task:
        """The task to draw from now."""
        return self.levels[state.level]

    def update(self, state: CurriculumState, *, answers: int, passed: int) -> CurriculumState:
        """The state after `answers` more answers, `passed` of which were right."""
        state = replace(state, answers=state.answers + answers, passed=state.passed + passed)
        if state.answers < self.window:
            return state
        rate = state.passed / state.answers
        move = (rate >= self.promote_at) - (rate < self.demote_below)
        return CurriculumState(level=min(max(state.level + move, 0), len(self.levels) - 1))
