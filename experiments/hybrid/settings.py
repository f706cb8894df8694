"""Settings of `hybrid_imitation_rl`, its tasks, and what computes each of its parts."""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.hybrid.arms import ARMS
from experiments.hybrid.arms import Field
from experiments.hybrid.arms import with_weight
from experiments.hybrid.exact import distance
from experiments.hybrid.exact import stationary
from experiments.hybrid.exact import worth
from experiments.hybrid.train import ArmScan
from experiments.hybrid.train import exact_gradient
from experiments.hybrid.train import sampled_gradient
from experiments.hybrid.variance import PER_CHUNK
from experiments.hybrid.variance import scatter
from experiments.hybrid.world import Task
from experiments.hybrid.world import make_tasks
from experiments.ranges import PLURAL
from experiments.ranges import RATE
from experiments.ranges import SEED
from experiments.ranges import SHARE
from experiments.ranges import SIZE
from experiments.ranges import Range
from experiments.ranges import Ranges
from experiments.ranges import check_ranges
from experiments.study import Parts
from jaxrl_llm.environments.worlds import Rooms

EXACT = tuple(name for name in ARMS if name not in ("rao_blackwell", "reinforce"))
"""Arms with an exact gradient of their own: those left out have the expectation of `hybrid`."""

RESTING = ("kl_loss", "hybrid_0", "hybrid_0.5", "hybrid_0.9", "hybrid")
"""Arms with reward and a dense part, whose fields vanish at one policy."""


@dataclasses.dataclass(frozen=True)
class HybridSettings:
    """The map, the teachers, the objective, and how long everything is trained.

    Attributes:
        rows: of the grid of rooms.
        columns: of the grid of rooms.
        extra: doors beyond those of a tree.
        turns: actions after which an episode is cut off.
        map_seed: seed of the map that is never shown.
        tasks: tasks of the map; each has a policy of its own.
        sharpness: logit of the teacher's preferred action above all others. [nats]
        wrong: share of the states in which the teacher prefers a wrong action.
        reward_weight: lambda of J = KL to the teacher - lambda reward. [nats]
        weights: lambdas whose resting policies are compared.
        updates: updates of the policy in every arm.
        group_size: episodes of each task per update.
        learning_rate: first step size of Adam.
        seeds: runs of each arm from sampled episodes.
        points: updates of the exact run of `hybrid` before which the variance is measured.
        batches: batches of episodes that a variance is measured from.
        seed: seed of all random numbers.
    """

    rows: int = 2
    columns: int = 4
    extra: int = 1
    turns: int = 16
    map_seed: int = 0
    tasks: int = 4
    sharpness: float = 2.5
    wrong: float = 0.15
    reward_weight: float = 4.0
    weights: tuple[float, ...] = (0.25, 0.5, 1.0, 1.5, 2.0, 2.5, 3.0, 3.5, 4.0, 5.0, 6.0, 8.0, 12.0, 16.0)
    updates: int = 300
    group_size: int = 8
    learning_rate: float = 0.1
    seeds: int = 16
    points: tuple[int, ...] = (0, 20, 60, 200)
    batches: int = 1024
    seed: int = 0


RANGES: Ranges = {
    "rows": Range(1, 26),
    "columns": Range(1, 26),
    "extra": Range(0, 1000),
    "turns": Range(1, 1000),
    "map_seed": SEED,
    "tasks": SIZE,
    # At 0 the teacher is the start: nothing is to be learned from it.
    "sharpness": Range(0, 100, above=True),
    "wrong": SHARE,
    # exp(lambda R) must be a number.
    "reward_weight": Range(0, 100, above=True),
    "weights": Range(0, 100, above=True),
    "updates": Range(1, 1_000_000),
    "group_size": PLURAL,
    "learning_rate": RATE,
    "seeds": Range(2, 10_000),
    "points": Range(0, 1_000_000),
    "batches": Range(PER_CHUNK, 10_000_000),
    "seed": SEED,
}


def _rooms(settings: HybridSettings) -> Rooms:
    return Rooms(
        rows=settings.rows,
        columns=settings.columns,
        extra=settings.extra,
        turns=settings.turns,
        map_seed=settings.map_seed,
    )


@functools.lru_cache(maxsize=4)
def _tasks(settings: HybridSettings, precision: str) -> Task:
    made = make_tasks(
        _rooms(settings), count=settings.tasks, sharpness=settings.sharpness, wrong=settings.wrong, seed=settings.seed
    )
    return jax.tree.map(lambda leaf: leaf if leaf.dtype == bool else leaf.astype(precision), made)


def tasks_of(settings: HybridSettings) -> Task:
    """The tasks, in the precision of the moment."""
    return _tasks(settings, jnp.result_type(float).name)


