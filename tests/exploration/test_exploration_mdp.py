"""Agents for episodes: planning against enumeration, what each agent does, and how it says that it cannot."""

import functools
import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_llm import tabular
from jaxrl_llm.environments import deep_sea
from jaxrl_llm.environments import draw_parameters
from jaxrl_llm.environments import random_mixture
from jaxrl_llm.environments import risky_mixture
from jaxrl_llm.environments import segment_atoms
from jaxrl_llm.environments import simplex_atoms
from jaxrl_llm.exploration import Episode
from jaxrl_llm.exploration import FiniteSupport
from jaxrl_llm.exploration import Gaussian
from jaxrl_llm.exploration import dirichlet
from jaxrl_llm.exploration import finite_support
from jaxrl_llm.exploration import gaussian_surrogate
from jaxrl_llm.exploration import greedy_in_the_mean
from jaxrl_llm.exploration import moments
from jaxrl_llm.exploration import play_episodes
from jaxrl_llm.exploration import psrl
from jaxrl_llm.exploration import q_learning
from jaxrl_llm.exploration import require_sound
from jaxrl_llm.exploration import rlsvi
from jaxrl_llm.exploration import run_episode
from jaxrl_llm.exploration import tabular_hyperagent
from jaxrl_llm.exploration import ucrl_vtr

HORIZON, ATOMS, EPISODES, SEEDS = 4, 20, 40, 200


@functools.cache
def drawn():
    """Worlds of all seeds: what they need and their true MDPs."""

    @jax.jit
    @jax.vmap
    def draw(key):
        keys = jax.random.split(key, 3)
        mixture = risky_mixture(keys[0], horizon=HORIZON)
        atoms = simplex_atoms(keys[1], horizon=HORIZON, atoms=ATOMS, dimension=4)
        weights = jnp.full((HORIZON, ATOMS), 1 / ATOMS)
        return mixture, atoms, weights, mixture.mdp(draw_parameters(keys[2], atoms, weights))

    return draw(jax.random.split(jax.random.key(2), SEEDS))


def first_world():
    return jax.tree.map(lambda array: array[0], drawn())


@functools.cache
def runs(name):
    def one(world, key):
        mixture, atoms, weights, mdp = world
        posterior = finite_support(mixture, atoms, weights)
        agent = {
            "psrl": lambda: psrl(posterior, mixture.rewards),
            "vtr": lambda: ucrl_vtr(mixture, failure=0.1),
        }[name]()
        best = tabular.plan(mdp.transitions, mdp.rewards).values
        return play_episodes(
            agent,
            mdp,
            key,
            episodes=EPISODES,
            measure=lambda state, plan, episode: (plan.values[0, 0], jnp.all(plan.values >= best - 1e-5)),
        ), best[0, 0]

    return jax.jit(jax.vmap(one))(drawn(), jax.random.split(jax.random.key(5), SEEDS))


def small_mdp(key):
    mixture = random_mixture(key, states=2, actions=2, horizon=3, dimension=2)
    return mixture.mdp(jnp.asarray([[0.5, 0.5], [0.2, 0.8], [1.0, 0.0]]))


def test_the_plan_is_the_best_of_all_policies(key):
    mdp = small_mdp(key)
    plan = tabular.plan(mdp.transitions, mdp.rewards)
    policies = jnp.asarray(list(itertools.product((0, 1), repeat=6))).reshape(-1, 3, 2)
    values = jax.vmap(lambda policy: tabular.evaluate(mdp, policy))(policies)
    np.testing.assert_allclose(plan.values, values.max(0), rtol=1e-5)
    np.testing.assert_allclose(tabular.evaluate(mdp, plan.policy), plan.values, rtol=1e-5)


def test_values_are_the_mean_return_over_all_paths(key):
    mdp = small_mdp(key)
    policy = jnp.asarray([[1, 0], [0, 0], [1, 1]])
    total = 0.0
    for path in itertools.product((0, 1), repeat=3):
        probability, reward = float(mdp.initial[path[0]]), 0.0
        for step, state in enumerate(path):
            action = int(policy[step, state])
            reward += float(mdp.rewards[step, state, action])
            if step < 2:
                probability *= float(mdp.transitions[step, state, action, path[step + 1]])
        total += probability * reward
    np.testing.assert_allclose(tabular.start_value(mdp, tabular.evaluate(mdp, policy)), total, rtol=1e-5)


