"""The entries of a config.json, by name and type."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from jaxrl_llm.models.files import ModelFileError
from jaxrl_llm.models.files import read_from

Settings = Mapping[str, Any]


@dataclass(frozen=True)
class Entries:
    """The entries of a config.json (or of an object in it), by name and type."""

    settings: Settings
    source: str

    def integer(self, name: str, default: int | None = None, *, null: int | None = None) -> int:
        """A whole number; `default` where the entry is absent, `null` where it is null."""
        value = self.settings.get(name, default)
        value = null if value is None else value
        if isinstance(value, bool) or not isinstance(value, int):
            raise self.unexpected(name, "a whole number", value)
        return value

    def number(self, name: str, default: float | None = None) -> float:
        """A finite number."""
        value = self.settings.get(name, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < math.inf:
            raise self.unexpected(name, "a finite number", value)
        with read_from(self.source):
            return float(value)

    def truth(self, name: str, default: bool) -> bool:
        """True or false."""
        value = self.settings.get(name, default)
        if not isinstance(value, bool):
            raise self.unexpected(name, "true or false", value)
        return value

    def part(self, name: str) -> "Entries | None":
        """An object inside this one, or None where it is absent, null or empty."""
        value = self.settings.get(name)
        if value is not None and not isinstance(value, Mapping):
            raise self.unexpected(name, "an object", value)
        return Entries(value, self.source) if value else None

    def unexpected(self, name: str, expected: str, value: Any) -> ModelFileError:
        """The sentence for an entry of another type."""
        return ModelFileError(f"{self.source} says {name} is {value!r:.80}; expected {expected}.")
