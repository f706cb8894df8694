"""Any server with OpenAI's completions as the engine: vLLM, SGLang, llama.cpp's server.

Asked for and needed: prompts as token ids, a log-prob for every sampled token, and the ids of the sampled tokens,
which OpenAI's protocol itself does not have. They are read from `token_ids` (vLLM, and SGLang in versions that know the
field `return_token_ids`), from tokens written "token_id:7" (vLLM), or from beside each log-prob (llama.cpp). A server
that sends log-probs without ids is an EngineError at its first answer. A text is never tokenised again: the ids would
differ from the sampled ones. The tests run llama.cpp's server only.
"""

import http
import json
import math
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from collections.abc import Mapping
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from typing import Literal
from typing import TypeVar

import numpy as np

from jaxrl_llm.models.tokenizers import Tokenizer
from jaxrl_llm.models.transformer import Transformer
from jaxrl_llm.rollouts.engines import rows
from jaxrl_llm.rollouts.engines.kept import Job
from jaxrl_llm.rollouts.engines.kept import KeptRollouts
from jaxrl_llm.rollouts.engines.kept import jobs_of
from jaxrl_llm.rollouts.engines.protocol import EngineError
from jaxrl_llm.rollouts.engines.protocol import EngineSettings
from jaxrl_llm.rollouts.engines.protocol import Stoppable
from jaxrl_llm.rollouts.engines.rows import Response
from jaxrl_llm.rollouts.engines.vocabulary import PROBE
from jaxrl_llm.rollouts.engines.vocabulary import require_same_pieces
from jaxrl_llm.rollouts.generate import Rollout
from jaxrl_llm.typing import Bool
from jaxrl_llm.typing import Float
from jaxrl_llm.typing import Int
from jaxrl_llm.typing import PRNGKey

LONGEST_WAIT = 8.0
"""Between two attempts [seconds]."""

