"""Tasks of reasoning-gym: split by identity, verifiers, and generators that never end."""

import dataclasses

import pytest
import reasoning_gym

from jaxrl_llm.environments import SUM_SHOTS
from jaxrl_llm.environments import GeneratedTask
from jaxrl_llm.environments import GenerationError
from jaxrl_llm.environments import Problem
from jaxrl_llm.environments import TimeLimitError
from jaxrl_llm.environments import addition
from jaxrl_llm.environments import chain_sum
from jaxrl_llm.environments import get_task
from jaxrl_llm.environments import is_held_out
from jaxrl_llm.environments import matching_places
from jaxrl_llm.environments import replaced_keys
from jaxrl_llm.environments import signed_terms
from jaxrl_llm.environments import stable_key
from jaxrl_llm.environments import sum_identity


def answers(task, text):
    problem = task.held_out()[0]
    return task.score(problem, text.format(problem.answer))


def test_the_default_family_has_enough_distinct_problems():
    task = get_task("sums_to_49")
    problems = [problem for step in range(60) for problem in task.train(0, step, 16)]
    distinct = {problem.identity for problem in problems}
    held_out = {problem.identity for problem in task.held_out()}
    assert len(distinct | held_out) >= 300
    assert len(held_out) >= 100
    assert distinct.isdisjoint(held_out)
    assert not any(is_held_out(identity) for identity in distinct)


def test_sums_are_what_they_say_and_closed_under_commutation():
    task = get_task("sums_to_49")
    for problem in task.held_out() + task.train(3, 5, 32):
        *shots, last = problem.prompt.split("\n")
        assert shots == ["3 + 5 = 8", "14 + 8 = 22"]
        left, right = signed_terms(last.removesuffix(" = "))
        assert 0 <= left <= 49
        assert 0 <= right <= 49
        assert int(problem.answer) == left + right
        assert problem.identity == sum_identity(f"{right} + {left}")
        assert not problem.metadata["replaced_keys"]


def test_wording_is_in_the_prompt_and_not_in_the_identity():
    plain, worded = (addition("sums", largest=99, shots=SUM_SHOTS, wording=words) for words in ("", "Sum: "))
    for short, long in zip(plain.train(1, 2, 8), worded.train(1, 2, 8), strict=True):
        assert "".join(f"Sum: {line}\n" for line in short.prompt.split("\n"))[:-1] == long.prompt
        assert (short.identity, short.answer) == (long.identity, long.answer)


def test_identity_of_sums():
    assert sum_identity("12 + 3") == sum_identity("3 + 12")
    assert sum_identity("12 - 3") != sum_identity("3 - 12")
    assert sum_identity("1 + 2 - 3") == sum_identity("2 - 3 + 1")
    assert sum_identity("1 + 23") != sum_identity("12 + 3")
    assert signed_terms("7 - 3 + 12") == (7, -3, 12)
    for broken in ("7 -", "7 * 3", "7 - - 3"):
        with pytest.raises(ValueError, match="expression is"):
            signed_terms(broken)


def test_operand_bounds_hold_and_both_ends_occur():
    task = addition("small", smallest=8, largest=10, held_out_count=50)
    values = {value for p in task.train(0, 0, 64) + task.held_out() for value in signed_terms(p.prompt[: -len(" = ")])}
    assert values == {8, 9, 10}
    with pytest.raises(ValueError, match="smallest is 5 and largest is 5"):
        addition("none", smallest=5, largest=5)


def test_a_held_out_worked_example_is_refused():
    held_out = next(f"{n} + 30" for n in range(50) if is_held_out(sum_identity(f"{n} + 30")))
    with pytest.raises(ValueError, match="held-out problem"):
        addition("leak", largest=49, shots=(*SUM_SHOTS, held_out))


def test_lenient_and_strict_scores():
    task = get_task("sums_to_49")
    assert answers(task, "{}").strict
    assert answers(task, " {}\n17 + 4 = 21").strict, "what follows the stop is not scored"
    wordy = answers(task, "that makes {}")
    assert wordy.lenient
    assert not wordy.strict
    assert wordy.reward == 0.5
    assert answers(dataclasses.replace(task, wordy_reward=1.0), "that makes {}").reward == 1.0
    for wrong in ("{}1", "", "I do not know", "{} or 5000"):
        score = answers(task, wrong)
        assert not score.lenient
        assert not score.strict
        assert score.reward < 1.0
    assert answers(task, "").reward == 0.0


def test_digits_joined_by_underscores_are_not_a_strict_answer():
    """Python's Decimal, which the verifier uses, would read them."""
    task = get_task("sums_to_49")
    problem = next(p for p in task.held_out() if len(p.answer) == 2)
    assert not task.score(problem, "_".join(problem.answer)).strict


def test_an_answer_of_several_lines_is_verified_as_a_whole():
    task = GeneratedTask("lines", "rotate_matrix", {"min_n": 2, "max_n": 3}, stop="")
    problem = next(p for p in task.train(0, 0, 8) if "\n" in p.answer)
    assert task.score(problem, problem.answer).strict
    assert task.score(problem, problem.answer).lenient
    assert not task.score(problem, problem.answer.split("\n")[-1]).lenient


