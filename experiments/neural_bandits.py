"""A hypermodel explores bandits whose rewards are not linear, at the price of one network.

Claim      On the vector-quadratic bandit, HyperAgent with M = 8 has at most 0.9 of the regret of the same network
           acting greedily.
Command    python -m experiments run neural_bandits
Cost       5 minutes on two quiet cores of an AMD EPYC, compilation included
Expected   saved_against_greedy >= 0.1 in summary.json: one minus the ratio of mean regrets

The bandits of Ensemble++ (arXiv 2407.13195, its section on nonlinear bandits) with its baselines, reduced: 20 features
(100 there), 200 actions (1000) of which 20 are shown per round (50), 1000 rounds, 16 seeds (10). All of it is a
setting: --dimension 100 --actions 1000 --shown 50 --rounds 10000 is the size of the source, whose number of rounds is
not stated; at 100 features 1000 rounds are too few for any agent to profit from exploring a quadratic form.

What came out (95 % intervals, paired over 16 bandits): 42 % (23 to 60) of greedy's regret saved on the claimed bandit,
as much as Ensemble+ saves with seven times the parameters. A first run with 4 seeds had 39 %, but an interval from -4
to 83, so the seeds were made 16. The claim is about that bandit alone. On the quadratic one HyperAgent saves 14 % (5 to
22) and Ensemble+ has less regret than it, 54 against 66; on the neural one nothing is saved: 110 against greedy's 102.
LMC-TS has the most regret everywhere, with the one step size and temperature that these runs tried.
"""

import dataclasses
import functools
from collections.abc import Callable
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments.bands import standard_error
from experiments.neural_bandit_page import neural_bandit_page
from experiments.ranges import RATE
from experiments.ranges import SEED
from experiments.ranges import SHARE
from experiments.ranges import SPREAD
from experiments.ranges import Range
from experiments.ranges import Ranges
from experiments.ranges import check_ranges
from experiments.registry import Expectation
from experiments.study import Parts
from experiments.study import Results
from experiments.study import Study
from jaxrl_llm.environments import neural_bandit
from jaxrl_llm.environments import quadratic_bandit
from jaxrl_llm.environments import vector_quadratic_bandit
from jaxrl_llm.exploration import Learning
from jaxrl_llm.exploration import NeuralAgent
from jaxrl_llm.exploration import ValueModel
from jaxrl_llm.exploration import as_agent
from jaxrl_llm.exploration import count_parameters
from jaxrl_llm.exploration import ensemble
from jaxrl_llm.exploration import ensemble_plus
from jaxrl_llm.exploration import ensemble_plus_plus
from jaxrl_llm.exploration import epinet
from jaxrl_llm.exploration import hypermodel
from jaxrl_llm.exploration import langevin_sampling
from jaxrl_llm.exploration import mlp
from jaxrl_llm.exploration import neural_greedy
from jaxrl_llm.exploration import neural_hyperagent
from jaxrl_llm.exploration import play_shown
from jaxrl_llm.exploration import point
from jaxrl_llm.exploration.indices import GAUSSIAN

BANDITS: Mapping[str, Callable[..., Any]] = {
    "quadratic": quadratic_bandit,
    "vector_quadratic": vector_quadratic_bandit,
    "neural": neural_bandit,
}
AGENTS = ("hyperagent", "ensemble_plus_plus", "ensemble_plus", "epinet", "langevin", "epsilon", "greedy")
SIZED = ("hyperagent", "ensemble_plus")
"""Agents that are also run at other index dimensions, for regret against parameter count."""

CLAIMED = "vector_quadratic"
POINTS = 100
"""Rounds at which curves are kept."""