UNTRUNCATED = {"top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0, "samplers": ["temperature"]}
"""What switches the servers' default truncations off: each server reads the names it knows. SGLang refuses a top_k of
0."""

WITH_IDS = {"return_token_ids": True, "return_tokens_as_token_ids": True, "return_tokens": True, "verbose": True}
"""What makes vLLM (the first two), SGLang (the first) and llama.cpp (the others) say which tokens they sampled."""

Item, Made = TypeVar("Item"), TypeVar("Made")


class _MalformedError(Exception):
    """An answer that another attempt may mend."""


class OpenAIEngine(Stoppable):
    """A server of completions, asked for one rollout per request.

    Args:
        base_url: with /v1 at its end.
        model: the name under which the server knows the model.
        settings: of the responses; temperature 1 without truncation, because servers report log-probs before both.
        vocab_size: tokens of the model.
        tokenizer: of the trainer, to be compared with the server's on a probe text (its /tokenize); None to go without.
        scoring: how `score` asks: "echo" (vLLM, SGLang) has the log-probs of a whole prompt sent back; "forced"
            (llama.cpp, which has no echo) forces one token per request by a logit bias.
        reload: makes the server take new weights; None where that is not done from here.
        api_key: some servers want one; it goes with every request.
        timeout: of one attempt [seconds].
        attempts: at most so many per request.
        backoff: wait before the second attempt [seconds]; it doubles, up to 8.
        parallel: requests at a time.

    Raises:
        ModuleNotFoundError: openai is not installed; the sentence names the extra.
        ValueError: settings that cannot be, or another tokenizer.
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
        openai = _openai()
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
        self._url, self._scoring, self._reload, self._timeout = base_url.rstrip("/"), scoring, reload, timeout
        self._attempts, self._backoff, self._parallel = attempts, backoff, parallel
        self._kept = KeptRollouts()
        # Attempts are counted here, so that malformed answers and lost connections share one budget.
        self._client = openai.OpenAI(base_url=self._url, api_key=api_key, timeout=timeout, max_retries=0)
        lost = (openai.APIConnectionError, openai.APITimeoutError, openai.InternalServerError, openai.RateLimitError)
        self._passing = (*lost, openai.APIResponseValidationError, json.JSONDecodeError, _MalformedError)
        self._final = openai.OpenAIError
        if tokenizer is not None:
            require_same_pieces(tokenizer, self._tokenized(PROBE, api_key), engine=self._url)

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
        """See `Engine.stop`; the server goes on."""
        self._client.close()

    def _in_parallel(self, job: Callable[[Item], Made], items: Sequence[Item]) -> list[Made]:
        with ThreadPoolExecutor(self._parallel) as pool:
            return list(pool.map(job, items))

    def _request(self, ask: Callable[[], Made]) -> Made:
        """What `ask` returns, after as many attempts as are allowed."""
        wait = self._backoff
        for attempt in range(1, self._attempts + 1):
            try:
                return ask()
            except self._passing as error:
                if attempt == self._attempts:
                    raise EngineError(
                        f"{self._url} gave no usable answer in {attempt} attempts of up to {self._timeout:g} s; the "
                        f"last one: {type(error).__name__}: {error}"
                    ) from error
                time.sleep(wait)
                wait = min(2 * wait, LONGEST_WAIT)
            except self._final as error:
                raise EngineError(f"{self._url} refused a request: {error}") from error
        raise AssertionError("the loop returns or raises")

    def _complete(self, prompt: Sequence[int], **fields: Any) -> dict[str, Any]:
        extra = {**UNTRUNCATED, **WITH_IDS}
        answer = self._client.completions.create(
            model=self.model, prompt=list(prompt), temperature=1.0, top_p=1.0, extra_body=extra, **fields
        )
        content = answer.model_dump() if hasattr(answer, "model_dump") else {}
        if not content.get("choices"):
            raise _MalformedError("the answer has no choices")
        return content

    def _sample(self, job: Job) -> Response:
        answer = self._complete(job.prompt, max_tokens=self.settings.max_new_tokens, seed=job.seed, logprobs=1)
        tokens, log_probs = sampled_tokens(answer, server=self._url)
        for token in tokens:
            if not 0 <= token < self.vocab_size:
                raise _MalformedError(
                    f"it has token {token}, which is outside the vocabulary 0 .. {self.vocab_size - 1}"
                )
        end = answer["choices"][0].get("finish_reason")
        if len(tokens) != self.settings.max_new_tokens and not (tokens and tokens[-1] in self.settings.eos_ids):
            raise _MalformedError(
                f"the response is cut off after {len(tokens)} of {self.settings.max_new_tokens} tokens (finish_reason "
                f"{end!r}, last token {tokens[-1:]}, eos_ids {tuple(self.settings.eos_ids)})"
            )
        if len(log_probs) != len(tokens):
            if self._scoring != "forced":
                raise EngineError(f"{self._url} gave log-probs of {len(log_probs)} of {len(tokens)} sampled tokens.")
            log_probs = self._forced(list(job.prompt), tokens)
        return Response(tokens, log_probs)

    def _echoed(self, prompt: list[int], response: list[int]) -> list[float]:
        return self._request(lambda: self._echo([*prompt, *response]))[len(prompt) :]

    def _echo(self, text: list[int]) -> list[float]:
        """The log-prob of every token of a text; that of the first one means nothing, and may be None."""
        content = self._complete(text, max_tokens=1, logprobs=1, echo=True)["choices"][0].get("logprobs") or {}
        found = (content.get("token_logprobs") or [])[: len(text)]
        if len(found) < len(text):
            raise EngineError(f"{self._url} did not echo the log-probs of the prompt; score with scoring='forced'.")
        for sent, came in zip(text, _marked_ids(content), strict=False):
            if came not in (None, sent):
                raise _MalformedError(f"token {came} came back where {sent} was sent")
        _require_numbers(found, start=1)
        return found

    def _forced(self, prompt: list[int], response: list[int]) -> list[float]:
        return [self._forced_token([*prompt, *response[:place]], token) for place, token in enumerate(response)]

    def _forced_token(self, before: list[int], token: int) -> float:
        def ask() -> tuple[list[int], list[float]]:
            return sampled_tokens(self._forcing(before, token, log_probs=1), server=self._url)

        tokens, log_probs = self._request(ask)
        if tokens != [token]:
            raise EngineError(f"{self._url} answered with the tokens {tokens} where a logit bias forced {token}.")
        return log_probs[0] if log_probs else self._request(lambda: self._listed(before, token))

    def _listed(self, before: list[int], token: int) -> float:
        """From the list of all tokens: llama.cpp leaves out a sampled token that ends inside a character."""
        answer = self._forcing(before, self.settings.eos_ids[0], log_probs=self.vocab_size)
        entries = answer["choices"][0]["logprobs"]["content"][0]["top_logprobs"]
        found = [entry["logprob"] for entry in entries if entry["id"] == token]
        if not found:
            raise EngineError(f"{self._url} gives no log-prob of token {token}.")
        _require_numbers(found)
        return found[0]

    def _forcing(self, before: list[int], token: int, *, log_probs: int) -> dict[str, Any]:
        return self._complete(before, max_tokens=1, logprobs=log_probs, logit_bias={str(token): 100})

    def _tokenized(self, text: str, api_key: str) -> list[int]:
        """By /tokenize, which vLLM and llama.cpp have under the same name with other fields."""
        address = f"{self._url.removesuffix('/v1')}/tokenize"
        body = {"content": text, "prompt": text, "model": self.model, "add_special_tokens": False}
        request = urllib.request.Request(address, json.dumps(body).encode(), {"Content-Type": "application/json"})
        request.add_unredirected_header("Authorization", f"Bearer {api_key}")
        try:
            with urllib.request.urlopen(request, timeout=self._timeout) as answer:
                return json.loads(answer.read())["tokens"]
        except urllib.error.HTTPError as error:
            guarded = error.code in (http.HTTPStatus.UNAUTHORIZED, http.HTTPStatus.FORBIDDEN)
            raise EngineError(
                f"{address} answered with the HTTP status {error.code} ({error.reason})"
                f"{'; is it the api_key that the server wants?' if guarded else '.'} Pass tokenizer=None to go without "
                "the comparison of tokenizers."
            ) from error
        except (OSError, ValueError, KeyError) as error:
            raise EngineError(
                f"{address} does not say how the server cuts texts into tokens ({error}); is the server up? Pass "
                "tokenizer=None to go without the comparison."
            ) from error


def sampled_tokens(answer: Mapping[str, Any], *, server: str) -> tuple[list[int], list[float]]:
    """Ids and log-probs of an answer, in whichever way the server writes them; fewer log-probs where some are missing.

    Raises:
        EngineError: it has neither, or log-probs without ids.
        _MalformedError: a log-prob is null, or no finite number.
    """
    choice = answer["choices"][0]
    whole = choice.get("token_ids") or (answer.get("__verbose") or {}).get("tokens")
    content = choice.get("logprobs") or {}
    if not content and not whole:
        raise EngineError(f"{server} sent no log-probs; start it so that it does, and with a limit of at least 1.")
    entries = content.get("content")
    if entries is not None:
        ids = [entry.get("id") for entry in entries]
        log_probs = [entry.get("logprob") for entry in entries]
    else:
        ids = _marked_ids(content)
        log_probs = list(content.get("token_logprobs") or [])
    ids = whole or ids
    known = [int(token) for token in ids if token is not None]
    if len(known) < len(ids) or (log_probs and not ids):
        raise EngineError(f"{server} does not say which token ids it sampled; a text cannot replace them.")
    _require_numbers(log_probs)
    return known, log_probs


def _marked_ids(content: Mapping[str, Any]) -> list[int | None]:
    """Ids of tokens that are written "token_id:7"; None for others."""
    marked = [str(token) for token in content.get("tokens") or []]
    return [int(token.removeprefix("token_id:")) if token.startswith("token_id:") else None for token in marked]


def _require_numbers(log_probs: Sequence[Any], start: int = 0) -> None:
    for place, value in enumerate(log_probs[start:], start):
        if not isinstance(value, int | float) or not math.isfinite(value):
            raise _MalformedError(f"log-prob {place} of {len(log_probs)} is {value}, no finite number")


def _openai() -> Any:
    try:
        import openai
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "the engine for OpenAI-compatible servers needs openai; run: pip install 'jaxrl_llm[engines]'",
            name="openai",
        ) from error
    return openai
