"""What the server does beside answering: bounds, keys, clients that go, weights that change, metrics."""

import dataclasses
import http
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from jaxrl_llm.models.tokenizers import ByteTokenizer
from jaxrl_llm.models.weights import save_hf
from jaxrl_llm.serving import Limits
from jaxrl_llm.serving import ServerSettings
from jaxrl_llm.serving import serving
from jaxrl_llm.serving.__main__ import main
from jaxrl_llm.serving.served import chat_of
from jaxrl_llm.serving.served import end_ids_of
from jaxrl_llm.serving.server import bound_socket
from tests.serving.conftest import KEY
from tests.serving.conftest import NAME
from tests.serving.conftest import SETTINGS
from tests.serving.conftest import SLOTS
from tests.serving.conftest import model
from tests.serving.conftest import served
from tests.serving.conftest import tokenizer
from tests.serving.raw import ask
from tests.serving.raw import begun
from tests.serving.raw import metric

LONG = {"model": NAME, "prompt": "a", "max_tokens": 700, "temperature": 1, "ignore_eos": True}
SHORT = {**LONG, "max_tokens": 2}


def until(check, seconds: float = 20) -> None:
    end = time.monotonic() + seconds
    while not check():
        assert time.monotonic() < end, "it did not come to pass"
        time.sleep(0.02)


def test_a_client_that_goes_frees_its_slot(address):
    """Whether it streams or waits for the whole answer."""
    before = metric(address, "cancelled_total")
    for stream in (True, False):
        places = [begun(address, "/v1/completions", {**LONG, "stream": stream}) for _ in range(SLOTS)]
        until(lambda: metric(address, "busy_slots") == SLOTS)
        for place in places:
            place.close()
        until(lambda: metric(address, "busy_slots") == 0)
    assert metric(address, "cancelled_total") == before + 2 * SLOTS
    assert ask(address, "/v1/completions", SHORT)[0] == http.HTTPStatus.OK


def test_the_official_client_cancels_a_stream(client, address):
    with client.completions.create(**{key: LONG[key] for key in ("model", "prompt", "max_tokens")}, stream=True) as s:
        assert next(iter(s)).choices[0].text is not None
    until(lambda: metric(address, "busy_slots") == 0)


def test_more_than_the_slots_wait_and_more_than_the_queue_are_refused(address):
    places = [begun(address, "/v1/completions", LONG) for _ in range(SLOTS)]
    until(lambda: metric(address, "busy_slots") == SLOTS)
    more = [begun(address, "/v1/completions", LONG) for _ in range(8)]
    until(lambda: metric(address, "queued_generations") == 8)
    status, answer = ask(address, "/v1/completions", SHORT)
    assert status == http.HTTPStatus.TOO_MANY_REQUESTS
    assert answer["error"]["code"] == "queue_full"
    assert "do not fit into the queue of 8" in answer["error"]["message"]
    for place in (*places, *more):
        place.close()
    until(lambda: metric(address, "busy_slots") + metric(address, "queued_generations") == 0)
    assert ask(address, "/v1/completions", SHORT)[0] == http.HTTPStatus.OK


def test_many_at_once_are_all_answered_as_they_would_be_alone(client):
    asked = {"model": NAME, "max_tokens": 8, "temperature": 1, "seed": 1}
    ids = {"return_token_ids": True}
    prompts = ["".join(np.random.default_rng(n).choice(list("abcdef"), 3 + 5 * n)) for n in range(10)]

    def one(prompt: str):
        return client.completions.create(prompt=prompt, **asked, extra_body=ids).choices[0].token_ids

    alone = [one(prompt) for prompt in prompts]
    with ThreadPoolExecutor(10) as pool:
        assert list(pool.map(one, prompts)) == alone


@pytest.mark.parametrize(
    ("body", "status", "sentence"),
    [
        (b"", 400, "the body is no JSON"),
        (b"{", 400, "the body is no JSON"),
        (b"[1]", 400, "the body is a list of 1; expected a JSON object"),
        (b'{"temperature": NaN}', 400, "NaN is no number"),
        (b"\xff\xfe", 400, "the body is no JSON"),
        (b"[" * 60_000, 400, "the body is no JSON"),
        (b'{"model": "tiny"}', 400, "prompt is not given"),
        (b'{"prompt": "\\ud800"}', 400, "half of a surrogate pair"),
        (b'{"prompt": "a", "seed": 1e999}', 400, "seed is inf"),
        (b'{"prompt": "a", "stop": {"a": 1}}', 400, "stop is a dict of 1"),
        (b" " * 70_000, 413, "larger than 65536 bytes"),
    ],
)
def test_malformed_bodies_are_told_so(body, status, sentence, bounded):
    found, answer = ask(bounded, "/v1/completions", body)
    assert (found, set(answer)) == (status, {"error"})
    assert sentence in answer["error"]["message"]
    assert set(answer["error"]) == {"message", "type", "param", "code"}


