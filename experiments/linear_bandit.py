"""A hypermodel with a small index explores a linear bandit as well as exact Thompson sampling.

Claim      At d = 10, 100 actions and 1000 rounds, the regret per round of HyperAgent with M = 16 is within 0.02 of
           exact Thompson sampling's.
Command    python -m experiments run linear_bandit
Cost       7 minutes on two quiet cores of an AMD EPYC, compilation included
Expected   margin_at_claimed_size >= 0.0 in summary.json: 0.02 minus that difference

The setting of Ensemble++ (arXiv 2407.13195): features uniform in [-1/sqrt d, 1/sqrt d]^d, theta ~ N(0, 10 I), unit
noise. All 25 pairs of reference and perturbation are run; every agent meets the same bandits and the same noise.
"""

import dataclasses
import functools
from collections.abc import Callable
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.bandit_page import linear_bandit_page
from experiments.bandit_page import needed_size
from experiments.ranges import SEED
from experiments.ranges import Range
from experiments.ranges import Ranges
from experiments.ranges import check_ranges
from experiments.registry import Expectation
from experiments.study import Parts
from experiments.study import Results
from experiments.study import Study
from jaxrl_llm.environments import box_bandit
from jaxrl_llm.exploration import Agent
from jaxrl_llm.exploration import ensemble_sampling
from jaxrl_llm.exploration import greedy
from jaxrl_llm.exploration import hyperagent
from jaxrl_llm.exploration import lin_ucb
from jaxrl_llm.exploration import play
from jaxrl_llm.exploration import require_sound
from jaxrl_llm.exploration import thompson_sampling
from jaxrl_llm.exploration.indices import CENTRED_ISOTROPIC
from jaxrl_llm.exploration.indices import SPHERE
from jaxrl_llm.exploration.indices import IndexLaw
from jaxrl_llm.exploration.indices import switched_law

LAW_NAMES = tuple(law.name for law in CENTRED_ISOTROPIC)
PRIOR_SCALE = 10**0.5
POINTS = 100
"""Rounds at which curves are kept."""


@dataclasses.dataclass(frozen=True)
class LinearBanditSettings:
    """What is played, by whom, how often.

    Attributes:
        dimension: d of the features.
        actions: how many actions a bandit has.
        rounds: T, how many actions are taken in each bandit.
        seeds: bandits, each with its own noise; every agent meets the same ones.
        index_dimensions: M, the sizes of the hypermodels.
        claimed_size: the M of the claim; one of index_dimensions.
        other_dimensions: values of d for which the smallest sufficient M is searched as well.
        tolerance: regret per round within which a hypermodel counts as equal to Thompson sampling.
        seed: seed of all random numbers.
    """

    dimension: int = 10
    actions: int = 100
    rounds: int = 1000
    seeds: int = 200
    index_dimensions: tuple[int, ...] = (2, 4, 8, 16, 32, 64, 128, 256)
    claimed_size: int = 16
    other_dimensions: tuple[int, ...] = (5, 20, 40)
    tolerance: float = 0.02
    seed: int = 0


RANGES: Ranges = {
    "dimension": Range(1, 1000),
    "actions": Range(1, 100_000),
    "rounds": Range(1, 1_000_000),
    "seeds": Range(1, 100_000),
    "index_dimensions": Range(2, 10_000),
    "claimed_size": Range(2, 10_000),
    "other_dimensions": Range(1, 1000),
    "tolerance": Range(0, 1000, above=True),
    "seed": SEED,
}


def _played(agent: Agent, settings: LinearBanditSettings, dimension: int) -> dict[str, Any]:
    """Cumulative regret of every seed, at the end and as a curve with its standard error; the states, to be checked."""

    def one(key: jax.Array) -> tuple[jax.Array, jax.Array, Any]:
        bandit_key, play_key = jax.random.split(key)
        bandit = box_bandit(bandit_key, dimension=dimension, actions=settings.actions, prior_scale=PRIOR_SCALE)
        played = play(agent, bandit, play_key, rounds=settings.rounds)
        return jnp.cumsum(played.regrets), bandit.parameter, played.state

    curves, parameters, states = jax.vmap(one)(jax.random.split(jax.random.key(settings.seed), settings.seeds))
    kept = np.unique(np.linspace(0, settings.rounds - 1, min(POINTS, settings.rounds)).round().astype(int))
    return {
        "rounds": jnp.asarray(kept + 1),
        "final": curves[:, -1],
        "mean": jnp.mean(curves, axis=0)[kept],
        "error": (jnp.std(curves, axis=0) / settings.seeds**0.5)[kept],
        "norm": jnp.linalg.norm(parameters, axis=1),
        "state": states,
    }


def _kept(played: dict[str, Any]) -> dict[str, Any]:
    """What is kept of `_played`: everything but the states, whose posteriors must be sound.

    Raises:
        PosteriorError: one of them is not.
    """
    require_sound(played.pop("state"))
    return jax.device_get(played)


def _baseline(name: str, settings: LinearBanditSettings) -> Mapping[str, Any]:
    agents: dict[str, Callable[..., Agent]] = {
        "thompson": thompson_sampling,
        "lin_ucb": functools.partial(lin_ucb, width=2.0),
        "greedy": greedy,
    }
    agent = agents[name](settings.dimension, prior_scale=PRIOR_SCALE)
    return _kept(jax.jit(lambda: _played(agent, settings, settings.dimension))())


def _ensemble(size: int, settings: LinearBanditSettings) -> Mapping[str, Any]:
    agent = ensemble_sampling(settings.dimension, members=size, prior_scale=PRIOR_SCALE)
    return _kept(jax.jit(lambda: _played(agent, settings, settings.dimension))())


