"""What a model wrote is never run: every dataset of reasoning-gym, with answers that touch files, end, hang or fill."""

import json
import os
import resource
import sys
import time
from fractions import Fraction
from pathlib import Path

import pytest
import reasoning_gym
from reasoning_gym.factory import DATASETS

from jaxrl_llm.environments import GeneratedTask
from jaxrl_llm.environments import GenerationError
from jaxrl_llm.environments import TimeLimitError
from jaxrl_llm.environments import UnsafeVerifierError
from jaxrl_llm.environments import time_limit
from jaxrl_llm.environments import verifiers
from jaxrl_llm.environments.verifiers import COMPARING
from jaxrl_llm.environments.verifiers import GUARDED
from jaxrl_llm.environments.verifiers import LONGEST_ANSWER
from jaxrl_llm.environments.verifiers import OWN
from jaxrl_llm.environments.verifiers import REFUSED

SCORED = sorted({*COMPARING, *GUARDED, *OWN})
RUNS_CODE = ("compile", "exec", "open", "os.system", "os.posix_spawn", "os.fork", "subprocess.Popen", "import")
"""Audit events of Python that a comparison of texts has no need of."""
watched: list[list[str]] = []
"""While it holds a list, the audit hook writes there what Python was asked to do."""


def _watch(event: str, arguments: tuple) -> None:
    if watched and event in RUNS_CODE:
        watched[-1].append(f"{event} {arguments!r}"[:200])


sys.addaudithook(_watch)


def payloads() -> list[str]:
    """Answers that do harm where they are evaluated; all paths are relative, to a working directory that is empty."""
    deep = 4000
    return [
        "__import__('os').system('touch X')",
        "open('X', 'w').write('x')",
        "[open('X', 'w') for _ in [0]]",
        "1 + open('X','w').write('1') # 24",
        "().__class__.__base__.__subclasses__()",
        "Symbol('x').__class__.__init__.__globals__['sys'].modules['os'].system('touch X')",
        "eval(\"open('X','w')\")",
        "exit(7)",
        "quit()",
        "raise SystemExit(7)",
        "__import__('os')._exit(7)",
        "[1 for _ in iter(int, 1)]",
        "9**9**9",
        "9**9**9**9 + 24",
        "factorial(10**9)",
        "[0] * 10**10",
        "'x' * 10**10",
        "1e999999999",
        "1e-999999999",
        "1/1e999999999",
        "-1E+999999999",
        "9" * 6000,
        "0x" + "f" * 6000,
        "R999999999",
        "R99 " * 2000,
        "A+999999999 B-999999999",
        "[" * deep + "]" * deep,
        '{"a":' * deep + "1" + "}" * deep,
        "(" * deep + "1" + ")" * deep,
        "¬" * deep + "P",
        " ∧ ".join(f"a{number}" for number in range(60)),
        " ∧ ".join("P" * number for number in range(1, 60)),
        "Move disk 99999999 from Peg 1 to Peg 99999999",
        "nan",
        "[NaN, NaN, NaN]",
        "inf+infj",
        "\x00",
        "\ud800",
        "x" * LONGEST_ANSWER * 100,
        ", " * 4000,
    ]


def problem_of(task: GeneratedTask):
    """A problem whose right answer the dataset gives, where there is one."""
    return task.train(0, 0, 1)[0]


def test_every_dataset_of_the_library_is_on_one_list():
    lists = [set(COMPARING), set(GUARDED), set(OWN), set(REFUSED)]
    assert set().union(*lists) == set(DATASETS)
    assert sum(map(len, lists)) == len(DATASETS)


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_a_dataset_whose_verifier_evaluates_answers_is_refused_by_name(name):
    with pytest.raises(UnsafeVerifierError, match=f"the dataset '{name}' .* is refused: .*never evaluated"):
        GeneratedTask("unsafe", name)


@pytest.mark.parametrize("name", SCORED)
def test_nothing_that_is_scored_runs_or_hangs(name, tmp_path, monkeypatch):
    # A generator that reads its data may be slow on a busy machine; it is the verifiers that are held to a second.
    problem = problem_of(GeneratedTask("all", name, stop="", seconds=60.0))
    task = GeneratedTask("all", name, stop="", seconds=1.0)
    task.score(problem, "x")  # what the verifier imports when it is first called
    monkeypatch.chdir(tmp_path)
    memory, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.monotonic()
    for answer in payloads():
        for text in (answer, f"7\n{answer}"):
            watched.append([])
            score = task.score(problem, text)
            events = watched.pop()
            assert not events, (text[:80], events)
            assert not score.strict, text[:80]
    assert not os.listdir(tmp_path)
    assert time.monotonic() - start < 60
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory < 200_000  # kB


@pytest.mark.parametrize("name", SCORED)
def test_right_answers_are_still_right_and_wrong_ones_wrong(name):
    task = GeneratedTask("all", name, stop="", seconds=60.0)
    problem = problem_of(task)
    if problem.metadata["entry"]["answer"] is None:
        assert not task.score(problem, "x").strict  # the dataset gives no right answer
        return
    assert task.score(problem, problem.answer).strict
    assert not task.score(problem, "no such answer").strict


@pytest.mark.parametrize("name", sorted(set(OWN) - {"game_of_life_halting"}))
def test_what_is_compared_here_is_what_the_library_calls_right(name):
    task = GeneratedTask("all", name, stop="")
    library = reasoning_gym.create_dataset(name, seed=0, size=1).score_answer
    for problem in task.train(0, 0, 5):
        entry = problem.metadata["entry"]
        changed = problem.answer[:-2] + problem.answer[-2:].swapcase()[::-1]
        for answer in (problem.answer, f" {problem.answer}", changed, "", "12", problem.answer * 2):
            expected = (
                name in ("spiral_matrix", "binary_matrix", "string_insertion") and answer.strip() == problem.answer
            )
            assert task._verified(problem, answer) == (expected or library(answer, entry) >= 1.0), answer


