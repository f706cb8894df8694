"""Legal and illegal requests that once ended the server for everybody, or were answered with a failure."""

import asyncio
import json
import math
from concurrent.futures import CancelledError

import numpy as np
import pytest

from jaxrl_llm.models.chat import TemplateChat
from jaxrl_llm.rollouts.constrained import Grammar
from jaxrl_llm.rollouts.slot_decoder import SlotDecoder
from jaxrl_llm.serving import Limits
from jaxrl_llm.serving.engine import Engine
from jaxrl_llm.serving.errors import APIError
from jaxrl_llm.serving.generation import Generation
from jaxrl_llm.serving.generation import Job
from jaxrl_llm.serving.generation import Piece
from jaxrl_llm.serving.http import CLIENT_GONE
from jaxrl_llm.serving.http import EventStream
from jaxrl_llm.serving.http import Inbox
from jaxrl_llm.serving.http import event
from jaxrl_llm.serving.messages import CallStream
from jaxrl_llm.serving.messages import knows_tools
from jaxrl_llm.serving.metrics import Metrics
from tests.serving.conftest import CONTEXT
from tests.serving.conftest import NAME
from tests.serving.conftest import SLOTS
from tests.serving.conftest import model
from tests.serving.conftest import served
from tests.serving.conftest import tokenizer
from tests.serving.raw import ask
from tests.serving.raw import metric
from tests.serving.test_service import until

CHAT = {"model": NAME, "messages": [{"role": "user", "content": "a"}], "max_tokens": 30}
TEXT = {"model": NAME, "prompt": "a", "max_tokens": 30}
ONE = {"type": "json_schema", "json_schema": {"name": "one", "schema": {"enum": ["a"]}}}
TOOL = {"type": "function", "function": {"name": "add", "parameters": {"type": "object", "properties": {}}}}


def test_a_grammar_that_ends_ends_the_answer_and_nothing_else(address):
    """Though the request has no end token of its own."""
    status, answer = ask(address, "/v1/completions", {**TEXT, "ignore_eos": True, "response_format": ONE})
    assert (status, answer["choices"][0]["text"], answer["choices"][0]["finish_reason"]) == (200, '"a"', "stop")
    assert ask(address, "/health") == (200, {"status": "ok"})


@pytest.mark.parametrize("stream", [False, True])
def test_fewer_allowed_tokens_than_are_listed(address, stream):
    more = {"response_format": ONE, "stream": stream}
    status, answer = ask(address, "/v1/completions", {**TEXT, **more, "logprobs": 5})
    chat_status, chat = ask(address, "/v1/chat/completions", {**CHAT, **more, "logprobs": True, "top_logprobs": 5})
    assert (status, chat_status) == (200, 200)
    if stream:
        assert "Infinity" not in answer + chat
        assert "[DONE]" in answer
    else:
        assert answer["choices"][0]["logprobs"]["top_logprobs"][0] == {'"': pytest.approx(0, abs=1e-6)}
        assert len(chat["choices"][0]["logprobs"]["content"][0]["top_logprobs"]) == 1


@pytest.mark.parametrize(
    ("path", "body", "sentence"),
    [
        ("chat/completions", {"messages": [{"role": "user", "content": "\ud800"}]}, "half of a surrogate pair"),
        ("../tokenize", {"content": "\ud800"}, "half of a surrogate pair"),
        ("completions", {"\ud800": 1}, "half of a surrogate pair"),
        ("completions", {"prompt": "a", "b" * 5000: 1}, "b is no field"),
        ("chat/completions", {"messages": [{"role": [], "content": "a"}]}, "has the role a list of 0"),
        ("chat/completions", {"messages": [{"role": "assistant", "tool_calls": 5}]}, "has the tool_calls 5"),
        ("chat/completions", {"chat_template_kwargs": [1]}, "chat_template_kwargs is a list of 1"),
        ("chat/completions", {"parallel_tool_calls": 5}, "parallel_tool_calls is 5"),
        ("chat/completions", {"response_format": {"type": "json_object", "schema": {}}}, "schema is no field"),
        ("chat/completions", {"response_format": {**ONE, "more": 1}}, "response_format.more is no field"),
        (
            "chat/completions",
            {"logprobs": True, "top_logprobs": 2, "logprobs_mode": "processed_logprobs"},
            "top_logprobs is 2; with logprobs_mode processed_logprobs expected 0",
        ),
        ("completions", {"prompt": ["a"] * 13}, "13 answers are asked for; expected at most 12"),
        (
            "chat/completions",
            {
                "messages": [
                    {"role": "assistant", "tool_calls": [{"function": {"name": "a", "arguments": '{"a": "\\ud800"}'}}]}
                ]
            },
            "arguments are no JSON object",
        ),
    ],
)
def test_what_is_wrong_is_a_sentence_and_no_failure(address, path, body, sentence):
    base = CHAT if path.startswith("chat") else {"model": NAME}
    status, answer = ask(address, f"/v1/{path}" if "../" not in path else path[2:], {**base, **body})
    assert (status, answer["error"]["type"]) == (400, "invalid_request_error")
    assert sentence in answer["error"]["message"]
    assert len(answer["error"]["message"]) < 400


