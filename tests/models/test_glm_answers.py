"""Answers taken apart: against an oracle of regular expressions, in pieces cut anywhere, and written again."""

import json
import re
from collections.abc import Callable
from dataclasses import replace
from functools import reduce
from itertools import accumulate
from operator import add

import pytest
from hypothesis import given
from hypothesis import settings
from hypothesis import strategies as st

from jaxrl_llm.models.chat_tools import Answer
from jaxrl_llm.models.chat_tools import Fault
from jaxrl_llm.models.chat_tools import ToolCall
from jaxrl_llm.models.chat_tools import argument_value
from jaxrl_llm.models.glm_answers import TAGS
from jaxrl_llm.models.glm_answers import AnswerStream
from jaxrl_llm.models.glm_answers import parse_answer
from jaxrl_llm.models.glm_answers import render_answer
from jaxrl_llm.models.glm_chat import GLM4_5

PROPERTIES = {
    "text": {"type": "string"},
    "count": {"type": "integer"},
    "share": {"type": "number"},
    "yes": {"type": "boolean"},
    "list": {"type": "array"},
    "map <ü>": {"type": "object"},
    "maybe": {"type": ["boolean", "null"]},
}
TOOLS = [
    {"type": "function", "function": {"name": "f.é-1", "parameters": {"type": "object", "properties": PROPERTIES}}},
    {"name": "now"},
]
USER = [{"role": "user", "content": "hi"}]

# What a text can be made of; the words are told apart, so that each can be looked for.
WORDS = [f"w{number}w" for number in range(5)]
FRAGMENTS = [
    *TAGS, *WORDS, "now", "f.é-1", " ", "\n", "\n\n", "<", "</", "<think", "tool_call>", "count", "12", "<|user|>",
    "<tool_call>now\n</tool_call>", "<tool_call>f.é-1\n<arg_key>count</arg_key>\n<arg_value>1</arg_value>\n",
    "<arg_key>text</arg_key>\n<arg_value>", "<arg_key>count</arg_key><arg_value>7</arg_value>",
]  # fmt: skip
TEXTS = st.lists(st.sampled_from(FRAGMENTS), max_size=14).map("".join)


VALUE = r"<arg_value>(?:(?!</arg_value>).)*+</arg_value>"
CALL = re.compile(rf"<tool_call>((?>(?:{VALUE}|(?!<arg_value>|</tool_call>).)*+))</tool_call>|<tool_call>.*\Z", re.S)
ARGUMENT = r"<arg_key>((?:(?!</arg_key>).)*)</arg_key>\s*<arg_value>((?:(?!</arg_value>).)*)</arg_value>\s*"
BODY = re.compile(rf"\s*([^\s<>]+)\s*((?:{ARGUMENT})*)", re.S)
Found = tuple[str, str, list[ToolCall], list[tuple[str, str]]]


def oracle(text: str) -> Found:
    """Thinking, content, calls and faults, of the whole text at once."""
    rest, began, thinking = text, text.lstrip().startswith("<think>"), ""
    if began:
        inner, found, rest = text.lstrip().removeprefix("<think>").partition("</think>")
        if not found:
            return inner.strip(), "", [], [("thinking", "")]
        thinking = inner.strip()
    calls: list[ToolCall] = []
    faults: list[tuple[str, str]] = []
    said, place = [], 0
    for match in [*CALL.finditer(rest), None]:
        part = rest[place : match.start() if match else None]
        if part.strip():
            faults += [("text", "")] * bool(place)
            said.append(part.strip())
            stray = re.findall("</tool_call>|</think>", part)
            faults += [("call" if "call" in tag else "thinking", "") for tag in stray if "call" in tag or not began]
        if match:
            place = match.end()
            body = BODY.fullmatch(match.group(1) or "")
            pairs = re.findall(ARGUMENT, body.group(2), re.S) if body else []
            if body is None or len(dict(pairs)) < len(pairs):
                faults.append(("call", match.group()))
                continue
            name = body.group(1)
            schemas = PROPERTIES if name == "f.é-1" else {}
            calls.append(ToolCall(name, {key: argument_value(value, schemas.get(key)) for key, value in pairs}))
            faults += [("tool", "")] * (name not in ("f.é-1", "now"))
    return thinking, "\n".join(said), calls, faults


