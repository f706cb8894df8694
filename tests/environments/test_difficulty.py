"""Problems chosen by counts: against the law of the choice by enumeration, and what an estimate would choose."""

import math

import numpy as np
import pytest

from experiments.pass_at_k import pass_at_k
from jaxrl_llm.environments.difficulty import just_out_of_reach
from jaxrl_llm.environments.difficulty import moderate


def test_moderate_problems_are_those_between_two_rates():
    chosen = moderate(np.array([0, 1, 2, 8, 14, 15, 16]), 16, low=0.125, high=0.875)
    assert chosen.tolist() == [False, False, True, True, True, False, False]
    assert moderate(np.arange(3), 2, low=0.0, high=1.0).all()


def test_out_of_reach_is_unsolved_by_few_solved_by_many_and_verified():
    few, many = np.array([0, 0, 1, 0, 2]), np.array([1, 0, 9, 300, 0])
    assert just_out_of_reach(few, many, np.array([True] * 5)).tolist() == [True, False, False, True, False]
    assert just_out_of_reach(few, many, np.arange(5) == 3).tolist() == [False, False, False, True, False]


def test_the_law_of_the_choice_is_that_of_the_docstring():
    """Every pair of counts once, with its probability."""
    few, many = 3, 7
    pairs = np.array([(a, b) for a in range(few + 1) for b in range(many + 1)])
    chosen = just_out_of_reach(pairs[:, 0], pairs[:, 1], np.ones(len(pairs), bool), few=few, many=many)
    for p in (0.1, 0.4):
        law = [
            math.comb(few, a) * p**a * (1 - p) ** (few - a) * math.comb(many, b) * p**b * (1 - p) ** (many - b)
            for a, b in pairs.tolist()
        ]
        assert np.dot(law, chosen) == pytest.approx((1 - p) ** few * (1 - (1 - p) ** many), rel=1e-12)
    grid = np.linspace(0, 0.1, 100_001)
    assert grid[np.argmax((1 - grid) ** 8 * (1 - (1 - grid) ** 512))] == pytest.approx(0.0081, abs=2e-4)


def test_an_estimate_from_the_many_would_choose_nothing():
    correct = np.arange(513)
    estimates = pass_at_k(correct, 512, 8)
    assert not np.any((estimates == 0) & (pass_at_k(correct, 512, 512) > 0))


def test_what_cannot_be_is_refused():
    counts, all_verified = np.array([0, 1]), np.ones(2, bool)
    for rates in ({"low": 0.6, "high": 0.5}, {"low": -0.1, "high": 0.5}, {"low": 0.5, "high": 1.5}):
        with pytest.raises(ValueError, match=r"0 <= low <= high <= 1 must hold"):
            moderate(counts, 4, **rates)
    with pytest.raises(ValueError, match=r"none of the 2 problems has a rate from 0.5 to 0.6"):
        moderate(counts, 4, low=0.5, high=0.6)
    for wrong in (np.array([0.0, 1.0]), np.zeros((2, 1), int), np.zeros(0, int)):
        with pytest.raises(ValueError, match="must be one whole number a problem"):
            moderate(wrong, 4, low=0.0, high=1.0)
    with pytest.raises(ValueError, match=r"correct_few goes from 0 to 9; each must be in 0 .. 8"):
        just_out_of_reach(np.array([0, 9]), counts, all_verified)
    with pytest.raises(ValueError, match=r"shapes \(2,\), \(2,\) and \(1,\)"):
        just_out_of_reach(counts, counts, np.ones(1, bool))
    with pytest.raises(ValueError, match="verified true or false"):
        just_out_of_reach(counts, counts, np.ones(2))
    with pytest.raises(ValueError, match="none of the 2 problems is verified, unsolved in 8 answers and solved in 512"):
        just_out_of_reach(counts, counts, all_verified)
    with pytest.raises(ValueError, match="samples is 0; it must be at least 1"):
        moderate(np.zeros(2, int), 0, low=0.0, high=1.0)
    with pytest.raises(ValueError, match="few is 0; it must be at least 1"):
        just_out_of_reach(np.zeros(2, int), counts, all_verified, few=0)
    with pytest.raises(ValueError, match="few is 8 and many 8"):
        just_out_of_reach(counts, counts, all_verified, many=8)
