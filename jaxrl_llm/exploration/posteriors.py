"""Posteriors over the transitions of an MDP, for agents that plan in a draw or in the mean of one.

Three of them: a prior of finitely many mixture weights and a Dirichlet prior of every row, both exact, and a Gaussian
law of the mixture weights that regresses values, which is exact for no MDP. A posterior that breaks (no atom explains
the data; a covariance loses definiteness) turns to NaN and stays so, through every later episode; `require_sound` says
it in a sentence after the run.
Source: PSRL with value-targeted model learning, Li and Luo 2024 (arXiv 2403.11175).
"""

from collections.abc import Callable
from typing import Any
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array
from jaxtyping import Float

from jaxrl_llm.exploration.episodes import Episode
from jaxrl_llm.exploration.gaussian import Gaussian
from jaxrl_llm.exploration.inputs import PosteriorError
from jaxrl_llm.exploration.inputs import require_positive_definite
from jaxrl_llm.tabular import LinearMixture
from jaxrl_llm.tabular import require_mdp
from jaxrl_llm.tabular import require_probabilities
from jaxrl_llm.tabular import value_ranges
from jaxrl_llm.typing import PRNGKey


class Posterior(NamedTuple):
    """A law of the transitions as pure functions of its state, which is any pytree.

    Attributes:
        init: -> the prior.
        sample: (state, key) -> transitions drawn from it [H, S, A, S].
        mean: state -> their mean [H, S, A, S].
        update: (state, episode, V_{h}(s) of the plan that was followed [H + 1, S]) -> state given the episode too.
    """

    init: Callable[[], Any]
    sample: Callable[[Any, PRNGKey], Float[Array, "H S A S"]]
    mean: Callable[[Any], Float[Array, "H S A S"]]
    update: Callable[[Any, Episode, Float[Array, "_ S"]], Any]


class FiniteSupport(NamedTuple):
    """The state of `finite_support`.

    Attributes:
        log_weights: normalised, of each step and atom [H, N].
    """

    log_weights: Float[Array, "H N"]


def moments(
    atoms: Float[Array, "H N D"], weights: Float[Array, "H N"]
) -> tuple[Float[Array, "H D"], Float[Array, "H D D"]]:
    """Mean and covariance of theta_h under a law of finite support.

    Args:
        atoms: theta of each step and atom.
        weights: their probabilities.

    Returns:
        (mean, covariance) of each step.
    """
    mean = jnp.einsum("hn,hnd->hd", weights, atoms)
    centred = atoms - mean[:, None, :]
    return mean, jnp.einsum("hn,hni,hnj->hij", weights, centred, centred)


def _met(kernels: Float[Array, "D S A S"], episode: Episode) -> Float[Array, "H D"]:
    """phi(s_{h+1} | s_h, a_h) of each step."""
    return kernels[:, episode.states[:-1], episode.actions, episode.states[1:]].T


def finite_support(mixture: LinearMixture, atoms: Float[Array, "H N D"], weights: Float[Array, "*shape"]) -> Posterior:
    """Exact Bayes for theta_h on N atoms, independent over steps: weights times <phi(s'|s, a), theta>, normalised.

    Args:
        mixture: the base kernels.
        atoms: support of the prior.
        weights: prior probabilities [H, N].

    Returns:
        the posterior; its state is a `FiniteSupport`.

    Raises:
        ValueError: if shapes do not fit, or (where values are known) weights, or the transitions of an atom, are not
            probabilities.
    """
    require_mdp(mixture)
    horizon, dimension = mixture.rewards.shape[0], mixture.kernels.shape[0]
    if atoms.ndim != 3 or (atoms.shape[0], atoms.shape[2]) != (horizon, dimension):
        raise ValueError(f"atoms has shape {atoms.shape}; it must be [{horizon}, N, {dimension}], as the mixture is.")
    if weights.shape != atoms.shape[:2]:
        raise ValueError(f"weights has shape {weights.shape}; it must be {atoms.shape[:2]}, as the atoms are.")
    require_probabilities(weights=weights)
    if not isinstance(atoms, Tracer) and not isinstance(mixture.kernels, Tracer):
        for step in range(horizon):
            require_probabilities(
                **{f"the mixture of atoms of step {step + 1}": jnp.tensordot(atoms[step], mixture.kernels, axes=1)}
            )

    def init() -> FiniteSupport:
        return FiniteSupport(jnp.log(weights))

    def sample(state: FiniteSupport, key: PRNGKey) -> Array:
        chosen = jax.random.categorical(key, state.log_weights, axis=1)
        return mixture.transitions(jnp.take_along_axis(atoms, chosen[:, None, None], axis=1)[:, 0])

    def mean(state: FiniteSupport) -> Array:
        return mixture.transitions(jnp.einsum("hn,hnd->hd", jnp.exp(state.log_weights), atoms))

    def update(state: FiniteSupport, episode: Episode, values: Array) -> FiniteSupport:
        likelihood = jnp.einsum("hnd,hd->hn", atoms, _met(mixture.kernels, episode))
        raised = state.log_weights + jnp.log(jnp.maximum(likelihood, 0.0))
        return FiniteSupport(raised - jax.scipy.special.logsumexp(raised, axis=1, keepdims=True))

    return Posterior(init, sample, mean, update)


