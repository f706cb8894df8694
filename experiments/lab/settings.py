"""Settings of training under a controlled mismatch, and the two worlds that they describe."""

import dataclasses
import functools
from collections.abc import Callable
from collections.abc import Mapping
from typing import Any
from typing import Literal

import jax

from experiments.lab.arms import DEFAULT_ARMS
from experiments.lab.arms import LABELS
from experiments.lab.arms import PRUNING
from experiments.lab.arms import arm
from experiments.lab.ladder import ladder
from experiments.lab.sums import sums
from experiments.lab.train import ArmScan
from experiments.lab.train import Mismatch
from experiments.lab.world import World
from experiments.ranges import POSITIVE
from experiments.ranges import RATE
from experiments.ranges import SEED
from experiments.ranges import SPREAD
from experiments.ranges import Range
from experiments.ranges import Ranges
from experiments.ranges import check_ranges
from jaxrl_llm.rollouts.perturb import perturbation

WORLDS = ("ladder", "sums")


@dataclasses.dataclass(frozen=True)
class WorldSettings:
    """One world, how its sampler is wrong, and how it is trained.

    Attributes:
        steps: updates of the policy.
        noise: standard deviation of the noise of each logit of the sampler, new at every step. [nats]
        lag: steps that the sampler's weights are old.
        learning_rate: step size of Adam.
        mask_maximum: largest KL of one token that TRM accepts. [nats]
        mask_average: largest mean KL per token that TRM accepts. [nats]
    """

    steps: int
    noise: float
    lag: int
    learning_rate: float
    mask_maximum: float
    mask_average: float


@dataclasses.dataclass(frozen=True)
class LabSettings:
    """What is trained, under which mismatch, how often. The fields of a world start with its name.

    Attributes:
        arms: which corrections are compared: the four of the claim, or all.
        seeds: policies trained at once, each with noise of its own.
        seed: seed of all random numbers.
        log_min_p: threshold of pruning, relative to the most likely token. [nats]
        ladder_horizon: T of the ladder. [tokens]
        ladder_rungs: states of the ladder, the ground included.
        ladder_vocabulary: how many tokens the ladder has.
        ladder_traps: tokens of each rung that fall to the ground.
        ladder_answers: responses per batch on the ladder.
        ladder_steps: updates of the policy on the ladder.
        ladder_noise: standard deviation of the sampler's noise in each logit. [nats]
        ladder_lag: steps that the sampler's weights are old.
        ladder_learning_rate: step size of Adam on the ladder.
        ladder_mask_maximum: largest KL of one token that TRM accepts. [nats]
        ladder_mask_average: largest mean KL per token that TRM accepts. [nats]
        sums_prompts: problems per batch of sums.
        sums_group_size: responses to each problem of sums.
        sums_width: width of the transformer for sums.
        sums_layers: layers of the transformer for sums.
        sums_imitation_steps: updates on right answers before reinforcement learning.
        sums_steps: updates of the policy on sums.
        sums_noise: standard deviation of the sampler's noise in each logit. [nats]
        sums_lag: steps that the sampler's weights are old.
        sums_learning_rate: step size of Adam on sums.
        sums_mask_maximum: largest KL of one token that TRM accepts. [nats]
        sums_mask_average: largest mean KL per token that TRM accepts. [nats]
    """

    arms: Literal["default", "all"] = "default"
    seeds: int = 16
    seed: int = 0
    log_min_p: float = -6.0
    ladder_horizon: int = 512
    ladder_rungs: int = 17
    ladder_vocabulary: int = 16
    ladder_traps: int = 3
    ladder_answers: int = 64
    ladder_steps: int = 150
    ladder_noise: float = 0.5
    ladder_lag: int = 8
    ladder_learning_rate: float = 0.3
    ladder_mask_maximum: float = 0.8
    ladder_mask_average: float = 0.3
    sums_prompts: int = 16
    sums_group_size: int = 8
    sums_width: int = 32
    sums_layers: int = 1
    sums_imitation_steps: int = 150
    sums_steps: int = 150
    sums_noise: float = 0.5
    sums_lag: int = 8
    sums_learning_rate: float = 1e-3
    sums_mask_maximum: float = 2.0
    sums_mask_average: float = 0.5

    def of(self, world: str) -> WorldSettings:
        """The settings of one world."""
        names = [field.name for field in dataclasses.fields(WorldSettings)]
        return WorldSettings(**{name: getattr(self, f"{world}_{name}") for name in names})


