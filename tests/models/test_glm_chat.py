"""GLM-4.5's format: byte for byte its own template, and what cannot be written is said."""

import json
import runpy
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from tokenizers.models import WordLevel

from jaxrl_llm.models.chat import CHATML
from jaxrl_llm.models.chat import LLAMA3
from jaxrl_llm.models.chat import SMOLLM2
from jaxrl_llm.models.chat import Chat
from jaxrl_llm.models.chat import TemplateChat
from jaxrl_llm.models.chat import format_chat
from jaxrl_llm.models.chat_template import render_chat
from jaxrl_llm.models.chat_tools import allowed_types
from jaxrl_llm.models.chat_tools import argument_value
from jaxrl_llm.models.chat_tools import tool_schemas
from jaxrl_llm.models.files import ModelFileError
from jaxrl_llm.models.glm_chat import GLM4_5
from jaxrl_llm.models.tokenizers import ByteTokenizer
from jaxrl_llm.models.tokenizers import Tokenizer

GOLDEN = Path(__file__).parents[1] / "golden"
GIVEN = runpy.run_path(str(GOLDEN / "glm_chats.py"))
TEXTS: dict[str, str] = json.loads((GOLDEN / "glm_chats.json").read_text(encoding="utf-8"))
USER = {"role": "user", "content": "hi"}
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}


def test_every_text_is_the_templates() -> None:
    assert len(TEXTS) == len(GIVEN["GLM_CHATS"]) * len(GIVEN["GLM_SETTINGS"]) == 147
    for name, messages in GIVEN["GLM_CHATS"].items():
        for listed, thinking, generation in GIVEN["GLM_SETTINGS"]:
            tools = GIVEN["GLM_TOOLS"][listed]
            found = GLM4_5.render(messages, tools=tools, thinking=thinking, generation=generation)
            key = f"{name} | {listed} | {thinking} | {generation}"
            assert found == TEXTS[key], key


def test_the_format_in_short() -> None:
    said = {"role": "assistant", "content": "Hi!", "reasoning_content": "greet"}
    assert GLM4_5.render([USER]) == "[gMASK]<sop><|user|>\nhi<|assistant|>"
    assert GLM4_5.render([USER], thinking=False) == ("[gMASK]<sop><|user|>\nhi/nothink<|assistant|>\n<think></think>")
    assert GLM4_5.render([USER, said], generation=False).endswith("<|assistant|>\n<think>greet</think>\nHi!")
    assert GLM4_5.render([USER, said, USER]).endswith("<|assistant|>\n<think></think>\nHi!<|user|>\nhi<|assistant|>")


BAD: dict[str, tuple[Any, str]] = {
    "nothing": ([], "messages is empty"),
    "role": ([{"role": "observation", "content": ""}], r"messages\[0\] has the role 'observation'; expected one of"),
    "no mapping": (["hi"], r"messages\[0\] has the role 'str'; expected one of"),
    "unknown key": ([{**USER, "reasoning": "x"}], r"messages\[0\] has the keys \['reasoning'\]; expected some of"),
    "none": ([USER, {"role": "assistant", "content": None}], r"messages\[1\] has a content of type NoneType"),
    "two kinds of key": ([{**USER, 1: 2, "b": 3}], r"messages\[0\] has the keys \[1, 'b'\]; expected some of"),
    "calls": (
        [USER, {"role": "assistant", "tool_calls": 3}],
        r"messages\[1\] has tool_calls of type int; expected a list",
    ),
    "thinking that ends twice": (
        [USER, {"role": "assistant", "content": "<think>a</think>lost</think>c"}],
        r"messages\[1\] has </think> 2 times in its content, after ''; expected </think> once, and nothing before",
    ),
    "text before thinking": (
        [USER, {"role": "assistant", "content": "lost<think>a</think>c"}],
        r"messages\[1\] has </think> 1 times in its content, after 'lost'; expected </think> once, and nothing before",
    ),
    "picture": ([{"role": "user", "content": [{"type": "image"}]}], "has a part of type 'image' in its content"),
    "not the assistant": ([{**USER, "tool_calls": [{"name": "f"}]}], "is the user's and has tool_calls"),
    "thinking": ([USER, {"role": "assistant", "reasoning_content": ["a"]}], "has a reasoning_content of type list"),
    "result": ([USER, {"role": "tool", "content": [{"text": "a"}]}], "has a list with what is no result"),
    "result of no kind": ([USER, {"role": "tool", "content": 3}], r"messages\[1\] has a content of type int"),
    **{
        name: ([USER, {"role": "assistant", "tool_calls": [call]}], said)
        for name, call, said in [
            ("no name", {"function": {"arguments": {}}}, "has a call 0 with the name None and arguments of type dict"),
            (
                "no function",
                {"function": None, "name": "f"},
                "has a call 0 with the name None and arguments of type dict",
            ),
            (
                "end of call",
                {"name": "f", "arguments": {"a</tool_call>": 2}},
                "has </tool_call> in it, which the format",
            ),
            ("JSON", {"name": "f", "arguments": '{"a": 1}'}, r"arguments of type str; expected .*JSON must be decoded"),
            ("name", {"name": "f g", "arguments": {}}, "a call has the name 'f g'; expected one without white space"),
            (
                "key",
                {"name": "f", "arguments": {1: 2}},
                "a call of f has the argument 1; expected names that are texts",
            ),
            ("end of key", {"name": "f", "arguments": {"</arg_key>": 2}}, "has </arg_key> in it, which the format"),
            ("end of value", {"name": "f", "arguments": {"a": "</arg_value>"}}, "'a' of f has </arg_value> in it"),
            ("end inside", {"name": "f", "arguments": {"a": ["</arg_value>"]}}, "'a' of f has </arg_value> in it"),
            ("no JSON", {"name": "f", "arguments": {"a": {1, 2}}}, r"\{1, 2\} is no JSON value"),
            ("NaN", {"name": "f", "arguments": {"a": float("nan")}}, "nan is no JSON value"),
        ]
    },
}


