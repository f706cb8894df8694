"""Posterior sampling solved exactly: every history of a small linear mixture MDP with a prior of a few atoms.

Two steps, so that R_1 = 1 and R_2 = 0: an action leads to the rewarded state with probability <x_a, theta>, and theta
has N atoms. There are (2 A)^K histories of K episodes, each with its exact posterior. All sides are taken
at every K; the first instances come near their bounds: one outcome tells, all but surely in all but the first, which of
two actions is rewarded.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxrl_llm.bounds import regret as bounds
from jaxrl_llm.exploration import moments
from theory_checks.check import Check
from theory_checks.check import Sides
from theory_checks.check import World

PAPER = "arXiv 2403.11175"
ACTIONS, DIMENSION, ATOMS, EPISODES = 2, 2, 4, 5
PLANTED = 8
EPS = (0.01, 0.1, 0.3, 1.0, 10.0)


def _draw(generator: np.random.Generator, count: int) -> list[Any]:
    features = generator.uniform(0.02, 0.98, (count, ACTIONS, DIMENSION))
    atoms = generator.dirichlet(np.full(DIMENSION, 0.3), (count, ATOMS))
    prior = generator.dirichlet(np.ones(ATOMS), count)
    features = np.where(generator.random(features.shape) < 1 / 3, features.round(), features)
    near = min(PLANTED, count)
    off = np.geomspace(1e-6, 1e-3, near)[:, None, None] * (np.arange(near) > 0)[:, None, None]
    features[:near] = np.eye(2) * (1 - 2 * off) + off
    atoms[:near] = np.eye(2)[[0, 1, 0, 1]]
    prior[:near] = 1 / ATOMS + 0.1 * off[:, 0] * np.array([1, -1, 1, -1])
    return [tuple(jnp.asarray(x) for x in (features, atoms, prior))]


def _measure(features: jax.Array, atoms: jax.Array, prior: jax.Array) -> dict[str, jax.Array]:
    means = atoms @ features.T  # [N, A]
    best = jax.nn.one_hot(jnp.argmax(means, axis=1), ACTIONS, dtype=means.dtype)
    outcome = jnp.stack([1 - means, means], -1)  # [N, A, 2]
    joint, regrets, variances = prior[None], [], []  # [histories, N]
    for _ in range(EPISODES):
        total = jnp.sum(joint, axis=1)
        posterior = joint / jnp.where(total > 0, total, 1.0)[:, None]  # 0 where no atom takes that action
        act = posterior @ best  # an action as often as it is the best one
        gap = jnp.max(means, axis=1)[:, None] - means
        regrets.append(jnp.sum(joint[:, :, None] * act[:, None, :] * gap[None]))
        # x_a^T Gamma x_a, as a mean of squares: a difference of squares may round below 0, which has no root.
        off = means[None] - (posterior @ means)[:, None]
        spread = jnp.sum(posterior[:, :, None] * jnp.square(off), axis=1)
        variances.append(jnp.sum(total[:, None] * act * spread))
        joint = jnp.einsum("hn,ha,nao->haon", joint, act, outcome).reshape(-1, ATOMS)
    regret, variance = jnp.cumsum(jnp.stack(regrets)), jnp.cumsum(jnp.stack(variances))  # at every K
    _, gamma = moments(atoms[None], prior[None])
    covariances = jnp.concatenate([gamma, gamma])
    ratio = jnp.max(jnp.linalg.norm(features, axis=1))
    # Theta sums to 1: a constant may be taken from the features, and the rank is d - 1.
    centred = jnp.max(jnp.linalg.norm(features - jnp.mean(features, axis=1, keepdims=True), axis=1))

    def at(k: jax.Array) -> dict[str, jax.Array]:
        arguments, sharp = {"episodes": k, "feature_ratio": ratio}, {"episodes": k, "feature_ratio": centred}
        return {
            "decoupling": (DIMENSION - 1) * k,
            "potential": bounds.psrl_potential(covariances, **arguments)[0],
            "potential_at": jnp.stack([bounds.psrl_potential_at(covariances, eps=e, **arguments)[0] for e in EPS]),
            "potential_sharp": bounds.psrl_potential_sharp(covariances, **sharp)[0],
            "bound": bounds.psrl_bayes_regret(covariances, **arguments),
            "bound_sharp": bounds.psrl_bayes_regret_sharp(covariances, rank=DIMENSION - 1, **sharp),
            "prior_free": bounds.psrl_bayes_regret_prior_free(dimension=DIMENSION, horizon=2, **arguments),
        }

    found = jax.vmap(at)(jnp.arange(1.0, EPISODES + 1))
    decoupled = jnp.sqrt(found["decoupling"] * variance)
    return {**found, "regret": regret, "variance": variance, "each": variance[:, None], "decoupled": decoupled}


WORLD = World(name="regret", draw=_draw, measure=_measure)


def _check(name: str, statement: str, function: str, left: str, right: str, *, factor: float) -> Check:
    return Check(
        name=f"regret.{name}",
        paper=PAPER,
        statement=f"{statement} (twin: {factor:g} of it)",
        functions=(f"bounds.regret.{function}",),
        world=WORLD,
        sides=lambda m: Sides(m[left], m[right]),
        wrong=lambda m: Sides(m[left], factor * m[right]),
    )


CHECKS = [
    _check("psrl", "Bayes regret <= the prior-dependent bound", "psrl_bayes_regret", "regret", "bound", factor=0.3),
    _check(
        "psrl_sharp",
        "Bayes regret <= the sharp prior-dependent bound",
        "psrl_bayes_regret_sharp",
        "regret",
        "bound_sharp",
        factor=0.99,
    ),
    _check(
        "decoupling",
        "Bayes regret <= sqrt((d - 1) K sum_k E[x^T Gamma_k x]), attained",
        "psrl_bayes_regret_sharp",
        "regret",
        "decoupled",
        factor=0.99,
    ),
    _check(
        "potential",
        "sum_k E[x^T Gamma_k x] <= the log-det potential",
        "psrl_potential",
        "variance",
        "potential",
        factor=0.2,
    ),
    _check(
        "potential_at",
        "the same for every eps, not the one of the bound alone",
        "psrl_potential_at",
        "each",
        "potential_at",
        factor=0.3,
    ),
    _check(
        "potential_sharp",
        "the same with a quarter of the logarithm and the best eps",
        "psrl_potential_sharp",
        "variance",
        "potential_sharp",
        factor=0.99,
    ),
    _check(
        "prior_free",
        "the prior-dependent bound <= the prior-free one",
        "psrl_bayes_regret_prior_free",
        "bound",
        "prior_free",
        factor=0.7,
    ),
]