def test_an_episode_follows_the_transitions(key):
    mdp = small_mdp(key)
    policy = jnp.zeros((3, 2), int)
    met = jax.jit(jax.vmap(lambda k: run_episode(mdp, policy, k)))(jax.random.split(key, 20_000))
    moves = np.asarray(mdp.transitions[:, :, 0])
    law = np.asarray(mdp.initial)
    for step in range(3):
        np.testing.assert_allclose(np.bincount(met.states[:, step], minlength=2) / 20_000, law, atol=0.02)
        law = law @ moves[step]


def test_posterior_sampling_promises_what_the_best_policy_earns():
    """Theta_k and theta have one law: E V*(M_k) = E V*(M) in every episode (and not for other agents)."""
    for name, equal in (("psrl", True), ("vtr", False)):
        played, best = runs(name)
        gaps = np.asarray(played.measured[0]) - np.asarray(best)[:, None]
        scores = gaps.mean(0) / (gaps.std(0) / SEEDS**0.5 + 1e-9)
        assert bool(np.abs(scores[[0, 5, 20, 39]]).max() < 4) is equal


def test_optimism_holds_in_more_than_the_promised_share_of_runs():
    played, _ = runs("vtr")
    assert np.asarray(played.measured[1]).all(axis=1).mean() >= 0.9


def test_regret_is_never_negative_and_falls():
    regrets = np.asarray(runs("psrl")[0].regrets)
    assert regrets.min() > -1e-5
    assert regrets[:, -10:].mean() < 0.4 * regrets[:, :3].mean()
    assert regrets.sum() < 0.3 * np.asarray(runs("vtr")[0].regrets).sum()
    require_sound(runs("psrl")[0].state)


def test_the_greedy_agent_plans_in_the_mean_and_rlsvi_around_it(key):
    mixture, atoms, weights, _ = first_world()
    mean, _ = moments(atoms, weights)
    expected = tabular.plan(mixture.transitions(mean), mixture.rewards)
    agent = greedy_in_the_mean(finite_support(mixture, atoms, weights), mixture.rewards)
    np.testing.assert_allclose(agent.act(agent.init(key), key).values, expected.values, rtol=1e-5)
    quiet = rlsvi(mixture.rewards, mixture.transitions(mean), noise=1e-6)
    np.testing.assert_allclose(quiet.act(quiet.init(key), key).values, expected.values, rtol=1e-4)


def known_visits():
    """What 3 episodes through the same cells leave: action 1 leads from 0 to 1, then action 2 from 1 to 2, twice."""
    return Episode(jnp.asarray([0, 1, 2, 0, 0]), jnp.asarray([1, 2, 0, 0]), jnp.zeros(HORIZON))


def test_the_noise_of_rlsvi_is_that_of_a_mean_of_values(key):
    """Q ~ N(r + mean, c^2 (H - h)^2 / (4 (n + 1))) where no clip is in the way."""
    mixture, atoms, *_ = first_world()
    prior = jnp.broadcast_to(jnp.full(3, 1 / 3), mixture.transitions(atoms[:, 0]).shape)
    rewards = jnp.full(mixture.rewards.shape, 0.5)
    agent = rlsvi(rewards, prior, noise=0.2)
    state = agent.init(key)
    plan = agent.act(state, key)
    for _ in range(3):
        state = agent.update(state, key, plan, known_visits())
    draws = jax.jit(jax.vmap(lambda k: agent.act(state, k)))(jax.random.split(key, 20_000))
    for step, cell, visits in ((1, (1, 2), 3), (1, (2, 1), 0), (2, (2, 0), 3)):
        following = draws.values[:, step + 1]
        mean = (visits * following[:, known_visits().states[step + 1]] + following.mean(1)) / (visits + 1)
        noise = draws.action_values[:, step, *cell] - 0.5 - mean
        np.testing.assert_allclose(noise.std(), 0.2 * (HORIZON - 1 - step) / (2 * (visits + 1) ** 0.5), rtol=0.03)
        np.testing.assert_allclose(noise.mean(), 0, atol=0.01)
    np.testing.assert_allclose(draws.action_values[:, HORIZON - 1], 0.5, atol=1e-7)


