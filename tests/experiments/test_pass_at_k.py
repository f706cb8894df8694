"""pass@k against enumeration of all subsets, and its interval over problems."""

import itertools
import math

import numpy as np
import pytest

from experiments.intervals import accuracy
from experiments.intervals import clustered
from experiments.pass_at_k import estimate
from experiments.pass_at_k import pass_at_k


def test_it_is_the_share_of_the_subsets_with_a_right_answer() -> None:
    for samples in range(1, 7):
        for k in range(1, samples + 1):
            found = pass_at_k(np.arange(samples + 1), samples, k)
            for right in range(samples + 1):
                answers = [True] * right + [False] * (samples - right)
                subsets = list(itertools.combinations(answers, k))
                assert found[right] == pytest.approx(sum(map(any, subsets)) / len(subsets), abs=1e-15)


def test_it_is_unbiased_where_the_rate_is_known() -> None:
    """Sum over Binomial(c; n, q) of the estimate is 1 - (1 - q)^k."""
    samples, rate = 9, 0.3
    law = np.array([math.comb(samples, c) * rate**c * (1 - rate) ** (samples - c) for c in range(samples + 1)])
    for k in (1, 4, 9):
        assert law @ pass_at_k(np.arange(samples + 1), samples, k) == pytest.approx(1 - (1 - rate) ** k)
    # The plug-in 1 - (1 - c / n)^k is not: it is too small for k > 1.
    plugged = law @ (1 - (1 - np.arange(samples + 1) / samples) ** 4)
    assert plugged < 1 - (1 - rate) ** 4 - 0.02


def test_large_numbers_of_answers_neither_overflow_nor_lose_digits() -> None:
    samples, k = 5000, 1200
    correct = np.array([0, 1, 7, 3800, 3801, 5000])
    exact = [1 - math.comb(samples - int(c), k) / math.comb(samples, k) for c in correct]
    np.testing.assert_allclose(pass_at_k(correct, samples, k), exact, rtol=1e-12)
    assert pass_at_k(correct, samples, k)[[0, -2, -1]].tolist() == [0, 1, 1]


def test_what_cannot_be_is_refused() -> None:
    for k in (0, 17):
        with pytest.raises(ValueError, match=f"k is {k}; of 16 answers 1 to 16 can be drawn"):
            pass_at_k(np.array([3]), 16, k)
    with pytest.raises(ValueError, match="correct has 0 to 5 right answers; each problem has 0 to 4"):
        pass_at_k(np.array([0, 5]), 4, 1)
    with pytest.raises(ValueError, match="there are 0 problems"):
        clustered(np.array([]))


def test_one_answer_is_accuracy_with_wilsons_interval() -> None:
    right = [1, 0, 0, 1, 1, 0, 0, 0]
    found = estimate(right, [str(index) for index in range(8)], samples=1, k=1)
    expected = accuracy(np.array(right, float))
    assert (found.value, found.low, found.high) == pytest.approx((expected.value, expected.low, expected.high))
    assert found.problems == 8


def test_forms_of_one_problem_are_one_cluster() -> None:
    once = estimate([3, 0, 16], ["a", "b", "c"], samples=16, k=4)
    assert once == estimate([3, 0, 16] * 3, ["a", "b", "c"] * 3, samples=16, k=4)
    assert once.problems == 3


def test_the_interval_covers_and_uses_that_answers_are_many() -> None:
    rng, problems, samples, k = np.random.default_rng(0), 60, 16, 4
    covered, narrower = 0, []
    truth = np.mean(1 - (1 - rng.beta(0.5, 1.5, 400_000)) ** k)
    for _ in range(2000):
        correct = rng.binomial(samples, rng.beta(0.5, 1.5, problems))
        shares = pass_at_k(correct, samples, k)
        found, wilson = clustered(shares, answers=samples // k), accuracy(shares)
        covered += found.low <= truth <= found.high
        narrower.append((found.high - found.low) / (wilson.high - wilson.low))
    assert 0.93 < covered / 2000 < 0.97
    assert np.mean(narrower) < 0.9


def test_the_width_is_never_nothing() -> None:
    """Alike problems tell nothing of what others may be; at most so many yes/no answers as were given do."""
    for shares, answers, number in ((np.zeros(30), 16, 30), (np.full(30, 0.25), 4, 120), (np.array([0.5]), 8, 1)):
        found, p = clustered(shares, answers=answers), shares[0]
        half = 1.96 * np.sqrt(p * (1 - p) / number + 1.96**2 / (4 * number**2)) / (1 + 1.96**2 / number)
        centre = (p + 1.96**2 / (2 * number)) / (1 + 1.96**2 / number)
        np.testing.assert_allclose((found.low, found.high), (centre - half, centre + half), atol=1e-4)
