"""Any server with OpenAI's completions as the engine: vLLM, SGLang, llama.cpp's server.

Asked for and needed: prompts as token ids, a log-prob for every sampled token, and the ids of the sampled tokens,
which OpenAI's protocol itself does not have. They are read from `token_ids` (vLLM, and SGLang in versions that know the
field `return_token_ids`), from tokens written "token_id:7" (vLLM), or from beside each log-prob (llama.cpp). A server
that sends log-probs without ids is an EngineError at its first answer. A text is never tokenised again: the ids would
differ from the sampled ones. The tests run llama.cpp's server only. The server is not trusted: `transport` bounds what
it can take, `answers` what it can say, and redirects are not followed.
"""

import datetime
import email.utils
import http
import json
import math
import time
from collections.abc import Callable
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from typing import Literal
from typing import TypeVar

import numpy as np

from jaxrl_llm.models.tokenizers import Tokenizer
from jaxrl_llm.models.transformer import Transformer
from jaxrl_llm.redaction import quoted
from jaxrl_llm.redaction import redact
from jaxrl_llm.rollouts.engines import answers
from jaxrl_llm.rollouts.engines import rows
from jaxrl_llm.rollouts.engines.answers import MalformedError
from jaxrl_llm.rollouts.engines.answers import sampled_tokens
from jaxrl_llm.rollouts.engines.kept import Job
from jaxrl_llm.rollouts.engines.kept import KeptRollouts
from jaxrl_llm.rollouts.engines.kept import jobs_of
from jaxrl_llm.rollouts.engines.protocol import EngineError
from jaxrl_llm.rollouts.engines.protocol import EngineSettings
from jaxrl_llm.rollouts.engines.protocol import Stoppable
from jaxrl_llm.rollouts.engines.rows import Response
from jaxrl_llm.rollouts.engines.transport import Answer
from jaxrl_llm.rollouts.engines.transport import APIConnectionError
from jaxrl_llm.rollouts.engines.transport import Limits
from jaxrl_llm.rollouts.engines.transport import OversizedAnswerError
from jaxrl_llm.rollouts.engines.transport import Server
from jaxrl_llm.rollouts.engines.transport import refusal
from jaxrl_llm.rollouts.engines.vocabulary import PROBE
from jaxrl_llm.rollouts.engines.vocabulary import require_same_pieces
from jaxrl_llm.rollouts.responses import Rollout
from jaxrl_llm.typing import Bool
from jaxrl_llm.typing import Float
from jaxrl_llm.typing import Int
from jaxrl_llm.typing import PRNGKey

LONGEST_WAIT = 8.0
"""Between two attempts [seconds]."""
LONGEST_RETRY_AFTER = 60.0
"""What a server asks for between two attempts is granted up to this [seconds]."""
BUSY = (http.HTTPStatus.REQUEST_TIMEOUT, http.HTTPStatus.TOO_EARLY, http.HTTPStatus.TOO_MANY_REQUESTS)
"""Statuses below 500 that another attempt may mend."""