def plain(answer: Answer) -> Found:
    faults = [(fault.kind, fault.text) for fault in answer.faults]
    return answer.thinking, answer.content, list(answer.tool_calls), faults


@settings(max_examples=150, deadline=None)
@given(TEXTS)
def test_an_answer_is_what_regular_expressions_find(text: str) -> None:
    assert plain(parse_answer(text, TOOLS)) == oracle(text)


@settings(max_examples=100, deadline=None)
@given(TEXTS, st.lists(st.integers(0, 150), max_size=30), st.booleans())
def test_pieces_cut_anywhere_give_the_same(text: str, cuts: list[int], opened: bool) -> None:
    places = sorted(min(cut, len(text)) for cut in cuts)
    pieces = [text[a:b] for a, b in zip([0, *places], [*places, len(text)], strict=True)]
    stream = AnswerStream(TOOLS, opened=opened)
    parts = [stream.feed(piece) for piece in pieces]
    for told in ([part.thinking for part in parts], [part.content for part in parts]):
        ends, whole = set(accumulate(map(len, told))), "".join(told)
        for tag in re.finditer("|".join(TAGS), whole):
            assert not ends & set(range(tag.start() + 1, tag.end())), (whole, tag)
        assert all(new == new.rstrip() for new in told)
    assert reduce(add, [*parts, stream.finish()]) == parse_answer(text, TOOLS, opened=opened)


@settings(max_examples=100, deadline=None)
@given(TEXTS, st.booleans())
def test_no_word_is_lost(text: str, opened: bool) -> None:
    answer = parse_answer(text, TOOLS, opened=opened)
    found = [answer.thinking, answer.content, *(fault.text for fault in answer.faults)]
    found += [call.name + json.dumps(call.arguments, ensure_ascii=False) for call in answer.tool_calls]
    for word in WORDS:
        assert sum(part.count(word) for part in found) == text.count(word)


LETTERS = st.lists(
    st.sampled_from(
        ["a", "b c", " ", "\n", "<", ">", "</arg", "_value>", "<think>", "é🙂", '"', "{", "0", "12", "null", "\u2028"]
    ),
    max_size=4,
).map("".join)


def without(*tags: str) -> Callable[[str], bool]:
    return lambda text: not any(tag in text for tag in tags)


RAW = LETTERS.filter(without("</arg_value>"))
NUMBERS = st.floats(allow_nan=False, allow_infinity=False)
PLAIN = st.none() | st.booleans() | st.integers() | NUMBERS | RAW
JSON = PLAIN | st.lists(PLAIN, max_size=2) | st.dictionaries(RAW, PLAIN | st.lists(PLAIN, max_size=2), max_size=2)
VALUES = {
    "text": RAW,
    "count": st.integers(),
    "share": NUMBERS,
    "yes": st.booleans(),
    "list": st.lists(JSON, max_size=2),
    "map <ü>": st.dictionaries(RAW, JSON, max_size=2),
    "maybe": st.booleans() | st.none(),
}
CALLS = st.fixed_dictionaries({}, optional=VALUES).map(lambda arguments: ToolCall("f.é-1", arguments))
ANSWERS = st.builds(
    Answer,
    LETTERS.map(str.strip).filter(without("</think>")),
    LETTERS.map(str.strip).filter(without("<tool_call>", "</tool_call>")),
    st.lists(CALLS | st.just(ToolCall("now")), max_size=2).map(tuple),
)


@settings(max_examples=60, deadline=None)
@given(ANSWERS)
def test_what_was_written_is_read_and_what_was_read_is_written(answer: Answer) -> None:
    text = render_answer(answer, TOOLS)
    assert parse_answer(text, TOOLS) == answer
    assert render_answer(parse_answer(text, TOOLS), TOOLS) == text
    prompt = GLM4_5.render(USER, tools=TOOLS)
    assert prompt + text == GLM4_5.render([*USER, answer.message()], tools=TOOLS, generation=False)


