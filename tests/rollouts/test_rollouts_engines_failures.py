"""Servers that fail: down, slow, cut off, without log-probs. Each is a real HTTP server on loopback that misbehaves."""

import dataclasses
import json
import threading
import time
from collections.abc import Callable
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler
from http.server import ThreadingHTTPServer
from typing import Any

import jax
import numpy as np
import pytest

from jaxrl_llm.models.tokenizers import ByteTokenizer
from jaxrl_llm.rollouts import SamplingSettings
from jaxrl_llm.rollouts.engines import EngineError
from jaxrl_llm.rollouts.engines import EngineSettings
from jaxrl_llm.rollouts.engines import IncompleteRolloutsError
from jaxrl_llm.rollouts.engines import OpenAIEngine
from jaxrl_llm.rollouts.engines.openai_server import sampled_tokens
from jaxrl_llm.rollouts.engines.vocabulary import PROBE

SETTINGS = EngineSettings(max_new_tokens=3, group_size=4, eos_ids=(9,), pad_id=0)
PROMPTS = (np.array([[1, 2]]), np.ones((1, 2), bool))
KEY = jax.random.key(0)

Reply = Callable[[int, dict[str, Any]], tuple[int, str]]
"""(number of the request, its body) -> status and text of the answer."""


def marked(tokens: list[int], log_probs: list[float | None]) -> dict[str, Any]:
    """Log-probs as vLLM writes them."""
    return {"tokens": [f"token_id:{token}" for token in tokens], "token_logprobs": log_probs}


def good(tokens: list[int], **changes: Any) -> tuple[int, str]:
    """What vLLM answers."""
    whole = marked(tokens, [-0.5] * len(tokens))
    choice = {"index": 0, "text": "", "finish_reason": "length", "logprobs": whole} | changes
    return 200, json.dumps({"id": "x", "object": "text_completion", "created": 1, "model": "m", "choices": [choice]})


@contextmanager
def server(reply: Reply, *, api_key: str | None = None) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """Its URL, and the bodies of the requests that came; with an api_key, requests without it are refused."""
    seen: list[dict[str, Any]] = []
    lock = threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with lock:
                seen.append(body)
                number = len(seen)
            known = api_key is None or self.headers["Authorization"] == f"Bearer {api_key}"
            status, text = reply(number, body) if known else (401, "{}")
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.end_headers()
            self.wfile.write(text.encode())

        def log_message(self, format: str, *args: Any) -> None:
            pass

    running = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield f"http://127.0.0.1:{running.server_address[1]}/v1", seen
    finally:
        running.shutdown()
        running.server_close()
        thread.join()


def engine_of(url: str, **changes: Any) -> OpenAIEngine:
    fields = {"vocab_size": 10, "tokenizer": None, "attempts": 3, "backoff": 0.01, "timeout": 5.0, "parallel": 1}
    return OpenAIEngine(url, "m", SETTINGS, **{**fields, **changes})


def test_what_is_asked_for_and_what_comes_back() -> None:
    with server(lambda number, body: good([3, 9]) if number % 2 else good([3, 4, 5])) as (url, seen):
        rollout = engine_of(url).generate(*PROMPTS, KEY)
    np.testing.assert_array_equal(rollout.tokens[:2], [[1, 2, 3, 9, 0], [1, 2, 3, 4, 5]])
    np.testing.assert_array_equal(rollout.response_mask.sum(axis=1), [2, 3, 2, 3])
    np.testing.assert_allclose(rollout.log_prob_behaviour[0], [0, 0, -0.5, -0.5, 0])
    assert len({body["seed"] for body in seen}) == 4
    for name, value in {"prompt": [1, 2], "max_tokens": 3, "temperature": 1.0, "top_p": 1.0, "top_k": -1}.items():
        assert seen[0][name] == value


def test_a_server_that_is_down_is_asked_a_few_times() -> None:
    with server(lambda number, body: good([3, 4, 5])) as (url, _):
        pass
    start = time.monotonic()
    with pytest.raises(IncompleteRolloutsError, match=r"0 of 4 .*gave no usable answer in 3 attempts.*Connection"):
        engine_of(url).generate(*PROMPTS, KEY)
    assert time.monotonic() - start < 5
    with pytest.raises(EngineError, match=r"/tokenize does not say how .*is the server up\?"):
        engine_of(url, tokenizer=ByteTokenizer())