@functools.lru_cache(maxsize=4)
def trainer(settings: HybridSettings, *, exact: bool) -> ArmScan:
    """What trains every arm; kept, because it is compiled once for all of them."""
    tasks = tasks_of(settings)
    gradient = exact_gradient if exact else sampled_gradient(settings.group_size)
    return ArmScan(
        tasks,
        gradient,
        updates=settings.updates,
        learning_rate=settings.learning_rate,
        reward_weight=settings.reward_weight,
        kept=settings.points if exact else (),
    )


def key_of(settings: HybridSettings, number: int) -> jax.Array:
    """A key for one purpose; the same for all arms, so that they are paired."""
    return jax.random.fold_in(jax.random.key(settings.seed), number)


def resting(settings: HybridSettings) -> Mapping[str, Any]:
    """Where the fields vanish, exactly: [arms of `RESTING`, weights], and what optimum, teacher and start are worth."""
    with jax.enable_x64(True):
        tasks, weights = tasks_of(settings), jnp.asarray((*settings.weights, settings.reward_weight))

        def rests(field: Field, weight: jax.Array, tasks: Task) -> tuple[jax.Array, ...]:
            policy = jax.vmap(stationary, in_axes=(None, 0))(with_weight(field, weight), tasks)
            optimum = jax.vmap(stationary, in_axes=(None, 0))(Field(settings.reward_weight), tasks)
            found, away = jax.vmap(worth)(policy, tasks), jax.vmap(distance)(policy, optimum, tasks)
            return jnp.mean(found.kl), jnp.mean(found.reward), jnp.mean(away)

        fields = jax.tree.map(lambda *numbers: jnp.asarray(numbers), *(ARMS[name].field for name in RESTING))
        by_weight = jax.vmap(rests, in_axes=(None, 0, None))
        kl, reward, away = jax.jit(jax.vmap(by_weight, in_axes=(0, None, None)))(fields, weights, tasks)
        known = {"teacher": tasks.teacher, "start": jnp.zeros_like(tasks.teacher)}
        worths = {name: jax.vmap(worth)(policy, tasks) for name, policy in known.items()}
        rewards = worths["teacher"].reward
        # The value of the optimum a second time, from the teacher alone.
        tilted = -jnp.log1p(rewards * jnp.expm1(settings.reward_weight))
        parts = {f"{name}_{part}": jnp.mean(getattr(one, part)) for name, one in worths.items() for part in one._fields}
        found = {"kl": kl, "reward": reward, "distance": away, "best": jnp.mean(tilted), **parts}
        return jax.device_get(found | {"teacher_rewards": rewards})


def exact_run(name: str, settings: HybridSettings) -> Mapping[str, Any]:
    """An arm trained by its exact gradient, in float64."""
    with jax.enable_x64(True):
        found = jax.device_get(trainer(settings, exact=True).train(name, key_of(settings, 1)[None]))
    return {"kl": found["kl"], "reward": found["reward"]}


def sampled_run(name: str, settings: HybridSettings) -> Mapping[str, Any]:
    """An arm trained from episodes, for every seed."""
    keys = jax.random.split(key_of(settings, 2), settings.seeds)
    return jax.device_get(trainer(settings, exact=False).train(name, keys))


def variances(settings: HybridSettings) -> Mapping[str, Any]:
    """The scatter of every estimator along the exact run of `hybrid`, and at the optimum [points + 1, estimators]."""
    with jax.enable_x64(True):
        policies = trainer(settings, exact=True).train("hybrid", key_of(settings, 1)[None])["policies"][0]
        optimum = jax.vmap(stationary, in_axes=(None, 0))(Field(settings.reward_weight), tasks_of(settings))
        policies = np.concatenate([policies, optimum[None]]).astype(np.float32)
    tasks = tasks_of(settings)
    measure = functools.partial(
        scatter,
        sampled_gradient(settings.group_size),
        exact_gradient,
        reward_weight=settings.reward_weight,
        batches=settings.batches // PER_CHUNK * PER_CHUNK,
    )
    compiled = jax.jit(lambda policy, tasks, key: measure(policy, tasks, key))
    found = [compiled(policy, tasks, key_of(settings, 3 + number)) for number, policy in enumerate(policies)]
    return jax.tree.map(lambda *rows: np.stack(rows), *jax.device_get(found))


def parts(settings: HybridSettings) -> Parts:
    """The resting policies, a part per arm and kind of gradient, and the variances.

    Raises:
        ValueError: a setting that cannot be.
    """
    check_ranges(settings, RANGES)
    if settings.tasks > (there := _rooms(settings).tasks):
        raise ValueError(f"Field --tasks is {settings.tasks}; this map has {there}.")
    if not settings.weights or not settings.points:
        raise ValueError("Fields --weights and --points need a number each.")
    if max(settings.points) >= settings.updates:
        raise ValueError(f"Field --points has {max(settings.points)}; it must be below --updates {settings.updates}.")
    return {
        "resting": functools.partial(resting, settings),
        **{f"exact_{name}": functools.partial(exact_run, name, settings) for name in EXACT},
        **{f"sampled_{name}": functools.partial(sampled_run, name, settings) for name in ARMS},
        "variance": functools.partial(variances, settings),
    }
