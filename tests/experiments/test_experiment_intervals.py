"""Intervals: against published and simulated values, and as functions of problems, not answers."""

import numpy as np
import pytest

from experiments.intervals import accuracy
from experiments.intervals import by_problem
from experiments.intervals import paired_difference


def test_wilson_known_values() -> None:
    # Newcombe 1998, table I: 81 of 263 is 0.2553 to 0.3662, 0 of 20 is 0 to 0.1611.
    estimate = accuracy(np.array([1.0] * 81 + [0.0] * 182))
    assert (round(estimate.low, 4), round(estimate.high, 4)) == (0.2553, 0.3662)
    none = accuracy(np.zeros(20))
    assert (none.low, round(none.high, 4)) == (0.0, 0.1611)


def test_answers_to_one_problem_are_one_cluster() -> None:
    once = accuracy(by_problem([1, 0, 1], ["a", "b", "c"]))
    thrice = accuracy(by_problem([1, 0, 1] * 3, ["a", "b", "c"] * 3))
    assert once == thrice
    assert once.problems == 3


def test_by_problem_averages_and_keeps_order() -> None:
    np.testing.assert_array_equal(by_problem([1, 0, 0], ["b", "a", "b"]), [0.5, 0.0])


def test_paired_difference_covers_and_is_not_wide() -> None:
    # 40 problems, right before with 0.3; of the others half become right, of the right ones a tenth become wrong.
    rng = np.random.default_rng(0)
    truth, covered, widths = 0.7 * 0.5 - 0.3 * 0.1, 0, []
    for _ in range(2000):
        before = rng.random(40) < 0.3
        after = np.where(before, rng.random(40) < 0.9, rng.random(40) < 0.5)
        estimate = paired_difference(before.astype(float), after.astype(float))
        covered += estimate.low <= truth <= estimate.high
        widths.append(estimate.high - estimate.low)
    assert 0.93 < covered / 2000 < 0.98
    assert np.mean(widths) < 0.4


def test_paired_difference_has_a_direction_and_a_width() -> None:
    before, after = np.array([0.0] * 10), np.array([1.0] * 10)
    up, down, same = (
        paired_difference(before, after),
        paired_difference(after, before),
        paired_difference(before, before),
    )
    assert up.value == 1
    assert up.low > 0.3
    assert (down.low, down.high) == (-up.high, -up.low)
    assert same.value == 0
    assert same.low < 0 < same.high


def test_mismatched_lengths_are_refused() -> None:
    with pytest.raises(ValueError, match="before has 3 problems and after 2"):
        paired_difference(np.zeros(3), np.zeros(2))
    with pytest.raises(ValueError, match="scores has 0"):
        by_problem([], [])
