"""A server that is asked to take new weights, and one that does not."""

import importlib.util
from pathlib import Path

import pytest

from jaxrl_llm.rollouts.engines import EngineError
from jaxrl_llm.rollouts.engines.reload import sglang_reload


@pytest.fixture(scope="module")
def server():
    """The misbehaving server of `test_rollouts_engines_failures`."""
    path = Path(__file__).with_name("test_rollouts_engines_failures.py")
    spec = importlib.util.spec_from_file_location("engines_failures", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.server


@pytest.mark.parametrize("end", ["", "/"])
def test_sglang_is_told_the_folder(end, server) -> None:
    with server(lambda number, body: (200, '{"success": true, "message": "ok"}')) as (url, seen):
        sglang_reload(url + end)("weights/3")
        sglang_reload(url.removesuffix("/v1"))("weights/4")
    assert seen == [{"model_path": "weights/3"}, {"model_path": "weights/4"}]


@pytest.mark.parametrize(
    ("status", "text", "reason"),
    [
        (200, '{"success": false, "message": "no such folder"}', "no such folder"),
        (200, '{"message": "ok"}', "ok"),
        (200, "fine", "no JSON"),
        (400, '{"success": false}', "HTTP status 400"),
    ],
)
def test_what_a_server_does_not_take_is_one_sentence(status, text, reason, server) -> None:
    sentence = rf"127\.0\.0\.1:\d+ did not take the weights of weights/3: .*{reason}"
    with server(lambda number, body: (status, text)) as (url, _), pytest.raises(EngineError, match=sentence):
        sglang_reload(url)("weights/3")


def test_a_server_that_is_not_there_and_an_address_that_cannot_be() -> None:
    with pytest.raises(EngineError, match="did not take the weights of weights/3: Connection error"):
        sglang_reload("http://127.0.0.1:9/v1", seconds=5)("weights/3")
    with pytest.raises(ValueError, match="expected http://host:port/path"):
        sglang_reload("127.0.0.1:30000")


def test_a_key_is_in_no_sentence(server) -> None:
    def echo(number, body):
        return 403, "the key s3cret-key is wrong"

    with server(echo) as (url, _), pytest.raises(EngineError) as caught:
        sglang_reload(url, api_key="s3cret-key")("weights/3")
    assert "s3cret-key" not in str(caught.value)
