"""Tools that a model may call, and what it said: thinking, content, calls, and what was wrong with them.

A tool is described as OpenAI's API does it: a name, and a JSON schema of an object whose properties are the
parameters. What a model writes for a parameter is a text; the schema says which type it was meant to have.
"""

import json
import math
from collections.abc import Mapping
from collections.abc import Sequence
from dataclasses import dataclass
from dataclasses import field
from typing import Any
from typing import Literal

Tool = Mapping[str, Any]
"""`{"type": "function", "function": {"name", "description", "parameters"}}`, or what is under `function` by itself."""
Schemas = Mapping[str, Mapping[str, Any]]
"""Name of a tool -> name of a parameter -> its JSON schema."""
ANY = frozenset({"string", "number", "integer", "boolean", "array", "object", "null"})
"""The types of JSON schema."""


@dataclass(frozen=True)
class ToolCall:
    """One call of a tool: its name, and the arguments by name as JSON values."""

    name: str
    arguments: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Fault:
    """What was wrong with an answer.

    Attributes:
        kind: "thinking" where it does not begin or end as it should, "call" where a call cannot be read or ends without
            a beginning, "tool" where a call is of a tool that is not there, "text" where text follows a call.
        reason: in words.
        text: the text that it is about and that is nowhere else in the answer.
    """

    kind: Literal["thinking", "call", "tool", "text"]
    reason: str
    text: str = ""


@dataclass(frozen=True)
class Answer:
    """What a model said in one turn, or a part of it that is new: parts are joined by `+`.

    Attributes:
        thinking: what it thought, without the white space around it.
        content: what it said, without the white space around it.
        tool_calls: its calls, in order; those that cannot be read are among the faults.
        faults: what was wrong, in order.
    """

    thinking: str = ""
    content: str = ""
    tool_calls: tuple[ToolCall, ...] = ()
    faults: tuple[Fault, ...] = ()

    def __add__(self, new: "Answer") -> "Answer":
        """This answer with what is new of it."""
        return Answer(
            self.thinking + new.thinking,
            self.content + new.content,
            self.tool_calls + new.tool_calls,
            self.faults + new.faults,
        )

    @property
    def malformed(self) -> bool:
        """Whether there is a call that cannot be read, a part of one among them, or one of a tool that is not there."""
        return any(fault.kind in ("call", "tool") for fault in self.faults)

    def message(self) -> dict[str, Any]:
        """The turn as a message: role, content, reasoning_content and, where there are calls, tool_calls."""
        calls = [{"type": "function", "function": {"name": c.name, "arguments": c.arguments}} for c in self.tool_calls]
        message = {"role": "assistant", "content": self.content, "reasoning_content": self.thinking}
        return message | ({"tool_calls": calls} if calls else {})


def tool_schemas(tools: Sequence[Tool]) -> Schemas:
    """The schemas of all parameters of these tools.

    Raises:
        ValueError: a tool that is no mapping, has no name, has the name of another, or whose parameters are not
            described by the JSON schema of an object, each by one that is one.
    """
    if isinstance(tools, str | Mapping) or not isinstance(tools, Sequence):
        raise ValueError(f"tools is a {type(tools).__name__}; expected a list of tools.")
    found: dict[str, Mapping[str, Any]] = {}
    for index, tool in enumerate(tools):
        function = tool.get("function", tool) if isinstance(tool, Mapping) else tool
        if not isinstance(function, Mapping):
            raise ValueError(f"tools[{index}] is a {type(function).__name__}; expected a mapping with a name.")
        name = function.get("name")
        if not isinstance(name, str) or not name:
            raise ValueError(f"tools[{index}] has the name {name!r}; expected a text of at least one letter.")
        if name in found:
            raise ValueError(f"tools[{index}] has the name {name!r}, as another has; expected one tool of a name.")
        found[name] = _properties(function.get("parameters", {}), f"tools[{index}] ({name!r})")
    return found


