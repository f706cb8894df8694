"""Fields of a request's body, each read once and held to its type and range; what is wrong is an `APIError`."""

import json
import math
import re
from collections.abc import Mapping
from typing import Any

from jaxrl_llm.serving.errors import bad

HALF = re.compile(r"\\u[dD][89a-fA-F]")
"""Where half of a surrogate pair may be written."""
LONGEST_SHOWN = 80
"""Characters of a client's value that a sentence shows."""


def parsed(body: bytes) -> dict[str, Any]:
    """The JSON object of a body.

    Raises:
        APIError: it is none.
    """
    try:
        text = body.decode("utf-8-sig")
        value = json.loads(text, parse_constant=_refuse)
        if HALF.search(text):
            json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise bad("the body has half of a surrogate pair in it; expected Unicode.", code="malformed") from None
    except (ValueError, RecursionError) as error:
        raise bad(f"the body is no JSON ({error}).", code="malformed") from None
    if not isinstance(value, dict):
        raise bad(f"the body is {shown(value)}; expected a JSON object.", code="malformed")
    return value


def shown(value: Any) -> str:
    """A value as sentences show it."""
    text = repr(value) if not isinstance(value, dict | list) else f"a {type(value).__name__} of {len(value)}"
    return text if len(text) <= LONGEST_SHOWN else f"{text[:LONGEST_SHOWN]}..."


def _refuse(text: str) -> None:
    raise ValueError(f"{text} is no number")


class Fields:
    """The fields of an object. A field that is null counts as not given.

    Args:
        values: of the object.
        inside: name of the object, before those of its fields.
    """

    def __init__(self, values: Mapping[str, Any], inside: str = "") -> None:
        self._values, self._inside = {name: value for name, value in values.items() if value is not None}, inside
        self._read: set[str] = set()

    def name(self, field: str) -> str:
        """The whole name of a field."""
        return f"{self._inside}.{field}" if self._inside else field

    def get(self, field: str) -> Any:
        """A field as it is; None where it is not given."""
        self._read.add(field)
        return self._values.get(field)

    def text(self, field: str, default: str | None = None) -> str:
        """A field that is a text; needed where there is no default."""
        return self._typed(field, default, lambda value: isinstance(value, str), "a text")

    def flag(self, field: str) -> bool:
        """A field that is true or false, false by default."""
        return self._typed(field, False, lambda value: isinstance(value, bool), "true or false")

    def integer(self, field: str, default: int, low: int, high: int) -> int:
        """A whole number in low .. high."""
        return self._typed(
            field,
            default,
            lambda value: isinstance(value, int) and not isinstance(value, bool) and low <= value <= high,
            f"a whole number in {low} .. {high}",
        )

    def number(self, field: str, default: float, low: float, high: float) -> float:
        """A number in [low, high]."""

        def fits(value: Any) -> bool:
            return isinstance(value, int | float) and not isinstance(value, bool) and low <= value <= high

        return float(self._typed(field, default, fits, f"a number in [{low:g}, {high:g}]"))

    def texts(self, field: str, *, most: int, longest: int) -> tuple[str, ...]:
        """A text or a list of texts, none by default."""
        value = self.get(field)
        found = [] if value is None else [value] if isinstance(value, str) else value
        if not isinstance(found, list) or len(found) > most:
            raise bad(f"{self.name(field)} is {shown(value)}; expected a text or at most {most} of them.", field)
        for text in found:
            if not isinstance(text, str) or not 1 <= len(text) <= longest:
                raise bad(f"{self.name(field)} has {shown(text)}; expected texts of 1 .. {longest} letters.", field)
        return tuple(found)

    def integers(self, field: str, *, low: int, high: int, most: int) -> tuple[int, ...]:
        """A list of whole numbers in low .. high, none by default."""
        value = self.get(field)
        found = [] if value is None else value
        if not isinstance(found, list) or len(found) > most:
            raise bad(f"{self.name(field)} is {shown(value)}; expected a list of at most {most} numbers.", field)
        for number in found:
            if isinstance(number, bool) or not isinstance(number, int) or not low <= number <= high:
                raise bad(f"{self.name(field)} has {shown(number)}; expected whole numbers in {low} .. {high}.", field)
        return tuple(found)

    def inner(self, field: str) -> "Fields":
        """The fields of a field that is an object, none by default."""
        value = self.get(field)
        if value is not None and not isinstance(value, dict):
            raise bad(f"{self.name(field)} is {shown(value)}; expected a JSON object.", field)
        return Fields(value or {}, self.name(field))

    def only(self, field: str, *allowed: Any) -> None:
        """Raise unless a field that is not supported is not given, or has a value that changes nothing."""
        value = self.get(field)
        if value is not None and value not in allowed:
            raise bad(
                f"{self.name(field)} is {shown(value)}, which this server does not support; leave it out"
                f"{allowed and f' or give {allowed[0]!r}'}.",
                field,
                "unsupported",
            )

    def ignore(self, *fields: str) -> None:
        """Fields that change nothing here."""
        self._read.update(fields)

    def require_all_read(self) -> None:
        """Raise if there is a field that nobody knows."""
        unknown = sorted(set(self._values) - self._read)
        if unknown:
            name = unknown[0][:LONGEST_SHOWN]
            raise bad(f"{self.name(name)} is no field that this server knows.", name, "unknown_field")

    def _typed(self, field: str, default: Any, fits, expected: str) -> Any:
        value = self.get(field)
        if value is None and default is not None:
            return default
        if not fits(value) or (isinstance(value, float) and not math.isfinite(value)):
            given = "not given" if value is None else shown(value)
            raise bad(f"{self.name(field)} is {given}; expected {expected}.", field)
        return value