def test_a_slow_server_runs_into_the_timeout() -> None:
    def slow(number: int, body: dict) -> tuple[int, str]:
        time.sleep(0.5)
        return good([3, 4, 5])

    with (
        server(slow) as (url, seen),
        pytest.raises(EngineError, match=r"2 attempts of up to 0.1 s; the last one: APITimeoutError"),
    ):
        engine_of(url, timeout=0.1, attempts=2).generate(*PROMPTS, KEY)
    assert len(seen) == 2


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        ((503, "busy"), "503|busy"),
        ((429, "{}"), "429"),
        ((200, '{"choices": [{"text'), "JSON|json|Expecting|no choices|Unterminated"),
        (good([3]), r"cut off after 1 of 3 tokens .*last token \[3\]"),
        ((200, '{"choices": []}'), "no choices"),
        (good([3, 4, 5], logprobs=marked([3, 4, 5], [-1.0, None, -1.0])), "log-prob 1 of 3 is None, no finite number"),
        (good([3, 4, 5], logprobs=marked([3, 4, 5], [-1.0, -1.0, float("nan")])), "log-prob 2 of 3 is nan"),
        (good([3], logprobs={"content": [{"id": 9, "logprob": None}]}), "log-prob 0 of 1 is None"),
        (good([3, 10, 5]), r"token 10, which is outside the vocabulary 0 \.\. 9"),
        (good([3, -1, 5]), r"token -1, which is outside the vocabulary 0 \.\. 9"),
    ],
)
def test_what_may_pass_is_asked_again(answer: tuple[int, str], reason: str) -> None:
    with server(lambda number, body: answer if number <= 2 else good([3, 4, 5])) as (url, seen):
        engine_of(url).generate(*PROMPTS, KEY)
    assert len(seen) == 6  # two failures and four rollouts
    with server(lambda number, body: answer) as (url, seen), pytest.raises(EngineError, match=reason):
        engine_of(url).generate(*PROMPTS, KEY)
    assert len(seen) == 3


def test_complete_rollouts_are_never_lost() -> None:
    """The server breaks down after two rollouts; when it is back only the other two are asked for."""
    broken = threading.Event()

    def reply(number: int, body: dict) -> tuple[int, str]:
        if broken.is_set() or number == 3:
            broken.set()
            return 500, "down"
        return good([number, 4, 5])

    with server(reply) as (url, seen):
        engine = engine_of(url)
        with pytest.raises(IncompleteRolloutsError, match="2 of 4 rollouts are complete and kept") as caught:
            engine.generate(*PROMPTS, KEY)
        assert (caught.value.completed, caught.value.wanted) == (2, 4)
        before = len(seen)
        broken.clear()
        rollout = engine.generate(*PROMPTS, KEY)
        assert len(seen) == before + 2
    np.testing.assert_array_equal(np.asarray(rollout.tokens)[:2, 2], [1, 2])


def test_a_batch_that_succeeds_does_not_cost_another_its_rollouts() -> None:
    """Batch A fails with one rollout complete, batch B succeeds, and A is asked for again."""
    other = (np.array([[3, 2]]), np.ones((1, 2), bool))
    with server(lambda number, body: (500, "down") if number in (2, 3, 4) else good([number, 4, 5])) as (url, seen):
        engine = engine_of(url, vocab_size=100)
        with pytest.raises(IncompleteRolloutsError, match="1 of 4"):
            engine.generate(*PROMPTS, KEY)
        engine.generate(*other, KEY)
        assert len(seen) == 8
        rollout = engine.generate(*PROMPTS, KEY)
        assert len(seen) == 11
        np.testing.assert_array_equal(np.asarray(rollout.tokens)[:, 2], [1, 9, 10, 11])
        engine.generate(*PROMPTS, KEY)  # what was returned is kept no longer
        assert len(seen) == 15


