"""Messages and tools of OpenAI's API as the text that a model continues, and what it wrote back."""

import json
from collections.abc import Mapping
from collections.abc import Sequence
from typing import Any
from typing import Protocol

from jaxrl_llm.models.chat import Chat
from jaxrl_llm.models.chat import TemplateChat
from jaxrl_llm.models.chat_tools import Answer
from jaxrl_llm.models.chat_tools import Fault
from jaxrl_llm.models.chat_tools import ToolCall
from jaxrl_llm.models.chat_tools import strict_json
from jaxrl_llm.models.chat_tools import tool_schemas
from jaxrl_llm.models.files import one_line
from jaxrl_llm.models.glm_answers import AnswerStream
from jaxrl_llm.models.glm_chat import GlmChat
from jaxrl_llm.serving.errors import bad
from jaxrl_llm.serving.fields import shown
from jaxrl_llm.serving.structure import CLOSE
from jaxrl_llm.serving.structure import OPEN

ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant", "tool": "tool"}
SILENT = ("name", "refusal", "annotations", "audio", "function_call")
"""Keys of a message that are not shown to a model."""
TOOLS = (
    "You can call these functions, each described by a line of JSON:\n{tools}\n"
    'To call one, answer with {open}\n{{"name": its name, "arguments": an object of its arguments}}\n{close}'
)


class Stream(Protocol):
    """Takes an answer apart while it comes."""

    def feed(self, piece: str) -> Answer:
        """What a further piece of text brings."""
        ...

    def finish(self) -> Answer:
        """What was held back."""
        ...


def knows_tools(chat: Chat) -> bool:
    """Whether the chat writes tools, calls and results itself, with calls that can be read back here."""
    return isinstance(chat, GlmChat) or (isinstance(chat, TemplateChat) and OPEN in chat.template)


def rendered(chat: Chat, messages: Any, tools: Sequence[Mapping[str, Any]], *, thinking: bool) -> str:
    """The text that the model continues.

    Args:
        chat: of the model.
        messages: of the body.
        tools: that may be called; where the chat does not know any, they are described in the system's turn.
        thinking: False asks for none, of a chat that knows it.

    Raises:
        APIError: messages that cannot be written.
    """
    if not isinstance(messages, list) or not messages:
        raise bad(f"messages is {shown(messages)}; expected a list of at least one message.", "messages")
    native = knows_tools(chat)
    turns = [_turn(message, f"messages[{index}]", native) for index, message in enumerate(messages)]
    if tools and not native:
        turns = _described(turns, tools)
    try:
        if native:
            return chat.render(turns, tools=list(tools) or None, thinking=thinking)
        # A format that is data knows neither tools nor thinking.
        return chat.render(turns, thinking=thinking) if isinstance(chat, TemplateChat) else chat.render(turns)
    except ValueError as error:  # ModelFileError, of a template, is one
        raise bad(f"the messages cannot be written in this model's chat: {one_line(error)}", "messages") from None


def stream_of(chat: Chat, tools: Sequence[Mapping[str, Any]]) -> Stream:
    """What takes an answer of this chat apart."""
    if isinstance(chat, GlmChat):
        return AnswerStream(list(tools))
    return CallStream(tools) if tools else PlainStream()


class PlainStream:
    """An answer that is all content."""

    def feed(self, piece: str) -> Answer:
        """See `Stream`."""
        return Answer(content=piece)

    def finish(self) -> Answer:
        """See `Stream`."""
        return Answer()


class CallStream:
    """An answer with calls as JSON between tags; a call that cannot be read stays content.

    Args:
        tools: that may be called.
    """

    def __init__(self, tools: Sequence[Mapping[str, Any]]) -> None:
        self._names = set(tool_schemas(tools))
        self._text, self._inside, self._called = "", False, False

    def feed(self, piece: str) -> Answer:
        """See `Stream`."""
        self._text += piece
        return self._run(last=False)

    def finish(self) -> Answer:
        """See `Stream`."""
        return self._run(last=True)

    def _run(self, *, last: bool) -> Answer:
        answer = Answer()
        while True:
            tag = CLOSE if self._inside else OPEN
            before, found, after = self._text.partition(tag)
            if found:
                answer += self._call(before) if self._inside else self._content(before)
                self._text, self._inside = after, not self._inside
                continue
            if last:
                answer += self._content((OPEN if self._inside else "") + self._text)
                self._text = ""
            elif not self._inside:
                kept = next((size for size in range(len(OPEN) - 1, 0, -1) if self._text.endswith(OPEN[:size])), 0)
                answer += self._content(self._text[: len(self._text) - kept])
                self._text = self._text[len(self._text) - kept :]
            return answer

    def _content(self, text: str) -> Answer:
        # White space between calls is of their form.
        return Answer(content="" if self._called and not text.strip() else text)

    def _call(self, text: str) -> Answer:
        try:
            call = strict_json(text)
            name, arguments = call["name"], call.get("arguments", {})
            if not isinstance(arguments, dict) or name not in self._names:
                raise ValueError(name)
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
            fault = Fault("call", "a call cannot be read, or is of a tool that is not there")
            return Answer(content=OPEN + text + CLOSE, faults=(fault,))
        self._called = True
        return Answer(tool_calls=(ToolCall(name, arguments),))


