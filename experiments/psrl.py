"""Posterior sampling explores a linear mixture MDP within its prior-dependent bound; acting on the mean does not.

Claim      Where exploration is needed, the Bayes regret of PSRL stays below its prior-dependent bound at every K, grows
           no faster than sqrt(K), falls with the width of the prior, and is smaller than that of UCRL-VTR and RLSVI,
           tuned or not; the regret of acting on the posterior mean grows linearly.
Command    python -m experiments run psrl
Cost       4 minutes on two quiet cores of an AMD EPYC, compilation included
Expected   share_of_statements_that_hold >= 1.0 in summary.json

The theorem is derived after Li and Luo 2024 (arXiv 2403.11175) in docs/theory.md. Regrets are exact (dynamic
programming) and averaged over MDPs drawn from the prior; every agent meets the same MDPs. In `random_mixture`, the
counter-example, exploration is free and acting on the mean is best.
"""

import dataclasses
import functools
from collections.abc import Callable
from collections.abc import Mapping
from typing import Any
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments.bands import standard_error
from experiments.psrl_page import AGENTS
from experiments.psrl_page import EASY_AGENTS
from experiments.psrl_page import psrl_page
from experiments.psrl_page import slope
from experiments.psrl_page import statements
from experiments.ranges import SEED
from experiments.ranges import Range
from experiments.ranges import Ranges
from experiments.ranges import check_ranges
from experiments.registry import Expectation
from experiments.study import Parts
from experiments.study import Results
from experiments.study import Study
from jaxrl_llm import tabular
from jaxrl_llm.bounds import regret as bounds
from jaxrl_llm.environments import draw_parameters
from jaxrl_llm.environments import random_mixture
from jaxrl_llm.environments import risky_mixture
from jaxrl_llm.environments import segment_atoms
from jaxrl_llm.environments import simplex_atoms
from jaxrl_llm.exploration import EpisodicAgent
from jaxrl_llm.exploration import EpisodicPlay
from jaxrl_llm.exploration import dirichlet
from jaxrl_llm.exploration import finite_support
from jaxrl_llm.exploration import gaussian_surrogate
from jaxrl_llm.exploration import greedy_in_the_mean
from jaxrl_llm.exploration import moments
from jaxrl_llm.exploration import play_episodes
from jaxrl_llm.exploration import psrl
from jaxrl_llm.exploration import require_sound
from jaxrl_llm.exploration import rlsvi
from jaxrl_llm.exploration import ucrl_vtr
from jaxrl_llm.exploration.episodes import Episode
from jaxrl_llm.exploration.gaussian import Gaussian
from jaxrl_llm.exploration.posteriors import value_targets
from jaxrl_llm.tabular import LinearMixture
from jaxrl_llm.tabular import Plan
from jaxrl_llm.tabular import TabularMdp

POINTS = 20
"""Values of K at which bounds are computed."""

SURROGATE_JITTER = 1e-3
"""Added to the prior variances of the Gaussian surrogate: covariances on the simplex are singular."""

ROW_MASS = 3.0
"""Total Dirichlet mass of a row for the agent that forgets that kernels are mixtures."""


@dataclasses.dataclass(frozen=True)
class PsrlSettings:
    """What is played, how often, and what is varied.

    Attributes:
        horizon: H, steps of an episode.
        dimension: d, entries of theta in each step.
        actions: A; one of them is sure.
        atoms: N, support of the prior of each step.
        easy_states: S of the environment where exploration is free.
        easy_actions: A of that easy environment.
        episodes: K, how many are played in each MDP.
        seeds: MDPs drawn from the prior; every agent meets the same ones.
        widths: c, the prior drawn towards the centre of the simplex.
        horizons: other values of H that are played.
        dimensions: other values of d that are played.
        varied_episodes: K where width, H or d are varied.
        seed: seed of all random numbers.
    """

    horizon: int = 5
    dimension: int = 4
    actions: int = 6
    atoms: int = 200
    easy_states: int = 6
    easy_actions: int = 3
    episodes: int = 400
    seeds: int = 200
    widths: tuple[float, ...] = (1.0, 0.5, 0.25, 0.1)
    horizons: tuple[int, ...] = (3, 8, 12)
    dimensions: tuple[int, ...] = (2, 8, 16)
    varied_episodes: int = 200
    seed: int = 0


