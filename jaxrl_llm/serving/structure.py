"""Which grammar an answer is held to: `response_format`, tools that must be called, or either of both."""

import functools
import json
from collections.abc import Mapping
from collections.abc import Sequence
from typing import Any

from jaxrl_llm.models.tokenizers import Tokenizer
from jaxrl_llm.rollouts.constrained import Grammar
from jaxrl_llm.serving.errors import bad
from jaxrl_llm.serving.fields import Fields
from jaxrl_llm.serving.fields import shown
from jaxrl_llm.serving.glm_calls import glm_call_rules
from jaxrl_llm.serving.glm_calls import json_rule

OPEN, CLOSE = "<tool_call>", "</tool_call>"


def response_schema(fields: Fields) -> dict[str, Any] | None:
    """The JSON schema that `response_format` asks for; None for a text.

    Raises:
        APIError: none that is known.
    """
    given = fields.get("response_format")
    if given is None:
        return None
    if not isinstance(given, dict):
        raise bad(f"response_format is {shown(given)}; expected a JSON object.", "response_format")
    inner = Fields(given, "response_format")
    kind = inner.text("type")
    if kind in ("text", "json_object"):
        inner.require_all_read()
        return None if kind == "text" else {"type": "object"}
    if kind != "json_schema":
        raise bad(
            f"response_format.type is {kind!r:.80}; expected text, json_object or json_schema.", "response_format"
        )
    described = inner.inner("json_schema")
    inner.require_all_read()
    schema = described.get("schema")
    if not isinstance(schema, dict):
        raise bad(
            "response_format.json_schema has no schema; expected an object with name and schema.", "response_format"
        )
    described.ignore("name", "description", "strict")
    described.require_all_read()
    return schema


def response_grammar(fields: Fields) -> Grammar | None:
    """The grammar of `response_format` alone."""
    schema = response_schema(fields)
    return None if schema is None else schema_grammar(schema, "response_format")


def schema_grammar(schema: Mapping[str, Any], param: str) -> Grammar:
    """The JSON values of a schema.

    Raises:
        APIError: no grammar can hold it.
    """
    try:
        return Grammar.from_json_schema(schema)
    except ValueError as error:
        raise bad(f"{param}: {error}", param, "schema_not_supported") from None


def call_grammar(
    tools: Sequence[Mapping[str, Any]],
    schema: Mapping[str, Any] | None,
    tokenizer: Tokenizer,
    *,
    glm: bool,
    several: bool,
) -> Grammar:
    """Calls of these tools; or a value of the schema, where there is one.

    Args:
        tools: that may be called, as OpenAI's API describes them.
        schema: of the response.
        tokenizer: of the model.
        glm: whether calls are written as GLM-4.5 does, else as JSON between tags.
        several: whether there may be more than one call.

    Raises:
        APIError: no grammar can hold it.
    """
    rules = [f"start: calls{' | answer' if schema is not None else ''}"]
    if schema is not None:
        schema_grammar(schema, "response_format")
        rules.append(f"answer: {json_rule(schema)}")
    opened, closed = (tag_rule(tokenizer, tag) for tag in (OPEN, CLOSE))
    rules.append('calls: call ("\\n" call)*' if several else "calls: call")
    rules.append(f"call: {opened} ({' | '.join(f'tool_{number}' for number in range(len(tools)))}) {closed}")
    for number, tool in enumerate(tools):
        function = tool["function"]
        parameters = {"additionalProperties": False, **function.get("parameters", {"type": "object", "properties": {}})}
        schema_grammar(parameters, "tools")
        if glm:
            rules += glm_call_rules(number, function["name"], parameters, functools.partial(tag_rule, tokenizer))
        else:
            name = json.dumps(f'{{"name": {json.dumps(function["name"])}, "arguments": ')
            rules.append(f'tool_{number}: "\\n" {name} tool_{number}_arguments "}}" "\\n"')
            rules.append(f"tool_{number}_arguments: {json_rule(parameters)}")
    try:
        return Grammar.from_lark("\n".join(rules))
    except ValueError as error:
        raise bad(f"tools: {error}", "tools", "schema_not_supported") from None


def tag_rule(tokenizer: Tokenizer, tag: str) -> str:
    """A tag as a special token where it is one, else as a text."""
    number = tokenizer.backend.token_to_id(tag)
    added = tokenizer.backend.get_added_tokens_decoder().get(number) if number is not None else None
    return tag if added is not None and added.special else json.dumps(tag)