@pytest.mark.parametrize("name", BAD)
def test_what_cannot_be_written_is_said(name: str) -> None:
    messages, said = BAD[name]
    with pytest.raises(ValueError, match=said) as caught:
        GLM4_5.render(messages)
    assert str(caught.value).endswith(".")


@pytest.mark.parametrize(
    ("tools", "said"),
    [
        ({"name": "f"}, "tools is a dict; expected a list of tools"),
        (["f"], r"tools\[0\] is a str; expected a mapping with a name"),
        ([{"type": "function"}], r"tools\[0\] has the name None; expected a text of at least one letter"),
        ([{"function": {"name": ""}}], r"tools\[0\] has the name ''"),
        ([TOOL, {"name": "f"}], r"tools\[1\] has the name 'f', as another has"),
        ([{"name": "f", "parameters": {"type": "array"}}], "has parameters of type 'array'; expected the JSON schema"),
        ([{"name": "f", "parameters": ["a"]}], "has parameters of type 'list'; expected the JSON schema of an object"),
        ([{"name": "f", "parameters": {"properties": []}}], "has properties of type list; expected a mapping"),
        *(
            (
                [{"name": "f", "parameters": {"properties": {"a": schema}}}],
                rf"\('f'\) has the parameter 'a' with {said}",
            )
            for schema, said in [
                ("string", "a schema of type str; expected a mapping"),
                ({"type": 3}, "the type 3; expected a text or a list of texts"),
                ({"type": ["string", None]}, r"the type \['string', None\]; expected a text or a list of texts"),
                ({"enum": None}, "enum of type NoneType; expected a list"),
                ({"allOf": {"type": "string"}}, "allOf of type dict; expected a list"),
                ({"anyOf": [{}, {"oneOf": [3]}]}, r"anyOf\[1\] with oneOf\[0\] with a schema of type int; expected"),
            ]
        ),
    ],
)
@pytest.mark.parametrize("chat", [GLM4_5, TemplateChat("{{ tools }}", "<end>")])
def test_tools_that_are_none_are_refused(tools: Any, said: str, chat: Chat) -> None:
    with pytest.raises(ValueError, match=said):
        chat.render([USER], tools=tools)
    assert tool_schemas([TOOL]) == {"f": {}}
    with pytest.raises(ValueError, match="has the name 'f>'; expected one without white space, < and >"):
        GLM4_5.render([USER], tools=[{"name": "f>"}])


