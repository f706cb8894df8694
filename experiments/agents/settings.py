"""The arms of `empg_agents`, and its settings."""

import dataclasses
import functools

import jax

from experiments.agents.scan import AgentScan
from experiments.agents.scan import Sizes
from experiments.ranges import PLURAL
from experiments.ranges import RATE
from experiments.ranges import SEED
from experiments.ranges import SIZE
from experiments.ranges import Range
from experiments.ranges import Ranges
from jaxrl_llm.environments.worlds import Rooms
from jaxrl_llm.environments.worlds import split_panels
from jaxrl_llm.objectives import Recipe
from jaxrl_llm.objectives import get_recipe

BASES = ("grpo", "dapo")
PARTS = {
    "plain": {},
    "centred": {"advantage": "empg", "sharpness": 0.0, "clarity_weight": 0.0},
    "scale": {"advantage": "empg", "clarity_weight": 0.0},
    "bonus": {"advantage": "empg", "sharpness": 0.0},
    "empg": {"advantage": "empg"},
}
"""EMPG and its parts, as changes of a recipe; each is tried on both bases.

EMPG ends by subtracting the mean over the steps of all groups that differ, which changes the advantage by itself: long
episodes, which are those that failed, weigh more. `centred` does only that, and the scale and the bonus have it too.
"""
VARIANTS = {
    "all_groups": {"advantage": "empg_all_groups"},
    "renyi": {"advantage": "empg_renyi"},
    "potential": {"advantage": "empg_potential"},
    "per_sign": {"advantage": "empg_per_sign"},
}
"""Tried on DAPO."""

LABELS = {
    "plain": "plain",
    "centred": "centred over steps",
    "scale": "+ scale, centred",
    "bonus": "+ bonus, centred",
    "empg": "EMPG",
    "all_groups": "EMPG, all groups (as printed)",
    "renyi": "EMPG with Rényi-2 entropy",
    "potential": "EMPG with potential bonus",
    "per_sign": "scale per sign",
}


def arms() -> dict[str, Recipe]:
    """Every arm by its name, base_part."""
    made = {}
    for base in BASES:
        for part, changes in (PARTS if base == "grpo" else PARTS | VARIANTS).items():
            made[f"{base}_{part}"] = dataclasses.replace(get_recipe(base), name=f"{base}_{part}", **changes)
    return made


def label(arm: str) -> str:
    """An arm in words."""
    base, _, part = arm.partition("_")
    return f"{base.upper()} {LABELS[part]}"


@dataclasses.dataclass(frozen=True)
class AgentSettings:
    """The world, the agents, and how they are trained.

    Attributes:
        rows: rows of the grid of rooms.
        columns: columns of the grid of rooms.
        extra: doors beyond those that join every room.
        turns: actions after which an episode is cut off.
        map_seed: seed of the map that is never shown.
        seeds: agents trained at once in each arm, with weights and random numbers of their own.
        seed: seed of all random numbers.
        width: width of the transformer, a multiple of 16.
        layers: layers of the transformer that acts.
        imitation_steps: updates on the expert's episodes before reinforcement learning.
        imitation_rate: step size of Adam in the imitation.
        tasks: different tasks in a batch of episodes.
        group_size: episodes of each task in a batch.
        rounds: how often the policy is measured.
        every: batches between two measurements of the policy.
        updates: updates of the policy per batch.
        learning_rate: step size of Adam in reinforcement learning.
        samples: episodes per task when the policy is measured.
    """

    rows: int = 2
    columns: int = 4
    extra: int = 0
    turns: int = 14
    map_seed: int = 0
    seeds: int = 16
    seed: int = 0
    width: int = 32
    layers: int = 2
    imitation_steps: int = 80
    imitation_rate: float = 5e-3
    tasks: int = 8
    group_size: int = 8
    rounds: int = 6
    every: int = 8
    updates: int = 2
    learning_rate: float = 5e-4
    samples: int = 4

    @property
    def world(self) -> Rooms:
        """The world.

        Raises:
            ValueError: there is none of that size.
        """
        return Rooms(self.rows, self.columns, extra=self.extra, turns=self.turns, map_seed=self.map_seed)


RANGES: Ranges = {
    "rows": Range(1, 26),
    "columns": Range(1, 26),
    "extra": Range(0, 1000),
    "turns": Range(1, 1000),
    "map_seed": SEED,
    "seeds": PLURAL,
    "seed": SEED,
    "width": Range(16, 4096),
    "layers": Range(1, 128),
    "imitation_steps": Range(0, 1_000_000),
    "imitation_rate": RATE,
    "tasks": SIZE,
    "group_size": PLURAL,
    "rounds": SIZE,
    "every": SIZE,
    "updates": SIZE,
    "learning_rate": RATE,
    "samples": PLURAL,
}
"""What the fields of `AgentSettings` may be."""


@functools.lru_cache(maxsize=4)
def trainer(settings: AgentSettings) -> AgentScan:
    """What trains every arm; kept, because it is compiled once for all of them.

    Raises:
        ValueError: settings that do not fit each other.
    """
    world = settings.world
    panels = split_panels(world)
    if settings.tasks > len(panels[0].seeds):
        raise ValueError(
            f"Field --tasks is {settings.tasks}; a batch has a task at most once, and {world.name} has "
            f"{len(panels[0].seeds)} to train on."
        )
    if settings.width % 16:
        raise ValueError(f"Field --width is {settings.width}; it must be a multiple of 16.")
    return AgentScan(world, panels, list(arms().values()), sizes_of(settings))


def sizes_of(settings: AgentSettings) -> Sizes:
    """The part of the settings that the trainer reads."""
    return Sizes(**{field.name: getattr(settings, field.name) for field in dataclasses.fields(Sizes)})


def keys(settings: AgentSettings) -> tuple[jax.Array, jax.Array]:
    """Of the start, and of training: the same for every arm."""
    start, train = jax.random.split(jax.random.key(settings.seed))
    return start, train