RANGES: Ranges = {
    "horizon": Range(2, 1000),
    "dimension": Range(2, 1000),
    "actions": Range(2, 1000),
    "atoms": Range(2, 100_000),
    "easy_states": Range(2, 1000),
    "easy_actions": Range(2, 1000),
    # A slope is fitted to the second half of them.
    "episodes": Range(8, 1_000_000),
    "varied_episodes": Range(8, 1_000_000),
    "seeds": Range(2, 100_000),
    "widths": Range(0, 1, above=True),
    "horizons": Range(2, 1000),
    "dimensions": Range(2, 1000),
    "seed": SEED,
}


class World(NamedTuple):
    """One draw of base kernels, prior (atoms of each step, all of one weight) and true MDP."""

    mixture: LinearMixture
    atoms: jax.Array
    weights: jax.Array
    mdp: TabularMdp


@functools.lru_cache(maxsize=4)
def worlds(kind: str, settings: PsrlSettings, width: float = 1.0) -> World:
    """The worlds of all seeds; those of one seed differ between widths in the width alone."""
    sizes = {"horizon": settings.horizon, "dimension": settings.dimension}
    easy = {"states": settings.easy_states, "actions": settings.easy_actions}

    @jax.jit
    @jax.vmap
    def draw(key: jax.Array, scale: jax.Array) -> World:
        mixture_key, atoms_key, true_key = jax.random.split(key, 3)
        if kind == "random":
            mixture = random_mixture(mixture_key, **sizes, **easy)
        else:
            mixture = risky_mixture(mixture_key, actions=settings.actions, **sizes)
        make_atoms = segment_atoms if kind == "segment" else functools.partial(simplex_atoms, width=scale)
        atoms = make_atoms(atoms_key, atoms=settings.atoms, **sizes)
        weights = jnp.full(atoms.shape[:2], 1 / settings.atoms)
        return World(mixture, atoms, weights, mixture.mdp(draw_parameters(true_key, atoms, weights)))

    keys = jax.random.split(jax.random.key(settings.seed), settings.seeds)
    return draw(keys, jnp.full(settings.seeds, width))


def agent(kind: str, world: World, scale: jax.Array) -> EpisodicAgent:
    """The agent of that kind for one world; the scale is that of a bonus or a noise, where there is one."""
    mixture, rewards = world.mixture, world.mixture.rewards
    mean, covariance = moments(world.atoms, world.weights)
    if kind == "vtr":
        return ucrl_vtr(mixture, bonus_scale=scale)
    if kind == "rlsvi":
        return rlsvi(rewards, mixture.transitions(mean), noise=scale)
    if kind == "dirichlet":
        return psrl(dirichlet(ROW_MASS * mixture.transitions(mean) + 0.01), rewards)
    if kind == "gaussian":
        wider = covariance + SURROGATE_JITTER * jnp.eye(mean.shape[1])
        return psrl(gaussian_surrogate(mixture, Gaussian(mean, wider)), rewards)
    posterior = finite_support(mixture, world.atoms, world.weights)
    return greedy_in_the_mean(posterior, rewards) if kind == "greedy" else psrl(posterior, rewards)


