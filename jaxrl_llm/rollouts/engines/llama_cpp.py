"""llama.cpp as the engine, in this process: `xllamacpp`'s prebuilt server, on a loopback port of its own.

Weights are pushed as a GGUF file that is written here, in a precision that is a setting: the mismatch of a
low-precision sync can be had on purpose. The server's native /completion is used because it returns token ids; all of
its routes leave out the log-prob of a token that ends inside a character, which is then asked for by itself.
"""

import gc
import http
import json
import secrets
import tempfile
from collections.abc import Callable
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from typing import Literal
from typing import NoReturn
from typing import TypeVar
from typing import get_args

import numpy as np

from jaxrl_llm.models.gguf_io import GGUFFile
from jaxrl_llm.models.gguf_io import GGUFType
from jaxrl_llm.models.gguf_io import write_gguf
from jaxrl_llm.models.gguf_tokenizer import placeholder_metadata
from jaxrl_llm.models.tokenizers import Tokenizer
from jaxrl_llm.models.tokenizers import check_vocabulary
from jaxrl_llm.models.transformer import Transformer
from jaxrl_llm.models.weights import model_tensors
from jaxrl_llm.rollouts.engines import answers
from jaxrl_llm.rollouts.engines import rows
from jaxrl_llm.rollouts.engines.answers import Completion
from jaxrl_llm.rollouts.engines.answers import CutOffError
from jaxrl_llm.rollouts.engines.answers import MalformedError
from jaxrl_llm.rollouts.engines.kept import Job
from jaxrl_llm.rollouts.engines.kept import KeptRollouts
from jaxrl_llm.rollouts.engines.kept import jobs_of
from jaxrl_llm.rollouts.engines.protocol import EngineError
from jaxrl_llm.rollouts.engines.protocol import EngineSettings
from jaxrl_llm.rollouts.engines.protocol import Stoppable
from jaxrl_llm.rollouts.engines.rows import Response
from jaxrl_llm.rollouts.engines.transport import APIConnectionError
from jaxrl_llm.rollouts.engines.transport import Limits
from jaxrl_llm.rollouts.engines.transport import OversizedAnswerError
from jaxrl_llm.rollouts.engines.transport import Sent
from jaxrl_llm.rollouts.engines.transport import Server
from jaxrl_llm.rollouts.engines.transport import refusal
from jaxrl_llm.rollouts.engines.vocabulary import require_tokenizer_of_gguf
from jaxrl_llm.rollouts.responses import Rollout
from jaxrl_llm.typing import Bool
from jaxrl_llm.typing import Float
from jaxrl_llm.typing import Int
from jaxrl_llm.typing import PRNGKey

LOOPBACK = "127.0.0.1"
"""Where the server listens, and nowhere else."""
FORCED = 1e6
"""A logit bias that leaves no choice. The log-probs that the server reports are those before it."""

Item, Made = TypeVar("Item"), TypeVar("Made")