def _pairs(size: int, settings: LinearBanditSettings) -> Mapping[str, Any]:
    """All pairs of reference (first axis) and perturbation (second axis), by one program."""

    @jax.jit
    def one(pair: jax.Array) -> dict[str, Any]:
        agent = hyperagent(
            settings.dimension,
            index_dimension=size,
            reference=switched_law(pair[0]),
            perturbation=switched_law(pair[1]),
            prior_scale=PRIOR_SCALE,
        )
        return _played(agent, settings, settings.dimension)

    count = len(CENTRED_ISOTROPIC)
    rows = [_kept(one(jnp.asarray([first, second]))) for first in range(count) for second in range(count)]
    return {
        name: np.stack([row[name] for row in rows]).reshape(count, count, -1) for name in ("final", "mean", "error")
    }


def _first_coordinates(size: jax.Array) -> IndexLaw:
    """The sphere law on the first `size` coordinates, 0 on the others: one program serves every size."""

    def on_sphere(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
        normal = jnp.where(jnp.arange(shape[-1]) < size, jax.random.normal(key, shape), 0.0)
        return normal / jnp.linalg.norm(normal, axis=-1, keepdims=True)

    return SPHERE._replace(
        reference=lambda key, shape: jnp.sqrt(size.astype(float)) * on_sphere(key, shape), perturbation=on_sphere
    )


def _other_dimension(dimension: int, settings: LinearBanditSettings) -> Mapping[str, Any]:
    """Regrets of Thompson sampling and of hypermodels (sphere, sphere) of growing size, for another d."""
    sizes = [size for size in settings.index_dimensions if size <= 64]

    @jax.jit
    def one(size: jax.Array) -> dict[str, Any]:
        law = _first_coordinates(size)
        agent = hyperagent(
            dimension,
            index_dimension=max(sizes),
            reference=law,
            perturbation=law,
            prior_factor=law,
            prior_scale=PRIOR_SCALE,
        )
        return _played(agent, settings, dimension)

    exact = thompson_sampling(dimension, prior_scale=PRIOR_SCALE)
    thompson = _kept(jax.jit(lambda: _played(exact, settings, dimension))())
    rows = [_kept(one(jnp.asarray(size))) for size in sizes]
    return {
        "sizes": np.array(sizes),
        "thompson": thompson["final"],
        "final": np.stack([row["final"] for row in rows]),
    }


def parts(settings: LinearBanditSettings) -> Parts:
    """One part per baseline, ensemble size, hypermodel size and further dimension.

    Raises:
        ValueError: a size is not possible.
    """
    check_ranges(settings, RANGES)
    if not settings.index_dimensions:
        raise ValueError("Field --index-dimensions is empty; the claim needs its size.")
    if settings.claimed_size not in settings.index_dimensions:
        raise ValueError(f"Field --claimed-size is {settings.claimed_size}; it must be one of --index-dimensions.")
    named: dict[str, Callable[[], Mapping[str, Any]]] = {}
    for name in ("thompson", "lin_ucb", "greedy"):
        named[name] = functools.partial(_baseline, name, settings)
    for size in settings.index_dimensions:
        named[f"ensemble_{size}"] = functools.partial(_ensemble, size, settings)
        named[f"pairs_{size}"] = functools.partial(_pairs, size, settings)
    for dimension in settings.other_dimensions:
        named[f"dimension_{dimension}"] = functools.partial(_other_dimension, dimension, settings)
    return named


def summarise(settings: LinearBanditSettings, results: Results) -> dict[str, Any]:
    """Regrets with standard errors, and the smallest sizes that match Thompson sampling."""
    sphere = LAW_NAMES.index("sphere")
    thompson, sizes = results["thompson"]["final"], list(settings.index_dimensions)
    chosen = {size: results[f"pairs_{size}"]["final"][sphere, sphere] for size in sizes}
    gaps = np.array([(chosen[size] - thompson).mean() for size in sizes]) / settings.rounds
    # Over seeds, paired: every agent meets the same bandits.
    errors = [(chosen[size] - thompson).std() / settings.seeds**0.5 / settings.rounds for size in sizes]
    claimed = sizes.index(settings.claimed_size)
    return {
        "margin_at_claimed_size": float(settings.tolerance - abs(gaps[claimed])),
        "gap_per_round_at_claimed_size": float(gaps[claimed]),
        "gap_per_round_error": float(errors[claimed]),
        "smallest_sufficient_size": needed_size(sizes, gaps, settings.tolerance),
        "gaps_per_round": {str(size): float(gap) for size, gap in zip(sizes, gaps, strict=True)},
        "gap_errors": {str(size): float(error) for size, error in zip(sizes, errors, strict=True)},
        "regret": {name: float(results[name]["final"].mean()) for name in ("thompson", "lin_ucb", "greedy")}
        | {f"hyperagent_{size}": float(chosen[size].mean()) for size in sizes}
        | {f"ensemble_{size}": float(results[f"ensemble_{size}"]["final"].mean()) for size in sizes},
    }


SETTINGS = LinearBanditSettings()

TINY = dataclasses.replace(
    SETTINGS, dimension=3, actions=8, rounds=40, seeds=6, index_dimensions=(2, 4), claimed_size=4, other_dimensions=(2,)
)

EXPERIMENT = Study(
    name="linear_bandit",
    claim="A hypermodel with a small index explores a linear bandit as well as exact Thompson sampling.",
    cost="7 minutes on two cores of an AMD EPYC",
    settings=SETTINGS,
    tiny=TINY,
    expectation=Expectation("margin_at_claimed_size", at_least=0.0),
    parts=parts,
    summarise=summarise,
    page=linear_bandit_page,
    ranges=RANGES,
)
