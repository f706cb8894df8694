"""Several collectors that take turns: one step learns from one of them, the next step from the next one."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from jaxrl_llm.rollouts.collect.protocol import BatchShape
from jaxrl_llm.rollouts.collect.protocol import Brings
from jaxrl_llm.rollouts.collect.protocol import Collector
from jaxrl_llm.rollouts.collect.protocol import Experience
from jaxrl_llm.rollouts.collect.protocol import PolicySnapshot
from jaxrl_llm.rollouts.collect.protocol import brought_by
from jaxrl_llm.rollouts.collect.samplers import NOBODYS_LAW
from jaxrl_llm.rollouts.collect.samplers import Law
from jaxrl_llm.trajectory import OUTSIDE
from jaxrl_llm.trajectory import Trajectories
from jaxrl_llm.typing import PRNGKey

FILLS = {"step_ids": OUTSIDE, "actor_ids": OUTSIDE, "versions": OUTSIDE}
"""What stands in the columns behind a row, where it is not 0."""


class TurnsCollector:
    """Step s is a batch of collector s mod n: tasks of several kinds in one run, each with groups of its own.

    The rows of all have the width of the widest, padded behind their end. Each collector has a cursor of its own, and
    is asked for its batches 0, 1, 2, .. one after the other.
    """

    def __init__(self, collectors: Mapping[str, Collector]) -> None:
        """Take turns in this order.

        Args:
            collectors: by name; what each measures of its rows is called `name/..` too.

        Raises:
            ValueError: there is none, or they differ in rows, groups or in what they bring.
        """
        self._names, self._collectors = tuple(collectors), tuple(collectors.values())
        if not self._collectors:
            raise ValueError("collectors is empty; there must be one to take a turn.")
        sizes = [(one.shape.rows, one.shape.group_size, brought_by(one)) for one in self._collectors]
        if len(set(sizes)) > 1:
            said = ", ".join(
                f"{name}: {size[0]} rows in groups of {size[1]}" for name, size in zip(self._names, sizes, strict=True)
            )
            raise ValueError(f"collectors that take turns must have batches of one size and kind; they have {said}.")
        shapes = [one.shape for one in self._collectors]
        widest, actions = (max(getattr(shape, name) for shape in shapes) for name in ("width", "actions"))
        self._shape = BatchShape(shapes[0].rows, shapes[0].group_size, widest, actions)
        self.brings: Brings = sizes[0][2]
        laws = {getattr(one, "law", NOBODYS_LAW) for one in self._collectors}
        self.law: Law = laws.pop() if len(laws) == 1 else NOBODYS_LAW

    @property
    def shape(self) -> BatchShape:
        """See `Collector.shape`."""
        return self._shape

    def collect(self, policy: PolicySnapshot, key: PRNGKey, step: int, cursor: Mapping[str, Any]) -> Experience:
        """See `Collector.collect`; the key of a collector is the run's, folded with its number."""
        turn, number = divmod(step, len(self._collectors))
        name, own = self._names[number], jax.random.fold_in(key, number)
        found = self._collectors[number].collect(policy, own, turn, cursor.get(name, {}))
        # What is measured of one kind alone has a name of its own in every batch, or means would mix the kinds.
        return dataclasses.replace(
            found,
            trajectories=_widened(found.trajectories, self._shape.width),
            per_row={f"{name}/{what}": values for what, values in found.per_row.items()},
            metrics={f"{name}/{what}": value for what, value in found.metrics.items()},
            cursor={**cursor, name: dict(found.cursor)},
        )


def _widened(rows: Trajectories, width: int) -> Trajectories:
    """The rows with as many columns; those behind their end hold no token."""
    more = width - np.shape(rows.tokens)[1]
    if not more:
        return rows
    shape, changed = np.shape(rows.tokens), {}
    for field in dataclasses.fields(rows):
        column = getattr(rows, field.name)
        if column is not None and np.shape(column)[:2] == shape:
            sides = ((0, 0), (0, more), *((0, 0),) * (np.ndim(column) - 2))
            changed[field.name] = np.pad(column, sides, constant_values=FILLS.get(field.name, 0))
    return dataclasses.replace(rows, **changed)