_WORLD_RANGES: Ranges = {
    "steps": Range(1, 1_000_000),
    "noise": SPREAD,
    "lag": Range(0, 10_000),
    "learning_rate": RATE,
    "mask_maximum": POSITIVE,
    "mask_average": POSITIVE,
}
RANGES: Ranges = {
    "seeds": Range(2, 10_000),
    "seed": SEED,
    # Above 0 nothing would be kept.
    "log_min_p": Range(-1000, 0),
    "ladder_horizon": Range(1, 100_000),
    "ladder_rungs": Range(2, 1000),
    "ladder_vocabulary": Range(2, 10_000),
    "ladder_traps": Range(1, 10_000),
    "ladder_answers": Range(2, 100_000),
    "sums_prompts": Range(1, 100_000),
    "sums_group_size": Range(2, 10_000),
    "sums_width": Range(4, 4096),
    "sums_layers": Range(1, 128),
    "sums_imitation_steps": Range(0, 1_000_000),
} | {f"{world}_{name}": allowed for world in WORLDS for name, allowed in _WORLD_RANGES.items()}
"""What the fields of `LabSettings` may be."""


def check(settings: LabSettings) -> None:
    """Refuse impossible numbers before anything is computed.

    Raises:
        ValueError: naming the field.
    """
    check_ranges(settings, RANGES)


def make_world(name: str, settings: LabSettings) -> World:
    """The world of that name.

    Raises:
        ValueError: its sizes do not fit each other.
    """
    if name == "ladder":
        return ladder(
            jax.random.key(settings.seed),
            horizon=settings.ladder_horizon,
            rungs=settings.ladder_rungs,
            vocabulary=settings.ladder_vocabulary,
            traps=settings.ladder_traps,
            answers=settings.ladder_answers,
        )
    return sums(
        prompts=settings.sums_prompts,
        group_size=settings.sums_group_size,
        width=settings.sums_width,
        layers=settings.sums_layers,
        imitation_steps=settings.sums_imitation_steps,
    )


@functools.lru_cache(maxsize=8)
def trainer(world: str, settings: LabSettings) -> ArmScan:
    """What trains every arm in that world; kept, because it is compiled once for all of them.

    Raises:
        ValueError: the world cannot be.
    """
    own = settings.of(world)
    names = DEFAULT_ARMS if settings.arms == "default" else LABELS
    recipes = [arm(name, mask_maximum=own.mask_maximum, mask_average=own.mask_average) for name in names]
    noise = perturbation("gaussian_noise", own.noise).logits
    assert noise is not None
    return ArmScan(
        make_world(world, settings),
        Mismatch(noise, own.lag),
        recipes,
        steps=own.steps,
        learning_rate=own.learning_rate,
    )


def train_part(world: str, name: str, settings: LabSettings) -> Callable[[], Mapping[str, Any]]:
    """A part of a study: one arm in one world. `name` may carry a threshold of pruning of its own, as in "dvp:-9".

    Raises:
        ValueError: the world cannot be.
    """
    kind, _, threshold = name.partition(":")
    prunes = kind in PRUNING
    log_min_p = (float(threshold) if threshold else settings.log_min_p) if prunes else None
    # The same key for every arm: all start from the same policies.
    key = jax.random.fold_in(jax.random.key(settings.seed), WORLDS.index(world))
    own = trainer(world, settings)
    return lambda: jax.device_get(own.train(kind, log_min_p=log_min_p, seeds=settings.seeds, key=key))
