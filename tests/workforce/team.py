"""Planners and workers that tests script."""

import threading
from collections.abc import Callable
from collections.abc import Sequence

from jaxrl_llm.workforce import Answer
from jaxrl_llm.workforce import AnswerRequest
from jaxrl_llm.workforce import Assignment
from jaxrl_llm.workforce import Card
from jaxrl_llm.workforce import Plan
from jaxrl_llm.workforce import PlanRequest
from jaxrl_llm.workforce import Said


class Texts:
    """Writes the given texts, one per attempt of a task, the last one again and again; keeps what it was asked."""

    def __init__(self, *texts: str) -> None:
        self.texts, self.asked = texts, list[PlanRequest]()

    def plan(self, requests: Sequence[PlanRequest]) -> list[Said]:
        self.asked += requests
        attempts = [sum(turn.actor == "planner" for turn in request.turns) for request in requests]
        return [Said(self.texts[min(attempt, len(self.texts) - 1)]) for attempt in attempts]

    def synthesise(self, requests: Sequence[AnswerRequest]) -> list[None]:
        return [None] * len(requests)


class First:
    """Gives every step to the worker that the plan names, else to the first one."""

    def assign(self, question: str, plan: Plan, cards: Sequence[Card]) -> list[str]:
        return [step.worker or cards[0].name for step in plan.steps]


class Does:
    """A worker that is a function; counts how many of its calls run at the same time."""

    def __init__(self, function: Callable[[Assignment], Answer], *, name: str = "does", capacity: int = 1) -> None:
        self.card, self.function = Card(name, "does what it is told", capacity), function
        self.most, self._now, self._lock = 0, 0, threading.Lock()

    def work(self, assignment: Assignment) -> Answer:
        with self._lock:
            self._now += 1
            self.most = max(self.most, self._now)
        try:
            return self.function(assignment)
        finally:
            with self._lock:
                self._now -= 1


def echo(assignment: Assignment) -> Answer:
    """The step and the results that it was given."""
    given = ", ".join(f"{number}={text}" for number, text in assignment.results.items())
    return Answer(f"{assignment.text}({given})")
