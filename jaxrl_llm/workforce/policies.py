"""The planner as a policy: whatever continues tokens can write plans."""

import functools
from collections.abc import Sequence
from typing import Protocol

import numpy as np

from jaxrl_llm.models.tokenizers import Tokenizer
from jaxrl_llm.rollouts.constrained import Grammar
from jaxrl_llm.rollouts.engines import JaxEngine
from jaxrl_llm.typing import PRNGKey
from jaxrl_llm.workforce.protocol import AnswerRequest
from jaxrl_llm.workforce.protocol import PlanRequest
from jaxrl_llm.workforce.protocol import Said
from jaxrl_llm.workforce.rows import encode_prompt


class TextPolicy(Protocol):
    """A policy seen from outside: it reads tokens and writes a text."""

    def __call__(self, prompt: Sequence[int], /) -> "str | Said":
        """The continuation without its end; a `Said` where tokens and log-probs are known."""
        ...


class GrammarPolicy(Protocol):
    """A policy that can be held by a grammar; the log-probs of a `Said` are then those of the policy that is held."""

    def __call__(self, prompt: Sequence[int], /, *, grammar: Grammar | None = None) -> "str | Said":
        """The continuation without its end."""
        ...


class EnginePolicy:
    """What an engine samples, one text at a time, each with the next random numbers.

    Args:
        engine: with a group of one; with a masker, if there are to be grammars.
        tokenizer: of its model.
        key: root of the random numbers.

    Raises:
        ValueError: the engine samples several responses to a prompt.
    """

    def __init__(self, engine: JaxEngine, tokenizer: Tokenizer, key: PRNGKey) -> None:
        if engine.settings.group_size != 1:
            raise ValueError(
                f"engine has group_size {engine.settings.group_size}; it must be 1, as a plan is one text."
            )
        self._engine, self._tokenizer, self._key, self._written = engine, tokenizer, key, 0

    def __call__(self, prompt: Sequence[int], /, *, grammar: Grammar | None = None) -> Said:
        """See `GrammarPolicy`."""
        # Few widths, so few programs.
        width = max(1 << (len(prompt) - 1).bit_length(), 16)
        tokens, mask = np.full((1, width), self._tokenizer.pad_id, np.int32), np.zeros((1, width), bool)
        tokens[0, width - len(prompt) :], mask[0, width - len(prompt) :] = prompt, True
        grammars = None if grammar is None else [grammar]
        rollout = self._engine.generate(tokens, mask, self._key, self._written, grammars=grammars)
        self._written += 1
        columns = (np.asarray(column)[0, width:] for column in (rollout.tokens, rollout.log_prob_behaviour))
        real = np.asarray(rollout.response_mask)[0, width:]
        ids, log_probs = (column[real].tolist() for column in columns)
        return Said(self._tokenizer.decode(ids), tuple(ids), tuple(log_probs))


class PolicyPlanner:
    """A planner whose plans a policy writes.

    Args:
        policy: writes plans; its prompt is the whole record of the task so far, as the row of the record has it.
        tokenizer: of the policies.
        answers: writes the final answers; None takes the result of the last step. One that is not `policy` itself is
            frozen: its answers are no choices of the planner's.
        grammar: of the plans, such as `Grammar.from_lark(plan_grammar())`; `parse_plan` then takes each plan that ends.
            None lets the policy write what it likes.
    """

    def __init__(
        self,
        policy: TextPolicy | GrammarPolicy,
        tokenizer: Tokenizer,
        *,
        answers: TextPolicy | None = None,
        grammar: Grammar | None = None,
    ) -> None:
        self._policy, self._tokenizer, self._answers = policy, tokenizer, answers
        self._held = policy if grammar is None else functools.partial(policy, grammar=grammar)

    def plan(self, requests: Sequence[PlanRequest]) -> list[Said]:
        """See `Planner.plan`."""
        return [self._said(self._held, request) for request in requests]

    def synthesise(self, requests: Sequence[AnswerRequest]) -> list[Said | None]:
        """See `Planner.synthesise`."""
        if self._answers is None:
            return [None] * len(requests)
        frozen = self._answers != self._policy  # two looks at one method of an object are equal, and not the same
        return [self._said(self._answers, request)._replace(frozen=frozen) for request in requests]

    def _said(self, policy: TextPolicy, request: PlanRequest | AnswerRequest) -> Said:
        written = policy(encode_prompt(request.turns, self._tokenizer))
        return Said(written) if isinstance(written, str) else written
