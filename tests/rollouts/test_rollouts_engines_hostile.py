"""Servers that mean harm or are broken in ways of their own: each is a real one, a raw socket on loopback."""

import base64
import dataclasses
import datetime
import email.utils
import json
import resource
import socket
import threading
import time
import traceback
import urllib.parse
from collections.abc import Callable
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import jax
import numpy as np
import pytest

from jaxrl_llm.models.tokenizers import ByteTokenizer
from jaxrl_llm.redaction import quoted
from jaxrl_llm.rollouts.engines import EngineError
from jaxrl_llm.rollouts.engines import EngineSettings
from jaxrl_llm.rollouts.engines import IncompleteRolloutsError
from jaxrl_llm.rollouts.engines import OpenAIEngine
from jaxrl_llm.rollouts.engines import answers
from jaxrl_llm.rollouts.engines.answers import MalformedError
from jaxrl_llm.rollouts.engines.openai_server import LONGEST_RETRY_AFTER
from jaxrl_llm.rollouts.engines.openai_server import retry_after
from jaxrl_llm.rollouts.engines.transport import Answer
from jaxrl_llm.rollouts.engines.transport import Limits
from jaxrl_llm.rollouts.engines.transport import Server

SETTINGS = EngineSettings(max_new_tokens=3, group_size=1, eos_ids=(9,), pad_id=0)
PROMPTS = (np.array([[1, 2]]), np.ones((1, 2), bool))
KEY = jax.random.key(0)
SECRET = 'sk-"very/secret"+key='

Speak = Callable[[socket.socket, int, bytes], None]
"""(connection, number of the request, its whole text): writes an answer."""


@contextmanager
def raw_server(speak: Speak) -> Iterator[tuple[str, list[bytes]]]:
    """Its URL and the requests that came."""
    listening = socket.create_server(("127.0.0.1", 0))
    listening.settimeout(0.05)
    ended, seen, threads = threading.Event(), [], []

    def handle(connection: socket.socket) -> None:
        with connection:
            connection.settimeout(5)
            text = b""
            try:
                while b"\r\n\r\n" not in text:
                    text += connection.recv(65536)
                head, _, body = text.partition(b"\r\n\r\n")
                length = int(next(line for line in head.split(b"\r\n") if b"ength:" in line).split(b":")[1])
                while len(body) < length:
                    body += connection.recv(65536)
                seen.append(head + b"\r\n\r\n" + body)
                speak(connection, len(seen), seen[-1])
            except OSError:
                pass

    def accept() -> None:
        while not ended.is_set():
            try:
                connection, _ = listening.accept()
            except TimeoutError:
                continue
            threads.append(threading.Thread(target=handle, args=(connection,)))
            threads[-1].start()

    accepting = threading.Thread(target=accept)
    accepting.start()
    try:
        yield f"http://127.0.0.1:{listening.getsockname()[1]}/v1", seen
    finally:
        ended.set()
        accepting.join()
        listening.close()
        for thread in threads:
            thread.join()


def response(body: str | bytes, *, status: str = "200 OK", headers: str = "") -> bytes:
    body = body.encode(errors="surrogatepass") if isinstance(body, str) else body
    return f"HTTP/1.1 {status}\r\nContent-Length: {len(body)}\r\n{headers}\r\n".encode() + body


def saying(body: Any, **how: str) -> Speak:
    """The same answer to everything."""
    text = body if isinstance(body, str | bytes) else json.dumps(body)
    return lambda connection, number, request: connection.sendall(response(text, **how))


def choice(tokens: list[Any], log_probs: list[Any] | None = None, **changes: Any) -> dict[str, Any]:
    """What vLLM answers."""
    marked = [f"token_id:{token}" for token in tokens]
    whole = {"tokens": marked, "token_logprobs": [-0.5] * len(tokens) if log_probs is None else log_probs}
    return {"choices": [{"index": 0, "text": "", "finish_reason": "length", "logprobs": whole} | changes]}


GOOD = choice([3, 4, 5])