def dirichlet(concentration: Float[Array, "*shape"]) -> Posterior:
    """Exact Bayes for transitions whose rows are independent Dirichlet: counts are added to the concentration.

    Args:
        concentration: alpha_h(s, a, s') of the prior [H, S, A, S], all positive.

    Returns:
        the posterior; its state is the concentration.

    Raises:
        ValueError: if it has not four axes, or (where values are known) an entry is not positive.
    """
    if concentration.ndim != 4 or concentration.shape[1] != concentration.shape[3]:
        raise ValueError(f"concentration has shape {concentration.shape}; it must be [H, S, A, S].")
    if not isinstance(concentration, Tracer):
        good = (concentration > 0) & jnp.isfinite(concentration)
        if not bool(jnp.all(good)):
            entry = float(concentration.reshape(-1)[jnp.argmin(good)])
            raise ValueError(f"concentration has the entry {entry:.3g}; all must be positive and finite.")
    steps = jnp.arange(concentration.shape[0])

    def update(state: Array, episode: Episode, values: Array) -> Array:
        return state.at[steps, episode.states[:-1], episode.actions, episode.states[1:]].add(1.0)

    return Posterior(
        lambda: concentration,
        lambda state, key: jax.random.dirichlet(key, state),
        lambda state: state / jnp.sum(state, axis=-1, keepdims=True),
        update,
    )


def value_targets(
    mixture: LinearMixture, episode: Episode, values: Float[Array, "_ S"]
) -> tuple[Float[Array, "H D"], Float[Array, " H"]]:
    """X_h = sum_s' phi(s'|s_h, a_h) V_{h+1}(s') and y_h = V_{h+1}(s_{h+1}): E[y_h | s_h, a_h] = <X_h, theta_h>.

    Args:
        mixture: the base kernels.
        episode: what was met.
        values: V of the plan that was followed.

    Returns:
        features and targets of each step; both are 0 at the last one.
    """
    rows = mixture.kernels[:, episode.states[:-1], episode.actions]  # [D, H, S]
    features = jnp.einsum("dhs,hs->hd", rows, values[1:])
    targets = jnp.take_along_axis(values[1:], episode.states[1:, None], axis=1)[:, 0]
    return features, targets


def gaussian_surrogate(mixture: LinearMixture, prior: Gaussian) -> Posterior:
    """theta_h ~ N and y_h = <X_h, theta_h> + noise of variance (H - h)^2 / 4: value-targeted regression, LMMSE updates.

    A surrogate: targets are not Gaussian and a draw may leave the simplex, so agents clip what they plan with.

    Args:
        mixture: the base kernels.
        prior: means [H, D] and covariances [H, D, D].

    Returns:
        the posterior; its state is a `Gaussian` with an axis of steps.

    Raises:
        ValueError: if shapes do not fit, or (where values are known) a prior covariance is not positive definite.
    """
    require_mdp(mixture)
    horizon, dimension = mixture.rewards.shape[0], mixture.kernels.shape[0]
    if prior.mean.shape != (horizon, dimension):
        raise ValueError(f"prior.mean has shape {prior.mean.shape}; it must be {(horizon, dimension)}.")
    if prior.covariance.shape != (horizon, dimension, dimension):
        raise ValueError(
            f"prior.covariance has shape {prior.covariance.shape}; it must be {(horizon, dimension, dimension)}."
        )
    if not isinstance(prior.covariance, Tracer):
        require_positive_definite(prior.covariance)
    ranges = value_ranges(horizon)
    # At the last step X = 0 and nothing is learned; any positive variance keeps 0/0 away.
    variances = jnp.where(ranges > 0, jnp.square(ranges) / 4, 1.0)

    def sample(state: Gaussian, key: PRNGKey) -> Array:
        normal = jax.random.normal(key, (horizon, dimension), state.mean.dtype)
        factor = jnp.linalg.cholesky(state.covariance)  # NaN where it is not positive definite, and NaN it stays
        return mixture.transitions(state.mean + jnp.einsum("hij,hj->hi", factor, normal))

    def update(state: Gaussian, episode: Episode, values: Array) -> Gaussian:
        features, targets = value_targets(mixture, episode, values)
        along = jnp.einsum("hij,hj->hi", state.covariance, features)
        gain = along / (variances + jnp.sum(features * along, axis=1))[:, None]
        surprise = targets - jnp.sum(features * state.mean, axis=1)
        return Gaussian(state.mean + gain * surprise[:, None], state.covariance - gain[:, :, None] * along[:, None, :])

    return Posterior(lambda: prior, sample, lambda state: mixture.transitions(state.mean), update)


def require_sound(state: Any) -> None:
    """The posteriors in the state of an agent must still be posteriors after a run, for any leading axes of seeds.

    Args:
        state: of any agent, outside jit, vmap and grad; every `Gaussian` (also that of a `Hypermodel`) and
            `FiniteSupport` in it is looked at.

    Raises:
        TypeError: if one of them is a tracer.
        PosteriorError: if a covariance is not positive definite, or no atom explains what was met.
    """
    laws = (Gaussian, FiniteSupport)
    for law in jax.tree.leaves(state, is_leaf=lambda node: isinstance(node, laws)):
        if isinstance(law, Gaussian):
            require_positive_definite(law.covariance)
        elif isinstance(law, FiniteSupport):
            _require_explained(law)


def _require_explained(law: FiniteSupport) -> None:
    if isinstance(law.log_weights, Tracer):
        raise TypeError("state is a tracer; a posterior can only be checked outside jit, vmap and grad.")
    if np.isnan(np.asarray(law.log_weights)).any():
        raise PosteriorError(
            "a posterior has weights that are not numbers: what was met has probability 0 under every atom of the "
            "prior (it must cover the true MDP)."
        )
