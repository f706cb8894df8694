"""Pass rates with clustered intervals, and the curriculum."""

import math

import numpy as np
import pytest

from jaxrl_llm.environments import Curriculum
from jaxrl_llm.environments import CurriculumState
from jaxrl_llm.environments import Score
from jaxrl_llm.environments import get_task
from jaxrl_llm.environments import pass_rate


def scores(values):
    return [Score(reward=float(value), lenient=bool(value), strict=False) for value in values]


def test_one_answer_each_is_the_plain_interval():
    values = np.arange(40) % 4 == 0
    rate = pass_rate(scores(values), [str(n) for n in range(40)])
    assert (rate.answers, rate.problems, rate.lenient, rate.strict) == (40, 40, 0.25, 0.0)
    assert rate.reward == 0.25
    assert rate.lenient_half_width == pytest.approx(1.959964 * np.std(values, ddof=1) / math.sqrt(40), rel=1e-6)
    assert rate.strict_half_width == 0.0


def test_repeating_every_answer_gives_no_narrower_interval():
    values, names = [1, 0, 0, 1, 1, 0, 1, 1], [str(n) for n in range(8)]
    once = pass_rate(scores(values), names)
    five = pass_rate(scores(values * 5), names * 5)
    assert five.lenient_half_width == pytest.approx(once.lenient_half_width, rel=1e-12)
    assert five.answers == 40
    naive = pass_rate(scores(values * 5), [str(n) for n in range(40)])
    assert naive.lenient_half_width < 0.5 * once.lenient_half_width


def test_the_clustered_interval_covers(key):
    """Problems that share their luck: 95 % intervals must cover the truth nearly as often as they say."""
    rng = np.random.default_rng(0)
    names = [str(n // 4) for n in range(160)]
    covered = 0
    for _ in range(400):
        solved = np.repeat(rng.random(40) < 0.6, 4)
        rate = pass_rate(scores(solved), names)
        covered += abs(rate.lenient - 0.6) <= rate.lenient_half_width
    assert 0.90 <= covered / 400 <= 0.99


def test_one_problem_alone_says_nothing():
    assert pass_rate(scores([1, 0]), ["a", "a"]).lenient_half_width == math.inf


@pytest.mark.parametrize(("count", "names"), [(0, []), (2, ["a"])])
def test_bad_lengths_are_refused(count, names):
    with pytest.raises(ValueError, match=f"scores has {count} entries"):
        pass_rate(scores([1] * count), names)


def test_curriculum_moves_up_and_down_by_pass_rate():
    levels = tuple(get_task(name) for name in ("sort_digits", "reverse_digits"))
    curriculum = Curriculum(levels, promote_at=0.8, demote_below=0.2, window=100)
    state = CurriculumState()
    assert curriculum.task(state).name == "sort_digits"
    state = curriculum.update(state, answers=60, passed=60)
    assert state == CurriculumState(level=0, answers=60, passed=60), "no decision before the window is full"
    up = curriculum.update(state, answers=40, passed=20)
    assert up == CurriculumState(level=1), "80 of 100 moves up and starts a new count"
    assert curriculum.task(up).name == "reverse_digits"
    assert curriculum.update(state, answers=40, passed=19) == CurriculumState(level=0)
    assert curriculum.update(up, answers=100, passed=100).level == 1, "there is no level above the last"
    assert curriculum.update(up, answers=100, passed=19).level == 0
    assert curriculum.update(CurriculumState(), answers=100, passed=0).level == 0


def test_impossible_curricula_are_refused():
    level = (get_task("sort_digits"),)
    with pytest.raises(ValueError, match="levels is empty"):
        Curriculum(())
    with pytest.raises(ValueError, match="promote_at"):
        Curriculum(level, promote_at=0.2, demote_below=0.5)
    with pytest.raises(ValueError, match="window is 0"):
        Curriculum(level, window=0)
