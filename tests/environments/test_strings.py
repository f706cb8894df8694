"""Digit strings: transformations, the dense reward, the split."""

import pytest

from jaxrl_llm.environments import StringTask
from jaxrl_llm.environments import get_task
from jaxrl_llm.environments.strings import ascending
from jaxrl_llm.environments.strings import either_direction


@pytest.mark.parametrize(
    ("name", "answer"), [("copy_digits", str), ("sort_digits", sorted), ("reverse_digits", reversed)]
)
def test_answers(name, answer):
    task = get_task(name)
    for problem in task.held_out() + task.train(0, 0, 16):
        string = problem.prompt.removesuffix(">")
        assert problem.answer == "".join(answer(string))


def test_permutations_and_reverses_stay_on_one_side():
    sort_digits, reverse_digits = get_task("sort_digits"), get_task("reverse_digits")
    sides = {}
    for step in range(100):
        for problem in sort_digits.train(0, step, 32):
            sides["".join(sorted(problem.prompt))] = "train"
    for problem in sort_digits.held_out():
        assert "".join(sorted(problem.prompt)) not in sides
    trained = {problem.prompt[:4] for step in range(100) for problem in reverse_digits.train(0, step, 32)}
    assert trained.isdisjoint({problem.prompt[:4][::-1] for problem in reverse_digits.held_out()})
    assert len(sort_digits.held_out()) >= 100


@pytest.mark.parametrize(
    ("text", "reward"),
    [
        ("0123", 1.0),
        ("0123\n999", 1.0),
        ("0124", 0.75),
        ("3210", 0.0),
        ("012", 0.75),
        ("01234", 0.8),
        ("0", 0.25),
        ("9123", 0.75),
        ("1230", 0.0),
        ("", 0.0),
        ("01234567", 0.5),
    ],
)
def test_dense_reward(text, reward):
    task = get_task("sort_digits")
    problem = next(p for p in task._split.train + task._split.held_out if p.answer == "0123")
    score = task.score(problem, text)
    assert score.reward == reward
    assert score.strict == score.lenient == (reward == 1.0)


def test_too_few_strings_are_refused():
    with pytest.raises(ValueError, match="too few"):
        StringTask("tiny", ascending, either_direction, alphabet="0", length=2).train(0, 0, 1)