def test_rollouts_of_other_settings_are_not_taken() -> None:
    with server(lambda number, body: (500, "down") if number == 2 else good([3, 4, 5][: body["max_tokens"]])) as (
        url,
        _,
    ):
        engine = engine_of(url, attempts=1)
        with pytest.raises(IncompleteRolloutsError, match="1 of 4"):
            engine.generate(*PROMPTS, KEY)
        engine.settings = dataclasses.replace(SETTINGS, max_new_tokens=2, eos_ids=[9])
        assert engine.generate(*PROMPTS, KEY).tokens.shape == (4, 4)


def test_rollouts_of_old_weights_are_not_kept_beyond_a_push() -> None:
    with server(lambda number, body: (500, "down") if number in (2, 3, 4) else good([3, 4, 5])) as (url, seen):
        engine = engine_of(url, reload=lambda model: None)
        with pytest.raises(IncompleteRolloutsError, match="1 of 4"):
            engine.generate(*PROMPTS, KEY)
        before = len(seen)
        engine.push_weights(None)  # pyright: ignore[reportArgumentType]
        engine.generate(*PROMPTS, KEY)
        assert len(seen) == before + 4


@pytest.mark.parametrize(
    ("answer", "sentence"),
    [
        (good([3, 4, 5], logprobs=None), "sent no log-probs; start it so that it does"),
        (good([3, 4, 5], logprobs={"tokens": ["a", "b", "c"], "token_logprobs": [-1, -1, -1]}), "which token ids"),
        (good([3, 4, 5], token_ids=[3, 4, 5], logprobs={"tokens": ["a"], "token_logprobs": [-1]}), "of 1 of 3 sampled"),
        ((400, '{"error": {"message": "logprobs are off"}}'), "refused a request: .*logprobs are off"),
    ],
)
def test_what_no_other_attempt_mends_is_said_at_once(answer: tuple[int, str], sentence: str) -> None:
    with server(lambda number, body: answer) as (url, seen), pytest.raises(EngineError, match=sentence):
        engine_of(url).generate(*PROMPTS, KEY)
    assert len(seen) == 1


def test_echoed_scores() -> None:
    """The log-probs of prompt, response and one new token: those in the middle are wanted."""
    echoed = {"tokens": [f"token_id:{t}" for t in (1, 2, 3, 4, 7)], "token_logprobs": [None, -1.0, -2.0, -3.0, -4.0]}
    with server(lambda number, body: good([7], logprobs=echoed)) as (url, seen):
        scores = engine_of(url).score(np.array([[1, 2, 3, 4, 0]]), np.array([[1, 1, 1, 1, 0]]) > 0, response_width=3)
    np.testing.assert_allclose(scores, [[-2.0, -3.0, 0.0]])
    assert seen[0]["echo"] is True
    assert seen[0]["prompt"] == [1, 2, 3, 4]


@pytest.mark.parametrize(
    ("echoed", "reason"),
    [
        (marked([1, 2, 3, 4, 7], [None, -1.0, None, -3.0, -4.0]), "log-prob 2 of 4 is None, no finite number"),
        (marked([1, 2, 3, 4, 7], [None, None, -2.0, -3.0, -4.0]), "log-prob 1 of 4 is None"),
        (marked([1, 2, 3, 40, 7], [None, -1.0, -2.0, -3.0, -4.0]), "token 40 came back where 4 was sent"),
    ],
)
def test_echoes_that_cannot_be_are_asked_for_again(echoed: dict[str, Any], reason: str) -> None:
    text = (np.array([[1, 2, 3, 4]]), np.ones((1, 4), bool))
    whole = good([7], logprobs=marked([1, 2, 3, 4, 7], [None, -1.0, -2.0, -3.0, -4.0]))
    with server(lambda number, body: good([7], logprobs=echoed) if number <= 2 else whole) as (url, seen):
        np.testing.assert_allclose(engine_of(url).score(*text, response_width=2), [[-2.0, -3.0]])
    assert len(seen) == 3
    with server(lambda number, body: good([7], logprobs=echoed)) as (url, _), pytest.raises(EngineError, match=reason):
        engine_of(url).score(*text, response_width=2)