def engine_of(url: str, **changes: Any) -> OpenAIEngine:
    settings = changes.pop("settings", SETTINGS)
    fields = {"vocab_size": 10, "tokenizer": None, "attempts": 1, "backoff": 0.01, "timeout": 5.0, "parallel": 1}
    return OpenAIEngine(url, "m", settings, **{**fields, **changes})


def drip(text: bytes) -> Speak:
    def speak(connection: socket.socket, number: int, request: bytes) -> None:
        for place in range(len(text)):
            connection.sendall(text[place : place + 1])
            time.sleep(0.05)

    return speak


def bursts(head: bytes, piece: bytes) -> Speak:
    """Without end, as fast as it goes."""

    def speak(connection: socket.socket, number: int, request: bytes) -> None:
        connection.sendall(head)
        for _ in range(100_000):
            connection.sendall(piece)

    return speak


HEAD = b"HTTP/1.1 200 OK\r\n"
CHUNKED = HEAD + b"Transfer-Encoding: chunked\r\n\r\n"


@pytest.mark.parametrize(
    "text",
    [
        HEAD + b"Content-Length: 999\r\n\r\n" + b" " * 200,
        HEAD + b"X-Header: " + b"a" * 200,
        b"HTTP/1.1 200 " + b"K" * 200,
        CHUNKED + b"1\r\n \r\n" * 40,
        b"HTTP/1.1 100 Continue\r\n\r\n" * 20,
        HEAD + b"\r\n" + b" " * 200,
    ],
    ids=["body", "header", "status", "chunks", "continue", "until closed"],
)
def test_the_timeout_is_that_of_the_whole_request(text: bytes) -> None:
    with raw_server(drip(text)) as (url, _):
        start = time.monotonic()
        with pytest.raises(EngineError, match=r"attempts of up to 0.3 s; the last one: APITimeoutError"):
            engine_of(url, timeout=0.3).generate(*PROMPTS, KEY)
        assert time.monotonic() - start < 5.0  # it would take ten


@pytest.mark.parametrize(
    ("speak", "sentence"),
    [
        (
            bursts(HEAD + b"Content-Length: 1000000000\r\n\r\n", b" " * 65536),
            "has 1000000000 bytes; at most 10[0-9]+ are",
        ),
        (bursts(HEAD + b"\r\n", b" " * 65536), "has more than 10[0-9]+ bytes"),
        (bursts(CHUNKED, b"10000\r\n" + b" " * 65536 + b"\r\n"), "has more than 10[0-9]+ bytes"),
        (saying(b"\x1f\x8b", headers="Content-Encoding: gzip\r\n"), "is compressed"),
        (bursts(HEAD, b"X-More: " + b"a" * 60000 + b"\r\n"), "HTTPException|headers"),
        (bursts(HEAD + b"X-Long: ", b"a" * 65536), "LineTooLong|line"),
        (bursts(b"", b"a" * 65536), "LineTooLong|line"),
    ],
    ids=["announced", "until closed", "chunked", "compressed", "headers", "one header", "status"],
)
def test_the_bytes_of_an_answer_are_bounded(speak: Speak, sentence: str) -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with raw_server(speak) as (url, _), pytest.raises(EngineError, match=sentence):
        engine_of(url).generate(*PROMPTS, KEY)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 60_000  # kB