@dataclasses.dataclass(frozen=True)
class NeuralBanditSettings:
    """What is played, by whom, how often.

    Attributes:
        bandits: which; names of `BANDITS`, vector_quadratic among them.
        agents: which; names of `AGENTS`, hyperagent and greedy among them.
        dimension: d, features of an action.
        actions: how many actions a bandit has.
        shown: how many of them a round shows.
        rounds: T, how many actions are taken in each bandit.
        seeds: bandits of each kind, each with its own noise; every agent meets the same ones.
        index_dimension: M of hypermodels, epinet and ensemble.
        other_sizes: further M at which the vector-quadratic bandit is played, for regret against parameters.
        hidden: units of each of the two hidden layers.
        learning_rate: step size of Adam.
        batch: data per gradient step; one step per round.
        start: rounds before the first step.
        noise_scale: sigma, standard deviation of the perturbations.
        weight_decay: beta, the weight of |theta|^2 in the loss.
        prior_scale: of the fixed priors of hypermodels and epinet; members of Ensemble+ have priors of scale 1.
        langevin_step: step size of LMC-TS agents.
        temperature: by which LMC-TS scales its noise.
        epsilon: share of random actions of the epsilon-greedy agent.
        seed: seed of all random numbers.
    """

    bandits: tuple[str, ...] = ("quadratic", "vector_quadratic", "neural")
    agents: tuple[str, ...] = AGENTS
    dimension: int = 20
    actions: int = 200
    shown: int = 20
    rounds: int = 1000
    seeds: int = 16
    index_dimension: int = 8
    other_sizes: tuple[int, ...] = (2,)
    hidden: int = 64
    learning_rate: float = 1e-3
    batch: int = 128
    start: int = 128
    noise_scale: float = 0.01
    weight_decay: float = 0.01
    prior_scale: float = 0.3
    langevin_step: float = 0.01
    temperature: float = 1e-4
    epsilon: float = 0.05
    seed: int = 0


RANGES: Ranges = {
    "dimension": Range(1, 10_000),
    "actions": Range(1, 100_000),
    "shown": Range(1, 100_000),
    "rounds": Range(1, 1_000_000),
    "seeds": Range(2, 100_000),
    "index_dimension": Range(1, 10_000),
    "other_sizes": Range(1, 10_000),
    "hidden": Range(1, 10_000),
    "learning_rate": RATE,
    "batch": Range(1, 100_000),
    "start": Range(0, 1_000_000),
    "noise_scale": SPREAD,
    "weight_decay": Range(0, 1000),
    "prior_scale": SPREAD,
    "langevin_step": RATE,
    "temperature": Range(0, 1000),
    "epsilon": SHARE,
    "seed": SEED,
}


def _agent(name: str, size: int, settings: NeuralBanditSettings) -> tuple[ValueModel, NeuralAgent]:
    """A value model of that index dimension and its agent."""
    learning = Learning(
        optax.adam(settings.learning_rate),
        noise_scale=settings.noise_scale,
        weight_decay=settings.weight_decay,
        batch=settings.batch,
        capacity=min(settings.rounds, 10_000),
        start=settings.start,
    )
    layers = mlp(settings.dimension, (settings.hidden, settings.hidden))
    scale = settings.prior_scale
    if name in ("hyperagent", "ensemble_plus_plus"):
        model = hypermodel(layers, index_dimension=size, prior_features=layers, prior_scale=scale)
        return model, (neural_hyperagent if name == "hyperagent" else ensemble_plus_plus)(model, learning)
    if name == "ensemble_plus":
        model = ensemble(layers, members=size, prior_features=layers, prior_scale=1.0)
        return model, ensemble_plus(model, learning)
    if name == "epinet":
        model = epinet(layers, index_dimension=size, prior_scale=scale)
        return model, neural_hyperagent(model, learning, reference=GAUSSIAN, update=GAUSSIAN, draws=8)
    model = point(layers)
    if name == "langevin":
        plain = learning._replace(optimizer=optax.identity())
        step, temperature = settings.langevin_step, settings.temperature
        return model, langevin_sampling(model, plain, step_size=step, temperature=temperature)
    return model, neural_greedy(model, learning, epsilon=settings.epsilon if name == "epsilon" else 0.0)


@functools.cache
def _drawn(bandit: str, settings: NeuralBanditSettings) -> tuple[Any, jax.Array]:
    """The bandits of all seeds, and the keys of what is played on them."""

    def one(key: jax.Array) -> tuple[Any, jax.Array]:
        bandit_key, play_key = jax.random.split(key)
        return BANDITS[bandit](bandit_key, dimension=settings.dimension, actions=settings.actions), play_key

    return jax.jit(jax.vmap(one))(jax.random.split(jax.random.key(settings.seed), settings.seeds))


