"""Posterior sampling solved exactly: every history of a small linear mixture MDP with a prior of a few atoms.

Two steps, so that R_1 = 1 and R_2 = 0: an action leads to the rewarded state with probability <x_a, theta>, and theta
has N atoms. There are (2 A)^K histories of K episodes, each with its exact posterior.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxrl_llm.bounds import regret as bounds
from theory_checks.check import Check
from theory_checks.check import Sides
from theory_checks.check import World

PAPER = "arXiv 2403.11175"
ACTIONS, DIMENSION, ATOMS, EPISODES = 2, 2, 4, 5


def _draw(generator: np.random.Generator, count: int) -> list[Any]:
    features = generator.uniform(0.02, 0.98, (count, ACTIONS, DIMENSION))
    atoms = generator.dirichlet(np.full(DIMENSION, 0.3), (count, ATOMS))
    prior = generator.dirichlet(np.ones(ATOMS), count)
    return [tuple(jnp.asarray(x) for x in (features, atoms, prior))]


def _measure(features: jax.Array, atoms: jax.Array, prior: jax.Array) -> dict[str, jax.Array]:
    means = atoms @ features.T  # [N, A]
    best = jax.nn.one_hot(jnp.argmax(means, axis=1), ACTIONS, dtype=means.dtype)
    outcome = jnp.stack([1 - means, means], -1)  # [N, A, 2]
    joint, regret, variance = prior[None], jnp.zeros(()), jnp.zeros(())  # [histories, N]
    for _ in range(EPISODES):
        total = jnp.sum(joint, axis=1)
        posterior = joint / jnp.where(total > 0, total, 1.0)[:, None]  # 0 where no atom takes that action
        act = posterior @ best  # an action as often as it is the best one
        gap = jnp.max(means, axis=1)[:, None] - means
        regret = regret + jnp.sum(joint[:, :, None] * act[:, None, :] * gap[None])
        spread = posterior @ jnp.square(means) - jnp.square(posterior @ means)  # x_a^T Gamma x_a
        variance = variance + jnp.sum(total[:, None] * act * spread)
        joint = jnp.einsum("hn,ha,nao->haon", joint, act, outcome).reshape(-1, ATOMS)
    centred = atoms - (prior @ atoms)[None]
    gamma = jnp.einsum("n,ni,nj->ij", prior, centred, centred)
    covariances = jnp.stack([gamma, gamma])
    ratio = jnp.max(jnp.linalg.norm(features, axis=1))
    arguments = {"episodes": float(EPISODES), "feature_ratio": ratio}
    return {
        "regret": regret,
        "variance": variance,
        "decoupled": jnp.sqrt(DIMENSION * EPISODES * variance),
        "potential": bounds.psrl_potential(covariances, **arguments)[0],
        "bound": bounds.psrl_bayes_regret(covariances, **arguments),
        "prior_free": bounds.psrl_bayes_regret_prior_free(dimension=DIMENSION, horizon=2, **arguments),
    }


WORLD = World(name="regret", draw=_draw, measure=_measure)


def _check(name: str, statement: str, function: str, left: str, right: str, *, factor: float) -> Check:
    return Check(
        name=f"regret.{name}",
        paper=PAPER,
        statement=statement,
        functions=(f"bounds.regret.{function}",),
        world=WORLD,
        sides=lambda m: Sides(m[left], m[right]),
        wrong=lambda m: Sides(m[left], factor * m[right]),
    )


CHECKS = [
    _check("psrl", "Bayes regret <= the prior-dependent bound", "psrl_bayes_regret", "regret", "bound", factor=0.02),
    _check(
        "decoupling",
        "Bayes regret <= sqrt(d K sum_k E[x^T Gamma_k x])",
        "psrl_bayes_regret",
        "regret",
        "decoupled",
        factor=0.1,
    ),
    _check(
        "potential",
        "sum_k E[x^T Gamma_k x] <= the log-det potential",
        "psrl_potential",
        "variance",
        "potential",
        factor=0.05,
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