def test_thinking_can_be_switched_off_beside_a_schema(address):
    body = {**CHAT, "response_format": ONE, "chat_template_kwargs": {"enable_thinking": False}}
    assert ask(address, "/v1/chat/completions", body)[1]["choices"][0]["message"]["content"] == '"a"'


def test_ids_of_calls_are_new_with_each_answer(address):
    body = {**CHAT, "tools": [TOOL], "tool_choice": "required", "parallel_tool_calls": False, "seed": 1}
    body["max_tokens"] = 90
    answers = [ask(address, "/v1/chat/completions", body)[1]["choices"][0]["message"] for _ in range(2)]
    (first,), (second,) = (answer["tool_calls"] for answer in answers)
    assert first["function"] == second["function"]
    assert first["id"] != second["id"]


@pytest.mark.parametrize("value", ['"\\ud800"', "NaN", "1e999"])
def test_a_call_that_cannot_be_sent_on_stays_content(value):
    text = f'<tool_call>{{"name": "add", "arguments": {{"a": {value}}}}}</tool_call>'
    stream = CallStream([TOOL])
    found = stream.feed(text) + stream.finish()
    assert (found.content, found.tool_calls) == (text, ())


def test_tools_are_described_where_a_template_writes_calls_that_are_not_read_here():
    assert not knows_tools(TemplateChat("{{ tools }}[TOOL_CALLS]", "<|im_end|>"))
    assert knows_tools(TemplateChat("{{ tools }}<tool_call>", "<|im_end|>"))


def test_offsets_and_names_of_bytes(address):
    """Each token's place in the text, and a name of its own, though none of them is a character."""
    body = {**TEXT, "temperature": 100, "seed": 5, "logprobs": 3, "max_tokens": 60, "return_token_ids": True}
    choice = ask(address, "/v1/completions", {**body, "prompt": "é", "echo": True, "ignore_eos": True})[1]["choices"][0]
    logs = choice["logprobs"]
    assert choice["text"].startswith("é")
    prompt = len(choice["prompt_token_ids"])
    assert logs["text_offset"][prompt - 1 : prompt + 1] == [0, 1]
    assert logs["tokens"][prompt - 2 : prompt] == ["bytes:\\xc3", "bytes:\\xa9"]
    ids = [*choice["prompt_token_ids"], *choice["token_ids"]]
    assert len(set(logs["tokens"])) == len(set(ids))
    assert all(0 <= place <= len(choice["text"]) for place in logs["text_offset"])
    for place, name in zip(logs["text_offset"], logs["tokens"], strict=True):
        if len(name) == 1 and name != "\ufffd":
            # What is held back may come after what follows it was counted, never before.
            assert name in choice["text"][place : place + 4]


def test_without_a_key_web_pages_are_kept_out():
    with served(api_key=None, warm=False) as address:
        host, json_type = address.removeprefix("http://"), {"content-type": "application/json"}
        text = json.dumps({"content": "a"}).encode()
        for headers, status in (
            ({**json_type, "host": host}, 200),
            ({**json_type, "host": "localhost:1"}, 200),
            ({**json_type, "host": "[::1]:8000"}, 200),
            ({**json_type, "host": "evil.example"}, 403),
            ({"content-type": "text/plain", "host": host}, 415),
        ):
            assert ask(address, "/tokenize", text, headers=headers)[0] == status


@pytest.fixture
def engine():
    """An engine that is not started."""
    decoder = SlotDecoder(model(), slots=SLOTS, context=CONTEXT)
    return Engine(decoder, tokenizer(), end_ids=(tokenizer().eos_id,), queue=8, metrics=Metrics())


def job_of(found: list[Piece], **more) -> Job:
    asked = Generation((1, 2, 3), np.zeros(2, np.uint32), 4, **more)
    return Job(asked, tokenizer(), found.append, seconds=60)