def argument_value(text: str, schema: Any = None) -> Any:
    """What a text means as an argument of this JSON schema.

    A text where the schema allows texts only; else the JSON value that it is, and the text itself where it is none,
    where that value is a text (its quotes are kept, since texts are written without), or where the schema allows
    texts and not the type of that value. NaN, infinities and objects that have a name twice are no JSON.

    Args:
        text: as the model wrote it.
        schema: of the parameter; None where it is not known.
    """
    types = allowed_types(schema)
    if types <= {"string"}:
        return text
    try:
        value = strict_json(text)
    except (ValueError, RecursionError):
        return text
    if isinstance(value, str) or ("string" in types and not _types_of(value) & types):
        return text
    return value


def strict_json(text: str) -> Any:
    """The JSON value of a text.

    Raises:
        ValueError: it is none, as are NaN, infinities, halves of surrogate pairs and objects with a name twice.
        RecursionError: it is nested too deep.
    """
    value = json.loads(text, parse_float=_finite, parse_constant=_refuse, object_pairs_hook=_unique)
    # A half of a surrogate pair has no bytes.
    json.dumps(value, ensure_ascii=False).encode()
    return value


def allowed_types(schema: Any) -> frozenset[str]:
    """The JSON types that a schema allows, as far as `type`, `enum`, `const`, `anyOf`, `oneOf` and `allOf` say it."""
    if not isinstance(schema, Mapping):
        return ANY
    types = ANY
    if "type" in schema:
        named = schema["type"]
        types &= frozenset([named] if isinstance(named, str) else named)
    values = [*schema.get("enum", ()), *([schema["const"]] if "const" in schema else [])]
    if values:
        types &= frozenset().union(*map(_types_of, values))
    for key in ("anyOf", "oneOf"):
        if schema.get(key):
            types &= frozenset().union(*map(allowed_types, schema[key]))
    for part in schema.get("allOf", ()):
        types &= allowed_types(part)
    return types or ANY


def _properties(parameters: Any, place: str) -> Mapping[str, Any]:
    if not isinstance(parameters, Mapping) or parameters.get("type", "object") != "object":
        given = parameters.get("type") if isinstance(parameters, Mapping) else type(parameters).__name__
        raise ValueError(f"{place} has parameters of type {given!r}; expected the JSON schema of an object.")
    properties = parameters.get("properties", {})
    if not isinstance(properties, Mapping):
        raise ValueError(f"{place} has properties of type {type(properties).__name__}; expected a mapping by name.")
    for name, schema in properties.items():
        _check_schema(schema, f"{place} has the parameter {name!r} with")
    return properties


def _check_schema(schema: Any, place: str) -> None:
    """Refuse, where tools are given, what `allowed_types` could not read in the middle of a run."""
    if not isinstance(schema, Mapping | bool):
        raise ValueError(f"{place} a schema of type {type(schema).__name__}; expected a mapping.")
    if isinstance(schema, bool):
        return
    named = schema.get("type", [])
    if not isinstance(named, str) and not (_is_list(named) and all(isinstance(name, str) for name in named)):
        raise ValueError(f"{place} the type {named!r}; expected a text or a list of texts.")
    for key in ("enum", "anyOf", "oneOf", "allOf"):
        parts = schema.get(key, ())
        if not _is_list(parts):
            raise ValueError(f"{place} {key} of type {type(parts).__name__}; expected a list.")
        for number, part in enumerate(parts if key != "enum" else ()):
            _check_schema(part, f"{place} {key}[{number}] with")


def _is_list(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str)


def _types_of(value: Any) -> frozenset[str]:
    if value is None:
        return frozenset({"null"})
    # True is an int in Python and no number in JSON; 2.0 is an integer in JSON schema.
    if isinstance(value, bool):
        return frozenset({"boolean"})
    if isinstance(value, int | float):
        # An int may be larger than any float.
        return frozenset({"number", "integer"} if isinstance(value, int) or value.is_integer() else {"number"})
    if isinstance(value, str):
        return frozenset({"string"})
    return frozenset({"object" if isinstance(value, Mapping) else "array"})


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(text)
    return number


def _refuse(text: str) -> None:
    raise ValueError(text)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a name stands twice")
    return found
