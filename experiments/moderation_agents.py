"""Who plays `content_moderation`: heads on features of texts, one output for publishing and one for blocking."""

from collections.abc import Callable
from collections.abc import Hashable
from typing import Any
from typing import NamedTuple

import jax.numpy as jnp
import optax

from jaxrl_llm.exploration import Features
from jaxrl_llm.exploration import Learning
from jaxrl_llm.exploration import NeuralAgent
from jaxrl_llm.exploration import ensemble
from jaxrl_llm.exploration import ensemble_plus
from jaxrl_llm.exploration import ensemble_plus_plus
from jaxrl_llm.exploration import hypermodel
from jaxrl_llm.exploration import independent_hyperagent
from jaxrl_llm.exploration import independent_linear
from jaxrl_llm.exploration import neural_greedy
from jaxrl_llm.exploration import point
from jaxrl_llm.exploration import rows_of
from jaxrl_llm.exploration.heads import ValueModel
from jaxrl_llm.typing import Array

OUTPUTS = 2


class Player(NamedTuple):
    """An agent, and what it thinks on average.

    Attributes:
        agent: the agent.
        mean_values: (its state, numbers of texts [N]) -> values of publishing and blocking [N, 2], over the index.
    """

    agent: NeuralAgent
    mean_values: Callable[[Any, Array], Array]


def _learning(settings: Any, *, start: int) -> Learning:
    """Adam; what is trained is a pair (parameters of the features, layer), each with its own rate."""
    rates: dict[Hashable, optax.GradientTransformation] = {
        "features": optax.adam(settings.tuned_learning_rate),
        "layer": optax.adam(settings.learning_rate),
    }
    return Learning(
        optax.partition(rates, ("features", "layer")),
        noise_scale=settings.noise_scale,
        weight_decay=settings.weight_decay,
        batch=settings.batch,
        capacity=settings.rounds,
        start=start,
        every=settings.every,
    )


def _neural(agent: NeuralAgent, model: ValueModel, mean_index: Array) -> Player:
    def mean_values(state: Any, numbers: Array) -> Array:
        return model.values(state.trained, state.prior, numbers, mean_index[None, None])[:, 0]

    return Player(agent, mean_values)


def _hypermodel(features: Features, rows: Array, settings: Any) -> Player:
    """Ensemble++: the exact expectation of the loss over the index, the factor not training the features."""
    model = hypermodel(
        features,
        index_dimension=settings.index_dimension,
        outputs=OUTPUTS,
        prior_scale=settings.prior_scale,
        first_mean="zeros",
    )
    agent = ensemble_plus_plus(model, _learning(settings, start=settings.every))
    return _neural(agent, model, jnp.zeros(settings.index_dimension))


def _ensemble(features: Features, rows: Array, settings: Any) -> Player:
    """Heads of their own with priors of their own, on features that are given."""
    members, given = settings.index_dimension, rows_of(rows)
    model = ensemble(given, members=members, prior_features=given, outputs=OUTPUTS, prior_scale=settings.prior_scale)
    agent = ensemble_plus(model, _learning(settings, start=settings.every))
    return _neural(agent, model, jnp.full(members, 1 / members))


def _greedy(features: Features, settings: Any, *, start: int, epsilon: float = 0.0) -> Player:
    model = point(features, outputs=OUTPUTS)
    agent = neural_greedy(model, _learning(settings, start=start), epsilon=epsilon)
    return _neural(agent, model, jnp.zeros(0))


def _linear(rows: Array, settings: Any, *, inflation: float) -> Player:
    agent = independent_linear(
        rows_of(rows),
        outputs=OUTPUTS,
        prior_scale=settings.prior_scale,
        noise_scale=settings.noise_scale,
        inflation=inflation,
    )

    def mean_values(state: Any, numbers: Array) -> Array:
        return rows[numbers] @ state.mean.T

    return Player(agent, mean_values)


def _incremental(features: Features, rows: Array, settings: Any) -> Player:
    """HyperAgent by its rank-one update instead of gradient steps."""
    agent = independent_hyperagent(
        rows_of(rows),
        outputs=OUTPUTS,
        index_dimension=settings.index_dimension,
        prior_scale=settings.prior_scale,
        noise_scale=settings.noise_scale,
    )

    def mean_values(state: Any, numbers: Array) -> Array:
        return rows[numbers] @ state.posterior.mean.T

    return Player(agent, mean_values)


AGENTS: dict[str, Callable[[Features, Array, Any], Player]] = {
    "hypermodel": _hypermodel,
    "incremental": _incremental,
    "ensemble": _ensemble,
    "thompson": lambda features, rows, settings: _linear(rows, settings, inflation=1.0),
    "greedy": lambda features, rows, settings: _greedy(features, settings, start=settings.every),
    "greedy_warm": lambda features, rows, settings: _greedy(features, settings, start=settings.warm_rounds),
    "epsilon_greedy": lambda features, rows, settings: _greedy(
        features, settings, start=settings.every, epsilon=settings.epsilon
    ),
    "posterior_mean": lambda features, rows, settings: _linear(rows, settings, inflation=0.0),
}
"""By name: (features of numbered texts, the same before any learning, settings) -> player.

`incremental`, `ensemble`, `thompson` and `posterior_mean` see the untuned features always.
"""

LABELS = {
    "hypermodel": "hypermodel",
    "incremental": "hypermodel, incremental",
    "ensemble": "ensemble",
    "thompson": "Thompson, linear",
    "greedy": "greedy",
    "greedy_warm": "greedy, warm start",
    "epsilon_greedy": "epsilon-greedy",
    "posterior_mean": "posterior mean",
}
"""Their names on a page."""