class LlamaCppEngine(Stoppable):
    """A llama.cpp server with weights of ours, or with those of a GGUF file.

    Args:
        weights: a model to push, or the path of a GGUF file to serve as it is, with the padding of its vocabulary;
            `load_pretrained` takes that away, so where its model is trained, give the engine the model.
        settings: of the responses; one to three end tokens.
        sync_dtype: precision in which pushed matrices are written. llama.cpp multiplies Q8_0 with activations in 8
            bits, BF16 and F16 with activations in that format.
        cache_dtype: of keys and values. "F32" also turns flash attention off, which would round them to half precision
            all the same: with F32 weights the engine then agrees with float32 to about 1e-4.
        slots: sequences at a time. With one, the same call gives the same bits; with more, what is computed together
            depends on the clock, and so does the rounding of 8-bit products.
        context: tokens of prompt and response that a slot has room for.
        n_threads: of the computation. More than one spins at barriers and collapses where other work runs.
        timeout: of one request, from the connection to the answer's last byte [seconds].
        tokenizer: of the trainer, to be compared with the file's; pushed weights have no texts to compare.

    Attributes:
        api_key: random, of this engine; the server answers requests with it only, since other users of the machine
            can reach a loopback port too.

    Raises:
        ModuleNotFoundError: xllamacpp is not installed; the sentence names the extra.
        ValueError: settings that cannot be, weights that GGUF cannot hold in this precision, or another vocabulary.
        EngineError: llama.cpp does not load the weights.
    """

    def __init__(
        self,
        weights: Transformer | str | Path,
        settings: EngineSettings,
        *,
        sync_dtype: GGUFType = "F32",
        cache_dtype: Literal["F16", "F32"] = "F16",
        slots: int = 4,
        context: int = 1024,
        n_threads: int = 1,
        timeout: float = 600.0,
        tokenizer: Tokenizer | None = None,
    ) -> None:
        self._llama = _xllamacpp()
        for name, value in (("slots", slots), ("context", context), ("n_threads", n_threads)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if sync_dtype not in get_args(GGUFType):
            raise ValueError(f"sync_dtype is {sync_dtype!r}; expected one of {', '.join(get_args(GGUFType))}.")
        self.settings, self.cache_dtype = settings, cache_dtype
        self.sync_dtype: GGUFType = sync_dtype
        self.slots, self.context, self.n_threads, self.timeout = slots, context, n_threads, timeout
        self._server: Any = None
        self.api_key = secrets.token_urlsafe(32)
        self._kept = KeptRollouts()
        self._folder = tempfile.TemporaryDirectory(prefix="jaxrl_llm_engine_")
        self._pushes = 0
        try:
            if isinstance(weights, Transformer):
                self.vocab_size = weights.config.vocab_size
                if tokenizer is not None:
                    check_vocabulary(tokenizer, self.vocab_size)
                self.push_weights(weights)
            else:
                file = GGUFFile(Path(weights))
                self.vocab_size = file.config.vocab_size
                if tokenizer is not None:
                    require_tokenizer_of_gguf(tokenizer, file.metadata, engine=str(weights))
                self._serve(Path(weights))
        except BaseException:
            self.stop()
            raise

    @property
    def address(self) -> str:
        """Of the server, http://127.0.0.1:port; its OpenAI routes are under /v1, and want `api_key`."""
        return self._running().listening_address

    def generate(
        self,
        prompt_tokens: Int[np.ndarray, "N P"],
        prompt_mask: Bool[np.ndarray, "N P"],
        key: PRNGKey,
        step: int = 0,
        prompt_index: Int[np.ndarray, " N"] | None = None,
    ) -> Rollout:
        """See `Engine.generate`. Complete rollouts of a batch that failed are kept, as in `OpenAIEngine.generate`; the
        seeds of the missing ones are the same in the next call, but their prompts may then be computed in other pieces
        (the server caches them), with other roundings.

        Raises:
            ValueError: the prompts do not fit.
            IncompleteRolloutsError: a request failed or ran into the timeout.
        """
        self._running()
        prompts = rows.prompts_of(prompt_tokens, prompt_mask, vocab_size=self.vocab_size)
        self._require_room(len(prompt) + self.settings.max_new_tokens for prompt in prompts)
        jobs = jobs_of(prompts, key, step, prompt_index, self.settings)
        responses = self._kept.sampled(jobs, self._sample, self._in_slots)
        return rows.rollout_of(prompt_tokens, prompt_mask, responses, self.settings)

    def score(
        self, tokens: Int[np.ndarray, "B T"], token_mask: Bool[np.ndarray, "B T"], *, response_width: int
    ) -> Float[np.ndarray, "B R"]:
        """See `Engine.score`; each token is forced, so what is computed is what sampling computes."""
        texts = rows.texts_of(tokens, token_mask, response_width, vocab_size=self.vocab_size)
        self._require_room(len(text.prompt) + len(text.response) for text in texts)
        return rows.padded(self._in_slots(lambda text: self._score(*text), texts), response_width)

    def distributions(
        self, tokens: Int[np.ndarray, "B T"], token_mask: Bool[np.ndarray, "B T"], *, response_width: int
    ) -> Float[np.ndarray, "B R V"]:
        """See `DistributionEngine.distributions`; a vocabulary of 49,152 takes 0.2 to 0.4 s per token.

        Requests go out in the order of sampling; each answer, megabytes of text, is read while the next is computed.
        """
        texts = rows.texts_of(tokens, token_mask, response_width, vocab_size=self.vocab_size)
        self._require_room(len(text.prompt) + len(text.response) for text in texts)
        result = np.zeros((len(texts), response_width, self.vocab_size), np.float32)

        def fill(job: tuple[int, rows.Text]) -> None:
            row, (prompt, response) = job
            answer = None
            for place in range(len(response)):
                asked = self._ask_distribution([*prompt, *response[:place]])
                if answer is not None:
                    result[row, place - 1] = self._read_distribution(answer)
                answer = self._answer(asked)
            if answer is not None:
                result[row, len(response) - 1] = self._read_distribution(answer)

        self._in_slots(fill, list(enumerate(texts)))
        return result

    def push_weights(self, model: Transformer) -> None:
        """See `Engine.push_weights`: written as a GGUF file in `sync_dtype`, and loaded by a new server.

        Raises:
            ValueError: another vocabulary, or a matrix that `sync_dtype` cannot hold.
        """
        if model.config.vocab_size != self.vocab_size:
            raise ValueError(f"model has {model.config.vocab_size} tokens; this engine has {self.vocab_size}.")
        self._pushes += 1
        path = Path(self._folder.name) / f"push_{self._pushes}.gguf"
        metadata = placeholder_metadata(vocab_size=self.vocab_size, end_ids=self.settings.eos_ids)
        write_gguf(path, model.config, model_tensors(model), dtype=self.sync_dtype, metadata=metadata)
        self._serve(path)
        self._kept.clear()  # sampled with the weights before
        for old in path.parent.glob("*.gguf"):
            if old != path:
                old.unlink()

    def stop(self) -> None:
        """See `Engine.stop`."""
        self._server = None
        gc.collect()  # the server ends when nothing refers to it any more
        self._folder.cleanup()

    def _serve(self, path: Path) -> None:
        self._server = None
        gc.collect()
        parameters = self._llama.CommonParams()
        parameters.model.path = str(path)
        parameters.hostnames, parameters.port, parameters.api_keys = [LOOPBACK], 0, [self.api_key]
        parameters.endpoint_slots = parameters.endpoint_metrics = parameters.endpoint_props = False
        parameters.n_parallel, parameters.n_ctx = self.slots, self.slots * self.context
        parameters.cpuparams.n_threads = parameters.cpuparams_batch.n_threads = self.n_threads
        parameters.verbosity, parameters.warmup, parameters.fit_params, parameters.cache_ram_mib = -1, False, False, 0
        if self.cache_dtype == "F32":
            parameters.cache_type_k = parameters.cache_type_v = self._llama.ggml_type.GGML_TYPE_F32
            parameters.flash_attn_type = self._llama.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
        try:
            self._server = self._llama.Server(parameters)
        except RuntimeError as error:
            raise EngineError(f"llama.cpp does not load {path} ({error}).") from error
        # A server that is dropped before its loop runs never comes back from its destructor; the loop answers this.
        self._answer(self._post({"prompt": [0], "n_predict": 1}))

    def _running(self) -> Any:
        if self._server is None:
            raise EngineError("this llama.cpp engine was stopped; make a new one.")
        return self._server

    def _require_room(self, lengths) -> None:
        longest = max(lengths, default=0)
        if longest > self.context:
            raise ValueError(f"prompt and response take {longest} tokens; context is {self.context}, make it larger.")

    def _in_slots(self, job: Callable[[Item], Made], items: Sequence[Item]) -> list[Made]:
        with ThreadPoolExecutor(self.slots) as pool:
            return list(pool.map(job, items))

    def _complete(self, body: dict[str, Any]) -> dict[str, Any]:
        return _read(lambda: answers.parsed(self._answer(self._ask(body))))

    def _completion(self, body: dict[str, Any]) -> Completion:
        answer = self._answer(self._ask(body))
        return _read(lambda: answers.completion_of(answer, vocab_size=self.vocab_size))

    def _ask(self, body: dict[str, Any]) -> Sent:
        """Send a request of somebody who waits for rollouts or scores."""
        return self._post(body)

    def _post(self, body: dict[str, Any]) -> Sent:
        """Send a request to /completion; the defaults of the server's sampler, which truncate, are all switched off."""
        body = {"samplers": ["temperature"], "temperature": 1.0, "n_probs": 1, "return_tokens": True, **body}
        count = len(body["prompt"]) + body["n_predict"]
        limits = Limits(self.timeout, answers.size_limit(count, listed=body["n_predict"] * body["n_probs"]))
        server = Server(self._running().listening_address, api_key=self.api_key, direct=True)
        try:
            return server.post("/completion", json.dumps({"cache_prompt": True, **body}).encode(), limits)
        except APIConnectionError as error:
            self._broke_off(error)

    def _answer(self, asked: Sent) -> bytes:
        """The answer to a request that was sent."""
        try:
            answer = asked.answer()
        except APIConnectionError as error:
            self._broke_off(error)
        except OversizedAnswerError as error:
            raise EngineError(f"llama.cpp gave no usable answer: {error}.") from None
        if answer.status != http.HTTPStatus.OK:
            raise EngineError(f"llama.cpp refused a request: {refusal(answer, [self.api_key])}")
        return answer.body

    def _broke_off(self, error: Exception) -> NoReturn:
        raise EngineError(f"llama.cpp did not answer within {self.timeout:g} s or broke off ({error}).") from None

    def _sample(self, job: Job) -> Response:
        prompt, sampling, width = list(job.prompt), self.settings.sampling, self.settings.max_new_tokens
        body: dict[str, Any] = {"prompt": prompt, "n_predict": width, "seed": job.seed}
        whole = sampling.temperature == 1 and not sampling.truncated
        if sampling.greedy:
            body |= {"samplers": ["top_k"], "top_k": 1}
        elif not whole:
            # In the order of `sampling`. Of entries that tie with the last of top_k, llama.cpp keeps some only; what it
            # reports are the probabilities of the entries that it kept.
            named = {"temperature": sampling.temperature, "top_k": sampling.top_k, "top_p": sampling.top_p}
            named["min_p"] = sampling.min_p
            given = {name: value for name, value in named.items() if value is not None}
            body |= {"samplers": list(given), "post_sampling_probs": True, **given}
        answer = self._completion(body)
        complete = answer.ids == answer.tokens
        if not (complete or whole or sampling.greedy):
            raise EngineError(
                f"llama.cpp gave log-probs of {len(answer.ids)} of {len(answer.tokens)} tokens: it leaves out those "
                "that end inside a character. Push weights instead of serving a file, or sample at temperature 1."
            )
        scored = complete and not sampling.greedy
        values = _read(lambda: answers.log_probs_of(answer.values, probabilities=not whole)) if scored else []
        tokens, log_probs = self._ended(answer, values)
        if sampling.greedy:
            return Response(tokens, [0.0] * len(tokens))
        return Response(tokens, log_probs if complete else self._score(prompt, tokens))

    def _ended(self, answer: Completion, log_probs: list[float]) -> answers.Sampled:
        """The response up to and with its first end token."""
        ends, width = self.settings.eos_ids, self.settings.max_new_tokens
        try:
            return answers.ended(answer.tokens, log_probs, ends=ends, width=width, reason=answer.reason)
        except CutOffError as error:
            raise EngineError(
                f"llama.cpp's response is cut off after {len(error.tokens)} of {width} tokens by {answer.reason!r}, "
                f"and its last token {error.tokens[-1:]} is not among eos_ids {tuple(ends)}; a file's own end tokens "
                "must all be among them."
            ) from None
        except MalformedError as error:
            raise EngineError(f"llama.cpp gave no usable answer: {error}.") from None

    def _score(self, prompt: list[int], response: list[int]) -> list[float]:
        scores = []
        for place, token in enumerate(response):
            before = [*prompt, *response[:place]]
            answer = self._completion({"prompt": before, "n_predict": 1, "logit_bias": [[token, FORCED]]})
            if answer.tokens != [token]:
                raise EngineError(f"llama.cpp answered with the tokens {answer.tokens[:9]} where {token} was forced.")
            found = _read(lambda values=answer.values: answers.log_probs_of(values, probabilities=False))
            # Left out for a token that ends inside a character: read from the whole distribution.
            scores.append(found[0] if found else float(self._distribution(before)[token]))
        return scores

    def _distribution(self, before: list[int]) -> Float[np.ndarray, " V"]:
        return self._read_distribution(self._answer(self._ask_distribution(before)))

    def _ask_distribution(self, before: list[int]) -> Sent:
        forced = [[int(self.settings.eos_ids[0]), FORCED]]
        return self._ask({"prompt": before, "n_predict": 1, "logit_bias": forced, "n_probs": self.vocab_size})

    def _read_distribution(self, answer: bytes) -> Float[np.ndarray, " V"]:
        return _read(lambda: answers.distribution_of(answer, vocab_size=self.vocab_size))


def _read(read: Callable[[], Made]) -> Made:
    """What is read from an answer; what is wrong with it in the engine's words."""
    try:
        return read()
    except MalformedError as error:
        raise EngineError(f"llama.cpp gave no usable answer: {error}.") from None


def _xllamacpp() -> Any:
    try:
        import xllamacpp
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "the llama.cpp engine needs xllamacpp; run: pip install 'jaxrl_llm[engines]'", name="xllamacpp"
        ) from error
    return xllamacpp
