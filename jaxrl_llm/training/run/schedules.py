"""What changes over a run beside its learning rate: a batch that grows, and numbers that switch."""

import bisect
import dataclasses
import math
from collections.abc import Sequence
from functools import cached_property

import optax

from jaxrl_llm.training.run.numbers import require_finite

TRILLION = 10**12

GLM_4_5_SWITCHES: dict[str, tuple[tuple[float, ...], tuple[int, ...]]] = {
    "bias_update_rate": ((1e-3, 0.0), (15 * TRILLION,)),
    "mtp_weight": ((0.3, 0.1), (15 * TRILLION,)),
    # The context grows from 4,096 to 32,768 tokens after 15 and 7 trillion: read off a figure, not stated in the text.
    "rotary_base": ((1e4, 1e6), (22 * TRILLION,)),
}
"""Values and the tokens at which the next one begins (GLM-4.5, arXiv 2508.06471, section 2)."""


def switched(values: Sequence[float], steps: Sequence[int]) -> optax.Schedule:
    """values[0] before steps[0], values[1] from there on, and so on.

    Each value is met exactly; `optax.piecewise_constant_schedule` multiplies and cannot leave 0.

    Args:
        values: one after the other.
        steps: at which the next value begins, rising. (`BatchRamp.steps` makes them of tokens.)

    Raises:
        ValueError: there is not one step fewer than values, or steps do not rise from 1 or more.
    """
    if len(values) != len(steps) + 1:
        raise ValueError(f"values has {len(values)} entries and steps {len(steps)}; it must have one more.")
    if list(steps) != sorted(set(steps)) or (steps and steps[0] < 1):
        raise ValueError(f"steps is {tuple(steps)}; they must rise, from 1 or more.")
    return optax.join_schedules([optax.constant_schedule(value) for value in values], list(steps))


@dataclasses.dataclass(frozen=True)
class BatchRamp:
    """The size of a batch, which grows in whole multiples of a unit with the tokens seen.

        batch = first + unit floor( (last - first) / unit min(1, seen / over) )

    The sizes of GLM-4.5 (arXiv 2508.06471, section 2) are first 16e6, last 64e6, over 500e9; the report says that the
    batch grows, and not by which curve: a line in the tokens seen is ours.

    Attributes:
        first: size at the start. [tokens]
        last: size at the end. [tokens]
        over: tokens after which it is reached; 0 starts there. [tokens]
        unit: sizes are first plus multiples of this, such as the tokens of a row. [tokens]

    Raises:
        ValueError: a number that cannot be, or sizes that are no whole number of units.
    """

    first: int
    last: int
    over: int
    unit: int

    def __post_init__(self) -> None:
        require_finite(self)
        for name, least in (("first", 1), ("last", self.first), ("over", 0), ("unit", 1)):
            value = getattr(self, name)
            if value < least or value != int(value):
                raise ValueError(f"{name} is {value}; it must be a whole number of at least {least}.")
            # 16e6 is whole too; as a float it would index no list, and round large sums.
            object.__setattr__(self, name, int(value))
        for name in ("first", "last"):
            if getattr(self, name) % self.unit:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be a multiple of unit, {self.unit}.")

    @cached_property
    def _stages(self) -> tuple[list[int], list[int], list[int]]:
        """Of each size: the step and the tokens seen at which it begins, and itself."""
        levels = (self.last - self.first) // self.unit
        level = 0 if self.over else levels
        steps, seen, sizes = [0], [0], [self.first + level * self.unit]
        while level < levels:
            # The next size begins with the first batch that finds so many tokens seen; sizes before it may be skipped.
            more = -(-(self.over * (level + 1) - seen[-1] * levels) // (sizes[-1] * levels))
            steps.append(steps[-1] + more)
            seen.append(seen[-1] + more * sizes[-1])
            level = min(levels, seen[-1] * levels // self.over)
            sizes.append(self.first + level * self.unit)
        return steps, seen, sizes

    def batch(self, step: int) -> int:
        """Tokens of the batch of a step, counted from 0.

        Raises:
            ValueError: a negative step.
        """
        if step < 0:
            raise ValueError(f"step is {step}; it must be at least 0.")
        steps, _, sizes = self._stages
        return sizes[bisect.bisect_right(steps, step) - 1]

    def tokens(self, step: int) -> int:
        """Tokens of all batches before a step.

        Raises:
            ValueError: a negative step.
        """
        size = self.batch(step)
        steps, seen, _ = self._stages
        stage = bisect.bisect_right(steps, step) - 1
        return seen[stage] + (step - steps[stage]) * size

    def steps(self, budget: float) -> int:
        """Steps after which at least `budget` tokens were seen: the fewest.

        Raises:
            ValueError: a budget that is negative or no finite number.
        """
        if not 0 <= budget < math.inf:
            raise ValueError(f"budget is {budget}; it must be a finite number of at least 0.")
        steps, seen, sizes = self._stages
        stage = max(bisect.bisect_left(seen, budget) - 1, 0)
        return steps[stage] + math.ceil((budget - seen[stage]) / sizes[stage])
