"""The command line with SmolLM2: a chat, a schema, a log-prob, as a user would ask for them."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import openai
import pytest

from jaxrl_llm import categorical
from jaxrl_llm.models.pretrained import smollm2_135m


@pytest.fixture(scope="module")
def client(tmp_path_factory):
    """`python -m jaxrl_llm.serving smollm2_135m` in a process of its own."""
    key = tmp_path_factory.mktemp("key") / "key"
    key.write_text("a-key\n")
    command = [sys.executable, "-m", "jaxrl_llm.serving", "smollm2_135m", "--port", "0", "--api-key-file", str(key)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(["kernels", *sys.path])}
    root = Path(__file__).parents[2]
    process = subprocess.Popen(
        [*command, "--slots", "2", "--context", "512"], stdout=subprocess.PIPE, text=True, cwd=root, env=environment
    )
    assert process.stdout is not None
    line = process.stdout.readline()
    assert line.startswith("smollm2_135m at http://127.0.0.1:"), line
    yield openai.OpenAI(base_url=line.split(" at ")[1].split(",")[0], api_key="a-key", max_retries=0, timeout=120)
    process.send_signal(signal.SIGINT)
    assert process.wait(60) in (0, -signal.SIGINT)


def test_a_chat_is_answered_in_words(client):
    question = [{"role": "user", "content": "What is the capital of France? Answer in one sentence."}]
    asked = {"model": "smollm2_135m", "messages": question, "temperature": 0, "max_tokens": 24}
    answer = client.chat.completions.create(**asked)
    assert "Paris" in answer.choices[0].message.content
    assert answer.choices[0].finish_reason == "stop"
    streamed = client.chat.completions.create(**asked, stream=True)
    said = "".join(piece.choices[0].delta.content or "" for piece in streamed)
    assert said == answer.choices[0].message.content


def test_log_probs_are_those_of_the_model(client):
    answer = client.completions.create(
        model="smollm2_135m",
        prompt="The sky is",
        max_tokens=8,
        temperature=0,
        logprobs=1,
        extra_body={"return_token_ids": True},
    ).choices[0]
    model, _ = smollm2_135m()
    text = np.array([[*answer.prompt_token_ids, *answer.token_ids]])
    log_probs = np.asarray(categorical.log_probs(model.logits(model(text)))[0])
    start = len(answer.prompt_token_ids)
    expected = [log_probs[place - 1, text[0, place]] for place in range(start, text.shape[1])]
    np.testing.assert_allclose(answer.logprobs.token_logprobs, expected, atol=2e-4)
    assert answer.token_ids == [int(log_probs[place - 1].argmax()) for place in range(start, text.shape[1])]


def test_a_schema_gives_an_object_of_it_and_tools_may_be_called(client):
    schema = {
        "type": "object",
        "properties": {"city": {"type": "string", "maxLength": 20}, "in_europe": {"type": "boolean"}},
        "required": ["city", "in_europe"],
        "additionalProperties": False,
    }
    described = {"type": "json_schema", "json_schema": {"name": "capital", "strict": True, "schema": schema}}
    tool = {
        "type": "function",
        "function": {
            "name": "capital",
            "description": "The capital of a country.",
            "parameters": {
                "type": "object",
                "properties": {"country": {"type": "string", "maxLength": 20}},
                "required": ["country"],
            },
        },
    }
    question = [{"role": "user", "content": "What is the capital of France?"}]
    asked = {"model": "smollm2_135m", "messages": question, "temperature": 0, "max_tokens": 60}
    said = json.loads(client.chat.completions.create(**asked, response_format=described).choices[0].message.content)
    assert set(said) == {"city", "in_europe"}
    choice = client.chat.completions.create(**asked, tools=[tool], tool_choice="required").choices[0]
    assert choice.finish_reason == "tool_calls"
    assert set(json.loads(choice.message.tool_calls[0].function.arguments)) == {"country"}
    either = client.chat.completions.create(**asked, tools=[tool], response_format=described).choices[0].message
    assert either.tool_calls or set(json.loads(either.content)) == {"city", "in_europe"}
