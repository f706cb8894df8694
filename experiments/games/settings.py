"""The arms of `divergence_minatar`, its settings, and what is computed."""

import dataclasses
from collections.abc import Callable
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from typing import NamedTuple

import numpy as np

from experiments.ranges import NOT_NEGATIVE
from experiments.ranges import PLURAL
from experiments.ranges import RATE
from experiments.ranges import SEED
from experiments.ranges import SHARE
from experiments.ranges import SIZE
from experiments.ranges import Range
from experiments.ranges import Ranges
from experiments.ranges import check_ranges
from experiments.study import Parts
from experiments.study import Resumable
from jaxrl_llm.checks import require_choice
from jaxrl_llm.environments.pixels.minatar import GAMES
from jaxrl_llm.environments.pixels.minatar import MinAtar
from jaxrl_llm.training.control import METHODS
from jaxrl_llm.training.control import ControlSettings
from jaxrl_llm.training.control import GameTrainer
from jaxrl_llm.training.control import train
from jaxrl_llm.training.run.optimizer import OptimizerSettings

FRESH = "fresh"
"""The arm that uses every batch once, while it is new."""
MAIN = ("ppo", "kl_one_step", "kl")
"""Arms that `--full` also trains with other reuse, and without sticky actions."""
LABELS = {
    FRESH: "PPO, each batch once",
    "ppo": "PPO",
    "vtrace": "V-trace",
    "unregularised": "no clip, no divergence",
    "kl_one_step": "KL, one-step",
    "kl": "KL, multi-step",
    "kl_clipped": "KL, multi-step, clipped",
    "kl_truncated": "KL, multi-step, V-trace",
    "reverse_kl": "reverse KL",
    "hellinger": "Hellinger",
    "total_variation": "total variation",
    "entropy": "entropy alone",
}
"""Every arm in words: what is held small, and how."""


class Arm(NamedTuple):
    """One way to learn one game.

    game: of MinAtar. method: a name of `LABELS`. reuse: how often every batch is used. sticky: probability that the
    last action is repeated.
    """

    game: str
    method: str
    reuse: int
    sticky: float

    @property
    def name(self) -> str:
        """Of the part."""
        return f"{self.game}.{self.method}.reuse_{self.reuse}.sticky_{self.sticky:g}"

    @property
    def label(self) -> str:
        """In words."""
        return LABELS[self.method]


@dataclasses.dataclass(frozen=True)
class GameSettings:
    """The games, the arms, and how they are trained.

    Attributes:
        games: games of MinAtar that are learned.
        arms: ways to learn that are compared, see `experiments.games.settings.LABELS`.
        full: also every other arm, each main arm at reuse 1, 4 and 16, and without sticky actions.
        seeds: agents trained at once in each arm, with weights and games of their own.
        seed: number of the first of these agents.
        iterations: batches that each agent plays and learns from.
        parallel: games that each agent plays at once.
        steps: steps of each of these games in a batch.
        reuse: how often every step is used by an update.
        replay: batches over whose iterations this use is spread.
        minibatches: parts of a batch, each the size of an update.
        learning_rate: step size of Adam at the start; it falls on a line to 0.
        coefficient: weight of the divergence against advantages of size 1.
        sticky: how probable it is that the last action is repeated.
        every: batches between two checkpoints of an arm.
    """

    games: tuple[str, ...] = ("breakout", "space_invaders")
    arms: tuple[str, ...] = (FRESH, "ppo", "kl_one_step", "kl")
    full: bool = False
    seeds: int = 5
    seed: int = 0
    iterations: int = 100
    parallel: int = 64
    steps: int = 32
    reuse: int = 8
    replay: int = 4
    minibatches: int = 4
    learning_rate: float = 1e-3
    coefficient: float = 1.0
    sticky: float = 0.1
    every: int = 10


RANGES: Ranges = {
    "seeds": PLURAL,
    "seed": SEED,
    "iterations": Range(10, 1_000_000),
    "parallel": SIZE,
    "steps": SIZE,
    "reuse": Range(1, 1000),
    "replay": Range(1, 1000),
    "minibatches": SIZE,
    "learning_rate": RATE,
    "coefficient": NOT_NEGATIVE,
    "sticky": Range(0, 1, below=True),
    "every": SIZE,
    "discount": SHARE,
}
"""What the fields of `GameSettings` may be."""


def all_arms(settings: GameSettings) -> list[Arm]:
    """What is trained, in its order.

    Raises:
        ValueError: a game or an arm that there is not, or none.
    """
    for what, names, known in (("games", settings.games, GAMES), ("arms", settings.arms, LABELS)):
        if not names:
            raise ValueError(f"Field --{what} is empty; it must name one at least, of {', '.join(known)}.")
        for name in names:
            require_choice(f"Field --{what}", name, tuple(known))
    made: dict[Arm, None] = {}
    for game in settings.games:
        for method in settings.arms:
            made[Arm(game, method, 1 if method == FRESH else settings.reuse, settings.sticky)] = None
        if settings.full:
            made |= dict.fromkeys(_others(settings, game))
    return list(made)


def _others(settings: GameSettings, game: str) -> list[Arm]:
    arms = [Arm(game, name, settings.reuse, settings.sticky) for name in LABELS if name != FRESH]
    arms += [Arm(game, name, reuse, settings.sticky) for reuse in (1, 4, 16) for name in MAIN]
    return arms + [Arm(game, name, settings.reuse, 0.0) for name in MAIN]


def control_settings(settings: GameSettings, arm: Arm) -> ControlSettings:
    """The numbers of one arm.

    Raises:
        ValueError: numbers that do not fit each other.
    """
    method = METHODS["ppo" if arm.method == FRESH else arm.method]
    return ControlSettings(
        method=dataclasses.replace(method, coefficient=settings.coefficient),
        games=settings.parallel,
        steps=settings.steps,
        iterations=settings.iterations,
        reuse=arm.reuse,
        replay=min(arm.reuse, settings.replay),
        minibatches=settings.minibatches,
        optimizer=OptimizerSettings(
            learning_rate=settings.learning_rate, schedule="linear", epsilon=1e-5, max_grad_norm=0.5
        ),
        measured=True,
    )


def parts(settings: GameSettings) -> Parts:
    """What chance scores in each game, then one part per arm.

    Raises:
        ValueError: a setting that cannot be.
    """
    check_ranges(settings, RANGES)
    seeds = range(settings.seed, settings.seed + settings.seeds)

    def of_arm(arm: Arm) -> Resumable:
        numbers = control_settings(settings, arm)

        def compute(folder: Path, say: Callable[[str], None]) -> Mapping[str, np.ndarray]:
            trainer = GameTrainer(MinAtar(arm.game, sticky=arm.sticky), numbers)
            return train(trainer, seeds, every=settings.every, folder=folder, say=say).metrics

        return Resumable(compute)

    chance = {f"{game}.chance": _of_chance(settings, game) for game in settings.games}
    return chance | {arm.name: of_arm(arm) for arm in all_arms(settings)}


def _of_chance(settings: GameSettings, game: str) -> Callable[[], Mapping[str, Any]]:
    """Returns of a policy that never learns: one whose actions are as probable as each other."""
    still = dataclasses.replace(
        control_settings(settings, Arm(game, FRESH, 1, settings.sticky)),
        optimizer=OptimizerSettings(learning_rate=0.0),
        iterations=max(10, settings.iterations // 4),
        measured=False,
    )

    def compute() -> Mapping[str, Any]:
        trainer = GameTrainer(MinAtar(game, sticky=settings.sticky), still)
        return train(trainer, [settings.seed], every=still.iterations).metrics

    return compute
