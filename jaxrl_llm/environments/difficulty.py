"""Which problems to learn from next, by how often they were solved: moderate ones, then those just out of reach.

GLM-4.5 (arXiv 2508.06471, section 3) trains in two stages, the second on problems with pass@8 = 0 and pass@512 > 0 and
a verified answer. The report does not say which rates are moderate, nor when the stage changes.
"""

import numpy as np

from jaxrl_llm.checks import require_sizes
from jaxrl_llm.typing import Bool
from jaxrl_llm.typing import Int


def moderate(correct: Int[np.ndarray, " P"], samples: int, *, low: float, high: float) -> Bool[np.ndarray, " P"]:
    """Where low <= correct / samples <= high: problems that are neither given nor hopeless.

    Args:
        correct: right answers to each problem.
        samples: answers given to each.
        low, high: rates. [prob]

    Raises:
        ValueError: counts or rates that cannot be, or no problem is moderate.
    """
    if not 0 <= low <= high <= 1:
        raise ValueError(f"low is {low} and high {high}; 0 <= low <= high <= 1 must hold.")
    require_sizes(samples=samples)
    rates = _counts("correct", correct, samples) / samples
    return _some((low <= rates) & (rates <= high), f"has a rate from {low} to {high}")


def just_out_of_reach(
    correct_few: Int[np.ndarray, " P"],
    correct_many: Int[np.ndarray, " P"],
    verified: Bool[np.ndarray, " P"],
    *,
    few: int = 8,
    many: int = 512,
) -> Bool[np.ndarray, " P"]:
    """Where none of few answers is right, one of many is, and the answer to compare with is verified.

    The few must not be judged by the many: the unbiased estimate of pass@8 from 512 answers, 1 - C(512 - c, 8) /
    C(512, 8), is above 0 as soon as one of them is right, so it would choose nothing. Count the few by themselves. A
    problem whose answers are right with probability p is then chosen with (1 - p)^8 (1 - (1 - p)^512) where they are
    drawn apart: most of all near p = 0.008.

    Args:
        correct_few: right answers among the few.
        correct_many: right answers among the many.
        verified: whether the reference answer was; a wrong one looks like a hard problem.
        few, many: answers given to each problem.

    Raises:
        ValueError: counts that cannot be, other shapes, or no problem is chosen.
    """
    require_sizes(few=few)
    if not few < many:
        raise ValueError(f"few is {few} and many {many}; few must be smaller.")
    none, some = _counts("correct_few", correct_few, few) == 0, _counts("correct_many", correct_many, many) > 0
    if not none.shape == some.shape == np.shape(verified) or np.asarray(verified).dtype != bool:
        raise ValueError(
            f"correct_few, correct_many and verified have the shapes {none.shape}, {some.shape} and "
            f"{np.shape(verified)}; they must be of one, and verified true or false."
        )
    return _some(none & some & verified, f"is verified, unsolved in {few} answers and solved in {many}")


def _counts(name: str, correct: Int[np.ndarray, " P"], samples: int) -> Int[np.ndarray, " P"]:
    correct = np.asarray(correct)
    if correct.ndim != 1 or not np.issubdtype(correct.dtype, np.integer) or not correct.size:
        raise ValueError(f"{name} is {correct.dtype} of shape {correct.shape}; it must be one whole number a problem.")
    if correct.min() < 0 or correct.max() > samples:
        raise ValueError(f"{name} goes from {correct.min()} to {correct.max()}; each must be in 0 .. {samples}.")
    return correct


def _some(chosen: Bool[np.ndarray, " P"], what: str) -> Bool[np.ndarray, " P"]:
    if not chosen.any():
        raise ValueError(f"none of the {len(chosen)} problems {what}; there is nothing to learn from.")
    return chosen