def test_an_engine_that_fails_tells_all_who_wait_and_takes_nothing_more(engine, monkeypatch):
    found: list[Piece] = []

    def broken(tokens):
        raise MemoryError("a secret")

    monkeypatch.setattr(engine.decoder, "open", broken)
    engine.submit([job_of(found)])
    waiting = engine.load(model(), 3)
    monkeypatch.setattr(engine, "_swap", lambda: None)
    engine.start()
    engine._thread.join(60)
    for error in (found[0].error, waiting.exception(1)):
        assert isinstance(error, APIError)
        assert (error.status, error.message) == (503, "the engine has stopped; the server's log says why.")
    for call in (lambda: engine.load(model()), lambda: engine.submit([job_of(found)])):
        with pytest.raises(APIError, match="the engine has stopped"):
            call()
    assert engine.failed == "a secret"


def test_weights_that_cannot_be_taken_are_told_and_versions_only_grow(engine, monkeypatch):
    right = engine.decoder.load

    def full(model):
        raise RuntimeError("RESOURCE_EXHAUSTED")

    first, gone, old, following = (engine.load(model(), version) for version in (5, 6, 5, None))
    assert gone.cancel()
    engine.start()
    assert (first.result(60), following.result(60), engine.version) == (5, 6, 6)
    with pytest.raises(APIError, match="version is 5; expected more than 5"):
        old.result(60)
    with pytest.raises(CancelledError):
        gone.result(60)
    monkeypatch.setattr(engine.decoder, "load", full)
    with pytest.raises(APIError, match="the weights were not taken; the log says why"):
        engine.load(model()).result(60)
    monkeypatch.setattr(engine.decoder, "load", right)
    assert engine.load(model()).result(60) == 7
    engine.stop()


def test_a_grammar_that_fails_ends_its_own_answer_only(engine, monkeypatch):
    grammar = Grammar.from_regex("[a-z]*")
    held, free = [], []

    def refuse(row, token):
        raise ValueError(f"row {row} is finished")

    monkeypatch.setattr(engine._rows, "advance", refuse)
    job = job_of(held, grammar=grammar)
    job.matcher = engine.masker.matcher(grammar)
    engine.submit([job, job_of(free)])
    engine.start()
    until(lambda: free and free[-1].finish is not None)
    assert held[-1].error is not None
    assert held[-1].error.code == "grammar_failed"
    engine.stop()


def test_an_answer_ends_in_its_time_though_the_engine_hangs(monkeypatch):
    monkeypatch.setattr(Engine, "start", lambda self: None)
    with served(warm=False, limits=Limits(seconds=0.2)) as address:
        status, answer = ask(address, "/v1/completions", TEXT)
        assert (status, answer["error"]["code"]) == (504, "timeout")
        assert metric(address, "requests_total") >= 1


def test_a_prompt_is_scored_a_chunk_at_a_time(address):
    body = {**TEXT, "prompt": "a" * 300, "max_tokens": 1, "echo": True, "logprobs": 1}
    found = ask(address, "/v1/completions", body)[1]["choices"][0]["logprobs"]["token_logprobs"]
    assert found[0] is None
    assert len(found) == 301 + (len(tokenizer().encode("a")) - 1)
    assert all(-math.inf < one < 0 for one in found[1:])


def test_a_stream_that_never_began_is_told_of_all_the_same():
    """Its generator has not begun, so nothing at the generator's end would run."""
    statuses: list[int] = []

    async def events():
        yield b""

    async def broken(message):
        raise OSError("gone")

    async def receive():
        await asyncio.sleep(60)
        return {}

    async def answered():
        await EventStream(events(), seconds=5, ended=statuses.append)({}, receive, broken)

    with pytest.raises(OSError, match="gone"):
        asyncio.run(answered())
    assert statuses == [CLIENT_GONE]


def test_what_waits_beside_an_error_is_delivered_before_it():
    async def collected():
        inbox = Inbox(2)
        inbox.deliver(0, Piece("all of it", finish="stop"))
        inbox.deliver(1, Piece("a part"))
        inbox.deliver(1, Piece(error=APIError(504, "late")))
        async for index, piece in inbox.pieces():
            found.append((index, piece.text))

    found: list[tuple[int, str]] = []
    with pytest.raises(APIError, match="late"):
        asyncio.run(collected())
    assert found == [(0, "all of it"), (1, "a part")]


def test_an_event_is_json():
    with pytest.raises(ValueError, match="not JSON compliant"):
        event({"logprob": -math.inf})
