"""Intervals for accuracies on a fixed set of held-out problems, clustered by problem.

The problem is the unit: answers to forms of one problem (a+b and b+a) are averaged first, so that asking a problem
twice does not make the interval narrower. Both formulas are closed: two reports of one run agree to the last digit.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np

Z95 = 1.959963984540054
"""Two-sided 95 % quantile of the normal distribution."""


@dataclasses.dataclass(frozen=True)
class Estimate:
    """A mean over problems with its 95 % interval.

    Attributes:
        value: the mean. [prob, or difference of probabilities]
        low: lower end of the interval.
        high: upper end of the interval.
        problems: number of distinct problems it rests on.
    """

    value: float
    low: float
    high: float
    problems: int


def by_problem(scores: Sequence[float], identities: Sequence[str]) -> np.ndarray:
    """Mean score of each distinct problem, in order of first appearance.

    Args:
        scores: one per answer, in [0, 1].
        identities: the problem that each answer belongs to.

    Raises:
        ValueError: for no answers, or for two lengths.
    """
    if len(scores) != len(identities) or not scores:
        raise ValueError(
            f"scores has {len(scores)} entries and identities {len(identities)}; both need one per answer."
        )
    groups: dict[str, list[float]] = {}
    for score, identity in zip(scores, identities, strict=True):
        groups.setdefault(identity, []).append(float(score))
    return np.array([np.mean(group) for group in groups.values()])


def accuracy(per_problem: np.ndarray) -> Estimate:
    """Wilson's score interval for the mean over problems.

    With one answer per problem it is the usual interval of a proportion. A per-problem mean in [0, 1] varies at most as
    much as a yes/no answer with the same mean, so with several answers it is wider than needed, never narrower.
    """
    return _wilson(float(np.mean(per_problem)), len(per_problem), len(per_problem))


def clustered(per_problem: np.ndarray, *, answers: int = 1) -> Estimate:
    """Interval for the mean over problems of a share that rests on several answers to each.

    The normal interval with the problem as the cluster, in Wilson's form so that it does not end at 0 width where all
    means are 0 or 1: Wilson's with n_eff = p (1 - p) / (s^2 / n) problems, s^2 the variance of the problems' means
    (divisor n - 1), so that its standard error is s / sqrt(n). n_eff is kept within n .. n * answers: a mean in [0, 1]
    varies at most as much as a yes/no answer, and no more is known than the answers themselves say. With yes/no means
    it is `accuracy`.

    Args:
        per_problem: means in [0, 1] [P].
        answers: independent answers that each mean rests on; for pass@k from n answers, n // k.

    Raises:
        ValueError: no problems, or fewer than one answer.
    """
    n = len(per_problem)
    if not n or answers < 1:
        raise ValueError(f"there are {n} problems with {answers} answers each; both must be at least 1.")
    p = float(np.mean(per_problem))
    if n == 1 or p in (0, 1):
        return _wilson(p, n, n)
    spread = float(np.var(per_problem, ddof=1)) / n
    effective = p * (1 - p) / spread if spread > 0 else np.inf
    return _wilson(p, min(max(effective, n), n * answers), n)


def _wilson(p: float, n: float, problems: int) -> Estimate:
    """Wilson's interval of a share p of n."""
    shrink = 1 + Z95**2 / n
    centre = (p + Z95**2 / (2 * n)) / shrink
    half = Z95 * np.sqrt(p * (1 - p) / n + Z95**2 / (4 * n**2)) / shrink
    return Estimate(p, max(0.0, float(centre - half)), min(1.0, float(centre + half)), problems)


def paired_difference(before: np.ndarray, after: np.ndarray) -> Estimate:
    """Interval for the mean of `after - before` over the same problems (Agresti and Min 2005).

    Wald's interval after adding half a problem to each of the four cells of (right before?) x (right after?):
    n* = n + 2, mean* = sum d / n*, variance* = (sum d^2 + 1) / n* - mean*^2, interval mean* +- z sqrt(variance* / n*).
    The value reported is the plain mean.

    Raises:
        ValueError: if the two have different lengths.
    """
    if before.shape != after.shape:
        raise ValueError(f"before has {len(before)} problems and after {len(after)}; they must be the same problems.")
    difference = after - before
    n = len(difference) + 2
    mean = difference.sum() / n
    half = Z95 * np.sqrt(((difference**2).sum() + 1) / n - mean**2) / np.sqrt(n)
    return Estimate(
        float(difference.mean()), max(-1.0, float(mean - half)), min(1.0, float(mean + half)), len(difference)
    )