def test_the_bonus_of_optimism_is_its_formula(key):
    """Q = r + <X, theta_hat> + scale R beta |X / R|, where beta takes delta / H."""
    mixture, *_ = first_world()
    agent = ucrl_vtr(mixture, failure=0.1, ridge=0.7, parameter_norm=0.9, bonus_scale=0.01)
    state = agent.init(key)
    ranges = HORIZON - 1 - np.arange(HORIZON)
    values = jnp.asarray([[1.5, 2.0, 1.0], [1.0, 2.0, 0.0], [0.5, 1.5, 0.2], [0.55, 1.0, 0.0], [0.0, 0.0, 0.0]])
    plan = agent.act(state, key)._replace(values=values)
    for _ in range(3):
        state = agent.update(state, key, plan, known_visits())
    step = 1
    met = np.asarray(mixture.kernels[:, 1, 2] @ values[step + 1])
    gram = 0.7 * np.eye(4) + 3 * np.outer(met, met) / ranges[step] ** 2
    estimate = np.linalg.solve(gram, 3 * met * float(values[step + 1, 2]) / ranges[step] ** 2)
    logs = np.linalg.slogdet(gram / 0.7)[1] + 2 * np.log(HORIZON / 0.1)
    beta = np.sqrt(logs) / 2 + np.sqrt(0.7) * 0.9
    found = agent.act(state, key)
    features = np.einsum("dsat,t->sad", np.asarray(mixture.kernels), np.asarray(found.values[step + 1]))
    scaled = features / ranges[step]
    spread = ranges[step] * np.sqrt(np.einsum("sai,ij,saj->sa", scaled, np.linalg.inv(gram), scaled))
    expected = np.asarray(mixture.rewards[step]) + np.clip(features @ estimate + 0.01 * beta * spread, 0, ranges[step])
    np.testing.assert_allclose(found.action_values[step], expected, rtol=1e-4)
    assert (features @ estimate + 0.01 * beta * spread).max() < ranges[step]


def test_tabular_hyperagent_backs_up_values_in_its_posterior_mean(key):
    """Q_1 = (beta mu_0 + sum (r + V_2(s'))) / (N + beta), without spread."""
    agent = tabular_hyperagent(horizon=2, states=2, actions=2, noise_scale=0.5, prior_scale=0.5, prior_mean=0.3)
    state = agent.init(key)
    for end, rewards in ((0, [0.5, 1.0]), (1, [0.5, 2.0]), (1, [0.5, 2.0])):
        met = Episode(jnp.asarray([0, end, 0]), jnp.asarray([1, 0]), jnp.asarray(rewards))
        state = agent.update(state, key, agent.act(state, key), met)
    found = agent.act(state._replace(perturbations=0 * state.perturbations), key)
    following = [(0.3 + 1) / 2, (0.3 + 4) / 3]  # beta is 1
    np.testing.assert_allclose(found.values[1], following, rtol=1e-6)
    expected = (0.3 + 3 * 0.5 + following[0] + 2 * following[1]) / (3 + 1)
    np.testing.assert_allclose(found.action_values[0, 0], [0.3, expected], rtol=1e-6)


def test_without_data_optimism_adds_its_bonus(key):
    mixture, *_ = first_world()
    plan = (agent := ucrl_vtr(mixture)).act(agent.init(key), key)
    # Nothing is known and widths are larger than the range: every value is the largest there is.
    np.testing.assert_allclose(plan.values[1], mixture.rewards[1, :, 0] + HORIZON - 2, rtol=1e-5)
    none = ucrl_vtr(mixture, bonus_scale=0.0)
    np.testing.assert_allclose(none.act(none.init(key), key).values[0], 0.0, atol=1e-6)


