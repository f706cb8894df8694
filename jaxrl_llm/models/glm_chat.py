"""The chat format of GLM-4.5 (arXiv 2508.06471), byte for byte what the checkpoint's own template writes.

    [gMASK]<sop> <|system|> tools <|system|> .. <|user|> .. <|assistant|> .. <|observation|> results <|assistant|> ..

There is no token that ends a turn: a model stops with the marker of who speaks next, <|user|> or, after calls of
tools, <|observation|>. What it thought is kept after the last turn of the user and left out before it.
"""

import json
import re
from collections.abc import Mapping
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from jaxrl_llm.models.chat_tools import Tool
from jaxrl_llm.models.chat_tools import tool_schemas

THINK = ("<think>", "</think>")
CALL = ("<tool_call>", "</tool_call>")
KEY = ("<arg_key>", "</arg_key>")
VALUE = ("<arg_value>", "</arg_value>")
NAME = re.compile(r"[^\s<>]+")
"""What a tool can be named: the format ends a name with the next tag or white space."""
NO_THINKING = "/nothink"

ROLES = ("system", "user", "assistant", "tool")
KEYS = {"role", "content", "reasoning_content", "tool_calls", "tool_call_id", "name"}
TOOLS = """<|system|>
# Tools

You may call one or more functions to assist with the user query.

You are provided with function signatures within <tools></tools> XML tags:
<tools>
{tools}
</tools>

For each function call, output the function name and arguments within the following XML format:
<tool_call>{{function-name}}
<arg_key>{{arg-key-1}}</arg_key>
<arg_value>{{arg-value-1}}</arg_value>
<arg_key>{{arg-key-2}}</arg_key>
<arg_value>{{arg-value-2}}</arg_value>
...
</tool_call>"""


@dataclass(frozen=True)
class GlmChat:
    """GLM-4.5 as a `chat.Chat`.

    A message has `role` and `content`, a text or a list of texts and of parts `{"type": "text", "text": ..}`. One of
    the assistant may have `reasoning_content` and `tool_calls`, each with a name and a mapping of arguments, in
    `function` or not; without `reasoning_content`, thinking is what stands before `</think>` in its content. The
    content of a tool may be a list of results, texts or mappings with `output`. The names of tokens in a text are
    written as they are, as the template does: who may write them can forge a turn.

    Departures from the template: what it would drop or write as Python does (pictures, None, unknown roles and keys,
    numbers that are not finite, text before `<think>` or between two `</think>` in a content) and calls that could not
    be read again are refused.
    """

    @property
    def stop_tokens(self) -> tuple[str, ...]:
        """The tokens with which an answer can end."""
        return ("<|user|>", "<|observation|>", "<|endoftext|>")

    def end(self, message: Mapping[str, Any]) -> str:
        """The token that ends this answer: the marker of who speaks after it."""
        return "<|observation|>" if message.get("tool_calls") else "<|user|>"

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Tool] | None = None,
        thinking: bool = True,
        generation: bool = True,
    ) -> str:
        """The messages as one text, start tokens included: encode it with `add_special_tokens=False`.

        Args:
            messages: the turns, oldest first.
            tools: what the model may call; listed in a turn of their own.
            thinking: whether the model is to think; False marks the user's turns and closes the thinking for it.
            generation: end with the opening of the assistant's turn.

        Raises:
            ValueError: messages or tools that the format cannot write.
        """
        if not messages:
            raise ValueError("messages is empty; a chat needs at least one.")
        for index, message in enumerate(messages):
            _check(message, f"messages[{index}]")
        asked = max((index for index, m in enumerate(messages) if m["role"] == "user"), default=-1)
        text = "[gMASK]<sop>" + _tools_turn(tools)
        for index, message in enumerate(messages):
            place, role = f"messages[{index}]", message["role"]
            if role == "assistant":
                text += "<|assistant|>" + _assistant(message, place, thinks=index > asked)
            elif role == "tool":
                follows = index > 0 and messages[index - 1]["role"] == "tool"
                text += _results(message, place, follows=follows)
            else:
                content = visible_text(message, place)
                mark = role == "user" and not thinking and not content.endswith(NO_THINKING)
                text += f"<|{role}|>\n{content}" + (NO_THINKING if mark else "")
        if generation:
            text += "<|assistant|>" + ("" if thinking else "\n" + "".join(THINK))
        return text


GLM4_5 = GlmChat()
"""GLM-4.5, GLM-4.5-Air and GLM-4.6."""


def assistant_text(thinking: str, content: str, calls: Sequence[tuple[str, Mapping[str, Any]]]) -> str:
    """What follows the marker of the assistant, up to the token that ends the turn.

    Raises:
        ValueError: a call that cannot be written, since the format has no escapes.
    """
    text = "\n" + thinking.strip().join(THINK)
    if content.strip():
        text += "\n" + content.strip()
    return text + "".join("\n" + _call(name, arguments) for name, arguments in calls)


