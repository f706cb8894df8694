"""What a check is: worlds to draw, what to measure in each, two sides to compare, and a wrong statement to catch.

A world draws random instances in batches of one shape and says what is measured in one instance; the measurement is
jitted and mapped over the batch. A check compares two sides of what was measured: left <= right for an inequality,
left = right for an identity. Its wrong twin is the same statement with a sign or a factor changed, and must be
violated on the same instances: a check whose twin passes cannot fail and proves nothing.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from typing import NamedTuple

import jax
import numpy as np

Measured = dict[str, np.ndarray]
"""Name -> array whose first axis runs over instances."""

RESOLVED = 1e-7
"""Right-hand sides below it do not count towards tightness: there a ratio is one of rounding errors."""


class Sides(NamedTuple):
    """The two sides of a statement, first axis over instances.

    Attributes:
        left: what is bounded, or the left of an equation.
        right: the bound, or the right of the equation.
    """

    left: np.ndarray
    right: np.ndarray


@dataclass(frozen=True, kw_only=True)
class World:
    """A family of random instances and what is measured in each.

    Attributes:
        name: of the family.
        draw: (generator, count) -> batches, each a pytree of arrays with a leading axis of instances.
        measure: one instance -> name -> array.
    """

    name: str
    draw: Callable[[np.random.Generator, int], list[Any]]
    measure: Callable[..., dict[str, jax.Array]]

    def measured(self, key: jax.Array, count: int) -> Measured:
        """Draw about `count` instances from a typed key, measure all of them, and join the batches."""
        generator = np.random.default_rng(np.asarray(jax.random.key_data(key)))
        one_batch = jax.jit(jax.vmap(self.measure))
        parts = [jax.device_get(one_batch(*batch)) for batch in self.draw(generator, count)]
        return {name: np.concatenate([np.asarray(part[name]) for part in parts]) for name in parts[0]}


@dataclass(frozen=True, kw_only=True)
class Check:
    """One theorem, or one erratum, as a statement about measured numbers.

    Attributes:
        name: `family.statement`.
        paper: where the statement is from; "derived" if it is from here.
        statement: in one line.
        functions: names below `jaxrl_llm` of what is checked.
        world: where the instances come from.
        sides: measured -> the two sides.
        wrong: measured -> the two sides of a wrong statement, which some instance must violate.
        equality: left = right instead of left <= right.
        tolerance: rounding allowed, relative to the right side where that is above 1.
    """

    name: str
    paper: str
    statement: str
    functions: tuple[str, ...]
    world: World
    sides: Callable[[Measured], Sides]
    wrong: Callable[[Measured], Sides]
    equality: bool = False
    tolerance: float = 1e-11

    @property
    def family(self) -> str:
        """The part of the name before the dot: the file it is defined in."""
        return self.name.partition(".")[0]

    def instances(self, key: jax.Array, count: int) -> Measured:
        """About `count` random instances, measured."""
        return self.world.measured(key, count)

    def margin(self, measured: Measured) -> np.ndarray:
        """One number per instance, at least 0 where the statement holds."""
        return self._margin(self.sides(measured))

    def wrong_margin(self, measured: Measured) -> np.ndarray:
        """The same for the wrong twin: below 0 on some instance."""
        return self._margin(self.wrong(measured))

    def tightness(self, measured: Measured) -> float:
        """The largest left / right over instances: 1 where a bound is attained, and always for an identity."""
        left, right = np.broadcast_arrays(*self.sides(measured))
        if self.equality:
            left, right = np.abs(left), np.abs(right)
        resolved = right > RESOLVED
        return max(float(np.max(left[resolved] / right[resolved])), 0.0) if resolved.any() else 0.0

    def _margin(self, sides: Sides) -> np.ndarray:
        left, right = np.broadcast_arrays(np.asarray(sides.left, np.float64), np.asarray(sides.right, np.float64))
        slack = self.tolerance * np.maximum(np.abs(right), 1.0)
        gap = -np.abs(left - right) if self.equality else right - left
        # NaN compares as false everywhere, so it must not be able to pass: it counts as an infinite violation.
        margin = np.where(np.isnan(gap), -np.inf, gap + slack)
        return margin.reshape(margin.shape[0], -1).min(axis=1)


@dataclass(frozen=True, kw_only=True)
class Result:
    """What running one check gave.

    Attributes:
        check: the check.
        passed: no instance violates it and some instance violates its wrong twin.
        margin: the smallest margin.
        tightness: the largest left / right.
        instances: how many there were.
        wrong_caught: share of the instances that violate the wrong twin.
        compared: the two sides, flat, for a plot.
    """

    check: Check
    passed: bool
    margin: float
    tightness: float
    instances: int
    wrong_caught: float
    compared: Sides

    @property
    def ratios(self) -> np.ndarray:
        """left / right wherever the right side is resolved; empty for an identity."""
        if self.check.equality:
            return np.zeros(0)
        left, right = self.compared
        return left[right > RESOLVED] / right[right > RESOLVED]


def run_check(check: Check, measured: Measured) -> Result:
    """Compare the sides of one check, and those of its wrong twin, on instances that were measured."""
    margin, wrong = check.margin(measured), check.wrong_margin(measured)
    caught = float(np.mean(wrong < 0))
    return Result(
        check=check,
        passed=bool(np.all(margin >= 0)) and caught > 0,
        margin=float(margin.min()),
        tightness=check.tightness(measured),
        instances=margin.size,
        wrong_caught=caught,
        compared=Sides(*(np.ravel(side) for side in np.broadcast_arrays(*check.sides(measured)))),
    )


def run_checks(checks: list[Check], *, seed: int, instances: int) -> list[Result]:
    """Run checks in order; those of one world share its instances."""
    measured: dict[str, Measured] = {}
    for check in checks:
        if check.world.name not in measured:
            measured[check.world.name] = check.instances(jax.random.key(seed), instances)
    return [run_check(check, measured[check.world.name]) for check in checks]


def compare(
    name: str,
    statement: str,
    functions: str,
    left: Callable[[Measured], np.ndarray],
    right: Callable[[Measured], np.ndarray],
    *,
    world: World,
    paper: str,
    wrong: Callable[[Measured], np.ndarray] | None = None,
    wrong_left: Callable[[Measured], np.ndarray] | None = None,
    equality: bool = False,
    tolerance: float = 1e-11,
) -> Check:
    """A check from its two sides, and its twin from what replaces them.

    Args:
        name: `family.statement`.
        statement: in one line.
        functions: names below `jaxrl_llm`, separated by blanks.
        left: measured -> left side.
        right: measured -> right side.
        world: where the instances come from.
        paper: where the statement is from.
        wrong: what replaces the right side in the twin.
        wrong_left: what replaces the left side in the twin.
        equality: left = right instead of left <= right.
        tolerance: rounding allowed.
    """
    return Check(
        name=name,
        paper=paper,
        statement=statement,
        functions=tuple(functions.split()),
        world=world,
        sides=lambda m: Sides(left(m), right(m)),
        wrong=lambda m: Sides((wrong_left or left)(m), (wrong or right)(m)),
        equality=equality,
        tolerance=tolerance,
    )
