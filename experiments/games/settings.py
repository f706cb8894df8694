"""The arms of `divergence_minatar`, its settings, and what is computed."""

import dataclasses
from collections.abc import Callable
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments.ranges import NOT_NEGATIVE
from experiments.ranges import PLURAL
from experiments.ranges import RATE
from experiments.ranges import SEED
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

FRESH = "fresh"
"""The arm that uses every batch once, while it is new."""
MAIN = ("ppo", "kl_one_step", "kl")
"""Arms that are also trained with other numbers of uses, and without sticky actions."""
OTHER_REUSES = (1, 4, 16)
LABELS = {
    FRESH: "PPO, each batch once",
    "ppo": "PPO",
    "vtrace": "V-trace",
    "unregularised": "no clip, no divergence",
    "kl_one_step": "KL, one-step (cD = 0)",
    "kl": "KL, multi-step (cD = 1)",
    "kl_clipped": "KL, multi-step, clipped",
    "kl_truncated": "KL, multi-step, V-trace",
    "reverse_kl": "reverse KL, multi-step",
    "hellinger": "Hellinger, multi-step",
    "total_variation": "total variation, multi-step",
    "entropy": "entropy alone, multi-step",
}
"""Every arm in words: what is held small, and how."""
LIMIT = 2500
"""Steps of the longest game of MinAtar."""


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
        reuses: other numbers of uses of a batch with which PPO and the KL arms are trained too.
        also_not_sticky: whether PPO and the KL arms are trained without sticky actions too.
        full: all four games and all arms, uses 1, 4 and 16, not sticky too, at least 10 seeds and 250 batches.
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
    reuses: tuple[int, ...] = ()
    also_not_sticky: bool = False
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

    @property
    def whole(self) -> "GameSettings":
        """With what `full` asks for."""
        if not self.full:
            return self
        return dataclasses.replace(
            self,
            games=tuple(dict.fromkeys((*self.games, "breakout", "space_invaders", "asterix", "freeway"))),
            arms=tuple(dict.fromkeys((*self.arms, *LABELS))),
            reuses=tuple(dict.fromkeys((*self.reuses, *OTHER_REUSES))),
            also_not_sticky=True,
            full=False,
            seeds=max(self.seeds, 10),
            iterations=max(self.iterations, 250),
        )


RANGES: Ranges = {
    "seeds": PLURAL,
    "seed": SEED,
    "iterations": Range(10, 1_000_000),
    "parallel": SIZE,
    "steps": SIZE,
    "reuse": Range(1, 1000),
    "reuses": Range(1, 1000),
    "replay": Range(1, 1000),
    "minibatches": SIZE,
    "learning_rate": RATE,
    "coefficient": NOT_NEGATIVE,
    "sticky": Range(0, 1, below=True),
    "every": SIZE,
}
"""What the fields of `GameSettings` may be."""


def all_arms(settings: GameSettings) -> list[Arm]:
    """What is trained, in its order.

    Raises:
        ValueError: a game or an arm that there is not, or none.
    """
    settings = settings.whole
    for what, names, known in (("games", settings.games, GAMES), ("arms", settings.arms, LABELS)):
        if not names:
            raise ValueError(f"Field --{what} is empty; it must name one at least, of {', '.join(known)}.")
        for name in names:
            require_choice(f"Field --{what}", name, tuple(known))
    made: dict[Arm, None] = {}
    for game in settings.games:
        arms = [named(settings, game, method) for method in settings.arms]
        for reuse in settings.reuses:
            # PPO that uses a batch once is the arm that does so.
            names = [FRESH if (name, reuse) == ("ppo", 1) else name for name in MAIN]
            arms += [Arm(game, name, reuse, settings.sticky) for name in names]
        if settings.also_not_sticky:
            arms += [Arm(game, name, settings.reuse, 0.0) for name in MAIN]
        made |= dict.fromkeys(arms)
    return list(made)


def named(settings: GameSettings, game: str, method: str) -> Arm:
    """The arm of a method with the reuse of the claim."""
    return Arm(game, method, 1 if method == FRESH else settings.reuse, settings.sticky)


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
        optimizer=dataclasses.replace(ControlSettings().optimizer, learning_rate=settings.learning_rate),
        measured=True,
    )


def parts(settings: GameSettings) -> Parts:
    """What chance scores in each game, then one part per arm.

    Raises:
        ValueError: a setting that cannot be.
        ImportError: gymnax is not installed.
    """
    check_ranges(settings, RANGES)
    arms, settings = all_arms(settings), settings.whole
    made: dict[str, Any] = {f"{game}.chance": _of_chance(settings, game) for game in settings.games}
    for arm in arms:
        made[arm.name] = Resumable(_of_arm(settings, arm, MinAtar(arm.game, sticky=arm.sticky)))
    return made


def _of_arm(settings: GameSettings, arm: Arm, game: MinAtar) -> Callable[..., Mapping[str, Any]]:
    numbers, seeds = control_settings(settings, arm), range(settings.seed, settings.seed + settings.seeds)

    def compute(folder: Path, say: Callable[[str], None]) -> Mapping[str, Any]:
        trainer = GameTrainer(game, numbers)
        trained = train(trainer, seeds, every=settings.every, folder=folder, say=say)
        # Whole games, in which no agent has been: what ended while it trained began under older policies.
        whole = trainer.play_whole(trained.state.learning, jax.random.key(2**32 - 1), limit=LIMIT)
        return {**trained.metrics, "whole": np.asarray(whole)}

    return compute


def _of_chance(settings: GameSettings, game: str) -> Callable[[], Mapping[str, Any]]:
    """Whole games of a network of zeros, to which all actions are as probable."""
    arm = Arm(game, FRESH, 1, settings.sticky)
    trainer = GameTrainer(MinAtar(game, sticky=settings.sticky), control_settings(settings, arm))

    def compute() -> Mapping[str, Any]:
        learning = trainer.init(jnp.asarray([settings.seed])).learning
        nothing = learning._replace(params=jax.tree.map(jnp.zeros_like, learning.params))
        return {"whole": np.asarray(trainer.play_whole(nothing, jax.random.key(2**32 - 1), limit=LIMIT))}

    return compute
