"""What all answers have: the tokens of a choice as they gather, usage, and the versions of the weights."""

import dataclasses
from collections.abc import Sequence
from typing import Any
from typing import Protocol

from jaxrl_llm.models.tokenizers import Tokenizer
from jaxrl_llm.serving.errors import bad
from jaxrl_llm.serving.generation import Generation
from jaxrl_llm.serving.generation import Job
from jaxrl_llm.serving.generation import Piece
from jaxrl_llm.serving.generation import Token
from jaxrl_llm.serving.sampling_fields import Sampling


class Choice(Protocol):
    """One of the answers of a request, as it gathers."""

    tokens: list[Token]

    def add(self, piece: Piece, job: Job) -> list[dict[str, Any]]:
        """Take a piece; the choices of the events that tell of it."""
        ...

    def whole(self, job: Job) -> dict[str, Any]:
        """The choice of an answer that is not streamed."""
        ...


class Form(Protocol):
    """A request that was read: what is to be generated, and how the answer is written."""

    @property
    def sampling(self) -> Sampling:
        """How the answers are drawn and reported."""
        ...

    @property
    def generations(self) -> Sequence[Generation]:
        """One for each choice."""
        ...

    @property
    def names(self) -> tuple[str, str, str]:
        """Beginning of the answer's id, and what an answer and an event call themselves."""
        ...

    def choice(self, index: int) -> Choice:
        """An empty choice."""
        ...


@dataclasses.dataclass(frozen=True)
class Reporting:
    """How tokens are reported.

    Attributes:
        tokenizer: of the model.
        sampling: of the request.
    """

    tokenizer: Tokenizer
    sampling: Sampling

    def log_prob(self, token: Token) -> float:
        """The one that was asked for [nats]."""
        return token.log_prob_behaviour if self.sampling.processed else token.log_prob

    def require_raw(self, listed: int, param: str) -> None:
        """Raise if other tokens are listed beside those of the drawing distribution, whose log-probs are not known."""
        if listed and self.sampling.processed:
            raise bad(f"{param} is {listed}; with logprobs_mode processed_logprobs expected 0.", param, "unsupported")


def usage(jobs: Sequence[Job], choices: Sequence[Choice], *, per_prompt: int) -> dict[str, Any]:
    """How many tokens there were; each prompt counts once."""
    prompts = sum(len(job.asked.prompt) for job in jobs[::per_prompt])
    reused = sum(job.reused or 0 for job in jobs[::per_prompt])
    drawn = sum(len(choice.tokens) for choice in choices)
    return {
        "prompt_tokens": prompts,
        "completion_tokens": drawn,
        "total_tokens": prompts + drawn,
        "prompt_tokens_details": {"cached_tokens": reused},
    }


def versions(tokens: Sequence[Token]) -> list[dict[str, int]]:
    """Which weights drew a choice: each version with the number of its first token."""
    found: list[dict[str, int]] = []
    for place, token in enumerate(tokens):
        if not found or found[-1]["version"] != token.version:
            found.append({"version": token.version, "from_token": place})
    return found