def test_a_gaussian_draw_has_the_moments_of_its_posterior(key):
    mixture, atoms, weights, _ = first_world()
    mean, covariance = moments(atoms, weights)
    prior = Gaussian(mean, covariance + 0.01 * jnp.eye(4)[None])
    posterior = gaussian_surrogate(mixture, prior)
    draws = jax.vmap(lambda k: posterior.sample(prior, k))(jax.random.split(key, 4000))
    np.testing.assert_allclose(draws.mean(0), posterior.mean(prior), atol=0.03)
    spread = jnp.einsum("dt,hde,et->ht", mixture.kernels[:, 0, 1], prior.covariance, mixture.kernels[:, 0, 1])
    np.testing.assert_allclose(draws[:, :, 0, 1].var(0), spread, atol=0.01)


def test_dirichlet_counts_what_was_met(key):
    posterior = dirichlet(jnp.full((2, 2, 1, 2), 0.5))
    met = Episode(jnp.asarray([0, 1, 1]), jnp.asarray([0, 0]), jnp.zeros(2))
    state = posterior.update(posterior.init(), met, jnp.zeros((3, 2)))
    np.testing.assert_allclose(posterior.mean(state)[0, 0, 0], [0.25, 0.75])
    np.testing.assert_allclose(posterior.mean(state)[1, 1, 0], [0.25, 0.75])
    np.testing.assert_allclose(posterior.mean(state)[0, 1, 0], [0.5, 0.5])
    np.testing.assert_allclose(posterior.sample(state, key).sum(-1), 1, rtol=1e-5)


def test_a_posterior_that_breaks_stays_broken_and_says_so(key):
    mixture, atoms, weights, mdp = first_world()
    broken = Gaussian(jnp.full((HORIZON, 4), 0.25), jnp.broadcast_to(-jnp.eye(4)[None], (HORIZON, 4, 4)))
    posterior = gaussian_surrogate(mixture, Gaussian(broken.mean, -broken.covariance))
    agent = psrl(posterior._replace(init=lambda: broken), mixture.rewards)
    with pytest.raises(ValueError, match="covariance 0 of 4 has smallest eigenvalue"):
        require_sound(play_episodes(agent, mdp, key, episodes=3).state)
    # The sure action leads to the medium state under every atom: what contradicts it has no explanation.
    exact = finite_support(mixture, atoms, weights)
    impossible = Episode(jnp.asarray([0, 1, 1, 1, 1]), jnp.zeros(HORIZON, int), jnp.zeros(HORIZON))
    state = exact.update(exact.init(), impossible, jnp.zeros((HORIZON + 1, 3)))
    with pytest.raises(ValueError, match="probability 0 under every atom"):
        require_sound(state)
    require_sound(FiniteSupport(jnp.zeros((2, 2))))


def test_priors_on_the_simplex(key):
    atoms = simplex_atoms(key, horizon=3, atoms=50, dimension=4)
    narrow = simplex_atoms(key, horizon=3, atoms=50, dimension=4, width=0.5)
    weights = jnp.full((3, 50), 1 / 50)
    np.testing.assert_allclose(4 * moments(narrow, weights)[1], moments(atoms, weights)[1], atol=1e-5)
    line = segment_atoms(key, horizon=3, atoms=50, dimension=4)
    for rows in (atoms, narrow, line):
        tabular.require_probabilities(rows=rows)
    ranks = np.linalg.matrix_rank(np.asarray(moments(line, weights)[1]), tol=1e-5)
    np.testing.assert_array_equal(ranks, 1)


def test_deep_sea_has_one_path_to_its_goal(key):
    mdp = deep_sea(key, size=5).mdp
    policies = jnp.asarray(list(itertools.product((0, 1), repeat=5)))
    right = deep_sea(key, size=5).right
    # A policy that moves right or left by step, whatever the state.
    follow = jnp.where(policies[:, :, None] == 1, right[None], 1 - right[None])
    values = jax.vmap(lambda policy: tabular.start_value(mdp, tabular.evaluate(mdp, policy)))(follow)
    expected = np.where((rights := np.asarray(policies).sum(1)) == 5, 0.99, -0.002 * rights)
    np.testing.assert_allclose(values, expected, atol=1e-6)