def visible_text(message: Mapping[str, Any], place: str) -> str:
    """The content of a message as one text."""
    content = message.get("content", "")
    if isinstance(content, str):
        return content
    if not isinstance(content, Sequence):
        raise ValueError(
            f"{place} has a content of type {type(content).__name__}; expected a text, a list of texts, or none at all."
        )
    return "".join(_part(part, place) for part in content)


def _part(part: Any, place: str) -> str:
    text = part["text"] if isinstance(part, Mapping) and part.get("type") == "text" and "text" in part else part
    if not isinstance(text, str):
        kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
        raise ValueError(f"{place} has a part of type {kind!r} in its content; expected texts only.")
    return text


def _check(message: Mapping[str, Any], place: str) -> None:
    if not isinstance(message, Mapping) or message.get("role") not in ROLES:
        role = message.get("role") if isinstance(message, Mapping) else type(message).__name__
        raise ValueError(f"{place} has the role {role!r}; expected one of {', '.join(ROLES)}.")
    if unknown := sorted(set(message) - KEYS, key=str):
        raise ValueError(f"{place} has the keys {unknown}; expected some of {', '.join(sorted(KEYS))}.")
    own = [key for key in ("reasoning_content", "tool_calls") if message.get(key)]
    if own and message["role"] != "assistant":
        raise ValueError(f"{place} is the {message['role']}'s and has {own[0]}; expected it of the assistant only.")


def _tools_turn(tools: Sequence[Tool] | None) -> str:
    if not tools:
        return ""
    for index, name in enumerate(tool_schemas(tools)):
        if not NAME.fullmatch(name):
            raise ValueError(f"tools[{index}] has the name {name!r}; expected one without white space, < and >.")
    return TOOLS.format(tools="\n".join(_json(tool) for tool in tools))


def _assistant(message: Mapping[str, Any], place: str, *, thinks: bool) -> str:
    content, thinking = visible_text(message, place), message.get("reasoning_content")
    if thinking is None:
        thinking = ""
        if THINK[1] in content:
            before, *between, content = content.split(THINK[1])
            lost, _, thinking = before.rpartition(THINK[0])
            if between or lost.strip():
                raise ValueError(
                    f"{place} has {THINK[1]} {len(between) + 1} times in its content, after {lost!r:.80}; expected "
                    f"{THINK[1]} once, and nothing before {THINK[0]}."
                )
    if not isinstance(thinking, str):
        raise ValueError(f"{place} has a reasoning_content of type {type(thinking).__name__}; expected a text.")
    calls, given = [], message.get("tool_calls") or ()
    if not isinstance(given, Sequence) or isinstance(given, str):
        raise ValueError(f"{place} has tool_calls of type {type(given).__name__}; expected a list.")
    for number, call in enumerate(given):
        called = call.get("function", call) if isinstance(call, Mapping) else {}
        called = called if isinstance(called, Mapping) else {}
        arguments = called.get("arguments", {})
        if not isinstance(called.get("name"), str) or not isinstance(arguments, Mapping):
            raise ValueError(
                f"{place} has a call {number} with the name {called.get('name')!r} and arguments of type "
                f"{type(arguments).__name__}; expected a text, and a mapping (JSON must be decoded)."
            )
        calls.append((called["name"], arguments))
    return assistant_text(thinking if thinks else "", content, calls)


def _call(name: str, arguments: Mapping[str, Any]) -> str:
    if not NAME.fullmatch(name):
        raise ValueError(f"a call has the name {name!r}; expected one without white space, < and >.")
    text = CALL[0] + name + "\n"
    for key, value in arguments.items():
        if not isinstance(key, str):
            raise ValueError(f"a call of {name} has the argument {key!r}; expected names that are texts.")
        written = value if isinstance(value, str) else _json(value)
        # Inside a value the end of a call is a text, and nowhere else.
        for what, tag in ((key, KEY[1]), (key, CALL[1]), (written, VALUE[1])):
            if tag in what:
                raise ValueError(f"the argument {key!r} of {name} has {tag} in it, which the format cannot write.")
        text += f"{key.join(KEY)}\n{written.join(VALUE)}\n"
    return text + CALL[1]


def _results(message: Mapping[str, Any], place: str, *, follows: bool) -> str:
    content = message.get("content", "")
    if isinstance(content, str):
        return ("" if follows else "<|observation|>") + f"\n<tool_response>\n{content}\n</tool_response>"
    if not isinstance(content, Sequence):
        raise ValueError(f"{place} has a content of type {type(content).__name__}; expected a text or a list.")
    results = [part.get("output") if isinstance(part, Mapping) else part for part in content]
    if not all(isinstance(result, str) for result in results):
        raise ValueError(f"{place} has a list with what is no result; expected texts, or mappings with an output.")
    return "<|observation|>" + "".join(f"\n<tool_response>\n{result}\n</tool_response>" for result in results)


def _json(value: Any) -> str:
    try:
        return json.dumps(value, ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"{value!r:.80} is no JSON value ({error}).") from error
