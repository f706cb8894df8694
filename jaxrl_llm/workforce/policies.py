"""The planner as a policy: whatever continues a text can write plans."""

from collections.abc import Sequence
from typing import Protocol

from jaxrl_llm.workforce.protocol import AnswerRequest
from jaxrl_llm.workforce.protocol import PlanRequest
from jaxrl_llm.workforce.protocol import Said


class TextPolicy(Protocol):
    """A policy seen from outside: it reads a prompt and writes a text."""

    def __call__(self, prompt: str) -> "str | Said":
        """The continuation without its end; a `Said` where tokens and log-probs are known."""
        ...


class PolicyPlanner:
    """A planner whose plans a policy writes.

    Args:
        policy: writes plans; its prompt is the whole record of the task so far.
        answers: writes the final answers; None takes the result of the last step.
    """

    def __init__(self, policy: TextPolicy, *, answers: TextPolicy | None = None) -> None:
        self._policy, self._answers = policy, answers

    def plan(self, requests: Sequence[PlanRequest]) -> list[Said]:
        """See `Planner.plan`."""
        return [_said(self._policy(request.prompt)) for request in requests]

    def synthesise(self, requests: Sequence[AnswerRequest]) -> list[Said | None]:
        """See `Planner.synthesise`."""
        if self._answers is None:
            return [None] * len(requests)
        return [_said(self._answers(request.prompt)) for request in requests]


def _said(written: str | Said) -> Said:
    return Said(written) if isinstance(written, str) else written