UNTRUNCATED = {"top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0, "samplers": ["temperature"]}
"""What switches the servers' default truncations off: each server reads the names it knows. SGLang refuses a top_k of
0."""

WITH_IDS = {"return_token_ids": True, "return_tokens_as_token_ids": True, "return_tokens": True, "verbose": True}
"""What makes vLLM (the first two), SGLang (the first) and llama.cpp (the others) say which tokens they sampled."""

Item, Made = TypeVar("Item"), TypeVar("Made")


class BusyError(Exception):
    """A server refused a request for now.

    Attributes:
        wait: what it asks to wait [seconds].
    """

    def __init__(self, sentence: str, wait: float) -> None:
        self.wait = wait
        super().__init__(sentence)


class OpenAIEngine(Stoppable):
    """A server of completions, asked for one rollout per request.

    Args:
        base_url: with /v1 at its end; http or https. A user and a password in it become basic authentication, and are
            in no sentence.
        model: the name under which the server knows the model.
        settings: of the responses; temperature 1 without truncation, because servers report log-probs before both.
        vocab_size: tokens of the model.
        tokenizer: of the trainer, to be compared with the server's on a probe text (its /tokenize); None to go without.
        scoring: how `score` asks: "echo" (vLLM, SGLang) has the log-probs of a whole prompt sent back; "forced"
            (llama.cpp, which has no echo) forces one token per request by a logit bias.
        reload: makes the server take new weights; None where that is not done from here.
        api_key: some servers want one; it goes with every request, and nowhere else.
        timeout: of one attempt, from the connection to the answer's last byte [seconds].
        attempts: at most so many per request.
        backoff: wait before the second attempt [seconds]; it doubles, up to 8. A server's Retry-After is waited for
            where it is longer, up to a minute.
        parallel: requests at a time.

    Raises:
        ValueError: settings or an address that cannot be, or another tokenizer.
        EngineError: the server cannot be asked for its tokenizer.
    """

    def __init__(
        self,
        base_url: str,
        model: str,
        settings: EngineSettings,
        *,
        vocab_size: int,
        tokenizer: Tokenizer | None,
        scoring: Literal["echo", "forced"] = "echo",
        reload: Callable[[Transformer], None] | None = None,
        api_key: str = "none",
        timeout: float = 120.0,
        attempts: int = 5,
        backoff: float = 0.5,
        parallel: int = 8,
    ) -> None:
        for name, value in (("attempts", attempts), ("parallel", parallel)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if scoring not in ("echo", "forced"):
            raise ValueError(f"scoring is {scoring!r}; expected 'echo' or 'forced'.")
        sampling = settings.sampling
        if sampling.temperature != 1 or sampling.truncated:
            raise ValueError(
                f"sampling is {sampling}; a completions server reports log-probs before temperature and truncation, so "
                "that those of the sampler are known at temperature 1 without top_k, top_p and min_p only."
            )
        self.settings, self.model, self.vocab_size = settings, model, vocab_size
        self._server = Server(base_url.rstrip("/"), api_key=api_key)
        self._url, self._scoring, self._reload, self._timeout = self._server.name, scoring, reload, timeout
        self._attempts, self._backoff, self._parallel = attempts, backoff, parallel
        self._kept = KeptRollouts()
        if tokenizer is not None:
            require_same_pieces(tokenizer, self._tokenized(PROBE), engine=self._url)

    def generate(
        self,
        prompt_tokens: Int[np.ndarray, "N P"],
        prompt_mask: Bool[np.ndarray, "N P"],
        key: PRNGKey,
        step: int = 0,
        prompt_index: Int[np.ndarray, " N"] | None = None,
    ) -> Rollout:
        """See `Engine.generate`. Complete rollouts of a batch that failed are kept until weights are pushed: the next
        call with the same arguments asks for the missing ones only.

        Raises:
            ValueError: the prompts do not fit.
            IncompleteRolloutsError: some could not be had within the attempts.
        """
        prompts = rows.prompts_of(prompt_tokens, prompt_mask, vocab_size=self.vocab_size)
        jobs = jobs_of(prompts, key, step, prompt_index, self.settings)
        responses = self._kept.sampled(jobs, lambda job: self._request(lambda: self._sample(job)), self._in_parallel)
        return rows.rollout_of(prompt_tokens, prompt_mask, responses, self.settings)

    def score(
        self, tokens: Int[np.ndarray, "B T"], token_mask: Bool[np.ndarray, "B T"], *, response_width: int
    ) -> Float[np.ndarray, "B R"]:
        """See `Engine.score`."""
        texts = rows.texts_of(tokens, token_mask, response_width, vocab_size=self.vocab_size)
        how = self._echoed if self._scoring == "echo" else self._forced
        return rows.padded(self._in_parallel(lambda text: how(*text), texts), response_width)

    def push_weights(self, model: Transformer) -> None:
        """See `Engine.push_weights`.

        Raises:
            ValueError: this engine was given no way to reload its server.
        """
        if self._reload is None:
            raise ValueError(f"the weights of {self._url} cannot be changed from here; give the engine a `reload`.")
        self._reload(model)
        self._kept.clear()  # sampled with the weights before

    def stop(self) -> None:
        """See `Engine.stop`; the server goes on, and no connection is kept between requests."""

    def _in_parallel(self, job: Callable[[Item], Made], items: Sequence[Item]) -> list[Made]:
        with ThreadPoolExecutor(self._parallel) as pool:
            return list(pool.map(job, items))

    def _request(self, ask: Callable[[], Made]) -> Made:
        """What `ask` returns, after as many attempts as are allowed."""
        wait = self._backoff
        for attempt in range(1, self._attempts + 1):
            try:
                return ask()
            except (BusyError, APIConnectionError, MalformedError) as error:
                if attempt == self._attempts:
                    raise self._error(
                        f"gave no usable answer in {attempt} attempts of up to {self._timeout:g} s; the last one: "
                        f"{type(error).__name__}: {error}"
                    ) from None  # what a server wrote is quoted once, without secrets
                time.sleep(max(wait, error.wait if isinstance(error, BusyError) else 0.0))
                wait = min(2 * wait, LONGEST_WAIT)
            except OversizedAnswerError as error:
                raise self._error(f"gave no usable answer: {error}") from None
        raise AssertionError("the loop returns or raises")

    def _error(self, sentence: str) -> EngineError:
        return EngineError(redact(f"{self._url} {sentence}", self._server.secrets))

    def _complete(self, prompt: Sequence[int], *, max_tokens: int, logprobs: int, **fields: Any) -> dict[str, Any]:
        body = {
            "model": self.model,
            "prompt": [int(token) for token in prompt],
            "temperature": 1.0,
            "top_p": 1.0,
            "max_tokens": max_tokens,
            "logprobs": logprobs,
            # Servers that know the field end there; the others' responses are cut at the first of these.
            "stop_token_ids": [int(token) for token in self.settings.eos_ids],
            **UNTRUNCATED,
            **WITH_IDS,
            **fields,
        }
        size = answers.size_limit(len(prompt) + max_tokens, listed=max_tokens * logprobs)
        path = f"{self._server.path}/completions"
        answer = self._server.post(path, json.dumps(body).encode(), Limits(self._timeout, size)).answer()
        if answer.status != http.HTTPStatus.OK:
            sentence = refusal(answer, self._server.secrets)
            if answer.status in BUSY or answer.status >= http.HTTPStatus.INTERNAL_SERVER_ERROR:
                raise BusyError(sentence, retry_after(answer))
            raise self._error(f"refused a request: {sentence}")
        return answers.parsed(answer.body)

    def _sample(self, job: Job) -> Response:
        width = self.settings.max_new_tokens
        answer = self._complete(job.prompt, max_tokens=width, seed=job.seed, logprobs=1)
        tokens, log_probs = sampled_tokens(answer, server=self._url, vocab_size=self.vocab_size)
        reason = answers.choice_of(answer).get("finish_reason")
        sampled = answers.ended(tokens, log_probs, ends=self.settings.eos_ids, width=width, reason=reason)
        if len(log_probs) == len(tokens):
            return Response(*sampled)
        if self._scoring != "forced":
            raise self._error(f"gave log-probs of {len(log_probs)} of {len(tokens)} sampled tokens.")
        return Response(sampled.tokens, self._forced(list(job.prompt), sampled.tokens))

    def _echoed(self, prompt: list[int], response: list[int]) -> list[float]:
        return self._request(lambda: self._echo(prompt, response))

    def _echo(self, prompt: list[int], response: list[int]) -> list[float]:
        text = [*prompt, *response]
        answer = self._complete(text, max_tokens=1, logprobs=1, echo=True)
        # All but the first, which has no context, are checked.
        found = answers.echoed_log_probs(answer, text, start=1)
        if found is None:
            raise self._error("did not echo the log-probs of the prompt; score with scoring='forced'.")
        return found[len(prompt) - 1 :]

    def _forced(self, prompt: list[int], response: list[int]) -> list[float]:
        return [self._forced_token([*prompt, *response[:place]], token) for place, token in enumerate(response)]

    def _forced_token(self, before: list[int], token: int) -> float:
        def ask() -> tuple[list[int], list[float]]:
            answer = self._forcing(before, token, log_probs=1)
            return sampled_tokens(answer, server=self._url, vocab_size=self.vocab_size)

        tokens, log_probs = self._request(ask)
        if tokens != [token] or len(log_probs) > 1:
            raise self._error(f"answered with the tokens {tokens[:9]} where a logit bias forced {token}.")
        return log_probs[0] if log_probs else self._request(lambda: self._listed(before, token))

    def _listed(self, before: list[int], token: int) -> float:
        """From the list of all tokens: llama.cpp leaves out a sampled token that ends inside a character."""
        answer = self._forcing(before, self.settings.eos_ids[0], log_probs=self.vocab_size)
        found = answers.listed_log_prob(answer, token)
        if found is None:
            raise self._error(f"gives no log-prob of token {token}.")
        return found

    def _forcing(self, before: list[int], token: int, *, log_probs: int) -> dict[str, Any]:
        return self._complete(before, max_tokens=1, logprobs=log_probs, logit_bias={str(token): 100})

    def _tokenized(self, text: str) -> list[int]:
        """By /tokenize, which vLLM and llama.cpp have under the same name with other fields."""
        path = f"{self._server.path.removesuffix('/v1')}/tokenize"
        body = {"content": text, "prompt": text, "model": self.model, "add_special_tokens": False}
        limits = Limits(self._timeout, answers.size_limit(len(text.encode())))
        address = f"{self._url.removesuffix('/v1')}/tokenize"
        try:
            answer = self._server.post(path, json.dumps(body).encode(), limits).answer()
            if answer.status == http.HTTPStatus.OK:
                return answers.tokenized(answer.body)
        except (APIConnectionError, OversizedAnswerError, MalformedError) as error:
            why = quoted(str(error), self._server.secrets)
            raise EngineError(
                f"{address} does not say how the server cuts texts into tokens ({why}); is the server "
                "up? Pass tokenizer=None to go without the comparison."
            ) from None
        guarded = answer.status in (http.HTTPStatus.UNAUTHORIZED, http.HTTPStatus.FORBIDDEN)
        said = refusal(answer, self._server.secrets).removeprefix(f"HTTP status {answer.status}: ")
        raise EngineError(
            f"{address} answered with the HTTP status {answer.status} ({said})"
            f"{'; is it the api_key that the server wants?' if guarded else '.'} Pass tokenizer=None to go without the "
            "comparison of tokenizers."
        )


def retry_after(answer: Answer) -> float:
    """What a server asks to wait before the next attempt [seconds], in 0 .. 60; 0 where it does not say.

    Its header Retry-After has a number of seconds or a date.
    """
    text = answer.headers.get("retry-after", "").strip()
    try:
        seconds = float(text)
    except ValueError:
        seconds = _seconds_until(text)
    return min(max(seconds, 0.0), LONGEST_RETRY_AFTER) if not math.isnan(seconds) else 0.0


def _seconds_until(date: str) -> float:
    try:
        moment = email.utils.parsedate_to_datetime(date)
    except (TypeError, ValueError, IndexError, OverflowError):
        return 0.0
    moment = moment if moment.tzinfo else moment.replace(tzinfo=datetime.UTC)
    return (moment - datetime.datetime.now(datetime.UTC)).total_seconds()
