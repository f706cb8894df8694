"""A mixture of experts with the tokens of GLM-4.5: its chat, its calls, its thinking."""

import json

import pytest
from flax import nnx

from jaxrl_llm.models.config import ExpertsConfig
from jaxrl_llm.models.config import tiny
from jaxrl_llm.models.glm_chat import GLM4_5
from jaxrl_llm.models.tokenizers import ByteTokenizer
from jaxrl_llm.models.transformer import Transformer
from jaxrl_llm.serving import ServerSettings
from jaxrl_llm.serving import serving
from jaxrl_llm.serving.messages import CallStream
from jaxrl_llm.serving.messages import stream_of
from tests.serving.conftest import client_of

TOOL = {
    "type": "function",
    "function": {
        "name": "add",
        "description": "The sum.",
        "parameters": {
            "type": "object",
            "properties": {"a": {"type": "integer", "minimum": 0, "maximum": 9}, "b": {"enum": [1, 2]}},
            "required": ["a", "b"],
        },
    },
}
CALL = '<tool_call>\n{"name": "add", "arguments": {"a": 1, "b": 2}}\n</tool_call>'


@pytest.fixture(scope="module")
def client():
    tokenizer = ByteTokenizer(["[gMASK]", "<sop>", "<|system|>", "<|assistant|>", *GLM4_5.stop_tokens])
    experts = ExpertsConfig(count=4, chosen=2, width=16, shared=1, dense_layers=1)
    config = tiny(vocab_size=tokenizer.vocab_size, max_positions=1024, experts=experts)
    settings = ServerSettings(name="glm", api_key="k", slots=2)
    with serving(Transformer(config, rngs=nnx.Rngs(0)), tokenizer, settings) as address:
        yield client_of(address, api_key="k", timeout=120)


def test_a_call_that_must_be_made_is_made_in_its_own_format(client):
    asked = {"model": "glm", "messages": [{"role": "user", "content": "1 + 2"}], "max_tokens": 200, "seed": 1}
    answer = client.chat.completions.create(**asked, tools=[TOOL], tool_choice="required", parallel_tool_calls=False)
    (call,) = answer.choices[0].message.tool_calls
    arguments = json.loads(call.function.arguments)
    assert (call.function.name, set(arguments)) == ("add", {"a", "b"})
    assert arguments["b"] in (1, 2)
    assert answer.choices[0].finish_reason == "tool_calls"
    assert answer.choices[0].message.content is None
    written = {"id": call.id, "type": "function", "function": call.function.model_dump()}
    asked["messages"] += [
        {"role": "assistant", "content": None, "tool_calls": [written]},
        {"role": "tool", "tool_call_id": call.id, "content": "3"},
    ]
    schema = {"type": "object", "properties": {"sum": {"const": 3}}, "required": ["sum"], "additionalProperties": False}
    described = {"type": "json_schema", "json_schema": {"name": "sum", "schema": schema}}
    answer = client.chat.completions.create(**asked, response_format=described)
    assert json.loads(answer.choices[0].message.content) == {"sum": 3}


def test_what_is_not_closed_is_thinking(client):
    answer = client.chat.completions.create(
        model="glm", messages=[{"role": "user", "content": "think"}], max_tokens=5, temperature=0
    )
    assert answer.choices[0].message.role == "assistant"
    stream = stream_of(GLM4_5, [])
    found = stream.feed("<think>so") + stream.feed("</think>it is") + stream.finish()
    assert (found.thinking, found.content) == ("so", "it is")


@pytest.mark.parametrize(
    ("text", "content", "calls"),
    [
        ("plain", "plain", 0),
        (CALL, "", 1),
        (f"Let me see.{CALL}\n{CALL}\n", "Let me see.", 2),
        ("<tool_call>{no json}</tool_call>", "<tool_call>{no json}</tool_call>", 0),
        (CALL.replace("add", "sub"), CALL.replace("add", "sub"), 0),
        ("a <tool_cal", "a <tool_cal", 0),
        ("<tool_call> begun", "<tool_call> begun", 0),
    ],
)
@pytest.mark.parametrize("size", [1, 7, 1000])
def test_calls_between_tags_are_read_wherever_the_text_is_cut(text, content, calls, size):
    stream = CallStream([TOOL])
    parts = [stream.feed(text[start : start + size]) for start in range(0, len(text), size)]
    parts.append(stream.finish())
    assert "".join(part.content for part in parts) == content
    found = [call for part in parts for call in part.tool_calls]
    assert [(call.name, dict(call.arguments)) for call in found] == [("add", {"a": 1, "b": 2})] * calls
