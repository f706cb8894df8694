"""What each kind of grammar takes, and what is refused before anything is computed."""

import json
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import settings
from hypothesis import strategies

from jaxrl_llm.models.tokenizers import ByteTokenizer
from jaxrl_llm.rollouts.constrained import Grammar
from jaxrl_llm.rollouts.constrained import TokenMasker

MASKER = TokenMasker(ByteTokenizer(), 300)
ASSIGNMENT = {
    "type": "object",
    "properties": {
        "worker": {"enum": ["files", "facts"]},
        "steps": {"type": "array", "items": {"type": "integer", "minimum": 1}, "maxItems": 2},
        "note": {"$ref": "#/$defs/note"},
    },
    "required": ["worker", "steps"],
    "additionalProperties": False,
    "$defs": {"note": {"type": ["string", "null"], "maxLength": 4}},
}


def takes(grammar: Grammar, text: str) -> bool:
    """Whether the text is one of the grammar's, token by token."""
    rows = MASKER.start([grammar])
    try:
        for byte in text.encode():
            rows.advance(0, byte)
    except ValueError:
        return False
    return rows.is_accepting(0)


@pytest.mark.parametrize(
    ("value", "valid"),
    [
        ({"worker": "files", "steps": [1, 20]}, True),
        ({"worker": "facts", "steps": [], "note": 'ä"\n'}, True),
        ({"worker": "facts", "steps": [], "note": None}, True),
        ({"worker": "nobody", "steps": []}, False),
        ({"worker": "files", "steps": [0]}, False),
        ({"worker": "files", "steps": [1, 2, 3]}, False),
        ({"worker": "files"}, False),
        ({"worker": "files", "steps": [], "note": "longer"}, False),
        ({"worker": "files", "steps": [], "other": 1}, False),
    ],
)
def test_a_schema_takes_its_values_as_json_dumps_writes_them(value: Any, valid: bool) -> None:
    grammar = Grammar.from_json_schema(ASSIGNMENT)
    assert takes(grammar, json.dumps(value, ensure_ascii=False)) == valid
    assert not takes(grammar, json.dumps(value, indent=1))


def test_a_regular_expression_is_matched_as_a_whole() -> None:
    grammar = Grammar.from_regex(r"[0-9]{2}/ä?")
    assert [takes(grammar, text) for text in ("12/", "12/ä", "1", "12/ä ", "")] == [True, True, False, False, False]


def test_lark_names_its_parts() -> None:
    grammar = Grammar.from_lark('start: word (", " word)*\nword: /[a-z]+/ | "#" /[0-9]/')
    assert [takes(grammar, text) for text in ("ab, #1", "ab,#1", "ab, ")] == [True, False, False]


@settings(max_examples=20, deadline=None)
@given(strategies.lists(strategies.text(min_size=1, max_size=6), min_size=1, max_size=4), strategies.text(max_size=6))
def test_choices_take_these_texts_and_no_others(choices: list[str], other: str) -> None:
    grammar = Grammar.from_choices(choices)
    assert all(takes(grammar, text) for text in choices)
    assert takes(grammar, other) == (other in choices)


@pytest.mark.parametrize(
    ("make", "argument", "named"),
    [
        (Grammar.from_json_schema, {"type": "object", "properties": {"a": {"not": {}}}}, "schema.properties.a .*'not'"),
        (Grammar.from_json_schema, {"items": {"uniqueItems": True}}, "schema.items .*'uniqueItems'"),
        (Grammar.from_json_schema, {"anyOf": [{"type": "string"}, {"typ": "null"}]}, r"schema.anyOf\[1\] .*'typ'"),
        (Grammar.from_json_schema, {"type": "object", "x-guidance": {}}, "'x-guidance'"),
        (Grammar.from_json_schema, {"oneOf": [{"type": "string"}, {"type": "string"}]}, "schema .*oneOf"),
        (Grammar.from_json_schema, {"type": "strin"}, "schema .*strin"),
        (Grammar.from_json_schema, {"$ref": "#/$defs/none"}, "schema .*none"),
        (Grammar.from_json_schema, {"type": "integer", "minimum": 5, "maximum": 3}, "schema .*minimum"),
        (Grammar.from_json_schema, {"enum": []}, "schema "),
        (Grammar.from_json_schema, {"minimum": float("nan")}, "schema is no JSON"),
        (Grammar.from_json_schema, {"enum": [{1}]}, "schema is no JSON"),
        (Grammar.from_json_schema, [{"type": "string"}], "schema is a list"),
        (Grammar.from_json_schema, {"type": "string", "pattern": "(?=a)b"}, "schema .*look-a"),
        (Grammar.from_json_schema, {"type": "string", "format": "poem"}, "schema .*poem"),
        (Grammar.from_regex, "(", "pattern .*unclosed"),
        (Grammar.from_lark, "start: missing", "text .*missing"),
        (Grammar.from_choices, [], "choices"),
        (Grammar.from_choices, ["a", ""], "choices"),
        (Grammar.from_choices, "abc", "choices"),
    ],
)
def test_what_cannot_be_held_is_refused_by_name(make: Callable[[Any], Grammar], argument: Any, named: str) -> None:
    with pytest.raises(ValueError, match=named):
        make(argument)


def test_a_schema_may_be_as_deep_as_it_likes() -> None:
    schema: dict[str, Any] = {"type": "null"}
    for _ in range(60):
        schema = {"type": "array", "items": schema, "maxItems": 1}
    assert takes(Grammar.from_json_schema(schema), "[[[]]]")
    for _ in range(5000):
        schema = {"items": schema}
    with pytest.raises(ValueError, match="schema"):
        Grammar.from_json_schema(schema)


def test_grammars_are_values() -> None:
    assert Grammar.from_choices(["a", "b"]) == Grammar.from_choices(["a", "b", "a"])
    assert len({Grammar.from_regex("a"), Grammar.from_regex("a"), Grammar.from_regex("b")}) == 2