@pytest.fixture(scope="module")
def bounded():
    """A server of one slot with tight bounds, which keeps no client long."""
    limits = Limits(body_bytes=1 << 16, body_seconds=0.5, seconds=1.5)
    with served(slots=1, limits=limits) as address:
        yield address


def test_a_slow_body_and_a_late_answer_end(bounded):
    place = begun(bounded, "/v1/completions", SHORT, cut=5)
    assert b"408" in place.recv(4096).split(b"\r\n")[0]
    place.close()
    # One holds the slot for longer than anybody may take; then both are late.
    began = time.monotonic()
    status, answer = ask(bounded, "/v1/completions", {**LONG, "n": 9})
    assert time.monotonic() - began < 8
    assert (status, answer["error"]["code"]) == (504, "timeout")
    assert ask(bounded, "/v1/completions", SHORT)[0] == http.HTTPStatus.OK


def test_routes_methods_and_keys(address):
    assert ask(address, "/v1/embeddings", {})[0] == http.HTTPStatus.NOT_FOUND
    status, answer = ask(address, "/v1/completions")
    assert (status, answer["error"]["code"]) == (405, "no_route")
    assert ask(address, "/health", headers={}) == (200, {"status": "ok"})
    for path in ("/v1/models", "/metrics", "/v1/weights"):
        for headers in ({}, {"authorization": KEY}, {"authorization": "Bearer ключ".encode().decode("latin-1")}):
            assert ask(address, path, headers=headers)[0] == http.HTTPStatus.UNAUTHORIZED
    assert ask(address, "/tokenize", {"content": "ab", "add_special_tokens": False})[1]["tokens"] == [97, 98]


def test_metrics_count_what_was_done(address):
    names = ("prompt_tokens_total", "generated_tokens_total", "time_to_first_token_seconds_count")
    before = [metric(address, name) for name in names]
    ask(address, "/v1/completions", {**SHORT, "prompt": "abc", "max_tokens": 5})
    assert [metric(address, name) - old for name, old in zip(names, before, strict=True)] == [3, 5, 1]
    shared = "a long beginning that two prompts have in common, "
    ask(address, "/v1/completions", {**SHORT, "prompt": shared + "one"})
    reused = metric(address, "reused_tokens_total")
    _, answer = ask(address, "/v1/completions", {**SHORT, "prompt": shared + "two"})
    assert answer["usage"]["prompt_tokens_details"]["cached_tokens"] == len(shared)
    assert metric(address, "reused_tokens_total") == reused + len(shared)


def test_weights_are_swapped_between_steps_and_answers_name_their_version(tmp_path):
    save_hf(model(1), tmp_path / "next", tokenizer=tokenizer())
    greedy = {"model": NAME, "prompt": "the prompt", "max_tokens": 6, "temperature": 0, "ignore_eos": True}
    with served(weights=tmp_path) as address, served(1) as other:
        first = ask(address, "/v1/completions", greedy)[1]
        assert first["system_fingerprint"] == "weights-0"
        with ThreadPoolExecutor(1) as pool:
            during = pool.submit(ask, address, "/v1/completions", {**LONG, "temperature": 0})
            until(lambda: metric(address, "busy_slots") == 1)
            taken = ask(address, "/v1/weights", {"path": "next", "version": 7})
            assert taken == (200, {"version": 7, "success": True})
            versions = during.result()[1]["choices"][0]["weights_versions"]
        assert [one["version"] for one in versions] == [0, 7]
        assert versions[1]["from_token"] > 0
        second = ask(address, "/v1/completions", greedy)[1]
        assert second["system_fingerprint"] == "weights-7"
        assert second["choices"][0]["text"] == ask(other, "/v1/completions", greedy)[1]["choices"][0]["text"]
        assert second["choices"][0]["text"] != first["choices"][0]["text"]
        assert ask(address, "/v1/weights")[1] == {"version": 7}
        assert ask(address, "/v1/weights", {"path": "../../etc"})[0] == http.HTTPStatus.FORBIDDEN
        (tmp_path / "loop").symlink_to(tmp_path / "loop")
        for path in ("nowhere", "a\0b", "loop"):
            assert ask(address, "/v1/weights", {"path": path})[0] == http.HTTPStatus.BAD_REQUEST
        again = ask(address, "/v1/weights", {"path": "next", "version": 7})
        assert again[0] == http.HTTPStatus.CONFLICT
        assert "expected more than 7" in again[1]["error"]["message"]
        with ThreadPoolExecutor(2) as pool:
            both = list(pool.map(lambda _: ask(address, "/v1/weights", {"path": "next"}), range(2)))
        taken = [answer["version"] for status, answer in both if status == http.HTTPStatus.OK]
        assert taken == sorted(set(range(8, 8 + len(taken))))
        other_words = ByteTokenizer(["<|im_start|>", "<|another|>"])
        save_hf(model(1), tmp_path / "words", tokenizer=other_words)
        status, answer = ask(address, "/v1/weights", {"path": "words"})
        assert (status, answer["error"]["code"]) == (400, "other_model")
        assert ask(other, "/v1/weights", {"path": "next"})[0] == http.HTTPStatus.FORBIDDEN
    assert versions[0] == {"version": 0, "from_token": 0}