def checked_tools(given: Any) -> list[dict[str, Any]]:
    """The tools of a body.

    Raises:
        APIError: they are none.
    """
    if given is None:
        return []
    if not isinstance(given, list):
        raise bad(f"tools is {shown(given)}; expected a list.", "tools")
    tools = []
    for index, tool in enumerate(given):
        if not isinstance(tool, dict) or tool.get("type") != "function" or not isinstance(tool.get("function"), dict):
            raise bad(f"tools[{index}] is {shown(tool)}; expected type function, and function.", "tools")
        function = {key: value for key, value in tool["function"].items() if value is not None and key != "strict"}
        tools.append({"type": "function", "function": function})
    try:
        tool_schemas(tools)
    except ValueError as error:
        raise bad(one_line(error), "tools") from None
    return tools


def _turn(message: Any, place: str, native: bool) -> dict[str, Any]:
    role = message.get("role") if isinstance(message, dict) else None
    if not isinstance(message, dict) or not isinstance(role, str) or role not in ROLES:
        role = message.get("role") if isinstance(message, dict) else message
        raise bad(f"{place} has the role {shown(role)}; expected one of {', '.join(ROLES)}.", "messages")
    known = {"role", "content", "tool_calls", "tool_call_id", "reasoning_content", *SILENT}
    if unknown := sorted(set(message) - known):
        raise bad(f"{place} has the key {unknown[0]!r:.80}, which this server does not know.", "messages")
    role, content = ROLES[message["role"]], _content(message.get("content"), place)
    calls = message.get("tool_calls") or []
    if not isinstance(calls, list):
        raise bad(f"{place} has the tool_calls {shown(calls)}; expected a list.", "messages")
    calls = [_call(call, place) for call in calls] if role == "assistant" else []
    if native:
        turn: dict[str, Any] = {"role": role, "content": content}
        if calls:
            turn["tool_calls"] = calls
        if role == "tool" and isinstance(message.get("tool_call_id"), str):
            turn["tool_call_id"] = message["tool_call_id"]
        if role == "assistant" and isinstance(message.get("reasoning_content"), str):
            turn["reasoning_content"] = message["reasoning_content"]
        return turn
    if role == "tool":
        return {"role": "user", "content": f"<tool_response>\n{content}\n</tool_response>"}
    written = [f"{OPEN}\n{json.dumps(call['function'], ensure_ascii=False)}\n{CLOSE}" for call in calls]
    return {"role": role, "content": "\n".join([*([content] if content or not written else []), *written])}


def _content(content: Any, place: str) -> str:
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise bad(f"{place} has the content {shown(content)}; expected a text.", "messages")
    for part in content:
        if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
            kind = part.get("type") if isinstance(part, dict) else part
            raise bad(f"{place} has a part of type {shown(kind)}; expected texts only.", "messages")
    return "".join(part["text"] for part in content)


def _call(call: Any, place: str) -> dict[str, Any]:
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise bad(f"{place} has a call without a function and its name.", "messages")
    arguments = function.get("arguments") or "{}"
    try:
        decoded = strict_json(arguments) if isinstance(arguments, str) else arguments
    except (ValueError, RecursionError):
        decoded = None
    if not isinstance(decoded, dict):
        raise bad(f"{place} has a call of {function['name']!r:.80} whose arguments are no JSON object.", "messages")
    return {"type": "function", "id": str(call.get("id")), "function": {"name": function["name"], "arguments": decoded}}


def _described(turns: list[dict[str, Any]], tools: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    lines = "\n".join(json.dumps(tool["function"], ensure_ascii=False) for tool in tools)
    text = TOOLS.format(tools=lines, open=OPEN, close=CLOSE)
    if turns[0]["role"] == "system":
        return [{"role": "system", "content": f"{turns[0]['content']}\n\n{text}"}, *turns[1:]]
    return [{"role": "system", "content": text}, *turns]