def test_hyperagent_crosses_a_sea_that_epsilon_greedy_does_not(key):
    size, episodes = 10, 90
    shape = {"horizon": size, "states": size, "actions": 2}
    agents = {
        "hyper": tabular_hyperagent(**shape, noise_scale=0.01, prior_scale=0.1),
        "epsilon": q_learning(**shape),
    }
    mdps = jax.vmap(lambda k: deep_sea(k, size=size).mdp)(jax.random.split(key, 4))
    late = {}
    for name, agent in agents.items():
        play = jax.jit(jax.vmap(lambda mdp, k, agent=agent: play_episodes(agent, mdp, k, episodes=episodes).regrets))
        late[name] = np.asarray(play(mdps, jax.random.split(key, 4)))[:, -5:]
    np.testing.assert_allclose(late["hyper"], 0, atol=1e-5)
    assert late["epsilon"].min() > 0.9


def test_q_learning_learns_backwards_within_an_episode(key):
    agent = q_learning(horizon=2, states=2, actions=2, epsilon=0.0)
    met = Episode(jnp.asarray([0, 1, 0]), jnp.asarray([1, 0]), jnp.asarray([0.5, 2.0]))
    table = agent.update(agent.init(key), key, agent.act(agent.init(key), key), met)
    assert float(table[1, 1, 0]) == 2.0
    assert float(table[0, 0, 1]) == 2.5
    assert int(agent.act(table, key).policy[0, 0]) == 1


def of(mixture, atoms):
    return finite_support(mixture, atoms, jnp.full(atoms.shape[:2], 1 / atoms.shape[1]))