@settings(max_examples=40, deadline=None)
@given(ANSWERS)
def test_without_thinking_the_prompt_has_closed_it(answer: Answer) -> None:
    answer = replace(answer, thinking="", content=answer.content.replace("think", "thin"))
    text = render_answer(answer, TOOLS, thinking=False)
    assert not text.lstrip().startswith("<think>")
    assert parse_answer(text, TOOLS) == answer
    prompt = GLM4_5.render(USER, thinking=False)
    assert prompt + text == GLM4_5.render([*USER, answer.message()], thinking=False, generation=False)


CODE = 'def f(x):\n    return x < 2 and "</tool_call>" not in x  # <think> & \\n\n'
RULES: dict[str, tuple[str, Answer]] = {
    "whole": (
        "\n<think>a\nb</think>\nHi!\n<tool_call>f.é-1\n<arg_key>text</arg_key>\n<arg_value>1</arg_value>\n"
        "<arg_key>count</arg_key>\n<arg_value>1</arg_value>\n</tool_call>\n<tool_call>now\n</tool_call>",
        Answer("a\nb", "Hi!", (ToolCall("f.é-1", {"text": "1", "count": 1}), ToolCall("now"))),
    ),
    "no white space": (
        "<think></think><tool_call>f.é-1<arg_key>yes</arg_key><arg_value>true</arg_value></tool_call>",
        Answer(tool_calls=(ToolCall("f.é-1", {"yes": True}),)),
    ),
    "no arguments": ("<tool_call>now</tool_call>", Answer(tool_calls=(ToolCall("now"),))),
    "code": (
        f"<tool_call>f.é-1\n<arg_key>text</arg_key>\n<arg_value>{CODE}</arg_value>\n</tool_call>",
        Answer(tool_calls=(ToolCall("f.é-1", {"text": CODE}),)),
    ),
    "unknown parameter": (
        "<tool_call>now\n<arg_key>a</arg_key>\n<arg_value>[1]</arg_value>\n</tool_call>",
        Answer(tool_calls=(ToolCall("now", {"a": [1]}),)),
    ),
    "nothing": (" \n", Answer()),
    "no thinking": ("\nHi! <b>", Answer(content="Hi! <b>")),
    "thinking that does not end": (
        "\n<think>a <tool_call>now\n</tool_call> b\n",
        Answer("a <tool_call>now\n</tool_call> b", faults=(Fault("thinking", "the thinking does not end"),)),
    ),
    "thinking that never began": (
        "a</think>b", Answer(content="a</think>b", faults=(Fault("thinking", "thinking ends that never began"),)),
    ),
    "thinking that ends twice": ("<think>a</think>b</think>c", Answer("a", "b</think>c")),
    "unknown tool": (
        "<tool_call>g\n</tool_call>",
        Answer(tool_calls=(ToolCall("g"),), faults=(Fault("tool", "'g' is none of the tools"),)),
    ),
    "text between calls": (
        "a <tool_call>now</tool_call>\n b \n<tool_call>now</tool_call>\n",
        Answer("", "a\nb", (ToolCall("now"),) * 2, (Fault("text", "a call is followed by text"),)),
    ),
    "end of a call": ("a</tool_call>", Answer(content="a</tool_call>", faults=(
        Fault("call", "a call ends that never began"),
    ))),
    **{name: ("a" + text, Answer(content="a", faults=(Fault("call", reason, text),))) for name, reason, text in [
        ("no name", "a call has no name", "<tool_call>\n</tool_call>"),
        ("JSON", "a call of '{\"name\":' has what is no argument", '<tool_call>{"name": "now"}</tool_call>'),
        ("no value", "a call of 'now' has what is no argument", "<tool_call>now<arg_key>a</arg_key>\n</tool_call>"),
        ("no key", "a call of 'now' has what is no argument", "<tool_call>now<arg_value>a</arg_value></tool_call>"),
        ("more", "a call of 'now' has what is no argument", "<tool_call>now then</tool_call>"),
        ("in a call", "a call of 'now' has what is no argument", "<tool_call>now\n<tool_call>now\n</tool_call>"),
        ("twice", "a call of 'now' has the argument 'a' twice", "<tool_call>now"
            + "<arg_key>a</arg_key><arg_value>1</arg_value>" * 2 + "</tool_call>"),
        ("cut", "a call does not end", "<tool_call>now\n<arg_key>a</arg_key>\n<arg_value>1</tool_call>"),
        ("cut in a tag", "a call does not end", "<tool_call>now\n</tool_ca"),
    ]},
}  # fmt: skip