def _proof_terms(world: World, state: Any, plan: Plan, episode: Episode) -> dict[str, jax.Array]:
    """What the proof sums, for one episode of PSRL on a finite prior."""
    weights = jnp.exp(state.log_weights)
    features, _ = value_targets(world.mixture, episode, plan.values)
    of_atoms = jnp.einsum("hnd,hd->hn", world.atoms, features)
    mean = jnp.sum(weights * of_atoms, axis=1)
    steps = jnp.arange(len(episode.actions))
    met = steps, episode.states[:-1], episode.actions
    sampled = plan.action_values[met] - episode.rewards
    true = jnp.einsum("hs,hs->h", world.mdp.transitions[met], plan.values[1:])
    achieved = tabular.start_value(world.mdp, tabular.evaluate(world.mdp, plan.policy))
    return {
        "matched": tabular.start_value(world.mdp, plan.values) - achieved,
        "along": jnp.sum(sampled - true),
        "true_part": jnp.sum(true - mean),
        "variance": jnp.sum(weights * jnp.square(of_atoms - mean[:, None]), axis=1),
    }


def _optimism(world: World, state: Any, plan: Plan, episode: Episode) -> dict[str, jax.Array]:
    best = tabular.plan(world.mdp.transitions, world.mdp.rewards).values
    return {"optimistic": jnp.all(plan.values >= best - 1e-5)}


MEASURES: dict[str, Callable[..., dict[str, jax.Array]]] = {"psrl": _proof_terms, "vtr": _optimism}


@functools.cache
def _player(kind: str, episodes: int) -> Callable[[World, jax.Array, jax.Array], EpisodicPlay]:
    """The compiled program of a kind of agent: it serves all scales, widths and environments of one shape."""

    def play(world: World, key: jax.Array, scale: jax.Array) -> EpisodicPlay:
        measure = functools.partial(MEASURES[kind], world) if kind in MEASURES else None
        return play_episodes(agent(kind, world, scale), world.mdp, key, episodes=episodes, measure=measure)

    return jax.jit(jax.vmap(play, in_axes=(0, 0, None)))


def _played(name: str, kind: str, settings: PsrlSettings, width: float = 1.0) -> Mapping[str, Any]:
    """Cumulative regrets of one agent in all worlds, with what belongs to it; a number in its name is its scale."""
    drawn = worlds(kind, settings, width)
    agent_kind, _, scale = name.partition("_")
    keys = jax.random.split(jax.random.key(settings.seed + 1), settings.seeds)
    played = _player(agent_kind, settings.episodes)(drawn, keys, jnp.asarray(float(scale or 1)))
    if name in ("psrl", "greedy", "gaussian"):
        require_sound(played.state)
    curves = jnp.cumsum(played.regrets, axis=1)
    kept: dict[str, Any] = {
        "final": curves[:, -1],
        "mean": jnp.mean(curves, axis=0),
        "error": standard_error(curves),
    }
    if name == "vtr_1":
        kept["optimistic"] = jnp.all(played.measured["optimistic"], axis=1)
    if name == "psrl":
        kept |= {term: jnp.sum(played.measured[term], axis=1) for term in ("matched", "along", "true_part")}
        kept |= _bounds(drawn, jnp.mean(jnp.cumsum(played.measured["variance"], axis=1), axis=0), settings)
    return kept


def _bounds(drawn: World, variance: jax.Array, settings: PsrlSettings) -> dict[str, Any]:
    """The chain of bounds on the Bayes regret at `POINTS` values of K, averaged over priors.

    On the simplex X may be centred: |X| <= sqrt(d) R / 2 in the sharp form, whose rank is d - 1 (1 on a segment).
    """
    dimension = settings.dimension
    episodes = np.unique(np.geomspace(1, settings.episodes, POINTS).round().astype(int))
    covariances = jax.vmap(lambda world: moments(world.atoms, world.weights)[1])(drawn)
    rank = int(np.linalg.matrix_rank(np.asarray(covariances[0, 0]), tol=1e-5))

    @jax.jit
    def at(k: jax.Array) -> tuple[jax.Array, jax.Array]:
        printed = functools.partial(bounds.psrl_bayes_regret, episodes=k, feature_ratio=dimension**0.5)
        sharp = functools.partial(
            bounds.psrl_bayes_regret_sharp, rank=rank, episodes=k, feature_ratio=dimension**0.5 / 2
        )
        return jnp.mean(jax.vmap(printed)(covariances)), jnp.mean(jax.vmap(sharp)(covariances))

    printed, sharp = (jnp.stack(curve) for curve in zip(*(at(jnp.asarray(float(k))) for k in episodes), strict=True))
    free = [
        bounds.psrl_bayes_regret_prior_free(
            dimension=dimension, horizon=settings.horizon, episodes=int(k), feature_ratio=dimension**0.5
        )
        for k in episodes
    ]
    totals = variance[episodes - 1]  # [points, H]
    return {
        "bound_episodes": episodes,
        "variance": totals,
        "decoupled": jnp.sum(jnp.sqrt(rank * episodes[:, None] * totals), axis=1),
        "sharp": sharp,
        "printed": printed,
        "prior_free": np.array([float(value) for value in free]),
    }