@functools.cache
def mixture_of_two():
    return random_mixture(jax.random.key(1), states=2, actions=2, horizon=2, dimension=2)


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda m, a: finite_support(m, a[:, :, :1], jnp.ones((2, 3)) / 3), r"atoms has shape \(2, 3, 1\); it must be"),
        (lambda m, a: finite_support(m, a, jnp.ones((2, 2)) / 2), r"weights has shape \(2, 2\); it must be \(2, 3\)"),
        (lambda m, a: finite_support(m, a, jnp.ones((2, 3))), "weights has a row .number 0. with sum 3"),
        (lambda m, a: dirichlet(jnp.zeros((2, 2, 2, 2))), "concentration has the entry 0; all must be positive"),
        (lambda m, a: dirichlet(jnp.ones((2, 2, 2))), r"concentration has shape \(2, 2, 2\)"),
        (
            lambda m, a: gaussian_surrogate(m, Gaussian(jnp.zeros((2, 3)), jnp.zeros((2, 2, 2)))),
            r"prior.mean has shape \(2, 3\); it must be \(2, 2\)",
        ),
        (
            lambda m, a: gaussian_surrogate(m, Gaussian(jnp.zeros((2, 2)), jnp.zeros((2, 2, 2)))),
            "covariance 0 of 2 has smallest eigenvalue 0",
        ),
        (lambda m, a: ucrl_vtr(m, ridge=0.0), "ridge is 0.0; it must be a positive number"),
        (lambda m, a: ucrl_vtr(m, failure=1.0), "failure is 1.0; it must lie between 0 and 1"),
        (lambda m, a: ucrl_vtr(m, bonus_scale=-1.0), "bonus_scale is -1.0; it must be a number that is not negative"),
        (lambda m, a: ucrl_vtr(m, bonus_scale=float("inf")), "bonus_scale is inf"),
        (lambda m, a: ucrl_vtr(m._replace(rewards=m.rewards + 1)), r"rewards run from 1.* they must lie in \[0, 1\]"),
        (lambda m, a: rlsvi(-m.rewards, m.transitions(a[:, 0])), r"rewards run from -.* they must lie in \[0, 1\]"),
        (lambda m, a: psrl(of(m, a), 5 * m.rewards), r"rewards run from .* they must lie in \[0, 1\]"),
        (lambda m, a: psrl(of(m, a), m.rewards[:1]), r"rewards has shape \(1, 2, 2\); it must be \(2, 2, 2\)"),
        (lambda m, a: greedy_in_the_mean(of(m, a), m.rewards * jnp.nan), "rewards run from nan to nan"),
        (lambda m, a: of(m, 2 * a), "the mixture of atoms of step 1 has a row .* with sum 2"),
        (
            lambda m, a: of(m, jnp.asarray([3.0, -2.0])[None, None] + 0 * a),
            "the mixture of atoms of step 1 has a row .* smallest",
        ),
        (lambda m, a: dirichlet(jnp.full((2, 2, 2, 2), jnp.inf)), "concentration has the entry inf; all must be"),
        (lambda m, a: tabular.require_mdp(m._replace(rewards=m.rewards * jnp.inf)), "they must be finite numbers"),
        (
            lambda m, a: tabular_hyperagent(horizon=2, states=2, actions=2, prior_mean=float("nan")),
            "prior_mean is nan; it must be a finite number",
        ),
        *(
            (
                lambda m, a, shape=shape: play_episodes(
                    q_learning(horizon=shape[0], states=shape[1], actions=shape[2]),
                    m.mdp(a[:, 0]),
                    jax.random.key(0),
                    episodes=1,
                ),
                re.escape(f"agent plans for {shape} steps, states and actions; the MDP has (2, 2, 2)"),
            )
            for shape in ((3, 2, 2), (2, 1, 2), (2, 2, 3))
        ),
        (lambda m, a: rlsvi(m.rewards, m.transitions(a[:, 0]), noise=0.0), "noise is 0.0; it must be a positive"),
        (lambda m, a: rlsvi(m.rewards, jnp.ones((2, 2, 2, 2))), "prior_transitions has a row .* with sum 2"),
        (lambda m, a: rlsvi(m.rewards, jnp.ones((2, 2, 2, 3))), "prior_transitions has shape"),
        (
            lambda m, a: tabular_hyperagent(horizon=2, states=2, actions=2, noise_scale=0.0),
            "noise_scale is 0.0; it must be a positive number",
        ),
        (
            lambda m, a: tabular_hyperagent(horizon=2, states=2, actions=2, prior_scale=-1.0),
            "prior_scale is -1.0; it must be a positive number",
        ),
        (lambda m, a: tabular_hyperagent(horizon=2, states=2, actions=2, index_dimension=0), "index_dimension is 0"),
        (lambda m, a: q_learning(horizon=2, states=2, actions=0), "actions is 0; it must be at least 1"),
        (lambda m, a: q_learning(horizon=2, states=2, actions=2, epsilon=2.0), "epsilon is 2.0; it must lie in"),
        (lambda m, a: q_learning(horizon=2, states=2, actions=2, learning_rate=0.0), "learning_rate is 0.0"),
        (lambda m, a: tabular.require_mdp(m._replace(initial=jnp.ones(2))), "initial has a row .* with sum 2"),
        (lambda m, a: tabular.require_mdp(m._replace(rewards=jnp.ones((2, 3, 2)))), "rewards are for"),
        (lambda m, a: tabular.require_mdp(m._replace(kernels=m.kernels[:, :1])), "kernels leads from 1 states to 2"),
        (
            lambda m, a: play_episodes(ucrl_vtr(m), m.mdp(2 * a[:, 0]), jax.random.key(0), episodes=1),
            "transitions has a row .* with sum 2",
        ),
        (
            lambda m, a: play_episodes(ucrl_vtr(m), m.mdp(a[:, 0]), jax.random.key(0), episodes=0),
            "episodes is 0; it must be at least 1",
        ),
        (lambda m, a: deep_sea(jax.random.key(0), size=1), "size is 1; it must be at least 2"),
        (lambda m, a: risky_mixture(jax.random.key(0), actions=1), "actions is 1; it must be at least 2"),
        (lambda m, a: random_mixture(jax.random.key(0), states=0), "states is 0; it must be at least 1"),
        (
            lambda m, a: simplex_atoms(jax.random.key(0), horizon=1, atoms=1, dimension=2, width=0.0),
            "width is 0.0; it must be above 0",
        ),
        (lambda m, a: segment_atoms(jax.random.key(0), horizon=1, atoms=1, dimension=1), "dimension is 1"),
    ],
)
def test_a_mistake_is_answered_in_a_sentence(call, sentence):
    atoms = jnp.broadcast_to(jnp.asarray([[1.0, 0.0], [0.0, 1.0], [0.5, 0.5]])[None], (2, 3, 2))
    with pytest.raises(ValueError, match=sentence):
        call(mixture_of_two(), atoms)