def test_weights_that_are_no_numbers_end_their_answers_and_not_the_server(tmp_path):
    broken = model()
    broken.embedding[...] *= np.nan
    save_hf(broken, tmp_path / "broken", tokenizer=tokenizer())
    with serving(broken, tokenizer(), dataclasses.replace(SETTINGS, weights=tmp_path)) as address:
        for _ in range(2):
            status, answer = ask(address, "/v1/completions", SHORT)
            assert (status, answer["error"]["code"]) == (500, "not_finite")
        assert metric(address, "busy_slots") == 0
        assert ask(address, "/health")[0] == http.HTTPStatus.OK
        assert ask(address, "/v1/weights", {"path": "broken"})[0] == http.HTTPStatus.BAD_REQUEST
        assert ask(address, "/v1/weights")[1] == {"version": 0}


def test_a_port_that_is_taken_and_a_place_that_others_reach_are_refused(address, tmp_path):
    port = int(address.rsplit(":", 1)[1])
    with pytest.raises(ValueError, match=rf"port {port} of 127.0.0.1 cannot be had .*is another server on it"):
        bound_socket("127.0.0.1", port, api_key=KEY)
    with pytest.raises(ValueError, match="which others can reach; give the server an API key"):
        bound_socket("0.0.0.0", 0, api_key=None)
    bound_socket("0.0.0.0", 0, api_key=KEY).close()


def test_the_command_line_refuses_in_one_sentence(address, tmp_path, capsys):
    key, two = tmp_path / "key", tmp_path / "two"
    key.write_text("k\n")
    two.write_text("k k\n")
    port = address.rsplit(":", 1)[1]
    for arguments, sentence in (
        (["nowhere", "--api-key-file", str(key), "--port", port], "is another server on it"),
        (["nowhere", "--api-key-file", str(key), "--port", "0"], "expected a Hugging Face folder or a GGUF file"),
        (["nowhere", "--api-key-file", str(two)], "has 2 words; expected the key alone"),
        (["nowhere", "--port", "0"], "give the server a key"),
        (["nowhere", "--port", "0", "--no-key", "--host", "0.0.0.0"], "which others can reach"),
        (["nowhere", "--port", "70000", "--no-key"], "port is 70000; expected 0 .. 65535"),
        (["nowhere", "--port", "0", "--no-key", "--seconds", "nan"], "seconds is nan; expected more than 0"),
        (["nowhere", "--port", "0", "--no-key", "--body-bytes", "0"], "body_bytes is 0; expected at least 1"),
    ):
        assert main(arguments) == 2
        said = capsys.readouterr().err
        assert sentence in said
        assert len(said.strip().splitlines()) == 1


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"context": 2}, "context is 2; expected at least 16"),
        ({"queue": -100}, "queue is -100; expected at least 0"),
        ({"slots": 0}, "slots is 0; expected at least 1"),
        ({"api_key": ""}, "api_key is empty"),
    ],
)
def test_settings_that_cannot_be_are_refused(fields, sentence):
    with pytest.raises(ValueError, match=sentence):
        ServerSettings(**fields)


def test_a_model_without_a_chat_says_so():
    assert chat_of(ByteTokenizer()) is None
    assert end_ids_of(ByteTokenizer(), None) == (258,)
    with pytest.raises(ValueError, match="which the tokenizer does not have"):
        chat_of(ByteTokenizer(), "llama3")
    with pytest.raises(ValueError, match="chat is 'x'; expected one of chatml"):
        chat_of(ByteTokenizer(), "x")
