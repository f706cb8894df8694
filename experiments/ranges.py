"""What numbers a field may have: one table beside each dataclass of settings, and the one function that checks it."""

import dataclasses
import math
from typing import Any

from experiments.fields import leaves
from experiments.run_folder import UserError


@dataclasses.dataclass(frozen=True)
class Range:
    """The numbers from `low` to `high`; NaN is never among them.

    Attributes:
        low: the smallest.
        high: the largest.
        above: whether `low` itself is left out.
        below: whether `high` itself is left out.
    """

    low: float = -math.inf
    high: float = math.inf
    above: bool = False
    below: bool = False

    def __contains__(self, value: float) -> bool:
        """Whether a number is one of them."""
        if not self.low <= value <= self.high:
            return False
        return not ((self.above and value == self.low) or (self.below and value == self.high))

    def __str__(self) -> str:
        """In words, after "it must be"."""
        parts = []
        if self.low > -math.inf:
            parts.append(f"{'above' if self.above else 'at least'} {_words(self.low)}")
        if self.high < math.inf:
            parts.append(f"{'below' if self.below else 'at most'} {_words(self.high)}")
        return " and ".join(parts) or "a number"


def _words(value: float) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:g}"


LARGEST_INT = 2**31 - 1
LARGEST_FLOAT = 1e30
"""Of a field without a range of its own; its squares and sums still are float32 numbers or are refused later."""
INTEGER = Range(-LARGEST_INT, LARGEST_INT)
FINITE = Range(-LARGEST_FLOAT, LARGEST_FLOAT)
SEED = Range(0, 2**32 - 1)
SHARE = Range(0, 1)
POSITIVE = Range(0, LARGEST_FLOAT, above=True)
NOT_NEGATIVE = Range(0, LARGEST_FLOAT)
RATE = Range(0, 1000, above=True)
"""Step sizes of optimisers."""
SIZE = Range(1, 1_000_000)
"""How many of something there are."""
PLURAL = Range(2, 1_000_000)
"""The same where an interval or a choice needs two."""
SPREAD = Range(0, 1000)
"""Standard deviations of noise and of priors."""

Ranges = dict[str, Range]


class RangeError(UserError, ValueError):
    """A number is outside the range of its field."""


def check_ranges(settings: Any, ranges: Ranges) -> None:
    """Hold every number among the settings to its range; a number without one must be finite.

    Args:
        settings: a dataclass, nested or not; numbers in tuples are checked one by one, None and texts are passed over.
        ranges: by the name of the field, as `fields.leaves` gives it.

    Raises:
        RangeError: naming the first field that is outside, its value and what it must be.
    """
    for leaf in leaves(settings):
        for value in leaf.value if isinstance(leaf.value, tuple) else (leaf.value,):
            if isinstance(value, (int, float)) and not isinstance(value, bool):
                check_number(leaf.shown, value, ranges.get(leaf.name, INTEGER if isinstance(value, int) else FINITE))


def check_number(shown: str, value: float, allowed: Range) -> None:
    """Hold one number to a range.

    Raises:
        RangeError: it is outside.
    """
    if value not in allowed:
        # Thousands of digits would hide the sentence.
        seen = str(value) if abs(value) < 1e30 or isinstance(value, float) else "a number of more than thirty digits"
        raise RangeError(f"Field --{shown} is {seen}; it must be {allowed}.")
