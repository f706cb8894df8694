"""Frozen panels: which tasks of a world are trained on and which are measured on, the same for all that is compared."""

import hashlib
from typing import NamedTuple
from typing import Protocol
from typing import runtime_checkable

import numpy as np

from jaxrl_llm.environments.splits import is_held_out
from jaxrl_llm.environments.worlds.protocol import ArrayWorld
from jaxrl_llm.environments.worlds.text import TextWorld
from jaxrl_llm.typing import Int


class Panel(NamedTuple):
    """Tasks of one world.

    Attributes:
        world: its name.
        seeds: the tasks, in order.
    """

    world: str
    seeds: Int[np.ndarray, " M"]

    @property
    def sha256(self) -> str:
        """Of the world's name and the seeds: two runs with the same hash were measured on the same tasks."""
        text = f"{self.world}/{','.join(map(str, self.seeds.tolist()))}"
        return hashlib.sha256(text.encode()).hexdigest()


@runtime_checkable
class HoldsOut(Protocol):
    """A world that says itself which of its tasks are never trained on, such as those of products never seen."""

    def held_out(self, seed: int) -> bool:
        """Whether the task is measured on; the same in every run."""
        ...


def split_panels(world: ArrayWorld | TextWorld) -> tuple[Panel, Panel]:
    """Every task of a world, on one of two panels: (to train on, to measure on).

    A world that is a `HoldsOut` says which side a task is on. Otherwise a hash of the world's name and the seed does,
    and a fixed third is measured on. No setting of a run moves a task.

    Raises:
        ValueError: the world has so few tasks that a panel would be empty.
    """
    if isinstance(world, HoldsOut):
        held_out = np.array([world.held_out(seed) for seed in range(world.tasks)])
    else:
        held_out = np.array([is_held_out(f"{world.name}/{seed}") for seed in range(world.tasks)])
    if held_out.all() or not held_out.any():
        raise ValueError(
            f"{world.name} has {world.tasks} tasks, too few for a panel to train on and one to measure on."
        )
    seeds = np.arange(world.tasks)
    return Panel(world.name, seeds[~held_out]), Panel(world.name, seeds[held_out])