@functools.cache
def _program(name: str, size: int, settings: NeuralBanditSettings) -> Callable[[Any, jax.Array], jax.Array]:
    """(bandits, keys) -> cumulative regrets of all seeds; compiling takes most of the time, so bandits share it."""
    agent = as_agent(_agent(name, size, settings)[1])

    def run(bandit: Any, key: jax.Array) -> jax.Array:
        return jnp.cumsum(play_shown(agent, bandit, key, rounds=settings.rounds, shown=settings.shown).regrets)

    return jax.jit(jax.vmap(run))


def _played(bandit: str, name: str, size: int, settings: NeuralBanditSettings) -> Mapping[str, Any]:
    """Cumulative regret of every seed: at the end, and as a curve with its standard error."""
    curves = np.asarray(_program(name, size, settings)(*_drawn(bandit, settings)))
    kept = np.unique(np.linspace(0, settings.rounds - 1, min(POINTS, settings.rounds)).round().astype(int))
    return {
        "rounds": kept + 1,
        "final": curves[:, -1],
        "mean": curves.mean(0)[kept],
        "error": standard_error(curves)[kept],
        "parameters": np.asarray(count_parameters(_agent(name, size, settings)[0])),
    }


def parts(settings: NeuralBanditSettings) -> Parts:
    """One part per bandit and agent, and one per further size.

    Raises:
        ValueError: a size is not possible.
    """
    check_ranges(settings, RANGES)
    if settings.shown > settings.actions:
        raise ValueError(f"Field --shown is {settings.shown}; it must be at most --actions, {settings.actions}.")
    unknown = [name for name in settings.bandits if name not in BANDITS]
    if unknown or CLAIMED not in settings.bandits:
        raise ValueError(f"Field --bandits is {settings.bandits}; names of {tuple(BANDITS)}, {CLAIMED} among them.")
    needed = ("hyperagent", "greedy")
    if not set(needed) <= set(settings.agents) <= set(AGENTS):
        raise ValueError(f"Field --agents is {settings.agents}; names of {AGENTS}, {needed} among them.")
    for name in settings.agents:
        _agent(name, settings.index_dimension, settings)
    named: dict[str, Callable[[], Mapping[str, Any]]] = {}
    for bandit in settings.bandits:
        for name in settings.agents:
            named[f"{bandit}_{name}"] = functools.partial(_played, bandit, name, settings.index_dimension, settings)
    for size in settings.other_sizes:
        for name in [name for name in SIZED if name in settings.agents]:
            named[f"size_{name}_{size}"] = functools.partial(_played, CLAIMED, name, size, settings)
    return named


def summarise(settings: NeuralBanditSettings, results: Results) -> dict[str, Any]:
    """Mean regrets with standard errors, and what the hypermodel saves against greedy."""
    finals = {
        bandit: {name: results[f"{bandit}_{name}"]["final"] for name in settings.agents} for bandit in settings.bandits
    }
    ours, greedy = finals[CLAIMED]["hyperagent"], finals[CLAIMED]["greedy"]
    return {
        "saved_against_greedy": float(1 - ours.mean() / greedy.mean()),
        # Over seeds, paired: every agent meets the same bandits.
        "saved_against_greedy_error": float(standard_error(greedy - ours) / greedy.mean()),
        "regret": {bandit: {name: float(f.mean()) for name, f in of.items()} for bandit, of in finals.items()},
        "regret_error": {
            bandit: {name: float(standard_error(f)) for name, f in of.items()} for bandit, of in finals.items()
        },
        "parameters": {name: int(results[f"{CLAIMED}_{name}"]["parameters"]) for name in settings.agents},
    }


SETTINGS = NeuralBanditSettings()

TINY = dataclasses.replace(
    SETTINGS,
    bandits=("vector_quadratic",),
    agents=("hyperagent", "greedy"),
    other_sizes=(),
    dimension=4,
    actions=12,
    shown=4,
    rounds=40,
    seeds=2,
    index_dimension=3,
    hidden=8,
    batch=8,
    start=8,
)

EXPERIMENT = Study(
    name="neural_bandits",
    claim="A hypermodel explores bandits whose rewards are not linear, at the price of one network.",
    cost="5 minutes on two cores of an AMD EPYC",
    settings=SETTINGS,
    tiny=TINY,
    expectation=Expectation("saved_against_greedy", at_least=0.1),
    parts=parts,
    summarise=summarise,
    page=neural_bandit_page,
    ranges=RANGES,
)
