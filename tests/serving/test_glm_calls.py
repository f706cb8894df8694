"""Calls of GLM-4.5's form are held to their schemas, or refused."""

import json

import pytest

from jaxrl_llm.models.chat_tools import argument_value
from jaxrl_llm.models.tokenizers import ByteTokenizer
from jaxrl_llm.rollouts.constrained import TokenMasker
from jaxrl_llm.serving.errors import APIError
from jaxrl_llm.serving.structure import call_grammar

TOKENIZER = ByteTokenizer()


@pytest.fixture(scope="module")
def masker() -> TokenMasker:
    return TokenMasker(TOKENIZER, TOKENIZER.vocab_size)


def grammar(schema, **more):
    parameters = {"type": "object", "properties": {"x": schema}, "required": ["x"], **more}
    tool = {"type": "function", "function": {"name": "f", "parameters": parameters}}
    return call_grammar([tool], None, TOKENIZER, glm=True, several=False)


def takes(masker: TokenMasker, schema, value: str) -> bool:
    """Whether the grammar lets a call with this value be written, to its end."""
    text = f"<tool_call>f\n<arg_key>x</arg_key>\n<arg_value>{value}</arg_value>\n</tool_call>"
    rows = masker.start([grammar(schema)])
    try:
        for token in TOKENIZER.encode(text, add_special_tokens=False):
            rows.advance(0, token)
    except ValueError:
        return False
    return rows.is_accepting(0)


@pytest.mark.parametrize(
    ("schema", "good", "wrong"),
    [
        ({"type": "string"}, "a b", None),
        ({"type": "string", "title": "X", "default": "a"}, "", None),
        (True, "[1", None),
        ({"enum": ["left", "right"]}, "left", '"left"'),
        ({"type": "string", "const": "a/b"}, "a/b", "a"),
        ({"type": "string", "minLength": 2, "maxLength": 3}, "abc", "abcd"),
        ({"type": "string", "minLength": 2}, "abc", "a"),
        ({"type": "string", "pattern": "^[a-c]+/[0-9]{2}$"}, "abc/12", "abc/1"),
        ({"type": "integer", "minimum": 3}, "4", "2"),
        ({"anyOf": [{"type": "string"}, {"type": "null"}]}, "null", None),
        ({"type": ["string", "null"]}, "what", None),
        ({"type": "array", "items": {"enum": ["a"]}}, '["a"]', "[1]"),
    ],
)
def test_values_are_those_of_the_schema(masker, schema, good, wrong):
    assert takes(masker, schema, good)
    assert wrong is None or not takes(masker, schema, wrong)
    if isinstance(schema, dict) and "enum" in schema:
        assert argument_value(good, schema) in schema["enum"]


@pytest.mark.parametrize(
    ("schema", "more", "sentence"),
    [
        ({"type": "string", "format": "date"}, {}, "f.x has format, type, which calls of this model's form"),
        ({"type": "string", "pattern": "a"}, {}, "f.x has pattern"),
        ({"type": "string", "pattern": "^a|b$"}, {}, "f.x has pattern"),
        ({"$ref": "#/$defs/X"}, {"$defs": {"X": {"type": "string"}}}, "f.x has"),
        ({"anyOf": [{"type": "string"}, {"type": "integer", "minimum": 2}]}, {}, "f.x has anyOf"),
        ({"enum": ["a", 1]}, {}, "f.x has enum"),
        ({"type": "integer"}, {"anyOf": [{"required": ["x"]}]}, "f has anyOf"),
        ({"type": "integer"}, {"additionalProperties": {"type": "integer"}}, "f has additionalProperties"),
    ],
)
def test_what_cannot_be_held_is_refused(schema, more, sentence):
    with pytest.raises(APIError) as caught:
        grammar(schema, **more)
    assert caught.value.status == 400
    assert sentence in str(caught.value), json.dumps(schema)