def parts(settings: PsrlSettings) -> Parts:
    """One part per agent and environment, per width, horizon and dimension.

    Raises:
        ValueError: a size is not possible.
    """
    check_ranges(settings, RANGES)
    if 1.0 not in settings.widths:
        raise ValueError(f"Field --widths is {settings.widths}; 1 must be among them.")
    varied = dataclasses.replace(settings, episodes=settings.varied_episodes)
    named: dict[str, Callable[[], Mapping[str, Any]]] = {}
    for name in AGENTS:
        named[name] = functools.partial(_played, name, "risky", settings)
    for name in EASY_AGENTS:
        named[f"easy_{name}"] = functools.partial(_played, name, "random", settings)
    for width in settings.widths:
        named[f"width_{width:g}"] = functools.partial(_played, "psrl", "risky", varied, width)
    named["rank_one"] = functools.partial(_played, "psrl", "segment", varied)
    for horizon in settings.horizons:
        changed = dataclasses.replace(varied, horizon=horizon)
        named[f"horizon_{horizon}"] = functools.partial(_played, "psrl", "risky", changed)
    for dimension in settings.dimensions:
        changed = dataclasses.replace(varied, dimension=dimension)
        named[f"dimension_{dimension}"] = functools.partial(_played, "psrl", "risky", changed)
    return named


def summarise(settings: PsrlSettings, results: Results) -> dict[str, Any]:
    """Which statements hold, and the numbers behind them."""
    held = statements(settings, results)
    at = [k for k in (50, 100, 200, 400) if k <= settings.episodes] or [settings.episodes]
    return {
        "share_of_statements_that_hold": float(np.mean([one.holds for one in held])),
        "statements": {one.name: bool(one.holds) for one in held},
        "slope_in_episodes": slope(results["psrl"]["mean"]),
        "regret": {
            name: {str(k): float(results[name]["mean"][k - 1]) for k in at}
            for name in (*AGENTS, *(f"easy_{one}" for one in EASY_AGENTS))
        },
        "regret_errors": {name: float(results[name]["error"][-1]) for name in AGENTS},
        "bounds": {name: float(results["psrl"][name][-1]) for name in ("decoupled", "sharp", "printed", "prior_free")},
        "optimistic_runs": float(results["vtr_1"]["optimistic"].mean()),
    }


SETTINGS = PsrlSettings()

TINY = dataclasses.replace(
    SETTINGS,
    horizon=3,
    atoms=20,
    easy_states=3,
    easy_actions=6,
    episodes=16,
    seeds=6,
    widths=(1.0, 0.25),
    horizons=(),
    dimensions=(),
    varied_episodes=16,
)

EXPERIMENT = Study(
    name="psrl",
    claim=(
        "Posterior sampling explores a linear mixture MDP within its prior-dependent bound; acting on the mean does "
        "not."
    ),
    cost="4 minutes on two cores of an AMD EPYC",
    settings=SETTINGS,
    tiny=TINY,
    expectation=Expectation("share_of_statements_that_hold", at_least=1.0),
    parts=parts,
    summarise=summarise,
    page=psrl_page,
    ranges=RANGES,
)
