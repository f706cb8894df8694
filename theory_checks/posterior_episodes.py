"""Two episodes of posterior sampling in an MDP that is small enough to enumerate: what `posterior_sampling` compares.

A linear mixture MDP of three steps (R = 2, 1, 0), two states, two actions and two atoms per step: all parameters, plans
and paths, with the planning and the posterior of the library.
"""

import itertools
from typing import Any
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxrl_llm import tabular
from jaxrl_llm.exploration import posteriors
from jaxrl_llm.exploration.episodes import Episode
from jaxrl_llm.tabular import LinearMixture
from theory_checks.check import World

HORIZON, STATES, ACTIONS, ATOMS = 3, 2, 2, 2
COMBINATIONS = jnp.asarray([(*pair, 0) for pair in itertools.product(range(ATOMS), repeat=2)])
"""Atoms of each step; that of the last step changes nothing."""
PATHS = jnp.asarray([(0, *pair, 0) for pair in itertools.product(range(STATES), repeat=2)])


def _mixed(generator: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    """Probabilities, a third of them nearly 0 or 1: bounds are attained there."""
    even = generator.uniform(0.02, 0.98, shape)
    return np.where(generator.random(shape) < 1 / 3, np.where(even > 0.5, 0.999, 0.001), even)


def _draw_episodes(generator: np.random.Generator, count: int) -> list[Any]:
    up = _mixed(generator, (count, 2, STATES, ACTIONS))
    rewards = generator.uniform(0, 1, (count, HORIZON, STATES, ACTIONS))
    atoms = generator.dirichlet(np.full(2, 0.3), (count, HORIZON, ATOMS))
    prior = generator.dirichlet(np.ones(ATOMS), (count, HORIZON))
    # One instance attains the decoupling bound: a fair coin says which of two actions leads to the rewarded state.
    up[0], rewards[0] = np.eye(2)[:, None, :], 0
    rewards[0, 1, 1], atoms[0], prior[0] = 1, np.eye(2), 1 / 2
    return [tuple(jnp.asarray(x) for x in (np.stack([1 - up, up], -1), rewards, atoms, prior))]


class Enumerated(NamedTuple):
    """Everything that can happen in one episode: L plans, one per parameter, M = L parameters, P paths.

    Attributes:
        values: V_h(s) of every plan in every true MDP [L, M, H + 1, S].
        probability: of every path, given plan and truth [L, P, M].
        features: X_h along every path, of the plan's own values [L, P, H, D].
        features_true: the same, of the values that the plan has in every true MDP [L, M, P, H, D].
        marginals: weights of the atoms of each step after every path [L, P, H, N].
        in_mean: V_1 of the plan for the mean parameter after every path, in its own MDP [L, P].
        mean: that parameter [L, P, H, D].
    """

    values: jax.Array
    probability: jax.Array
    features: jax.Array
    features_true: jax.Array
    marginals: jax.Array
    in_mean: jax.Array
    mean: jax.Array


def _enumerate(mixture: LinearMixture, atoms: jax.Array, prior: jax.Array, theta: jax.Array) -> Enumerated:
    rewards, steps = mixture.rewards, jnp.arange(HORIZON)
    moves = jax.vmap(mixture.transitions)(theta)
    plans = jax.vmap(lambda p: tabular.plan(p, rewards))(moves)
    evaluated = jax.vmap(lambda p, policy: tabular.evaluate(tabular.TabularMdp(p, rewards, mixture.initial), policy))
    values = jax.vmap(lambda policy: evaluated(moves, jnp.broadcast_to(policy, (len(moves), *policy.shape))))(
        plans.policy
    )
    posterior = posteriors.finite_support(mixture, atoms, prior)

    def met(policy: jax.Array, path: jax.Array) -> Episode:
        actions = policy[steps, path[:-1]]
        return Episode(path, actions, rewards[steps, path[:-1], actions])

    def along(plan: tabular.Plan, own: jax.Array) -> jax.Array:
        return jax.vmap(lambda path: posteriors.value_targets(mixture, met(plan.policy, path), own)[0])(PATHS)

    def chance(policy: jax.Array, path: jax.Array) -> jax.Array:
        ends = moves[:, steps[:2], path[:2], policy[steps, path[:-1]][:2], path[1:3]]
        return jnp.prod(ends, axis=1)

    def weights_after(plan: tabular.Plan, path: jax.Array) -> jax.Array:
        after = posterior.update(posterior.init(), met(plan.policy, path), plan.values)
        return jnp.exp(after.log_weights)

    over_paths = (None, 0)
    marginals = jax.vmap(jax.vmap(weights_after, over_paths), (0, None))(plans, PATHS)
    mean = jnp.einsum("lphn,hnd->lphd", marginals, atoms)
    return Enumerated(
        values=values,
        probability=jax.vmap(jax.vmap(chance, over_paths), (0, None))(plans.policy, PATHS),
        features=jax.vmap(along)(plans, plans.values),
        features_true=jax.vmap(jax.vmap(along, over_paths))(plans, values),
        marginals=marginals,
        in_mean=jax.vmap(jax.vmap(lambda at: tabular.plan(mixture.transitions(at), rewards).values[0, 0]))(mean),
        mean=mean,
    )


def _measure_episodes(
    kernels: jax.Array, rewards: jax.Array, atoms: jax.Array, prior: jax.Array
) -> dict[str, jax.Array]:
    steps = jnp.arange(HORIZON)
    theta = atoms[steps[None, :], COMBINATIONS]  # [M, H, D]
    weight = jnp.prod(prior[steps[None, :2], COMBINATIONS[:, :2]], axis=1)  # [M]
    every = _enumerate(LinearMixture(kernels, rewards, jnp.asarray([1.0, 0.0])), atoms, prior, theta)
    features, probability, marginals, mean = every.features, every.probability, every.marginals, every.mean
    value = every.values[:, :, 0, 0]
    posterior_weight = marginals[:, :, 0, COMBINATIONS[:, 0]] * marginals[:, :, 1, COMBINATIONS[:, 1]]  # [L, path, M]
    joint = weight[:, None, None] * probability * weight[None, None, :]  # of plan, path and truth in episode 1
    history = jnp.sum(joint, axis=2)
    # Episode 2: given the history, truth m and plan k are independent with the same law.
    twice = jnp.einsum("lpm,lpk->lpmk", joint, posterior_weight)
    best = value[jnp.arange(len(theta)), jnp.arange(len(theta))]
    second = jnp.einsum("lpmk,kqm->lpmkq", twice, probability)  # with the path of episode 2
    of_true = jnp.einsum("kqhd,mhd->kqmh", features, theta)
    of_sampled = jnp.einsum("kqhd,khd->kqh", features, theta)
    of_mean = jnp.einsum("kqhd,lphd->lpkqh", features, mean)
    centred = atoms[None, None] - mean[:, :, :, None, :]
    gamma = jnp.einsum("lphn,lphni,lphnj->lphij", marginals, centred, centred)
    variance = jnp.einsum("lpmkq,kqhi,lphij,kqhj->h", second, features, gamma, features)
    first = jnp.einsum("m,kqm,k->kq", weight, probability, weight)
    prior_gamma = posteriors.moments(atoms, prior)[1]
    first_variance = jnp.einsum("kq,kqhi,hij,kqhj->h", first, features, prior_gamma, features)
    second_regret = jnp.einsum("lpm,m->", joint, best) - jnp.einsum("lpmk,km->", twice, value)
    return {
        "posterior": posterior_weight * history[:, :, None],
        "joint": joint,
        "unchanged": weight[None, None, :] * history[:, :, None],
        "regret": second_regret,
        "matched": jnp.einsum("lpmk,k->", twice, best) - jnp.einsum("lpmk,km->", twice, value),
        "matched_mean": jnp.sum(history * every.in_mean) - jnp.einsum("lpmk,km->", twice, value),
        "difference": best[:, None] - value,
        "simulated": jnp.einsum("kqm,kqmh->km", probability, of_sampled[:, :, None, :] - of_true),
        "simulated_true": jnp.einsum(
            "kqm,kmqhd,kmhd->km", probability, every.features_true, theta[:, None] - theta[None]
        ),
        "true_part": jnp.einsum("lpmkq,kqmh->h", second, of_true) - jnp.einsum("lpmkq,lpkqh->h", second, of_mean),
        "sampled_part": jnp.einsum("lpmkq,kqh->h", second, of_sampled) - jnp.einsum("lpmkq,lpkqh->h", second, of_mean),
        "regrets": jnp.stack([weight @ best - weight @ value @ weight, second_regret]),
        "decoupled": jnp.sum(jnp.sqrt(jnp.maximum(jnp.stack([first_variance, variance]), 0.0)), axis=1),
    }


EPISODES = World(name="posterior_sampling_episodes", draw=_draw_episodes, measure=_measure_episodes)
