"""/v1/completions: a text, or token ids, and what follows."""

from collections.abc import Mapping
from collections.abc import Sequence
from typing import Any

from jaxrl_llm.models.tokenizers import Tokenizer
from jaxrl_llm.serving.answers import Reporting
from jaxrl_llm.serving.answers import versions
from jaxrl_llm.serving.errors import bad
from jaxrl_llm.serving.fields import Fields
from jaxrl_llm.serving.fields import shown
from jaxrl_llm.serving.generation import Generation
from jaxrl_llm.serving.generation import Job
from jaxrl_llm.serving.generation import Piece
from jaxrl_llm.serving.generation import Token
from jaxrl_llm.serving.sampling_fields import read_sampling
from jaxrl_llm.serving.structure import response_grammar
from jaxrl_llm.serving.text_stream import TextStream
from jaxrl_llm.serving.tokens import token_name

MOST_PROMPTS = 256
"""Of one request."""
MOST_LISTED = 20
"""Log-probs at a place."""
DEFAULT_TOKENS = 16
"""Of an answer, as OpenAI's API has it."""


class CompletionForm:
    """A request of completions.

    Args:
        body: of the request.
        tokenizer: of the model.
        end_ids: tokens that end an answer.
        vocab_size: of the model.
        context: tokens of prompt and answer.

    Raises:
        APIError: a body that cannot be answered.
    """

    names = ("cmpl", "text_completion", "text_completion")

    def __init__(
        self, body: Mapping[str, Any], tokenizer: Tokenizer, *, end_ids: tuple[int, ...], vocab_size: int, context: int
    ) -> None:
        fields = Fields(body)
        fields.ignore("model")
        self.sampling = read_sampling(fields, end_ids=end_ids, vocab_size=vocab_size)
        fields.only("suffix", "")
        self.echo, self.reporting = fields.flag("echo"), Reporting(tokenizer, self.sampling)
        self.listed = None if fields.get("logprobs") is None else fields.integer("logprobs", 0, 0, MOST_LISTED)
        self.reporting.require_raw(self.listed or 0, "logprobs")
        add_special_tokens = True if fields.get("add_special_tokens") is None else fields.flag("add_special_tokens")
        prompts = _prompts(fields.get("prompt"), tokenizer, add_special_tokens)
        max_tokens = fields.integer("max_tokens", DEFAULT_TOKENS, 1, 2**31 - 1)
        grammar = response_grammar(fields)
        fields.require_all_read()
        self.generations: Sequence[Generation] = [
            self.sampling.generation(
                prompt,
                number * self.sampling.count + index,
                max_tokens=max_tokens,
                listed=self.listed or 0,
                score_prompt=self.echo and self.listed is not None,
                grammar=grammar,
            )
            for number, prompt in enumerate(prompts)
            for index in range(self.sampling.count)
        ]

    def choice(self, index: int) -> "CompletionChoice":
        """An empty choice."""
        return CompletionChoice(index, self)


class CompletionChoice:
    """One completion, as it gathers."""

    def __init__(self, index: int, form: CompletionForm) -> None:
        self._index, self._form = index, form
        self.tokens: list[Token] = []
        self._text, self._finish, self._offset, self._begun = "", None, 0, False

    def add(self, piece: Piece, job: Job) -> list[dict[str, Any]]:
        """See `answers.Choice`."""
        first, self._begun = not self._begun, True
        text = self._prompt_text(job) + piece.text if first else piece.text
        self.tokens += piece.tokens
        self._text, self._finish = self._text + text, piece.finish
        return [self._written(text, piece.tokens, job, prompt=first)] if self._form.sampling.stream else []

    def whole(self, job: Job) -> dict[str, Any]:
        """See `answers.Choice`."""
        return self._written(self._text, self.tokens, job, prompt=True)

    def _prompt_text(self, job: Job) -> str:
        return self._form.reporting.tokenizer.decode(job.asked.prompt) if self._form.echo else ""

    def _written(self, text: str, tokens: Sequence[Token], job: Job, *, prompt: bool) -> dict[str, Any]:
        written: dict[str, Any] = {"index": self._index, "text": text, "finish_reason": self._finish, "logprobs": None}
        if self._form.listed is not None:
            written["logprobs"] = self._log_probs(tokens, job if prompt and self._form.echo else None)
        if self._form.sampling.return_ids:
            written["token_ids"] = [token.id for token in tokens]
            if prompt:
                written["prompt_token_ids"] = list(job.asked.prompt)
        if self._finish is not None:
            written["weights_versions"] = versions(self.tokens)
        return written

    def _log_probs(self, tokens: Sequence[Token], echoed: Job | None) -> dict[str, list[Any]]:
        found: dict[str, list[Any]] = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}

        def write(token: int, text: str, log_prob: float | None, top: Sequence[tuple[int, float]]) -> None:
            listed = None if log_prob is None else {self._name(one): value for one, value in [*top, (token, log_prob)]}
            row = (self._name(token), log_prob, listed, self._offset)
            for values, value in zip(found.values(), row, strict=True):
                values.append(value)
            self._offset += len(text)

        if echoed is not None:
            texts = TextStream(self._form.reporting.tokenizer)
            for token, score in zip(echoed.asked.prompt, [None, *echoed.prompt_log_probs], strict=True):
                write(token, texts.feed(token), score, ())
            self._offset += len(texts.finish())
        for token in tokens:
            write(token.id, token.text, self._form.reporting.log_prob(token), token.top)
        return found

    def _name(self, token: int) -> str:
        return token_name(self._form.reporting.tokenizer, token, as_id=self._form.sampling.ids_as_tokens)


def _prompts(given: Any, tokenizer: Tokenizer, add_special_tokens: bool) -> list[tuple[int, ...]]:
    """Token ids of one or several prompts, each a text or a list of ids."""
    if given is None:
        raise bad("prompt is not given; expected a text, token ids, or a list of these.", "prompt")
    several = isinstance(given, list) and all(isinstance(one, str | list) for one in given)
    prompts = given if several else [given]
    if not 1 <= len(prompts) <= MOST_PROMPTS:
        raise bad(f"prompt has {len(prompts)} prompts; expected 1 .. {MOST_PROMPTS}.", "prompt")
    found = []
    for prompt in prompts:
        if isinstance(prompt, str):
            try:
                found.append(tuple(tokenizer.encode(prompt, add_special_tokens=add_special_tokens)))
            except UnicodeEncodeError:
                raise bad("prompt has half of a surrogate pair in it; expected Unicode.", "prompt") from None
        elif isinstance(prompt, list) and all(isinstance(one, int) and not isinstance(one, bool) for one in prompt):
            found.append(tuple(prompt))
        else:
            raise bad(f"prompt is {shown(prompt)}; expected a text or token ids.", "prompt")
    return found
