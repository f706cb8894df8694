"""pass@k: how likely it is that one of k sampled answers is right, from n >= k answers to each problem."""

from collections.abc import Sequence

import numpy as np

from experiments.intervals import Estimate
from experiments.intervals import by_problem
from experiments.intervals import clustered


def pass_at_k(correct: np.ndarray, samples: int, k: int) -> np.ndarray:
    """Unbiased estimate of pass@k for each problem.

    1 - C(n - c, k) / C(n, k), the share of the k-subsets of the n answers that hold a right one (Chen et al. 2021,
    arXiv 2107.03374, eq. 1), as 1 - prod_{i < k} (n - c - i) / (n - i): each factor lies in [0, 1], so nothing
    overflows, and a problem with n - c < k meets a factor 0 and gets exactly 1.

    Args:
        correct: c, right answers of each problem, whole numbers in 0 .. n [P].
        samples: n, answers given to each problem.
        k: answers that are drawn, 1 .. n.

    Returns:
        the estimates [P]. [prob]

    Raises:
        ValueError: k above n or below 1, or more right answers than answers.
    """
    if not 1 <= k <= samples:
        raise ValueError(f"k is {k}; of {samples} answers 1 to {samples} can be drawn.")
    correct = np.asarray(correct)
    if correct.size and not 0 <= correct.min() <= correct.max() <= samples:
        raise ValueError(
            f"correct has {correct.min()} to {correct.max()} right answers; each problem has 0 to {samples}."
        )
    taken = np.arange(k)
    wrong = np.maximum(samples - correct[..., None] - taken, 0)
    return 1 - np.prod(wrong / (samples - taken), axis=-1)


def estimate(correct: Sequence[int], identities: Sequence[str], *, samples: int, k: int) -> Estimate:
    """Mean pass@k over distinct problems with its 95 % interval.

    The problem is the cluster: forms of one problem are averaged first, and the interval is `intervals.clustered`, the
    normal one over the problems' means in Wilson's form; with one answer per problem it is Wilson's.

    Args:
        correct: right answers of each problem asked.
        identities: the problem that each of them is.
        samples: n, answers given to each.
        k: answers drawn.

    Raises:
        ValueError: as `pass_at_k`, or no problems.
    """
    per_problem = by_problem(pass_at_k(np.asarray(correct), samples, k).tolist(), identities)
    return clustered(per_problem, answers=samples // k)
