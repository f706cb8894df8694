"""The official client against our server, with a small random model."""

import json

import numpy as np
import openai
import pytest

from jaxrl_llm import categorical
from tests.serving.conftest import NAME
from tests.serving.conftest import client_of
from tests.serving.conftest import model
from tests.serving.conftest import tokenizer


def test_a_completion_has_the_log_probs_that_scoring_has(client):
    asked = {"model": NAME, "prompt": "two and two", "max_tokens": 12, "temperature": 1, "seed": 3, "logprobs": 5}
    answer = client.completions.create(**asked, extra_body={"return_token_ids": True})
    choice = answer.choices[0]
    prompt, tokens = choice.prompt_token_ids, choice.token_ids
    assert prompt == tokenizer().encode("two and two")
    assert answer.usage.prompt_tokens == len(prompt)
    assert answer.usage.completion_tokens == len(tokens)
    assert choice.finish_reason == ("stop" if tokens[-1] == tokenizer().eos_id else "length")
    text = np.array([[*prompt, *tokens]])
    policy = model()
    log_probs = np.asarray(categorical.log_probs(policy.logits(policy(text)))[0])
    expected = [log_probs[place - 1, text[0, place]] for place in range(len(prompt), text.shape[1])]
    np.testing.assert_allclose(choice.logprobs.token_logprobs, expected, atol=1e-5)
    likeliest = np.sort(log_probs[len(prompt) - 1])[::-1]
    found = sorted(choice.logprobs.top_logprobs[0].values(), reverse=True)
    np.testing.assert_allclose(found[0], likeliest[0], atol=1e-5)
    again = client.completions.create(**asked, extra_body={"return_token_ids": True})
    assert again.choices[0].token_ids == tokens
    assert again.usage.prompt_tokens_details.cached_tokens == 0  # shorter than what is worth keeping
    assert answer.system_fingerprint == "weights-0"
    assert choice.weights_versions == [{"version": 0, "from_token": 0}]


def test_several_prompts_and_answers_each_with_their_seed(client):
    asked = {"model": NAME, "max_tokens": 6, "temperature": 1.5, "seed": 5}
    ids = {"return_token_ids": True}
    both = client.completions.create(prompt=["one", "two"], n=3, **asked, extra_body=ids)
    assert [choice.index for choice in both.choices] == list(range(6))
    answers = [tuple(choice.token_ids) for choice in both.choices]
    assert len(set(answers)) == 6
    first = client.completions.create(prompt=[*map(int, tokenizer().encode("one"))], n=3, **asked, extra_body=ids)
    assert [tuple(choice.token_ids) for choice in first.choices] == answers[:3]


def test_a_stream_says_what_the_whole_answer_says(client):
    asked = {"model": NAME, "messages": [{"role": "user", "content": "hello"}], "max_tokens": 40, "seed": 1}
    whole = client.chat.completions.create(**asked, logprobs=True, top_logprobs=2)
    pieces = list(
        client.chat.completions.create(
            **asked, logprobs=True, top_logprobs=2, stream=True, stream_options={"include_usage": True}
        )
    )
    assert "".join(p.choices[0].delta.content or "" for p in pieces if p.choices) == whole.choices[0].message.content
    entries = [entry for p in pieces if p.choices for entry in p.choices[0].logprobs.content]
    assert [entry.bytes for entry in entries] == [entry.bytes for entry in whole.choices[0].logprobs.content]
    np.testing.assert_allclose(
        [entry.logprob for entry in entries], [e.logprob for e in whole.choices[0].logprobs.content], atol=1e-5
    )
    assert pieces[-1].usage.completion_tokens == whole.usage.completion_tokens
    assert [p.choices[0].finish_reason for p in pieces if p.choices][-1] == whole.choices[0].finish_reason
    assert all(len(entry.top_logprobs) == 2 for entry in entries)


def test_a_stop_string_ends_an_answer_and_is_not_in_it(client):
    asked = {"model": NAME, "prompt": "abc", "max_tokens": 60, "seed": 11}
    text = client.completions.create(**asked).choices[0].text
    stop = text[20:22]
    answer = client.completions.create(**asked, stop=[stop, "never at all"]).choices[0]
    assert answer.text == text[: text.find(stop)]
    assert answer.finish_reason == "stop"
    streamed = client.completions.create(**asked, stop=stop, stream=True)
    assert "".join(piece.choices[0].text for piece in streamed) == answer.text


