"""Conversations in which GLM-4.5's template takes every way it has."""

from typing import Any

WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "Das Wetter, 天气 <b>",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string"}, "days": {"type": "integer"}},
            "required": ["city"],
        },
    },
}
RUN = {"name": "run.code", "parameters": {"type": "object", "properties": {"code": {"type": "string"}}}}


def user(content: Any) -> dict[str, Any]:
    return {"role": "user", "content": content}


def says(content: Any, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content, **more}


def tool(content: Any) -> dict[str, Any]:
    return {"role": "tool", "content": content}


def call(name: str, **arguments: Any) -> dict[str, Any]:
    return {"type": "function", "id": "1", "function": {"name": name, "arguments": arguments}}


NESTED = {"a": [1, 2.5, None, True], "ü": {"<b>": "x\ny"}}
CODE = "for i in range(3):\n\tprint('</b>', \"é\", i < 2 & 1)\n  "
GLM_CHATS: dict[str, list[dict[str, Any]]] = {
    "one question": [user("2 + 2?")],
    "system": [{"role": "system", "content": "Be brief.\n"}, user(" hi \n")],
    "nothing said": [user("")],
    "asked without thinking already": [user("hi/nothink"), says("a"), user("b")],
    "answer": [user("hi"), says("  Hello!\n\n", reasoning_content=" I greet.\n")],
    "answer without thinking": [user("hi"), says("Hello!")],
    "thinking in the content": [user("hi"), says("<think>\nI greet.\n</think>\n\nHello!")],
    "end of thinking alone": [user("hi"), says("\na\n</think>\nc")],
    "tag in the content beside thinking": [user("hi"), says("a</think>b", reasoning_content="c")],
    "empty thinking beside a tag": [user("hi"), says("a</think>b", reasoning_content="")],
    "blank thinking": [user("hi"), says("a", reasoning_content=" \n ")],
    "history": [
        user("1?"), says("one", reasoning_content="un"), user("2?"), says("two", reasoning_content="deux"), user("3?"),
    ],
    "history that ends with the assistant": [
        user("1?"), says("<think>un</think>one"), user("2?"), says("two", reasoning_content="deux"),
    ],
    "letters": [user("naïve 你好 🙂 \u2028 e\u0301"), says("¡Olé! 日本", reasoning_content="思考 🚀")],
    "parts": [
        user([{"type": "text", "text": "a "}, "b", {"type": "text", "text": "c"}]),
        says([{"type": "text", "text": "<think>x</think>"}, " y "]),
        user([]),
    ],
    "two calls and their results": [
        user("weather?"),
        says("I look.", reasoning_content="a", tool_calls=[call("weather", city="Köln", days=2), call("weather")]),
        tool("rain"),
        tool(" sun\n"),
        says("", reasoning_content="and now", tool_calls=[call("run.code", code=CODE)]),
        tool("0"),
        says("Done.", reasoning_content="good"),
    ],
    "calls before the last question": [
        user("weather?"),
        says("", reasoning_content="a", tool_calls=[call("weather", city="Paris")]),
        tool("rain"),
        says("It rains."),
        user("and now?"),
        says("", reasoning_content="b", tool_calls=[call("weather", city="Paris", days=0)]),
        tool("sun"),
    ],
    "values": [
        user("x"),
        says("y", tool_calls=[call("f", n=NESTED, l=[], t=True, z=None, i=-3, r=0.5, s="", d="12", q='"q"', m={})]),
    ],
    "calls without content or function": [
        user("x"),
        {"role": "assistant", "tool_calls": [{"name": "f", "arguments": {"a": "b"}}]},
        tool([{"output": "one"}, "two"]),
        tool("three"),
        tool([{"output": "four"}]),
        says("z"),
        {"role": "tool", "content": "late", "tool_call_id": "1", "name": "f"},
    ],
    "system in the middle": [user("a"), says("b"), {"role": "system", "content": "c"}, says("d"), says("e")],
    "control names": [user("<|assistant|> [gMASK]"), says("<|user|>")],
}  # fmt: skip
GLM_TOOLS: dict[str, list[dict[str, Any]] | None] = {"none": None, "empty": [], "two": [WEATHER, RUN]}
GLM_SETTINGS = [
    ("none", True, True), ("none", True, False), ("none", False, True), ("none", False, False),
    ("two", True, True), ("two", False, False), ("empty", True, True),
]  # fmt: skip
"""Tools, whether to think, whether the assistant is to speak."""
