"""Grammars: which texts a policy may write, from a JSON schema, a regular expression, a list of texts or in Lark.

A grammar is a value: nothing of a tokenizer or a model is in it. `TokenMasker` turns it into masks over tokens.
"""

import json
from collections.abc import Mapping
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from typing import Self

from llguidance import LLMatcher

ANNOTATIONS = frozenset(
    {"$schema", "$id", "$comment", "title", "description", "default", "examples", "deprecated", "readOnly", "writeOnly"}
)
"""Keywords of JSON schema that say nothing about which values are valid."""

KEYWORDS = ANNOTATIONS | {
    *("type", "enum", "const", "anyOf", "oneOf", "allOf", "$ref", "$defs", "definitions"),
    *("properties", "patternProperties", "additionalProperties", "required", "minProperties", "maxProperties"),
    *("items", "prefixItems", "additionalItems", "minItems", "maxItems"),
    *("minLength", "maxLength", "pattern", "format"),
    *("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf"),
}
"""Keywords that a schema may have. Any other is refused, as it would be ignored and hold nothing."""

_NAMED_SCHEMAS = ("properties", "patternProperties", "$defs", "definitions")
_LISTED_SCHEMAS = ("anyOf", "oneOf", "allOf", "prefixItems", "items")
_SINGLE_SCHEMAS = ("additionalProperties", "additionalItems", "items")

# One way to write each value: with free white space a policy may write blanks for ever.
_JSON_FORM = {"item_separator": ", ", "key_separator": ": ", "whitespace_flexible": False}


@dataclass(frozen=True)
class Grammar:
    """A set of texts, made by one of its constructors; two grammars of one source are equal.

    Attributes:
        source: the grammar in llguidance's own form.
    """

    source: str

    @classmethod
    def from_json_schema(cls, schema: Mapping[str, Any]) -> Self:
        """The JSON values that are valid under a schema, each written as `json.dumps(value, ensure_ascii=False)` does.

        An object's members come in the order of `properties`, then those that `additionalProperties` allows.

        Args:
            schema: a JSON schema (draft 2020-12); its keywords are among `KEYWORDS`.

        Raises:
            ValueError: a keyword that is unknown or cannot be held by a grammar (such as `not` or `uniqueItems`), or a
                schema that no value satisfies; the sentence names it.
        """
        if not isinstance(schema, Mapping):
            raise ValueError(f"schema is a {type(schema).__name__}; it must be a JSON schema as a dictionary.")
        try:
            text = json.dumps(schema, allow_nan=False)
        except (TypeError, ValueError, RecursionError) as error:
            raise ValueError(f"schema is no JSON: {error}.") from error
        _require_known_keywords(schema)
        return cls._checked(LLMatcher.grammar_from_json_schema(text, overrides=_JSON_FORM), "schema")  # pyright: ignore[reportArgumentType]

    @classmethod
    def from_regex(cls, pattern: str) -> Self:
        """The texts that match a regular expression as a whole (Rust's syntax, without look-around).

        Raises:
            ValueError: it is none.
        """
        return cls._checked(LLMatcher.grammar_from_regex(pattern), "pattern")

    @classmethod
    def from_lark(cls, text: str) -> Self:
        """The texts of a grammar in Lark's notation, as llguidance reads it; its first rule is `start`.

        Special tokens are written as `<|name|>`; text that spells the same is not the token.

        Raises:
            ValueError: it is none.
        """
        return cls._checked(LLMatcher.grammar_from_lark(text), "text")

    @classmethod
    def from_choices(cls, choices: Sequence[str]) -> Self:
        """One of these texts.

        Raises:
            ValueError: there are none, one is empty, or one is no Unicode.
        """
        if isinstance(choices, str) or not choices or not all(isinstance(text, str) and text for text in choices):
            raise ValueError(
                f"choices is {choices!r:.80}; it must be a list of texts, at least one, none of them empty."
            )
        # Every letter by its number: it then stands for nothing but itself.
        written = ("".join(f"\\x{{{ord(letter):x}}}" for letter in text) for text in dict.fromkeys(choices))
        return cls._checked(LLMatcher.grammar_from_regex("|".join(written)), "choices")

    @classmethod
    def _checked(cls, source: str, argument: str) -> Self:
        wrong, messages = LLMatcher.validate_grammar_with_warnings(source)
        if wrong:
            raise ValueError(f"{argument} cannot be held by a grammar: {' '.join(messages[0].split())[:400]}.")
        return cls(source)


def _require_known_keywords(schema: Mapping[str, Any]) -> None:
    waiting: list[tuple[str, Any]] = [("schema", schema)]
    while waiting:
        place, part = waiting.pop()
        if not isinstance(part, Mapping):
            continue  # true and false; anything else is refused where the grammar is made
        for name in part:
            if name not in KEYWORDS:
                raise ValueError(f"{place} has the keyword {name!r}, which a grammar cannot hold.")
        for name in _NAMED_SCHEMAS:
            if isinstance(part.get(name), Mapping):
                waiting += [(f"{place}.{name}.{key}", inner) for key, inner in part[name].items()]
        for name in _LISTED_SCHEMAS:
            if isinstance(part.get(name), list):
                waiting += [(f"{place}.{name}[{number}]", inner) for number, inner in enumerate(part[name])]
        for name in _SINGLE_SCHEMAS:
            waiting.append((f"{place}.{name}", part.get(name)))
