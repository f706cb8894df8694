"""Rules of a grammar for calls as GLM-4.5 writes them: texts without quotes, all else as JSON.

    call = name (key value)*        each on a line, between tags

A text has no quotes, so no grammar of JSON can hold it: what a schema asks of a text is held by a pattern, and what
cannot be is refused. See `models.chat_tools.argument_value` for how a value is read back.
"""

import json
from collections.abc import Callable
from collections.abc import Mapping
from typing import Any

from jaxrl_llm.models.chat_tools import ANY
from jaxrl_llm.models.chat_tools import allowed_types
from jaxrl_llm.rollouts.constrained.grammars import ANNOTATIONS
from jaxrl_llm.serving.errors import APIError
from jaxrl_llm.serving.errors import bad

FORM = {"item_separator": ", ", "key_separator": ": ", "whitespace_flexible": False}
"""One way to write each JSON value, as `Grammar.from_json_schema` has it."""
TAGS = ("<arg_key>", "</arg_key>", "<arg_value>", "</arg_value>")
KNOWN = ANNOTATIONS | {"type", "properties", "required", "additionalProperties", "$defs", "definitions"}
"""Keywords of parameters."""


def json_rule(schema: Mapping[str, Any]) -> str:
    """The JSON values of a schema."""
    return f"%json {json.dumps({**schema, 'x-guidance': FORM})}"


def glm_call_rules(number: int, name: str, parameters: Mapping[str, Any], tag: Callable[[str], str]) -> list[str]:
    """The rule `tool_<number>`, and those that it needs.

    Args:
        number: of the tool.
        name: of the tool.
        parameters: its schema.
        tag: how a grammar writes a tag.

    Raises:
        APIError: parameters that cannot be held.
    """
    key, key_end, value, value_end = map(tag, TAGS)
    properties, required = parameters.get("properties", {}), parameters.get("required", ())
    unknown = sorted({*parameters} - KNOWN) + sorted(set(required) - set(properties))
    if unknown or isinstance(parameters.get("additionalProperties"), Mapping):
        raise _refused(name, unknown[0] if unknown else "additionalProperties")
    shared = {field: parameters[field] for field in ("$defs", "definitions") if field in parameters}
    order, rules = [], []
    for place, (argument, schema) in enumerate(properties.items()):
        rule = f"tool_{number}_{place}"
        rules.append(f"{rule}_value: {_value_rule(f'{name}.{argument}', schema, shared)}")
        parts = (key, json.dumps(argument), key_end, '"\\n"', value, f"{rule}_value", value_end, '"\\n"')
        rules.append(f"{rule}: {' '.join(parts)}")
        order.append(rule if argument in required else f"{rule}?")
    return [f'tool_{number}: {json.dumps(name)} "\\n" {" ".join(order)}', *rules]


def _value_rule(place: str, schema: Any, shared: Mapping[str, Any]) -> str:
    if schema is False:
        raise _refused(place, "false")
    said = {} if schema is True else {word: value for word, value in schema.items() if word not in ANNOTATIONS}
    types = allowed_types(said)
    if "string" not in types:
        return json_rule({**said, **shared})
    if types == {"string"}:
        return _text_rule(place, said)
    if types != ANY:
        # Whatever is no value of another type is a text; so the others must be any value of their types.
        parts = said.get("anyOf", [{"type": "string"}])
        if not {*said} <= {"type", "anyOf"} or not all(_is_any_of_a_type(part) for part in parts):
            raise _refused(place, ", ".join(sorted(said)))
    elif said.keys() - {"type"}:
        raise _refused(place, ", ".join(sorted(said)))
    return "/[^<]*/"


def _is_any_of_a_type(schema: Any) -> bool:
    return isinstance(schema, Mapping) and {*schema} - ANNOTATIONS == {"type"}


def _text_rule(place: str, said: Mapping[str, Any]) -> str:
    values = [said["const"]] if "const" in said else said.get("enum")
    if values is not None:
        if {*said} - {"type", "enum", "const"} or any("<" in value for value in values):
            raise _refused(place, ", ".join(sorted(said)))
        return " | ".join(map(json.dumps, values))
    pattern = said.get("pattern")
    if pattern is not None:
        # A pattern may stand anywhere in a text unless it says otherwise; a bar may end what it says.
        whole = isinstance(pattern, str) and pattern.startswith("^") and pattern.endswith("$")
        if {*said} - {"type", "pattern"} or not whole or "|" in pattern or "<" in pattern or pattern.endswith("\\$"):
            raise _refused(place, "pattern")
        return "/" + pattern[1:-1].replace("\\/", "/").replace("/", "\\/") + "/"
    low, high = said.get("minLength", 0), said.get("maxLength", "")
    if {*said} - {"type", "minLength", "maxLength"}:
        raise _refused(place, ", ".join(sorted(said)))
    return f"/[^<]{{{low},{high}}}/" if low or high != "" else "/[^<]*/"


def _refused(place: str, words: str) -> APIError:
    return bad(
        f"tools: {place:.80} has {words:.80}, which calls of this model's form cannot be held to.",
        "tools",
        "schema_not_supported",
    )
