"""A task on its way through the room, as a value: Algorithm 1 of Workforce with replanning of the whole task.

    failures = 0
    while failures <= K: plan (with what failed so far); do its steps; no failure: answer and end; else failures += 1

An attempt starts clean: neither plan nor results of the one before it, only the report of why it failed. Source: Hu et
al. 2025, arXiv 2505.23885, Algorithm 1, whose results are emptied at each attempt as in its released code.
"""

import dataclasses
import enum
from collections.abc import Mapping
from collections.abc import Sequence
from dataclasses import dataclass
from dataclasses import field

from jaxrl_llm.workforce.plans import Plan
from jaxrl_llm.workforce.protocol import COORDINATOR
from jaxrl_llm.workforce.protocol import PLANNER
from jaxrl_llm.workforce.protocol import USER
from jaxrl_llm.workforce.protocol import Answer
from jaxrl_llm.workforce.protocol import Card
from jaxrl_llm.workforce.protocol import Said
from jaxrl_llm.workforce.protocol import Turn

GRAMMAR = (
    "Write a plan, one step a line: number, dot, what to do; then ' | after: 1, 2' where a step needs earlier results, "
    "which it names #1, #2. The last step gives the answer."
)
CUE = "Plan:\n"
"""What a plan comes behind."""
ANSWER_CUE = "Answer:\n"
"""What a final answer comes behind."""


class Phase(enum.Enum):
    """What a task waits for."""

    PLANNING = "planning"
    RUNNING = "running"
    ANSWERING = "answering"
    DONE = "done"
    FAILED = "failed"


@dataclass(frozen=True)
class TaskRun:
    """One task.

    Attributes:
        question: the task.
        phase: what it waits for.
        attempt: which one it is at, from 1.
        plan: of this attempt, and its workers; None while there is none.
        assignees: who does which step.
        posted: numbers of the steps that went to the channel in this attempt.
        results: of the steps that are done in this attempt.
        failures: why each earlier attempt failed, and what failed in this one.
        turns: the record, from the first prompt on.
        answer: the final one.
    """

    question: str
    phase: Phase = Phase.PLANNING
    attempt: int = 1
    plan: Plan | None = None
    assignees: tuple[str, ...] = ()
    posted: frozenset[int] = frozenset()
    results: Mapping[int, str] = field(default_factory=dict)
    failures: tuple[tuple[str, ...], ...] = ((),)
    turns: tuple[Turn, ...] = ()
    answer: str | None = None

    @property
    def ready(self) -> tuple[int, ...]:
        """Steps that were not posted and whose predecessors are done, in order."""
        if self.plan is None or self.phase is not Phase.RUNNING:
            return ()
        return tuple(
            number
            for number in self.plan.numbers
            if number not in self.posted and all(other in self.results for other in self.plan.step(number).after)
        )


def begin(question: str, cards: Sequence[Card]) -> TaskRun:
    """A task that nobody has planned.

    Raises:
        ValueError: the question is blank.
    """
    if not question.strip():
        raise ValueError(f"a question is {question!r}; it must have text.")
    workers = "\n".join(f"- {card.name}: {card.description}" for card in cards)
    prompt = f"Question: {question}\nWorkers:\n{workers}\n{GRAMMAR}\n{CUE}"
    return TaskRun(question, turns=(Turn(USER, Said(prompt)),))


def wrote(run: TaskRun, said: Said) -> TaskRun:
    """The planner wrote something; whether it is a plan is not known yet."""
    return _with_turns(run, Turn(PLANNER, said, acted=not said.frozen))


def planned(run: TaskRun, plan: Plan, assignees: Sequence[str]) -> TaskRun:
    """It is a plan, and every step has a worker."""
    who = ", ".join(f"{number} {name}" for number, name in zip(plan.numbers, assignees, strict=True))
    run = _with_turns(run, Turn(COORDINATOR, Said(f"\nAssigned: {who}.\n")))
    return dataclasses.replace(run, phase=Phase.RUNNING, plan=plan, assignees=tuple(assignees))


def refused(run: TaskRun, sentence: str) -> TaskRun:
    """It is no plan, or nobody can do it: the attempt has failed before a step was taken."""
    run = _with_turns(run, Turn(USER, Said(f"\nRefused: {sentence}\n")))
    return _failed(dataclasses.replace(run, phase=Phase.RUNNING, plan=None, assignees=()), sentence)


def posted(run: TaskRun, number: int) -> TaskRun:
    """A step went to the channel."""
    return dataclasses.replace(run, posted=run.posted | {number})


def returned(run: TaskRun, number: int, answer: Answer) -> TaskRun:
    """A step came back, with its result or with the reason of its failure."""
    worker, text = run.assignees[number - 1], " ".join(answer.text.split())
    if answer.failed:
        run = _with_turns(run, Turn(worker, Said(f"{number}. {worker} failed: {text}\n")))
        return _failed(run, f"step {number} failed at {worker}: {text}")
    run = _with_turns(run, Turn(worker, Said(f"{number}. {worker}: {text}\n")))
    return dataclasses.replace(run, results={**run.results, number: answer.text})


def settled(run: TaskRun, *, replans: int) -> TaskRun:
    """Nothing of this attempt is being worked on: on to the answer, to the next attempt, or to the end.

    Args:
        run: the task.
        replans: K, attempts after the first one.
    """
    if run.phase is not Phase.RUNNING:
        return run
    if run.failures[-1]:
        if run.attempt > replans:
            return dataclasses.replace(run, phase=Phase.FAILED)
        notice = f"Attempt {run.attempt} failed. Write another plan.\n{CUE}"
        run = _with_turns(run, Turn(USER, Said(notice)))
        return dataclasses.replace(
            run,
            phase=Phase.PLANNING,
            attempt=run.attempt + 1,
            plan=None,
            assignees=(),
            posted=frozenset(),
            results={},
            failures=(*run.failures, ()),
        )
    if run.plan is not None and len(run.results) == len(run.plan.steps):
        return dataclasses.replace(run, phase=Phase.ANSWERING)
    return run


def asked(run: TaskRun) -> TaskRun:
    """The planner is asked for the final answer."""
    return _with_turns(run, Turn(USER, Said(ANSWER_CUE)))


def answered(run: TaskRun, said: Said | None) -> TaskRun:
    """The planner wrote the final answer; None takes the result of the last step."""
    if said is None:
        return dataclasses.replace(run, phase=Phase.DONE, answer=run.results[len(run.results)])
    run = _with_turns(run, Turn(PLANNER, said, acted=not said.frozen))
    return dataclasses.replace(run, phase=Phase.DONE, answer=said.text.strip())


def _failed(run: TaskRun, sentence: str) -> TaskRun:
    return dataclasses.replace(run, failures=(*run.failures[:-1], (*run.failures[-1], sentence)))


def _with_turns(run: TaskRun, *turns: Turn) -> TaskRun:
    return dataclasses.replace(run, turns=(*run.turns, *turns))