def test_forced_scores_are_asked_for_again_where_they_are_no_numbers() -> None:
    text = (np.array([[1, 2, 3]]), np.ones((1, 3), bool))
    broken = good([3], logprobs=marked([3], [None]))
    with server(lambda number, body: broken if number <= 2 else good([3])) as (url, seen):
        scores = engine_of(url, scoring="forced").score(*text, response_width=1)
    np.testing.assert_allclose(scores, [[-0.5]])
    assert len(seen) == 3
    with server(lambda number, body: broken) as (url, _), pytest.raises(EngineError, match="log-prob 0 of 1 is None"):
        engine_of(url, scoring="forced").score(*text, response_width=1)


def test_a_null_in_the_list_of_all_tokens_is_no_score() -> None:
    """Where llama.cpp leaves out the log-prob of a forced token, it is looked up among those of all tokens."""
    text = (np.array([[1, 2, 3]]), np.ones((1, 3), bool))
    left_out = good([3], token_ids=[3], logprobs={"content": []})

    def listed(log_prob: float | None) -> tuple[int, str]:
        entry = {"id": 9, "logprob": -1.0, "top_logprobs": [{"id": 3, "logprob": log_prob}]}
        return good([9], logprobs={"content": [entry]})

    def reply(number: int, body: dict) -> tuple[int, str]:
        return left_out if body["logprobs"] == 1 else listed(None if number <= 2 else -4.0)

    with server(reply) as (url, seen):
        scores = engine_of(url, scoring="forced").score(*text, response_width=1)
    np.testing.assert_allclose(scores, [[-4.0]])
    assert len(seen) == 3


def test_a_guarded_server_is_asked_for_its_tokenizer_with_the_key() -> None:
    tokenizer = ByteTokenizer()
    pieces = json.dumps({"tokens": tokenizer.encode(PROBE, add_special_tokens=False)})
    with server(lambda number, body: (200, pieces), api_key="secret") as (url, _):
        engine_of(url, tokenizer=tokenizer, api_key="secret")
        with pytest.raises(EngineError, match=r"answered with the HTTP status 401 .*is it the api_key") as caught:
            engine_of(url, tokenizer=tokenizer, api_key="wrong")
    assert "is the server up" not in str(caught.value)
    with (
        server(lambda number, body: (404, "")) as (url, _),
        pytest.raises(EngineError, match=r"answered with the HTTP status 404 .*tokenizer=None"),
    ):
        engine_of(url, tokenizer=tokenizer)


def test_another_tokenizer_is_refused_with_its_first_token() -> None:
    with (
        server(lambda number, body: (200, json.dumps({"tokens": [84, 5]}))) as (url, seen),
        pytest.raises(ValueError, match=r"first token that differs in a probe text, number 1, is 5 there and 104"),
    ):
        engine_of(url, tokenizer=ByteTokenizer())
    assert seen[0]["content"] == seen[0]["prompt"]


def test_ids_in_each_of_the_forms() -> None:
    content = [{"id": 3, "logprob": -1.0, "token": "a", "bytes": [97]}]
    assert sampled_tokens({"choices": [{"logprobs": {"content": content}}]}, server="s") == ([3], [-1.0])
    both = {"choices": [{"logprobs": {"content": content}}], "__verbose": {"tokens": [200, 3]}}
    assert sampled_tokens(both, server="s") == ([200, 3], [-1.0])
    vllm = {"choices": [{"token_ids": [5], "logprobs": {"tokens": ["x"], "token_logprobs": [-2.0]}}]}
    assert sampled_tokens(vllm, server="s") == ([5], [-2.0])


def test_settings_that_cannot_be() -> None:
    for sampling in (SamplingSettings(temperature=0.5), SamplingSettings(top_k=5)):
        settings = dataclasses.replace(SETTINGS, sampling=sampling)
        with pytest.raises(
            ValueError, match=r"reports log-probs before temperature and truncation.* without top_k, top_p"
        ):
            OpenAIEngine("http://127.0.0.1/v1", "m", settings, vocab_size=10, tokenizer=None)
    with pytest.raises(ValueError, match="attempts must be at least 1, got 0"):
        engine_of("http://127.0.0.1/v1", attempts=0)
    with pytest.raises(ValueError, match="scoring is 'guess'; expected 'echo' or 'forced'"):
        engine_of("http://127.0.0.1/v1", scoring="guess")
