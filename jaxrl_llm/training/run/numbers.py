"""Settings are finite numbers; those that came later change no run that was saved before them."""

import dataclasses
import math
from typing import Any

from jaxrl_llm.checks import LATER


def is_written(field: dataclasses.Field[Any], value: Any) -> bool:
    """Whether a field of settings with this value is written down: all are but those of `LATER` at their default."""
    return not (field.metadata == LATER and value == field.default)


def require_finite(settings: Any) -> None:
    """Refuse infinities and what is no number, in any field of a dataclass.

    Args:
        settings: a dataclass; fields that are no numbers are not looked at.

    Raises:
        ValueError: naming the field.
    """
    for field in dataclasses.fields(settings):
        value = getattr(settings, field.name)
        if isinstance(value, (int, float)) and not _is_finite(value):
            shown = str(value) if isinstance(value, float) else "larger than any number of the machine"
            raise ValueError(f"{field.name} is {shown}; it must be a finite number.")


def _is_finite(value: float) -> bool:
    try:
        return math.isfinite(value)
    except OverflowError:
        return False