def test_a_probability_is_compared_as_a_number():
    """The library's verifier calls "0" right for every probability below 1, and the first digits half right."""
    task = GeneratedTask("coins", "coin_flip", stop="")
    for problem in task.train(0, 0, 5):
        if not 0.001 < float(Fraction(problem.answer)) < 0.999:
            continue
        assert task.score(problem, problem.answer).strict
        for wrong in ("0", "0.", "-0", "1", problem.answer[:3], "0/1", "1/0"):
            same = wrong != "1/0" and abs(Fraction(wrong) - Fraction(problem.answer)) <= 1e-4
            assert task._verified(problem, wrong) == same, wrong


def test_sorted_numbers_are_compared_in_order_and_size():
    task = GeneratedTask("sorted", "number_sorting")
    problem = next(p for p in task.train(0, 0, 20) if len(json.loads(p.answer.replace("'", '"'))) > 2)
    numbers = [float(number) for number in json.loads(problem.answer.replace("'", '"'))]
    assert task.score(problem, json.dumps(numbers)).strict
    assert not task.score(problem, json.dumps(numbers[::-1])).strict
    assert not task.score(problem, json.dumps([*numbers[:-1], numbers[-1] + (2 if numbers[-1] > 0 else -2)])).strict
    assert not task.score(problem, json.dumps([float("nan")] * len(numbers))).strict


def test_an_unknown_dataset_is_refused_and_so_is_another_version(monkeypatch):
    class Dataset:
        def __init__(self, seed):
            self.seed = seed

        def __getitem__(self, index):
            return {"question": f"? {self.seed}", "answer": "1", "metadata": {}}

        def score_answer(self, answer, entry):
            return float(eval(answer) == 1)

    monkeypatch.setattr(reasoning_gym, "create_dataset", lambda name, *, size, seed: Dataset(seed))
    task = GeneratedTask("new", "brand_new")
    problem = task.train(0, 0, 1)[0]
    with pytest.raises(UnsafeVerifierError, match=r"'brand_new' .* was not read"):
        task.score(problem, "1")
    monkeypatch.setitem(DATASETS, "brand_new", DATASETS["chain_sum"])
    with pytest.raises(UnsafeVerifierError, match=r"'brand_new' .* was not read"):
        GeneratedTask("new", "brand_new").train(0, 0, 1)
    monkeypatch.undo()
    task = GeneratedTask("sums", "chain_sum")
    problem = task.train(0, 0, 1)[0]
    monkeypatch.setattr(verifiers, "READ_VERSION", "0.0.1")
    with pytest.raises(UnsafeVerifierError, match=r"read in version 0\.0\.1"):
        task.score(problem, problem.answer)


class StrangeError(BaseException):
    """No Exception."""


@pytest.mark.parametrize("error", [SystemExit(7), GeneratorExit(), StrangeError(), MemoryError(), RecursionError()])
def test_a_verifier_that_ends_the_process_counts_as_wrong(error):
    def ends(answer, entry):
        raise error

    task = GeneratedTask("arithmetic", "basic_arithmetic", {"max_terms": 2, "max_digits": 1})
    problem = task.train(0, 0, 1)[0]
    task.__dict__["_verifier"] = ends
    assert task.score(problem, problem.answer).reward == 0.0


def test_ctrl_c_and_outer_time_limits_pass_a_verifier():
    def interrupted(answer, entry):
        raise KeyboardInterrupt

    def endless(answer, entry):
        while True:
            pass

    task = GeneratedTask("arithmetic", "basic_arithmetic", {"max_terms": 2, "max_digits": 1}, seconds=5.0)
    problem = task.train(0, 0, 1)[0]
    task.__dict__["_verifier"] = interrupted
    with pytest.raises(KeyboardInterrupt):
        task.score(problem, problem.answer)
    task.__dict__["_verifier"] = endless
    start = time.monotonic()
    with pytest.raises(TimeLimitError, match="the batch"), time_limit(0.1, what="the batch"):
        task.score(problem, problem.answer)
    assert time.monotonic() - start < 2


def test_a_generator_that_ends_the_process_is_given_up(monkeypatch):
    class Ends:
        def __getitem__(self, index):
            raise SystemExit(7)

    monkeypatch.setattr(reasoning_gym, "create_dataset", lambda name, **_: Ends())
    with pytest.raises(GenerationError, match="failed: 7"):
        GeneratedTask("ends", "maze").train(0, 0, 1)


def test_an_answer_that_is_too_long_is_not_looked_at():
    task = GeneratedTask("lines", "rotate_matrix", stop="")
    problem = task.train(0, 0, 1)[0]
    seen = []
    task.__dict__["_verifier"] = lambda answer, entry: seen.append(answer) or 1.0
    assert task.score(problem, "1" * (LONGEST_ANSWER + 1)).reward == 0.0
    assert not seen
    assert task.score(problem, "1" * LONGEST_ANSWER).reward == 1.0
    longest = "2" * (LONGEST_ANSWER + 1)
    assert task.score(type(problem)("?", longest, "?", problem.metadata), longest).reward == 1.0


def test_no_verifier_here_evaluates():
    source = Path(verifiers.__file__).read_text(encoding="utf-8")
    assert "eval(" not in source
    assert "exec(" not in source
