"""Going through the records of a file again and again, in an order that depends on the seed and the epoch alone."""

import dataclasses
import functools
from collections.abc import Callable
from collections.abc import Mapping
from typing import Any
from typing import Generic
from typing import TypeVar

import numpy as np

from jaxrl_llm.rollouts.collect.records import Records

Usable = TypeVar("Usable")


@dataclasses.dataclass(frozen=True)
class Walk:
    """Where a collector stands: `position` records of `epoch` are done."""

    epoch: int = 0
    position: int = 0

    @classmethod
    def of(cls, cursor: Mapping[str, Any], records: Records) -> "Walk":
        """The place that a cursor names; the beginning where it is empty.

        Raises:
            ValueError: the cursor belongs to another content of the file, or to another collector.
        """
        if not cursor:
            return cls()
        if set(cursor) != {"epoch", "position", "file"}:
            raise ValueError(f"the cursor has the keys {sorted(cursor)}; expected epoch, file and position.")
        if cursor["file"] != records.fingerprint:
            raise ValueError(
                "the file has changed since the cursor was written: its SHA-256 is "
                f"{records.fingerprint[:12]}.., that of the cursor {str(cursor['file'])[:12]}.."
            )
        return cls(int(cursor["epoch"]), int(cursor["position"]))

    def cursor(self, records: Records) -> dict[str, Any]:
        """This place as JSON."""
        return {"epoch": self.epoch, "position": self.position, "file": records.fingerprint}

    def epochs(self, count: int) -> float:
        """How often all `count` records have been gone through."""
        return self.epoch + self.position / count


@dataclasses.dataclass(frozen=True)
class Taken(Generic[Usable]):
    """What `take` found.

    Attributes:
        items: what was made of the records, with the number of each record.
        unusable: records that nothing could be made of.
        walk: where it ended.
    """

    items: list[tuple[int, Usable]]
    unusable: int
    walk: Walk


@functools.lru_cache(maxsize=4)
def order(count: int, seed: int, epoch: int) -> np.ndarray:
    """The records of one epoch, shuffled; the same for the same arguments, wherever it is asked."""
    shuffled = np.random.default_rng((seed, epoch)).permutation(count)
    shuffled.setflags(write=False)
    return shuffled


def take(
    count: int,
    wanted: int,
    walk: Walk,
    seed: int,
    use: Callable[[int], Usable | None],
    *,
    why: str = "each was dropped",
) -> Taken[Usable]:
    """The next `wanted` usable records; a batch goes on in the next epoch where one ends.

    Args:
        count: records there are.
        wanted: records to find.
        walk: where to go on.
        seed: of the order.
        use: what is made of a record, by its number; None for one that cannot be used.
        why: what is said where none can be used.

    Raises:
        ValueError: as many records as there are were gone through, and none of them was usable.
    """
    epoch, position = walk.epoch, walk.position
    items: list[tuple[int, Usable]] = []
    unusable = in_a_row = 0
    while len(items) < wanted:
        if position >= count:
            epoch, position = epoch + 1, 0
        index = int(order(count, seed, epoch)[position])
        position += 1
        made = use(index)
        if made is not None:
            items.append((index, made))
            in_a_row = 0
            continue
        unusable += 1
        in_a_row += 1
        if in_a_row >= 2 * count:  # two epochs in two orders: all of them were met
            raise ValueError(f"none of the {count} records can be used; {why}.")
    return Taken(items, unusable, Walk(epoch, position))