def test_a_schema_holds_a_random_model_and_its_log_probs_are_of_what_was_allowed(client):
    schema = {
        "type": "object",
        "properties": {"task": {"enum": ["left", "right"]}, "score": {"type": "integer", "minimum": 0, "maximum": 99}},
        "required": ["task", "score"],
        "additionalProperties": False,
    }
    described = {"type": "json_schema", "json_schema": {"name": "choice", "strict": True, "schema": schema}}
    answer = client.chat.completions.create(
        model=NAME, messages=[{"role": "user", "content": "?"}], response_format=described, logprobs=True, n=4, seed=0
    )
    for choice in answer.choices:
        said = json.loads(choice.message.content)
        assert said["task"] in ("left", "right")
        assert 0 <= said["score"] <= 99
        assert choice.finish_reason == "stop"
        # What the grammar forces has probability one.
        assert choice.logprobs.content[0].logprob == pytest.approx(0, abs=1e-6)
    assert len({choice.message.content for choice in answer.choices}) > 1


def test_tools_and_a_schema_together_give_one_or_the_other(client):
    tool = {
        "type": "function",
        "function": {
            "name": "add",
            "description": "The sum.",
            "parameters": {
                "type": "object",
                "properties": {"a": {"type": "integer", "maximum": 9, "minimum": 0}, "b": {"enum": [1, 2]}},
                "required": ["a", "b"],
            },
        },
    }
    schema = {"type": "object", "properties": {"sum": {"enum": [1, 2, 3]}}, "required": ["sum"]}
    schema["additionalProperties"] = False
    described = {"type": "json_schema", "json_schema": {"name": "sum", "strict": True, "schema": schema}}
    asked = {"model": NAME, "messages": [{"role": "user", "content": "1 + 2"}], "tools": [tool], "max_tokens": 90}
    kinds = set()
    # Hot enough that a model without sense chooses either.
    both = client.chat.completions.create(**asked, response_format=described, seed=0, n=8, temperature=50)
    for choice in both.choices:
        if choice.message.tool_calls:
            kinds.add("call")
            assert choice.finish_reason in ("tool_calls", "length")
            arguments = json.loads(choice.message.tool_calls[0].function.arguments)
            assert arguments["b"] in (1, 2)
        elif choice.finish_reason == "stop":
            kinds.add("answer")
            assert json.loads(choice.message.content)["sum"] in (1, 2, 3)
    assert kinds == {"call", "answer"}
    streamed = list(
        client.chat.completions.create(
            **asked, tool_choice="required", parallel_tool_calls=False, stream=True, temperature=0
        )
    )
    calls = [call for piece in streamed for call in piece.choices[0].delta.tool_calls or ()]
    assert [call.function.name for call in calls] == ["add"]
    assert streamed[-1].choices[0].finish_reason == "tool_calls"
    # And the result comes back as a message.
    called = {"id": calls[0].id, "type": "function", "function": {"name": "add", "arguments": '{"a": 1, "b": 2}'}}
    talk = [
        {"role": "user", "content": "1 + 2"},
        {"role": "assistant", "content": None, "tool_calls": [called]},
        {"role": "tool", "tool_call_id": calls[0].id, "content": "3"},
    ]
    answer = client.chat.completions.create(model=NAME, messages=talk, tools=[tool], response_format=described)
    assert answer.choices[0].message.role == "assistant"


def test_any_json_object(client):
    answer = client.chat.completions.create(
        model=NAME,
        messages=[{"role": "user", "content": "an object"}],
        response_format={"type": "json_object"},
        max_tokens=200,
        temperature=0.3,
        seed=2,
    )
    choice = answer.choices[0]
    assert choice.message.content.startswith("{")
    if choice.finish_reason == "stop":
        assert isinstance(json.loads(choice.message.content), dict)


def test_models_are_listed(client):
    assert [one.id for one in client.models.list()] == [NAME]
    assert client.models.retrieve(NAME).max_model_len == 768
    with pytest.raises(openai.NotFoundError, match="the model 'gpt' is not here"):
        client.models.retrieve("gpt")


