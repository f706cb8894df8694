"""Text tasks with verifiable answers: what a problem is, what a score is, and where tasks are found by name.

A task is any object with the five members of `Task`. One of your own, in ten lines:

    from jaxrl_llm.environments import Problem, Score, register, split, stable_key

    class Doubles:
        name, stop = "doubles", "\\n"
        def _problem(self, n): return Problem(prompt=f"twice {n} is", answer=str(2 * n), identity=f"2*{n}")
        def train(self, seed, step, count):
            pool = split(map(self._problem, range(500))).train
            return [pool[stable_key(seed, step, index) % len(pool)] for index in range(count)]
        def held_out(self): return split(map(self._problem, range(500))).held_out
        def score(self, problem, text): return Score.exact(text, problem.answer)
    register("doubles", Doubles)

Rules that every task here keeps, and that `jaxrl_llm.environments.check_task` checks for yours:
`train` is a pure function of (seed, step, count); a problem of `train` never has the identity of one of `held_out`;
`score` gives the right answer the reward 1.
"""

import difflib
from collections.abc import Callable
from collections.abc import Iterable
from collections.abc import Mapping
from collections.abc import Sequence
from dataclasses import dataclass
from dataclasses import field
from typing import Any
from typing import Protocol
from typing import runtime_checkable

from jaxrl_llm.environments.numbers import is_number as is_number
from jaxrl_llm.environments.numbers import last_number as last_number
from jaxrl_llm.environments.numbers import same_number


@dataclass(frozen=True)
class Problem:
    """One question with one verifiable answer.

    Attributes:
        prompt: the whole text that the model continues, worked examples included.
        answer: a right continuation; the verifier may accept others.
        identity: canonical form, equal for problems that differ by commutation or wording only. Splits go by it.
        metadata: what the verifier needs; `key` (what generated it) and `replaced_keys` where a generator made it.
    """

    prompt: str
    answer: str
    identity: str
    metadata: Mapping[str, Any] = field(default_factory=dict, compare=False)


@dataclass(frozen=True)
class Score:
    """What a continuation is worth.

    Attributes:
        reward: in [0, 1]; what reinforcement learning maximises.
        lenient: the last number (or, where the answer is no number, the last line) is right.
        strict: the whole continuation, without the white space around it, is right.
    """

    reward: float
    lenient: bool
    strict: bool

    @classmethod
    def exact(cls, text: str, answer: str) -> "Score":
        """The score against one known answer: reward 1 if lenient, else 0.

        Numbers are compared by value ("72.0" is 72, "1e2" is 100, "2 1/2" is 2.5) and read as far as they go ("1e5" has
        no 5 in it); `environments.numbers` says what a number is. Other answers are compared as texts. For mathematics
        beyond numbers write a `score` with a library made for it, such as math-verify; it is none of our dependencies.
        """
        answer = answer.strip()
        final, whole = final_answer(text, like=answer), text.strip()
        lenient = final == answer or same_number(final, answer)
        return cls(reward=float(lenient), lenient=lenient, strict=whole == answer or same_number(whole, answer))


@runtime_checkable
class Task(Protocol):
    """Problems to train on, other problems to measure on, and a verifier.

    `stop` is the text that ends a continuation: generation may end there, and it is not part of the scored text.
    """

    @property
    def name(self) -> str:
        """What `get_task` finds it by."""
        ...

    @property
    def stop(self) -> str:
        """The text that ends an answer, a newline for most; the empty text where only the end token does."""
        ...

    def train(self, seed: int, step: int, count: int) -> list[Problem]:
        """`count` problems of training step `step`; the same for the same arguments, on every machine."""
        ...

    def held_out(self) -> list[Problem]:
        """The problems that are never trained on, one for each identity, always the same ones in the same order."""
        ...

    def score(self, problem: Problem, text: str) -> Score:
        """The score of the continuation `text` of `problem.prompt`."""
        ...


def final_answer(text: str, *, like: str) -> str:
    """The part of `text` that lenient scoring looks at: its last number if `like` is a number, else its last line."""
    if is_number(like):
        return last_number(text) or ""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else ""


def before_stop(text: str, stop: str) -> str:
    """`text` up to the first `stop`; all of it where `stop` is empty or does not occur."""
    return text.split(stop, 1)[0] if stop else text


def replaced_keys(problems: Iterable[Problem]) -> list[dict[str, int]]:
    """Which generator keys timed out or failed and were replaced, for the log of the training loop.

    Returns:
        One {"index": place in the batch, "key": the key given up, "replaced_by": the key used} per key given up.
    """
    return [
        {"index": index, "key": key, "replaced_by": problem.metadata["key"]}
        for index, problem in enumerate(problems)
        for key in problem.metadata.get("replaced_keys", ())
    ]


_FACTORIES: dict[str, Callable[[], Task]] = {}


def register(name: str, factory: Callable[[], Task]) -> None:
    """Make `get_task(name)` return `factory()`.

    Raises:
        ValueError: the name is taken by another factory, or empty.
    """
    if not name:
        raise ValueError("name is empty; a task must have a name.")
    if _FACTORIES.get(name, factory) is not factory:
        raise ValueError(f"name is {name!r}, which another task has; it must be a new name.")
    _FACTORIES[name] = factory


def task_names() -> tuple[str, ...]:
    """The names that `get_task` knows, sorted."""
    return tuple(sorted(_FACTORIES))


def get_task(name: str) -> Task:
    """The task registered under `name`.

    Raises:
        KeyError: no task has that name; the message gives the nearest one.
    """
    if name in _FACTORIES:
        return _FACTORIES[name]()
    near = difflib.get_close_matches(name, _FACTORIES, n=1, cutoff=0.0)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    raise UnknownTaskError(f"name is {name!r}, but no task has that name.{hint} Known: {', '.join(task_names())}.")


class UnknownTaskError(KeyError):
    """A KeyError that prints its sentence as it is."""

    def __str__(self) -> str:
        return str(self.args[0])


def check_task(task: Task, *, seeds: Sequence[int] = (0, 1), steps: int = 3, count: int = 16) -> None:
    """Check the rules of a task on a sample of its problems; use it in the test of your own task.

    Raises:
        ValueError: a rule is broken; the sentence says which and by which problem.
    """
    held_out = task.held_out()
    identities = {problem.identity for problem in held_out}
    if len(identities) < len(held_out):
        raise ValueError(f"{task.name}: held_out() gives {len(held_out)} problems with {len(identities)} identities.")
    if [problem.prompt for problem in task.held_out()] != [problem.prompt for problem in held_out]:
        raise ValueError(f"{task.name}: held_out() gave other problems the second time.")
    problems = list(held_out)
    for seed in seeds:
        for step in range(steps):
            batch = task.train(seed, step, count)
            if len(batch) != count:
                raise ValueError(f"{task.name}: train(..., count={count}) gave {len(batch)} problems.")
            if batch != task.train(seed, step, count):
                raise ValueError(f"{task.name}: train({seed}, {step}, {count}) gave other problems the second time.")
            problems += batch
            leaked = [problem for problem in batch if problem.identity in identities]
            if leaked:
                raise ValueError(f"{task.name}: train gives {leaked[0].prompt!r}, whose identity is held out.")
    for problem in problems:
        score = task.score(problem, problem.answer)
        if not (score.lenient and score.strict and score.reward == 1.0):
            raise ValueError(f"{task.name}: the answer {problem.answer!r} to {problem.prompt!r} scores {score}.")