def test_an_answer_that_breaks_off_is_asked_again() -> None:
    def speak(connection: socket.socket, number: int, request: bytes) -> None:
        whole = response(json.dumps(GOOD))
        connection.sendall(whole[: len(whole) // 2] if number == 1 else whole)

    with raw_server(speak) as (url, seen):
        engine_of(url, attempts=2).generate(*PROMPTS, KEY)
    assert len(seen) == 2


@pytest.mark.parametrize("status", ["301 Moved", "302 Found", "303 See Other", "307 Temporary", "308 Permanent"])
def test_redirects_are_not_followed(status: str) -> None:
    with raw_server(saying(GOOD)) as (other, taken):
        for place in (f"{other}/completions", f"//user:pw@{other.removeprefix('http://')}/completions"):
            with raw_server(saying("", status=status, headers=f"Location: {place}\r\n")) as (url, seen):
                with pytest.raises(EngineError, match=r"refused a request: .*it redirects to .*not followed") as caught:
                    engine_of(url, attempts=3, api_key="secret-key").generate(*PROMPTS, KEY)
                with pytest.raises(EngineError, match=r"/tokenize answered with the HTTP status 30.*not followed"):
                    engine_of(url, tokenizer=ByteTokenizer())
                assert len(seen) == 2
            assert "user:pw" not in str(caught.value)
        assert not taken


def whole_trace(error: BaseException) -> str:
    """What a terminal would show, chained errors included."""
    return "".join(traceback.format_exception(error))


@pytest.mark.parametrize(
    "echo",
    [
        SECRET,
        json.dumps({"error": f"Incorrect API key provided: {SECRET}"}),
        urllib.parse.quote(SECRET, safe=""),
        base64.b64encode(SECRET.encode()).decode(),
        "Authorization: Bearer " + SECRET,
        "x" * 290 + SECRET,
    ],
)
@pytest.mark.parametrize("status", ["401 No", "400 Bad", "503 Busy", "302 Found"])
def test_a_key_that_a_server_echoes_is_in_no_error(echo: str, status: str) -> None:
    with raw_server(saying(echo, status=status, headers=f"Location: http://x/{urllib.parse.quote(echo)}\r\n")) as (
        url,
        seen,
    ):
        address = url.replace("//", "//someone:hunter2-pass@")
        for make in (
            lambda: engine_of(address, api_key=SECRET).generate(*PROMPTS, KEY),
            lambda: engine_of(address, api_key=SECRET).score(
                *(np.ones((1, 3), kind) for kind in (int, bool)), response_width=1
            ),
            lambda: engine_of(address, api_key=SECRET, tokenizer=ByteTokenizer()),
        ):
            with pytest.raises(EngineError) as caught:
                make()
            shown = whole_trace(caught.value).replace("lambda", "")
            for secret in (
                SECRET,
                SECRET[4:12],
                "hunter2-pass",
                "very",
                base64.b64encode(SECRET.encode()).decode()[4:20],
            ):
                assert secret not in shown.replace(__file__, ""), secret
    assert all(b"Authorization: Bearer " + SECRET.encode() in request for request in seen)


@pytest.mark.parametrize(
    "text",
    [
        f"HTTP/1.1 {SECRET} x\r\n\r\n",
        f"{SECRET}\r\n\r\n",
        f"HTTP/1.1 200 OK\r\nContent-Length: {SECRET}\r\n\r\n",
        SECRET,
    ],
)
def test_a_key_in_broken_http_is_in_no_error(text: str) -> None:
    def speak(connection: socket.socket, number: int, request: bytes) -> None:
        connection.sendall(text.encode())

    with raw_server(speak) as (url, _), pytest.raises(EngineError) as caught:
        engine_of(url, api_key=SECRET).generate(*PROMPTS, KEY)
    assert "very" not in whole_trace(caught.value)


def test_a_key_in_a_field_is_in_no_error() -> None:
    for body in (choice([3], finish_reason=SECRET), choice([3, SECRET, 5]), {"choices": SECRET}, {"choices": [SECRET]}):
        with raw_server(saying(body)) as (url, _), pytest.raises(EngineError) as caught:
            engine_of(url, api_key=SECRET).generate(*PROMPTS, KEY)
        assert "very" not in whole_trace(caught.value)


@pytest.mark.parametrize(
    "user",
    [
        "me@work:hun@ter2",
        "me:hun'te\"r<2",
        "me:hun ter2",
        "me:hun\nter2",
        "me:" + "hunter2" * 100,
        "hunter2" * 100,
        "me:hun/ter2",
        "me:hun#ter2",
    ],
)
@pytest.mark.parametrize("before", ["http://", "http:///", "", "http:/"])
def test_the_name_of_an_address_has_no_password(before: str, user: str) -> None:
    try:
        shown = Server(f"{before}{user}@host/v1").name
    except ValueError as error:
        shown = str(error)
    assert "ter2" not in shown
    assert "@host/v1" in shown


def test_what_an_address_makes_a_request_say_is_secret() -> None:
    """A server that sends back the header as it came, without its first word, or the user who is the key."""
    for address in ("http://me:hunter2@host/v1", "http://hunter2hunter@host/v1"):
        user = address.removeprefix("http://").partition("@")[0]
        sent = base64.b64encode((user if ":" in user else f"{user}:").encode()).decode()
        shown = quoted(f"no such user {sent}, {user}", Server(address).secrets)
        assert sent not in shown
        assert "hunter" not in shown


def test_user_and_password_of_an_address_are_sent_and_not_said() -> None:
    with raw_server(saying(GOOD)) as (url, seen):
        engine_of(url.replace("//", "//me:p%40ss@")).generate(*PROMPTS, KEY)
    assert b"Authorization: Basic " + base64.b64encode(b"me:p@ss") in seen[0]
    for address in (
        "http://me:hunter2@host:port/v1",
        "ftp://me:hunter2@host/v1",
        "http://me:hunter2@/v1",
        "me:hunter2@h",
    ):
        with pytest.raises(ValueError, match=r"the address is .*expected http://host:port/path") as caught:
            engine_of(address)
        assert "hunter2" not in whole_trace(caught.value)
    with pytest.raises(ValueError, match="api_key must be printable ASCII") as caught:
        engine_of("http://127.0.0.1/v1", api_key="hunter2\r\nX-Header: 1")
    assert "hunter2" not in str(caught.value)


MALFORMED = [
    b"",
    b"null",
    b"[]",
    b"3",
    b'"text"',
    b"\xff\xfe",
    b"[" * 100_000,
    b'{"a":' * 100_000,
    b"9" * 10_000,
    json.dumps({"choices": 2 * choice([3, 4, 5])["choices"]}).encode(),
    json.dumps(choice([3, 4, 5])).replace('"choices"', '"choices": [], "choices"', 1).encode(),
    json.dumps(choice([3, 4, 5])).replace('"logprobs"', '"logprobs": null, "logprobs"', 1).encode(),
    *(
        json.dumps(body).encode()
        for body in (
            {},
            {"choices": None},
            {"choices": {}},
            {"choices": "x"},
            {"choices": [None]},
            {"choices": [3]},
            {"choices": [[]]},
            choice([3, 4, 5], logprobs="x"),
            choice([3, 4, 5], logprobs=[1]),
            choice([3, 4, 5], logprobs={"tokens": "abc", "token_logprobs": [-1]}),
            choice([3, 4, 5], logprobs={"tokens": {"a": 1}, "token_logprobs": [-1]}),
            choice([3, 4, 5], logprobs={"tokens": ["token_id:3"], "token_logprobs": 7}),
            choice([3, 4, 5], logprobs={"tokens": ["token_id:3"], "token_logprobs": {"a": 1}}),
            choice([3, 4, 5], logprobs={"content": 3}),
            choice([3, 4, 5], logprobs={"content": [3]}),
            choice([3, 4, 5], logprobs={"content": [{"id": "3", "logprob": -1}] * 3}),
            choice([3, 4, 5], logprobs={"content": [{"id": True, "logprob": -1}] * 3}),
            choice([3, 4, 5], logprobs={"content": [{"id": 3.0, "logprob": -1}] * 3}),
            choice([3, 4, 5], logprobs={"content": [{"id": [3], "logprob": -1}] * 3}),
            choice([3, 4, 5], logprobs={"content": [{"id": 3, "token": "token_id:4", "logprob": -1}] * 3}),
            choice([3, 4, 5], token_ids="345"),
            choice([3, 4, 5], token_ids={"3": 1}),
            choice([3, 4, 5], token_ids=[3, "4", 5]),
            choice([3, 4, 5], token_ids=[3, True, 5]),
            choice([3, 4, 5], token_ids=[3, 4.5, 5]),
            choice([3, 4, 5], token_ids=[3, None, 5]),
            choice([3, 4, 5], token_ids=[3, 10, 5]),
            choice([3, 4, 5], token_ids=[3, -1, 5]),
            choice([3, 4, 5], token_ids=[3, 4, 6]),  # beside token_id:5
            choice([3, 4, 5], token_ids=[5, 4, 3]),
            choice([3, 4, 5]) | {"__verbose": {"tokens": [3, 4, 6]}},
            choice([3, 4, 5]) | {"__verbose": "x"},
            choice([3, 4, 5], token_ids=[3, 4, 5]) | {"__verbose": {"tokens": [3, 4, 6]}},
            choice([3, 4, "x"]),
            choice([3, 4, "٣"]),
            choice([3, 4, "5_0"]),
            choice([3, 4, "1" * 5000]),
            choice([3, 4, 5], [-1, -1, 0.5]),
            choice([3, 4, 5], [-1, -1, 1e-3]),
            choice([3, 4, 5], [-1, -1, True]),
            choice([3, 4, 5], [-1, -1, False]),
            choice([3, 4, 5], [-1, -1, "-1"]),
            choice([3, 4, 5], [-1, -1, [-1]]),
            choice([3, 4, 5], [-1, -1, None]),
            choice([3, 4, 5], [-1, -1, float("nan")]),
            choice([3, 4, 5], [-1, -1, -float("inf")]),
            choice([3, 4, 5], [-1, -1, -1e300]),
            choice([3, 4, 5], [-1, -1, -(10**400)]),
            choice([3, 4, 5, 6]),
            choice([3, 4, 5, 6, 9]),
            choice([]),
            choice([3, 4]),
        )
    ),
]


@pytest.mark.parametrize("body", MALFORMED, ids=range(len(MALFORMED)))
def test_malformed_answers_are_asked_again_and_end_in_a_sentence(body: bytes) -> None:
    text = (np.array([[1, 2, 3]]), np.ones((1, 3), bool))
    with raw_server(saying(body)) as (url, seen):
        with pytest.raises(IncompleteRolloutsError, match=r"0 of 1"):
            engine_of(url, attempts=2).generate(*PROMPTS, KEY)
        asked = len(seen)
        assert asked in (1, 2)
        with pytest.raises(EngineError):
            engine_of(url, scoring="forced").score(*text, response_width=1)
        with pytest.raises(EngineError):
            engine_of(url).score(*text, response_width=1)
        with pytest.raises(EngineError, match="does not say how"):
            engine_of(url, tokenizer=ByteTokenizer())
    again = [saying(body), saying(GOOD)]
    if asked == 2:
        with raw_server(lambda c, number, request: again[number > 1](c, number, request)) as (url, _):
            assert engine_of(url, attempts=2).generate(*PROMPTS, KEY).tokens.shape == (1, 5)


@pytest.mark.parametrize(
    "body",
    [
        {"tokens": None, "x": 1},
        {"tokens": "abc"},
        {"tokens": [1, "2"]},
        {"tokens": [True]},
        {"tokens": [1.5]},
        {"a": 1},
    ],
)
def test_malformed_tokens_of_a_tokenizer(body: Any) -> None:
    with raw_server(saying(body)) as (url, _), pytest.raises((EngineError, ValueError), match=r"tokens|tokenizer"):
        engine_of(url, tokenizer=ByteTokenizer())


@pytest.mark.parametrize(
    "entry",
    [
        {"top_logprobs": 3},
        {"top_logprobs": [3]},
        {"top_logprobs": [{"id": 3, "logprob": 0.5}]},
        {"top_logprobs": [{"id": 3, "logprob": True}]},
        {"top_logprobs": [{"id": "3", "logprob": -1}]},
        3,
        None,
    ],
)
def test_malformed_lists_of_all_tokens(entry: Any) -> None:
    def speak(connection: socket.socket, number: int, request: bytes) -> None:
        listed = {"logprobs": {"content": [] if b'"logprobs": 1,' in request else [entry]}, "token_ids": [3]}
        connection.sendall(response(json.dumps(choice([3], **listed))))

    text = (np.array([[1, 2, 3]]), np.ones((1, 3), bool))
    with raw_server(speak) as (url, _), pytest.raises(EngineError):
        engine_of(url, scoring="forced").score(*text, response_width=1)


def test_rounding_above_zero_is_zero() -> None:
    with raw_server(saying(choice([3, 4, 5], [-1, 5e-7, 0]))) as (url, _):
        rollout = engine_of(url).generate(*PROMPTS, KEY)
    np.testing.assert_array_equal(rollout.log_prob_behaviour[0, 2:], np.float32([-1, 0, 0]))


@pytest.mark.parametrize("ends", [(9,), (4, 9), (7, 3)])
@pytest.mark.parametrize("form", ["marked", "token_ids", "content"])
def test_a_response_ends_at_its_first_end_token(ends: tuple[int, ...], form: str) -> None:
    tokens, log_probs = [5, 3, 4, 9, 4, 9], [-1.0, -2.0, -3.0, -4.0, -5.0, -6.0]
    body = {
        "marked": choice(tokens, log_probs),
        "token_ids": choice([], token_ids=tokens, logprobs={"tokens": list("abcdef"), "token_logprobs": log_probs}),
        "content": choice(
            [], logprobs={"content": [{"id": t, "logprob": p} for t, p in zip(tokens, log_probs, strict=True)]}
        ),
    }[form]
    settings = dataclasses.replace(SETTINGS, eos_ids=ends, max_new_tokens=6)
    with raw_server(saying(body)) as (url, seen):
        rollout = engine_of(url, settings=settings).generate(*PROMPTS, KEY)
    length = min(tokens.index(end) for end in ends if end in tokens) + 1
    np.testing.assert_array_equal(rollout.tokens[0, 2:], tokens[:length] + [0] * (6 - length))
    np.testing.assert_array_equal(rollout.log_prob_behaviour[0, 2:], log_probs[:length] + [0] * (6 - length))
    assert rollout.response_mask.sum() == length
    asked = json.loads(seen[0].partition(b"\r\n\r\n")[2])
    assert asked["stop_token_ids"] == list(ends)


def test_tokens_after_an_end_token_are_not_too_many() -> None:
    with raw_server(saying(choice([3, 9, 4, 5, 6]))) as (url, _):
        assert engine_of(url).generate(*PROMPTS, KEY).response_mask.sum() == 2


def test_an_overlong_answer_loses_no_finished_rollout() -> None:
    long = threading.Event()
    long.set()

    def speak(connection: socket.socket, number: int, request: bytes) -> None:
        body = choice([3, 4, 5, 6]) if long.is_set() and number > 2 else choice([number % 9, 4, 5])
        connection.sendall(response(json.dumps(body)))

    settings = dataclasses.replace(SETTINGS, group_size=4)
    with raw_server(speak) as (url, seen):
        engine = engine_of(url, settings=settings)
        with pytest.raises(IncompleteRolloutsError, match="has 4 tokens where at most 3 were asked for") as caught:
            engine.generate(*PROMPTS, KEY)
        assert (caught.value.completed, caught.value.wanted, len(seen)) == (2, 4, 3)
        long.clear()
        rollout = engine.generate(*PROMPTS, KEY)
        assert len(seen) == 5
    np.testing.assert_array_equal(rollout.tokens[:, 2], [1, 2, 4, 5])


def test_retry_after_is_waited_for() -> None:
    def speak(connection: socket.socket, number: int, request: bytes) -> None:
        busy = response("later", status="429 Too Many", headers="Retry-After: 0.6\r\n")
        connection.sendall(busy if number == 1 else response(json.dumps(GOOD)))

    with raw_server(speak) as (url, seen):
        start = time.monotonic()
        engine_of(url, attempts=2).generate(*PROMPTS, KEY)
        assert 0.6 <= time.monotonic() - start < 5
    assert len(seen) == 2


def test_what_retry_after_says() -> None:
    later = datetime.datetime.now(datetime.UTC) + datetime.timedelta(seconds=20)
    for text, seconds in (
        ("7", 7),
        ("0", 0),
        ("-3", 0),
        ("nan", 0),
        ("1e400", LONGEST_RETRY_AFTER),
        ("3600", LONGEST_RETRY_AFTER),
        ("soon", 0),
        ("", 0),
        (email.utils.format_datetime(later, usegmt=True), 20),
        ("Thu, 01 Jan 1970 00:00:00 GMT", 0),
        ("Thu, 99 Jan 99999999999 00:00:00 GMT", 0),
    ):
        assert retry_after(Answer(429, {"retry-after": text}, b"")) == pytest.approx(seconds, abs=2)
    assert retry_after(Answer(503, {}, b"")) == 0


def test_the_environments_proxy_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    with raw_server(saying(GOOD)) as (url, seen):
        monkeypatch.setenv("http_proxy", url.replace("//", "//me:pw@").removesuffix("/v1"))
        monkeypatch.delenv("no_proxy", raising=False)
        monkeypatch.delenv("NO_PROXY", raising=False)
        engine_of("http://inference.invalid/v1").generate(*PROMPTS, KEY)
        assert seen[0].startswith(b"POST http://inference.invalid/v1/completions HTTP/1.1\r\n")
        assert b"Host: inference.invalid\r\n" in seen[0]
        assert b"Proxy-Authorization: Basic " in seen[0]
        monkeypatch.setenv("no_proxy", "127.0.0.1")
        engine_of(url).generate(*PROMPTS, KEY)
        assert seen[1].startswith(b"POST /v1/completions HTTP/1.1\r\n")
        # A server in this process is asked without it, whatever the environment says.
        monkeypatch.delenv("no_proxy")
        Server(url, direct=True).post("/x", b"{}", Limits(5, 10**6)).answer()
        assert seen[2].startswith(b"POST /x HTTP/1.1\r\n")


@pytest.mark.parametrize(
    "body",
    [
        {},
        {"tokens": "ab"},
        {"tokens": [3, True]},
        {"tokens": [3, 10]},
        {"tokens": [3], "completion_probabilities": 3},
        {"tokens": [3], "completion_probabilities": [3]},
        {"tokens": [3], "completion_probabilities": [{"id": 4, "logprob": -1}]},
        {"tokens": [3], "completion_probabilities": [{"id": 3, "logprob": -1}, {"id": 3, "logprob": -1}]},
        {"tokens": [3], "completion_probabilities": [{"logprob": -1}]},
    ],
)
def test_malformed_completions_of_llama_cpp(body: Any) -> None:
    if body == {}:
        assert answers.completion_of(b"{}", vocab_size=10).tokens == []
        return
    with pytest.raises(MalformedError):
        answers.completion_of(json.dumps(body).encode(), vocab_size=10)


def test_probabilities_of_llama_cpp() -> None:
    assert answers.log_probs_of([1.0, 0.5], probabilities=True) == [0.0, np.log(0.5)]
    for value in (0, -0.1, 1.01, True, "0.5", None, float("nan")):
        with pytest.raises(MalformedError, match="probability 0 of 1 is"):
            answers.log_probs_of([value], probabilities=True)


def listed(values: list[Any], ids: list[Any] | None = None) -> bytes:
    entries = [{"id": i, "logprob": v} for i, v in zip(ids or range(len(values)), values, strict=True)]
    return json.dumps({"completion_probabilities": [{"top_logprobs": entries}]}).encode()


def test_distributions_of_llama_cpp() -> None:
    np.testing.assert_allclose(answers.distribution_of(listed([-2, -1.0], [1, 0]), vocab_size=2), [-1, -2])
    lowest = answers.distribution_of(listed([-1e300, 0]), vocab_size=2)
    assert np.isfinite(lowest).all()
    for body in (
        b"{}",
        listed([-1.0]),
        listed([-1, 0.5]),
        listed([-1, True]),
        listed([-1, None]),
        listed([-1, "x"]),
        listed([-1, float("nan")]),
        listed([-1, -1], [0, 0]),
        listed([-1, -1], [0, 2]),
        listed([-1, -1], [0, -1]),
        listed([-1, -1], [0, True]),
        b'{"completion_probabilities": [{"top_logprobs": [1, 2]}]}',
        b'{"completion_probabilities": [{"top_logprobs": 3}]}',
        b'{"completion_probabilities": [3]}',
    ):
        with pytest.raises(MalformedError):
            answers.distribution_of(body, vocab_size=2)


STRANGE = [
    *(None, True, False, 0, -1, 3, 10, 1.5, -0.5, 1e300, -1e300, 10**400, float("nan"), float("inf"), -float("inf")),
    *("", "x", "token_id:", "token_id:4", "token_id:-1", "\ud800", [], {}, [None], [[]], [3], ["3"], [{}], {"a": 1}),
]
"""What may stand in the place of any field."""


def variants(value: Any) -> Iterator[Any]:
    """The value with each part of it, and itself, replaced by each of the strange ones, or left out."""
    yield from STRANGE
    if isinstance(value, dict):
        for name, part in value.items():
            yield {key: other for key, other in value.items() if key != name}
            for other in variants(part):
                yield {**value, name: other}
    if isinstance(value, list):
        for place, part in enumerate(value):
            for other in variants(part):
                yield [*value[:place], other, *value[place + 1 :]]


ENTRY = {"id": 3, "token": "a", "logprob": -1.0, "top_logprobs": [{"id": 3, "logprob": -1.0}, {"id": 4, "logprob": -2}]}
SHAPES = {
    "vllm": choice([3, 4, 5], token_ids=[3, 4, 5]),
    "marked": choice([3, 4, 5]),
    "llama.cpp": choice([], logprobs={"content": [ENTRY] * 3}) | {"__verbose": {"tokens": [3, 3, 3]}},
}


@pytest.mark.parametrize("name", SHAPES)
def test_no_field_whatever_it_holds_raises_pythons_own_error(name: str) -> None:
    read, sentences = 0, set()
    for body in variants(SHAPES[name]):
        text = json.dumps(body).encode()
        for use in (
            lambda answer: answers.ended(
                *answers.sampled_tokens(answer, server="s", vocab_size=10),
                ends=(9,),
                width=3,
                reason=answers.choice_of(answer).get("finish_reason"),
            ),
            lambda answer: answers.echoed_log_probs(answer, [3, 4, 5], start=1),
            lambda answer: answers.listed_log_prob(answer, 3),
        ):
            try:
                found = use(answers.parsed(text))
            except (MalformedError, EngineError) as error:
                sentences.add(str(error))
                continue
            read += 1
            if isinstance(found, answers.Sampled):
                assert 0 < len(found.tokens) <= 3
                assert all(type(token) is int and 0 <= token < 10 for token in found.tokens)
                assert all(type(value) is float and -1e5 <= value <= 0 for value in found.log_probs)
    assert read
    assert all(sentence.isprintable() and len(sentence) < 500 for sentence in sentences)


@pytest.mark.parametrize("body", [{"tokens": [3, 4], "completion_probabilities": [ENTRY], "stop_type": "limit"}])
def test_no_field_of_llama_cpp_raises_pythons_own_error(body: dict[str, Any]) -> None:
    sentences = set()
    for other in variants(body):
        text = json.dumps(other).encode()
        for use in (
            lambda text: answers.log_probs_of(answers.completion_of(text, vocab_size=10).values, probabilities=False),
            lambda text: answers.log_probs_of(answers.completion_of(text, vocab_size=10).values, probabilities=True),
            lambda text: answers.distribution_of(text, vocab_size=2),
            answers.tokenized,
        ):
            try:
                use(text)
            except MalformedError as error:
                sentences.add(str(error))
    assert all(sentence.isprintable() and len(sentence) < 500 for sentence in sentences)
