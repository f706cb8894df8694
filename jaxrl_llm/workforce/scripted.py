"""Planner and coordinator without a model: plans that are known, and workers found by the words of their cards."""

from collections.abc import Mapping
from collections.abc import Sequence

from jaxrl_llm.workforce.plans import Plan
from jaxrl_llm.workforce.plans import render_plan
from jaxrl_llm.workforce.protocol import AnswerRequest
from jaxrl_llm.workforce.protocol import AssignmentError
from jaxrl_llm.workforce.protocol import Card
from jaxrl_llm.workforce.protocol import PlanRequest
from jaxrl_llm.workforce.protocol import Said
from jaxrl_llm.workforce.search import Index


class ScriptedPlanner:
    """An oracle: the plan of each question is known, and is the same in every attempt.

    Args:
        plans: of each question.
    """

    def __init__(self, plans: Mapping[str, Plan]) -> None:
        self._plans = dict(plans)

    def plan(self, requests: Sequence[PlanRequest]) -> list[Said]:
        """See `Planner.plan`.

        Raises:
            ValueError: a question that no plan is known of.
        """
        for request in requests:
            if request.question not in self._plans:
                raise ValueError(f"no plan is known of the question {request.question!r}.")
        return [Said(render_plan(self._plans[request.question])) for request in requests]

    def synthesise(self, requests: Sequence[AnswerRequest]) -> list[None]:
        """The result of the last step."""
        return [None] * len(requests)


class WordCoordinator:
    """Gives a step to the worker that the plan names, else to the one whose name and description fit its words best.

    BM25 over the cards, of which the name counts twice; equal ones in the order of the workers.
    """

    def assign(self, question: str, plan: Plan, cards: Sequence[Card]) -> list[str]:
        """See `Coordinator.assign`.

        Raises:
            AssignmentError: a step without a word of any card.
        """
        index = Index([f"{card.name} {card.name} {card.description}" for card in cards])
        names = []
        for number in plan.numbers:
            step = plan.step(number)
            if step.worker is not None:
                names.append(step.worker)
                continue
            found = index.search(step.text, most=1)
            if not found:
                raise AssignmentError(f"step {number}, {step.text!r}, has no word of any worker's description.")
            names.append(cards[found[0]].name)
        return names