MALFORMED = {
    "unknown tool", "end of a call", "no name", "JSON", "no value", "no key", "more", "in a call", "twice", "cut",
    "cut in a tag",
}  # fmt: skip


@pytest.mark.parametrize("name", RULES)
def test_the_rules(name: str) -> None:
    text, expected = RULES[name]
    assert parse_answer(text, TOOLS) == expected
    assert expected.malformed is (name in MALFORMED)


def test_degenerate_answers_are_read_whole() -> None:
    """Each tag once: what cuts the text anew at every tag would not end here."""
    assert len(parse_answer("</tool_call>" * 100_000).faults) == 100_000
    pairs = (f"<arg_key>{number}</arg_key><arg_value></arg_value>" for number in range(20_000))
    [call] = parse_answer(f"<tool_call>now{''.join(pairs)}</tool_call>").tool_calls
    assert len(call.arguments) == 20_000


def test_a_prompt_may_have_opened_the_thinking() -> None:
    assert parse_answer("a</think>b", opened=True) == Answer("a", "b")
    assert parse_answer("a", opened=True).thinking == "a"
    assert parse_answer("a", opened=True).faults[0].kind == "thinking"


def test_without_tools_every_tool_is_known() -> None:
    found = parse_answer("<tool_call>g<arg_key>a</arg_key><arg_value>1</arg_value></tool_call>")
    assert found == Answer(tool_calls=(ToolCall("g", {"a": 1}),))
    assert parse_answer("<tool_call>g</tool_call>", []).faults[0].kind == "tool"
    long = "9" * 400
    found = parse_answer(f"<tool_call>g<arg_key>a</arg_key><arg_value>{long}</arg_value></tool_call>")
    assert found.tool_calls == (ToolCall("g", {"a": int(long)}),)


@pytest.mark.parametrize(
    ("answer", "thinking", "said"),
    [
        (Answer("</think>"), True, "has a tag in its thinking or content"),
        (Answer(content="<tool_call>now</tool_call>"), True, "answer has a tag in"),
        (Answer(content="</tool_call>"), True, "answer has a tag in"),
        (Answer(content="<think>a</think>"), False, "answer has a tag in"),
        (Answer(content="a</think>"), False, "answer has a tag in"),
        (
            Answer(tool_calls=(ToolCall("now", {"a": "12"}),)),
            True,
            "the argument 'a' of now is '12', which .* read as 12",
        ),
        (
            Answer(tool_calls=(ToolCall("f.é-1", {"count": "1"}),)),
            True,
            "'count' of f.é-1 is '1', which would be read as 1",
        ),
        (Answer(tool_calls=(ToolCall("g"),)), True, "answer has a call that cannot be made: 'g' is none of the tools"),
        (Answer("a"), False, "answer has thinking, and thinking is False; expected none"),
        (Answer(faults=(Fault("call", "a call has no name"),)), True, r"a fault \(a call has no name\); only"),
    ],
)
def test_answers_that_cannot_be_written(answer: Answer, thinking: bool, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        render_answer(answer, TOOLS, thinking=thinking)


def test_without_tools_texts_that_are_json_cannot_be_arguments() -> None:
    call = Answer(tool_calls=(ToolCall("f.é-1", {"text": "12"}),))
    assert parse_answer(render_answer(call, TOOLS), TOOLS) == call
    with pytest.raises(ValueError, match=r"'text' of f\.é-1 is '12', which would be read as 12"):
        render_answer(call)
    text = render_answer(Answer(tool_calls=(ToolCall("g", {"a": (1, "b")}),)))
    assert parse_answer(text).tool_calls == (ToolCall("g", {"a": [1, "b"]}),)


def test_a_stream_ends_once() -> None:
    stream = AnswerStream(TOOLS)
    assert stream.feed("a <tool") == Answer(content="a")
    assert stream.finish() == Answer(content=" <tool")
    with pytest.raises(ValueError, match="the answer is finished; expected no further piece"):
        stream.feed("b")
    with pytest.raises(ValueError, match=r"tools\[0\] has the name None"):
        AnswerStream([{}])
