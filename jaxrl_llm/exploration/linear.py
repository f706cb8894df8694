"""Agents for linear bandits: exact Thompson sampling, LinUCB, greedy, ensemble sampling, HyperAgent.

All of them keep the same Gaussian posterior (prior N(0, s^2 I), noise sigma) and differ in how they act on it. Sources:
Ensemble++ (arXiv 2407.13195) and HyperAgent (arXiv 2402.10228).
"""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array
from jaxtyping import Float
from jaxtyping import Int

from jaxrl_llm.checks import require_at_least
from jaxrl_llm.checks import require_positive
from jaxrl_llm.exploration import indices
from jaxrl_llm.exploration.agent import Agent
from jaxrl_llm.exploration.gaussian import Gaussian
from jaxrl_llm.exploration.gaussian import Hypermodel
from jaxrl_llm.exploration.gaussian import hypermodel_update
from jaxrl_llm.exploration.gaussian import isotropic_prior
from jaxrl_llm.exploration.gaussian import posterior_update
from jaxrl_llm.exploration.indices import IndexLaw
from jaxrl_llm.exploration.inputs import require_width
from jaxrl_llm.tabular import first_maxima
from jaxrl_llm.typing import PRNGKey


def _values(features: Float[Array, "X F"], parameter: Float[Array, " D"]) -> Float[Array, " X"]:
    require_width("features", features, parameter.shape[0])
    return features @ parameter


def _nothing(key: PRNGKey, rounds: int) -> tuple[None, None]:
    return None, None


def _posterior_agent(dimension: int, prior_scale: float, noise_scale: float, act, draw=_nothing) -> Agent:
    """An agent whose state is the exact posterior."""
    require_at_least("dimension", dimension, 1)
    require_positive("prior_scale", prior_scale)
    require_positive("noise_scale", noise_scale)

    def init(key: PRNGKey) -> Gaussian:
        return isotropic_prior(dimension, prior_scale)

    def update(state: Gaussian, drawn: None, features: Array, reward: Array) -> Gaussian:
        return posterior_update(state, features, reward, noise_scale=noise_scale)

    return Agent(init, draw, act, update)


def thompson_sampling(
    dimension: int, *, prior_scale: float = 1.0, noise_scale: float = 1.0, inflation: float = 1.0
) -> Agent:
    """Act greedily on theta ~ N(mu_t, inflation^2 Sigma_t), drawn afresh each round by a Cholesky factor.

    Args:
        dimension: d.
        prior_scale: standard deviation of each coordinate of theta before any data.
        noise_scale: sigma, the standard deviation of a reward.
        inflation: factor on the posterior's spread; 1 is Bayes' rule, frequentist theory takes beta_t.

    Returns:
        the agent; its state is a `Gaussian`.

    Raises:
        ValueError: if a scale is not positive or dimension is below 1.
    """
    require_positive("inflation", inflation)

    def draw(key: PRNGKey, rounds: int) -> tuple[Array, None]:
        return jax.random.normal(key, (rounds, dimension)), None

    def act(state: Gaussian, normal: Float[Array, " D"], features: Float[Array, "X D"]) -> Int[Array, ""]:
        parameter = state.mean + inflation * (jnp.linalg.cholesky(state.covariance) @ normal)
        return first_maxima(_values(features, parameter))

    return _posterior_agent(dimension, prior_scale, noise_scale, act, draw)


def lin_ucb(dimension: int, *, width: float, prior_scale: float = 1.0, noise_scale: float = 1.0) -> Agent:
    """Act on <x, mu_t> + width |x|_{Sigma_t}.

    Args:
        dimension: d.
        width: standard deviations of optimism; `bounds.regret.confidence_width` gives the theory's.
        prior_scale, noise_scale: as `thompson_sampling`.

    Returns:
        the agent; its state is a `Gaussian`.

    Raises:
        ValueError: if a scale is not positive, width is negative, or dimension is below 1.
    """
    if not width >= 0:
        raise ValueError(f"width is {width}; it must be at least 0.")

    def act(state: Gaussian, drawn: None, features: Float[Array, "X D"]) -> Int[Array, ""]:
        variances = jnp.sum((features @ state.covariance) * features, axis=1)
        # Rounding can leave a variance of -1e-9 where the posterior is sure.
        return first_maxima(_values(features, state.mean) + width * jnp.sqrt(jnp.maximum(variances, 0.0)))

    return _posterior_agent(dimension, prior_scale, noise_scale, act)