@pytest.mark.parametrize(
    ("given", "wanted", "fraction"),
    [("42", "42", 1.0), ("52", "42", 0.5), ("43", "42", 0.5), ("5", "42", 0.0), ("2", "42", 0.5), ("142", "42", 2 / 3)],
)
def test_place_credit_shapes_the_reward_of_wrong_sums_only(given, wanted, fraction):
    assert matching_places(given, wanted) == pytest.approx(fraction)
    assert matching_places(wanted, given) == pytest.approx(fraction)
    plain, shaped = (addition("sums", largest=49, place_credit=credit) for credit in (0.0, 0.5))
    problem = next(p for step in range(50) for p in plain.train(0, step, 16) if p.answer == wanted)
    right = given == wanted
    for task, credit in ((plain, 0.0), (shaped, 0.5)):
        score = task.score(problem, given)
        assert score.lenient == score.strict == right
        assert score.reward == pytest.approx(1.0 if right else credit * fraction)


def test_impossible_place_credit_is_refused():
    assert matching_places("", "") == 0.0
    with pytest.raises(ValueError, match="place_credit is 1"):
        GeneratedTask("sums", "chain_sum", place_credit=1.0)
    with pytest.raises(ValueError, match=r"wordy_reward is 1\.5"):
        GeneratedTask("sums", "chain_sum", wordy_reward=1.5)


def test_negative_answers_need_their_sign():
    task = chain_sum("differences", digits=(1, 1))
    problem = next(p for step in range(20) for p in task.train(0, step, 16) if p.answer == "-4")
    assert task.score(problem, "-4").strict
    assert task.score(problem, "so = -4").lenient
    assert not task.score(problem, "4").lenient


def test_a_verifier_that_raises_or_never_ends_counts_as_wrong():
    task = GeneratedTask("arithmetic", "basic_arithmetic", {"max_terms": 2, "max_digits": 1}, seconds=0.1)
    problem = task.held_out()[0]

    def endless(answer, entry):
        while True:
            pass

    def broken(answer, entry):
        raise RecursionError

    assert task.score(problem, problem.answer).strict
    for verifier in (endless, broken):
        task.__dict__["_verifier"] = verifier
        assert task.score(problem, problem.answer).reward == 0.0


class SometimesEndless:
    """A generator in the shape of reasoning-gym's that loops forever for one key in four."""

    def __init__(self, seed):
        self.seed = seed

    def __getitem__(self, index):
        while self.seed % 4 == 0:
            pass
        return {"question": f"What is {self.seed}?", "answer": str(self.seed), "metadata": {}}


@pytest.fixture
def sometimes_endless(monkeypatch):
    monkeypatch.setattr(reasoning_gym, "create_dataset", lambda name, *, size, seed: SometimesEndless(seed))
    return GeneratedTask("sometimes_endless", "sometimes_endless", seconds=0.02, held_out_count=4)


def test_a_key_that_times_out_is_replaced_and_reported(sometimes_endless):
    problems = sometimes_endless.train(0, 0, 12)
    assert problems == sometimes_endless.train(0, 0, 12)
    log = replaced_keys(problems)
    assert log, "one key in four times out"
    for line in log:
        used = problems[line["index"]].metadata["key"]
        assert line["replaced_by"] == used
        assert line["key"] % 4 == 0
        attempts = [stable_key("train", 0, 0, line["index"], attempt) for attempt in range(30)]
        assert attempts.index(line["key"]) < attempts.index(used), "the replacement is a later key of the same problem"
    assert all(problem.metadata["key"] % 4 for problem in problems)
    assert len(sometimes_endless.held_out()) == 4


def test_a_key_on_which_the_generator_raises_is_replaced(sometimes_endless, monkeypatch):
    class SometimesBroken(SometimesEndless):
        def __getitem__(self, index):
            if self.seed % 4 == 0:
                raise RuntimeError("no path")
            return super().__getitem__(index)

    timed_out = replaced_keys(sometimes_endless.train(0, 0, 12))
    monkeypatch.setattr(reasoning_gym, "create_dataset", lambda name, *, size, seed: SometimesBroken(seed))
    assert replaced_keys(sometimes_endless.train(0, 0, 12)) == timed_out


def test_a_generator_that_never_ends_is_given_up(monkeypatch):
    monkeypatch.setattr(reasoning_gym, "create_dataset", lambda name, *, size, seed: SometimesEndless(0))
    task = GeneratedTask("endless", "maze", {}, seconds=0.02)
    with pytest.raises(TimeLimitError, match="generator 'maze' with key"):
        task.train(0, 0, 1)


def test_a_generator_that_raises_is_given_up():
    """Mazes this small have no place for a goal, which reasoning-gym notices only while it generates."""
    task = GeneratedTask("maze", "maze", {"min_grid_size": 3, "max_grid_size": 4})
    with pytest.raises(GenerationError, match=r"generator .maze. with key .* failed"):
        task.train(0, 0, 1)


def test_settings_that_allow_nothing_are_named():
    with pytest.raises(ValueError, match="refuses 'chain_sum'"):
        GeneratedTask("bad", "chain_sum", {"min_terms": 5, "max_terms": 2}).train(0, 0, 1)
    with pytest.raises(ValueError, match="refuses 'no_such_dataset'"):
        GeneratedTask("bad", "no_such_dataset").train(0, 0, 1)
    with pytest.raises(ValueError, match="no problem to train on among"):
        GeneratedTask("none", "chain_sum", keep=lambda entry: False).train(0, 0, 1)
    with pytest.raises(ValueError, match="no held-out problem among"):
        GeneratedTask("none", "chain_sum", keep=lambda entry: False).held_out()


def test_replaced_keys_reads_tasks_that_have_none():
    assert replaced_keys([Problem("a", "b", "c")]) == []