@pytest.mark.parametrize(
    ("fields", "error", "sentence", "code"),
    [
        (
            {"model": "gpt"},
            openai.NotFoundError,
            "the model 'gpt' is not here; this server has 'tiny'",
            "model_not_found",
        ),
        ({"prompt": "a" * 800}, openai.BadRequestError, "has 800 tokens; expected 1 .. 767", "context_length_exceeded"),
        ({"prompt": [1, 999]}, openai.BadRequestError, "tokens 1 .. 999; the model's are 0 .. 260", None),
        ({"prompt": []}, openai.BadRequestError, "prompt has 0 prompts", None),
        ({"temperature": -1}, openai.BadRequestError, r"temperature is -1; expected a number in \[0, 100\]", None),
        ({"top_p": 0}, openai.BadRequestError, r"top_p is 0; expected a number in \(0, 1\]", None),
        ({"n": 1000}, openai.BadRequestError, "n is 1000; expected a whole number in 1 .. 128", None),
        ({"max_tokens": 0}, openai.BadRequestError, "max_tokens is 0", None),
        ({"logit_bias": {"5": 100}}, openai.BadRequestError, "logit_bias is .* does not support", "unsupported"),
        ({"frequency_penalty": 0.5}, openai.BadRequestError, "frequency_penalty is 0.5, which", "unsupported"),
        ({"stop": ["a"] * 20}, openai.BadRequestError, "stop is a list of 20; expected a text or at most 16", None),
        (
            {"extra_body": {"tempo": 3}},
            openai.BadRequestError,
            "tempo is no field that this server knows",
            "unknown_field",
        ),
        ({"extra_body": {"logprobs_mode": "x"}}, openai.BadRequestError, "logprobs_mode is 'x'; expected one of", None),
    ],
)
def test_what_cannot_be_answered_is_said(client, fields, error, sentence, code):
    with pytest.raises(error, match=sentence) as caught:
        client.completions.create(**{"model": NAME, "prompt": "a", "max_tokens": 2, **fields})
    assert caught.value.code == code
    assert caught.value.type in ("invalid_request_error", "not_found_error")


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"messages": []}, "messages is a list of 0"),
        ({"messages": [{"role": "robot", "content": "a"}]}, r"messages\[0\] has the role 'robot'"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "a part of type 'image_url'"),
        ({"top_logprobs": 2}, "top_logprobs is given without logprobs"),
        ({"tools": [{"type": "function"}]}, r"tools\[0\] is a dict of 1"),
        ({"tool_choice": "required"}, "tool_choice is 'required'; expected"),
        ({"response_format": {"type": "xml"}}, "response_format.type is 'xml'"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"schema": {"uniqueItems": True}}}},
            "the keyword 'uniqueItems', which a grammar cannot hold",
        ),
    ],
)
def test_chats_that_cannot_be_answered_are_said(client, fields, sentence):
    body = {"messages": [{"role": "user", "content": "a"}], **fields}
    with pytest.raises(openai.BadRequestError, match=sentence):
        client.chat.completions.create(model=NAME, **body)


def test_a_wrong_key_is_told_so_and_nothing_else(address):
    for key in ("wrong", "s3cret-key2"):
        with pytest.raises(openai.AuthenticationError, match="the API key is missing or wrong") as caught:
            client_of(address, default_headers={"authorization": f"Bearer {key}"}).models.list()
        assert caught.value.status_code == 401
        assert caught.value.code == "invalid_api_key"


def test_log_probs_of_the_drawing_distribution_on_request(client):
    asked = {"model": NAME, "prompt": "abcd", "max_tokens": 3, "temperature": 0.25, "seed": 4, "logprobs": 0}
    raw = client.completions.create(**asked).choices[0].logprobs
    drawn = client.completions.create(**asked, extra_body={"logprobs_mode": "processed_logprobs"}).choices[0].logprobs
    assert raw.tokens == drawn.tokens
    assert max(abs(a - b) for a, b in zip(raw.token_logprobs, drawn.token_logprobs, strict=True)) > 1e-3
    policy = model()
    logits = np.asarray(policy.logits(policy(np.array([tokenizer().encode("abcd")])))[0, -1], np.float64) / 0.25
    token = client.completions.create(**asked, extra_body={"return_token_ids": True}).choices[0].token_ids[0]
    expected = logits[token] - np.log(np.exp(logits).sum())
    np.testing.assert_allclose(drawn.token_logprobs[0], expected, atol=1e-5)


def test_an_echo_scores_the_prompt(client):
    answer = client.completions.create(
        model=NAME, prompt="to be scored", max_tokens=1, echo=True, logprobs=1, extra_body={"return_token_ids": True}
    ).choices[0]
    assert answer.text.startswith("to be scored")
    tokens = np.array([answer.prompt_token_ids])
    policy = model()
    log_probs = np.asarray(categorical.log_probs(policy.logits(policy(tokens)))[0])
    assert answer.logprobs.token_logprobs[0] is None
    expected = [log_probs[place - 1, tokens[0, place]] for place in range(1, tokens.shape[1])]
    np.testing.assert_allclose(answer.logprobs.token_logprobs[1:-1], expected, atol=1e-5)
