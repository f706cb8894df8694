"""The task interface: registry, scoring of final answers, splits, and the rules that every task keeps."""

import dataclasses
import hashlib

import pytest

from jaxrl_llm.environments import LEVELS
from jaxrl_llm.environments import TASKS
from jaxrl_llm.environments import Problem
from jaxrl_llm.environments import Score
from jaxrl_llm.environments import Task
from jaxrl_llm.environments import before_stop
from jaxrl_llm.environments import check_task
from jaxrl_llm.environments import final_answer
from jaxrl_llm.environments import get_task
from jaxrl_llm.environments import is_held_out
from jaxrl_llm.environments import last_number
from jaxrl_llm.environments import register
from jaxrl_llm.environments import split
from jaxrl_llm.environments import stable_key
from jaxrl_llm.environments import task_names


class Doubles:
    """The ten-line task of the module docstring."""

    name, stop = "doubles", "\n"

    def _problem(self, n):
        return Problem(prompt=f"twice {n} is", answer=str(2 * n), identity=f"2*{n}")

    def train(self, seed, step, count):
        pool = split(map(self._problem, range(500))).train
        return [pool[stable_key(seed, step, index) % len(pool)] for index in range(count)]

    def held_out(self):
        return split(map(self._problem, range(500))).held_out

    def score(self, problem, text):
        return Score.exact(text, problem.answer)


class Leaky(Doubles):
    def train(self, seed, step, count):
        return self.held_out()[:count]


class Forgetful(Doubles):
    def __init__(self):
        self.calls = 0

    def train(self, seed, step, count):
        self.calls += 1
        return super().train(seed, step + self.calls, count)


class Harsh(Doubles):
    def score(self, problem, text):
        return Score(reward=0.5, lenient=True, strict=True)


class Repeating(Doubles):
    def held_out(self):
        return super().held_out() * 2


@pytest.mark.parametrize("name", sorted(TASKS))
def test_every_task_of_the_project_keeps_the_rules(name):
    task = get_task(name)
    assert isinstance(task, Task)
    assert task.name == name
    check_task(task, seeds=(0, 1), steps=2, count=8)
    first = task.train(0, 0, 8)
    assert [p.prompt for p in first] != [p.prompt for p in task.train(1, 0, 8)], "the seed must matter"
    assert [p.prompt for p in first] != [p.prompt for p in task.train(0, 1, 8)], "the step must matter"
    assert [p.prompt for p in first[:4]] == [p.prompt for p in task.train(0, 0, 4)], "a prefix of a larger batch"


def test_a_task_in_ten_lines_registers_and_keeps_the_rules():
    register("doubles", Doubles)
    register("doubles", Doubles)
    check_task(get_task("doubles"))
    with pytest.raises(ValueError, match="another task has"):
        register("doubles", Leaky)
    with pytest.raises(ValueError, match="name is empty"):
        register("", Doubles)


@pytest.mark.parametrize(
    ("task", "sentence"),
    [
        (Leaky(), "identity is held out"),
        (Forgetful(), "gave other problems the second time"),
        (Harsh(), "scores Score"),
        (Repeating(), "identities"),
    ],
)
def test_check_task_sees_a_broken_rule(task, sentence):
    with pytest.raises(ValueError, match=sentence):
        check_task(task)


def test_an_unknown_task_names_the_nearest_one():
    with pytest.raises(KeyError) as caught:
        get_task("sum_to_49")
    assert "'sum_to_49'" in str(caught.value)
    assert "Did you mean 'sums_to_49'?" in str(caught.value)
    assert "sort_digits" in str(caught.value)


def test_levels_are_names_of_tasks():
    assert set(LEVELS) <= set(task_names())


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("42", "42"),
        (" 31", "31"),
        ("The answer is: 1 + 28 = 29.", "29"),
        ("12 apples, 7 pears", "7"),
        ("1,234 in all", "1234"),
        ("3, 4, 15", "15"),
        ("= -3", "-3"),
        ("7-3", "3"),
        ("7 - 3", "3"),
        ("(2 + 1) - 3", "3"),
        ("about 2.50", "2.50"),
        ("none", None),
        ("", None),
    ],
)
def test_last_number(text, number):
    assert last_number(text) == number


def test_final_answer_is_the_last_line_where_the_answer_is_no_number():
    assert final_answer("Let me see.\n  yes \n\n", like="no") == "yes"
    assert final_answer("first 3\nthen 12", like="7") == "12"
    assert final_answer("nothing", like="7") == ""
    assert final_answer(" \n", like="no") == ""


def test_before_stop():
    assert before_stop("42\n3 + 4", "\n") == "42"
    assert before_stop("42", "\n") == "42"
    assert before_stop("4 2", "") == "4 2"


def test_exact_score_is_lenient_about_words_and_strict_about_the_whole():
    assert Score.exact("It is 12", "12") == Score(1.0, True, False)
    assert Score.exact(" 12 ", "12") == Score(1.0, True, True)
    assert Score.exact("12 or 13", "12") == Score(0.0, False, False)


def test_split_is_a_fixed_third_by_identity():
    problems = [Problem(f"{word} {n}", str(n), f"id {n}") for n in range(3000) for word in ("say", "write")]
    train, held_out = split(problems)
    assert {p.identity for p in train}.isdisjoint({p.identity for p in held_out})
    assert len({p.identity for p in held_out}) == len(held_out), "one problem for each identity"
    assert 0.30 < len(held_out) / 3000 < 0.37
    assert len(train) == 2 * (3000 - len(held_out)), "both wordings stay on one side"
    assert split(reversed(problems)).held_out != held_out, "the representative is the first given"
    assert {p.identity for p in split(reversed(problems)).held_out} == {p.identity for p in held_out}


def test_split_and_keys_are_pinned():
    """Accuracies of different versions can be compared only while these values stay as they are."""
    assert [n for n in range(12) if is_held_out(f"sum:{n},30")] == [
        n for n in range(12) if int.from_bytes(hashlib.sha256(f"sum:{n},30".encode()).digest(), "big") % 3 == 0
    ]
    assert [n for n in range(12) if is_held_out(f"sum:{n},30")] == [1, 2, 11]
    assert stable_key("train", 0, 0, 0, 0) == 1141695473
    keys = [stable_key("a", n) for n in range(2000)]
    assert len(set(keys)) == 2000
    assert all(0 <= key < 2**31 for key in keys)
    assert max(keys) > 0.99 * 2**31
    assert stable_key(1, 23) != stable_key(12, 3)


def test_problems_compare_by_text_not_by_metadata():
    problem = Problem("1 + 1 = ", "2", "sum:1,1", {"key": 3})
    assert problem == dataclasses.replace(problem, metadata={"key": 4})
    assert problem != dataclasses.replace(problem, answer="3")