def greedy(dimension: int, *, prior_scale: float = 1.0, noise_scale: float = 1.0) -> Agent:
    """Act on the posterior mean: never explores on purpose.

    Args, Returns, Raises as `thompson_sampling`.
    """

    def act(state: Gaussian, drawn: None, features: Float[Array, "X D"]) -> Int[Array, ""]:
        return first_maxima(_values(features, state.mean))

    return _posterior_agent(dimension, prior_scale, noise_scale, act)


def hyperagent(
    dimension: int,
    *,
    index_dimension: int,
    reference: IndexLaw = indices.SPHERE,
    perturbation: IndexLaw = indices.SPHERE,
    prior_factor: IndexLaw = indices.SPHERE,
    prior_scale: float = 1.0,
    noise_scale: float = 1.0,
    inflation: float = 1.0,
) -> Agent:
    """Act greedily on mu_t + inflation A_t xi, xi fresh each round; A_t follows `hypermodel_update`.

    A_0 = s Z_0, the rows of Z_0 independent draws of the perturbation of `prior_factor`, so that E A_0 A_0^T = s^2 I.

    Args:
        dimension: d.
        index_dimension: M.
        reference: law of xi.
        perturbation: law of what is stored with each datum.
        prior_factor: law of the rows of Z_0.
        prior_scale, noise_scale, inflation: as `thompson_sampling`.

    Returns:
        the agent; its state is a `Hypermodel`.

    Raises:
        ValueError: if a scale is not positive, or dimension or index_dimension is below 1.
    """
    require_at_least("dimension", dimension, 1)
    require_at_least("index_dimension", index_dimension, 1)
    require_positive("prior_scale", prior_scale)
    require_positive("noise_scale", noise_scale)
    require_positive("inflation", inflation)

    def init(key: PRNGKey) -> Hypermodel:
        rows = prior_factor.perturbation(key, (dimension, index_dimension))
        return Hypermodel(isotropic_prior(dimension, prior_scale), prior_scale * rows)

    def draw(key: PRNGKey, rounds: int) -> tuple[Array, Array]:
        act_key, update_key = jax.random.split(key)
        shape = (rounds, index_dimension)
        return reference.reference(act_key, shape), perturbation.perturbation(update_key, shape)

    def act(state: Hypermodel, index: Float[Array, " M"], features: Float[Array, "X D"]) -> Int[Array, ""]:
        return first_maxima(_values(features, state.posterior.mean + inflation * (state.factor @ index)))

    def update(state: Hypermodel, stored: Float[Array, " M"], features: Array, reward: Array) -> Hypermodel:
        return hypermodel_update(state, features, reward, stored, noise_scale=noise_scale)

    return Agent(init, draw, act, update)


def ensemble_sampling(
    dimension: int, *, members: int, prior_scale: float = 1.0, noise_scale: float = 1.0, inflation: float = 1.0
) -> Agent:
    """Act on one of `members` models mu_t + sqrt(M) A_t e_i, i uniform, each trained on rewards perturbed by N(0,
    sigma^2).

    The linear ensemble as a hypermodel: reference sqrt(M) e_i, Gaussian perturbations and prior.

    Args:
        dimension: d.
        members: M.
        prior_scale, noise_scale, inflation: as `thompson_sampling`.

    Returns, Raises as `hyperagent`.
    """
    scale = math.sqrt(max(members, 1))
    member = indices.ONE_HOT._replace(reference=lambda key, shape: scale * indices.ONE_HOT.reference(key, shape))
    return hyperagent(
        dimension,
        index_dimension=members,
        reference=member,
        perturbation=indices.GAUSSIAN,
        prior_factor=indices.GAUSSIAN,
        prior_scale=prior_scale,
        noise_scale=noise_scale,
        inflation=inflation,
    )
