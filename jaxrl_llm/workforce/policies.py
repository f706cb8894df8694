"""The planner as a policy: whatever continues tokens can write plans."""

from collections.abc import Sequence
from typing import Protocol

from jaxrl_llm.models.tokenizers import Tokenizer
from jaxrl_llm.workforce.protocol import AnswerRequest
from jaxrl_llm.workforce.protocol import PlanRequest
from jaxrl_llm.workforce.protocol import Said
from jaxrl_llm.workforce.rows import encode_prompt


class TextPolicy(Protocol):
    """A policy seen from outside: it reads tokens and writes a text."""

    def __call__(self, prompt: Sequence[int], /) -> "str | Said":
        """The continuation without its end; a `Said` where tokens and log-probs are known."""
        ...


class PolicyPlanner:
    """A planner whose plans a policy writes.

    Args:
        policy: writes plans; its prompt is the whole record of the task so far, as the row of the record has it.
        tokenizer: of the policies.
        answers: writes the final answers; None takes the result of the last step. One that is not `policy` itself is
            frozen: its answers are no choices of the planner's.
    """

    def __init__(self, policy: TextPolicy, tokenizer: Tokenizer, *, answers: TextPolicy | None = None) -> None:
        self._policy, self._tokenizer, self._answers = policy, tokenizer, answers

    def plan(self, requests: Sequence[PlanRequest]) -> list[Said]:
        """See `Planner.plan`."""
        return [self._said(self._policy, request) for request in requests]

    def synthesise(self, requests: Sequence[AnswerRequest]) -> list[Said | None]:
        """See `Planner.synthesise`."""
        if self._answers is None:
            return [None] * len(requests)
        frozen = self._answers != self._policy  # two looks at one method of an object are equal, and not the same
        return [self._said(self._answers, request)._replace(frozen=frozen) for request in requests]

    def _said(self, policy: TextPolicy, request: PlanRequest | AnswerRequest) -> Said:
        written = policy(encode_prompt(request.turns, self._tokenizer))
        return Said(written) if isinstance(written, str) else written