@pytest.mark.parametrize(
    ("text", "schema", "value"),
    [
        ("12", {"type": "string"}, "12"),
        (" a\n", {"type": "string"}, " a\n"),
        ('{"a": 1}', {"type": "string"}, '{"a": 1}'),
        ("12", {"enum": ["12", "13"]}, "12"),
        ("12", {"const": "12"}, "12"),
        ("12", {"anyOf": [{"type": "string"}, {"const": "x"}]}, "12"),
        ("12", {"type": "integer"}, 12),
        ("12", {"type": ["string", "integer"]}, 12),
        ("12.5", {"type": ["string", "integer"]}, "12.5"),
        ("null", {"type": ["string", "null"]}, None),
        ("null", {"oneOf": [{"type": "string"}, {"type": "null"}]}, None),
        ("true", {"type": ["string", "integer"]}, "true"),
        ("[1]", {"anyOf": [{"type": "string"}, {"type": "array"}]}, [1]),
        ("12", {"allOf": [{"type": ["string", "null"]}, {"type": ["string", "integer"]}]}, "12"),
        ("12", None, 12),
        ("12", {}, 12),
        ("12", True, 12),
        ("twelve", {"type": "integer"}, "twelve"),
        ('{"a": [1.5, null, "ü"]}', {"type": "object"}, {"a": [1.5, None, "ü"]}),
        ('"12"', {"type": "integer"}, '"12"'),
        ("NaN", {"type": "number"}, "NaN"),
        ("-Infinity", {"type": "number"}, "-Infinity"),
        ("1e999", {"type": "number"}, "1e999"),
        ("9" * 5000, {"type": "number"}, "9" * 5000),
        ("9" * 400, {"type": ["string", "integer"]}, int("9" * 400)),
        ("2.0", {"type": ["string", "integer"]}, 2.0),
        ("[" * 20000, {"type": "array"}, "[" * 20000),
        ('{"a": 1, "a": 2}', {"type": "object"}, '{"a": 1, "a": 2}'),
        ('["\\ud800"]', {"type": "array"}, '["\\ud800"]'),
        ("", {"type": "integer"}, ""),
    ],
)
def test_types_of_arguments(text: str, schema: Any, value: object) -> None:
    found = argument_value(text, schema)
    assert found == value
    assert type(found) is type(value)


def test_types_of_schemas() -> None:
    assert allowed_types({"enum": [1, "a"]}) == {"integer", "number", "string"}
    assert allowed_types({"type": "integer", "enum": [1, True]}) == {"integer"}
    assert allowed_types({"type": "string", "const": 1}) == allowed_types({}) == allowed_types({"$ref": "#/x"})


def test_formats_and_templates_are_chats_too() -> None:
    for chat_format in (CHATML, SMOLLM2, LLAMA3):
        chat: Chat = chat_format
        assert chat.render([USER]) == format_chat([USER], chat_format=chat_format)
        assert chat.render([USER], generation=False) + chat_format.before.replace("{role}", "assistant") == chat.render(
            [USER]
        )
        assert (chat.end({"role": "assistant"}),) == chat.stop_tokens
        with pytest.raises(ValueError, match="this chat format has no tools; take the checkpoint's own template"):
            chat.render([USER], tools=[TOOL])
        with pytest.raises(ValueError, match="this chat format cannot ask for thinking=False"):
            chat.render([USER], thinking=False)


def test_a_template_is_told_tools_and_thinking() -> None:
    plain = ByteTokenizer()
    source = "{{ bos_token }}{{ tools | tojson }} {{ enable_thinking is defined }}{{ enable_thinking }}"
    tokenizer = Tokenizer(plain.backend, eos_id=258, bos_id=257, pad_id=256, chat_template=source)
    chat = TemplateChat.of(tokenizer)
    assert chat.stop_tokens == (chat.end({}),) == (plain.backend.id_to_token(258),)
    assert chat.render([USER], tools=[TOOL]) == f"<|bos|>{json.dumps([TOOL])} False"
    assert chat.render([USER], thinking=False) == "<|bos|>null TrueFalse"
    with pytest.raises(ValueError, match="tokenizer has no chat template"):
        TemplateChat.of(plain)
    silent = Tokenizer(gap_in_the_ids(), eos_id=1, chat_template=source)
    with pytest.raises(ValueError, match=r"the tokenizer has no text for its end tokens \(1,\); a chat needs one"):
        TemplateChat.of(silent)


def gap_in_the_ids() -> tokenizers.Tokenizer:
    """A vocabulary whose id 1 has no text."""
    return tokenizers.Tokenizer(WordLevel({"a": 0, "b": 2}, unk_token="a"))


@pytest.mark.parametrize(("source", "said"), [("{% if %}", "is no template"), ({"a": "b"}, "is a dict; expected a")])
def test_a_template_that_is_none(source: Any, said: str) -> None:
    with pytest.raises(ModelFileError, match=f"the chat template {said}"):
        TemplateChat(source, "<end>").render([USER])
    with pytest.raises(ModelFileError, match=f"the chat template {said}"):
        render_chat(source, [USER])
