"""Linear agents: what they choose, and how their regrets are ordered."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_llm.environments import LinearBandit
from jaxrl_llm.environments import box_bandit
from jaxrl_llm.exploration import Gaussian
from jaxrl_llm.exploration import Hypermodel
from jaxrl_llm.exploration import PosteriorError
from jaxrl_llm.exploration import ensemble_sampling
from jaxrl_llm.exploration import greedy
from jaxrl_llm.exploration import hyperagent
from jaxrl_llm.exploration import lin_ucb
from jaxrl_llm.exploration import play
from jaxrl_llm.exploration import require_positive_definite
from jaxrl_llm.exploration import require_sound
from jaxrl_llm.exploration import thompson_sampling

PRIOR = 10**0.5
FEATURES = jnp.asarray([[1.0, 0.0], [0.8, 0.6], [0.0, 1.0], [-1.0, 0.2]])
STATE = Gaussian(jnp.asarray([0.3, 0.2]), jnp.asarray([[0.4, 0.1], [0.1, 2.0]]))


@functools.cache
def runs(name, *, seeds=100, rounds=300):
    agents = {
        "thompson": thompson_sampling(4, prior_scale=PRIOR),
        "greedy": greedy(4, prior_scale=PRIOR),
        "hyper_2": hyperagent(4, index_dimension=2, prior_scale=PRIOR),
        "hyper_16": hyperagent(4, index_dimension=16, prior_scale=PRIOR),
        "ensemble_16": ensemble_sampling(4, members=16, prior_scale=PRIOR),
    }

    def one(key):
        bandit_key, play_key = jax.random.split(key)
        bandit = box_bandit(bandit_key, dimension=4, actions=20, prior_scale=PRIOR)
        return play(agents[name], bandit, play_key, rounds=rounds), bandit

    return jax.jit(jax.vmap(one))(jax.random.split(jax.random.key(3), seeds))


def test_greedy_and_ucb_choose_by_their_formulas():
    mean = np.asarray(FEATURES) @ np.asarray(STATE.mean)
    assert int(greedy(2).act(STATE, None, FEATURES)) == mean.argmax()
    spread = np.sqrt(np.einsum("xi,ij,xj->x", FEATURES, STATE.covariance, FEATURES))
    for width in (0.1, 0.3, 1.0):
        assert int(lin_ucb(2, width=width).act(STATE, None, FEATURES)) == (mean + width * spread).argmax()
    assert mean.argmax() != (mean + spread).argmax()


def test_thompson_sampling_draws_from_the_posterior(key):
    """Arm frequencies against those of parameters drawn by another route, an eigendecomposition."""
    agent = thompson_sampling(2)
    normal, _ = agent.draw(key, 20_000)
    chosen = np.bincount(jax.vmap(lambda n: agent.act(STATE, n, FEATURES))(normal), minlength=4) / 20_000
    values, vectors = np.linalg.eigh(STATE.covariance)
    other = np.random.default_rng(0).normal(size=(20_000, 2)) * np.sqrt(values) @ vectors.T + np.asarray(STATE.mean)
    expected = np.bincount((other @ np.asarray(FEATURES).T).argmax(1), minlength=4) / 20_000
    np.testing.assert_allclose(chosen, expected, atol=0.02)


def test_a_large_hypermodel_chooses_as_thompson_sampling_does(key):
    """M -> infinity: with A A^T = Sigma, arm frequencies are those of exact Thompson sampling."""
    exact, hyper = thompson_sampling(2), hyperagent(2, index_dimension=64)
    state = Hypermodel(STATE, hyper.init(key).factor)
    left, _, right = np.linalg.svd(np.asarray(state.factor), full_matrices=False)
    state = state._replace(factor=jnp.asarray(np.linalg.cholesky(STATE.covariance) @ left @ right, jnp.float32))
    frequencies = []
    for agent, at in ((exact, STATE), (hyper, state)):
        drawn, _ = agent.draw(key, 20_000)
        chosen = jax.vmap(lambda n, agent=agent, at=at: agent.act(at, n, FEATURES))(drawn)
        frequencies.append(np.bincount(chosen, minlength=4) / 20_000)
    np.testing.assert_allclose(frequencies[0], frequencies[1], atol=0.02)


def test_chi_square_tells_a_small_index_from_thompson_sampling_and_a_large_one_not(key):
    """Two samples of actions after the same data, four arms: 16.3 is exceeded once in 1000 by equal laws."""
    count, data_key = 3000, jax.random.fold_in(key, 1)
    rows = jax.random.normal(data_key, (6, 2))

    def frequencies(agent):
        drawn, stored = agent.draw(jax.random.fold_in(key, 2), count)
        state = agent.init(key)
        for number, row in enumerate(rows):
            kept = None if stored is None else stored[number]
            state = agent.update(state, kept, row, jnp.asarray(0.1))
        act = jax.jit(jax.vmap(lambda one: agent.act(state, one, FEATURES)))
        return np.bincount(act(drawn), minlength=4) + 0.5

    def statistic(index_dimension):
        hyper = frequencies(hyperagent(2, index_dimension=index_dimension))
        return np.sum(np.square(hyper - exact) / (hyper + exact))

    exact = frequencies(thompson_sampling(2))
    assert statistic(4096) < 16.3
    assert statistic(2) > 100


def test_inflation_widens_what_is_drawn():
    factor = jnp.asarray([[0.0, 0.0], [1.0, 0.0]])
    state, index = Hypermodel(STATE, factor), jnp.asarray([1.0, 0.0])
    for inflation in (0.1, 1.0):
        values = np.asarray(FEATURES) @ (np.asarray(STATE.mean) + inflation * np.array([0.0, 1.0]))
        agent = hyperagent(2, index_dimension=2, inflation=inflation)
        assert int(agent.act(state, index, FEATURES)) == values.argmax()


def test_regret_is_exact():
    played, bandit = runs("thompson")
    means = np.einsum("sxd,sd->sx", bandit.features, bandit.parameter)
    chosen = np.take_along_axis(means, np.asarray(played.actions), axis=1)
    np.testing.assert_allclose(played.regrets, means.max(1, keepdims=True) - chosen, atol=1e-5)
    assert played.regrets.min() == 0


def test_orderings_of_the_regrets():
    total = {name: np.asarray(runs(name)[0].regrets).sum(1) for name in ("thompson", "greedy", "hyper_2", "hyper_16")}
    mean = {name: value.mean() for name, value in total.items()}
    error = {name: value.std() / len(value) ** 0.5 for name, value in total.items()}
    assert mean["greedy"] > 3 * mean["thompson"]
    assert mean["hyper_2"] > mean["hyper_16"]
    assert abs(mean["hyper_16"] - mean["thompson"]) < 4 * (error["hyper_16"] + error["thompson"])


def test_an_ensemble_beats_greedy():
    ensemble, other = (np.asarray(runs(name)[0].regrets).sum(1).mean() for name in ("ensemble_16", "greedy"))
    assert ensemble < other / 2


def test_regret_of_the_last_rounds_is_small_and_the_posterior_stays_sound():
    played, bandit = runs("hyper_16")
    assert played.regrets[:, -50:].mean() < 0.1 * played.regrets[:, :20].mean()
    require_positive_definite(played.state.posterior.covariance)
    # The posterior holds the truth: Mahalanobis distances have mean d.
    gap = np.asarray(played.state.posterior.mean - bandit.parameter, np.float64)
    distance = np.einsum("si,sij,sj->s", gap, np.linalg.inv(played.state.posterior.covariance), gap)
    assert 2.5 < distance.mean() < 6


def test_vmapped_seeds_are_the_seeds_one_by_one():
    agent, bandit = hyperagent(2, index_dimension=3), LinearBandit(FEATURES, jnp.asarray([0.5, -1.0]))
    keys = jax.random.split(jax.random.key(5), 3)
    one = jax.jit(lambda key: play(agent, bandit, key, rounds=20).actions)
    np.testing.assert_array_equal(jax.jit(jax.vmap(one))(keys), [one(key) for key in keys])


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda: thompson_sampling(2, prior_scale=0.0), "prior_scale is 0.0; it must be a positive number"),
        (lambda: greedy(2, noise_scale=-1.0), "noise_scale is -1.0; it must be a positive number"),
        (lambda: thompson_sampling(2, prior_scale=float("nan")), "prior_scale is nan"),
        (lambda: hyperagent(2, index_dimension=0), "index_dimension is 0; it must be at least 1"),
        (lambda: ensemble_sampling(2, members=0), "index_dimension is 0"),
        (lambda: lin_ucb(2, width=-1.0), "width is -1.0"),
        (lambda: greedy(0), "dimension is 0; it must be at least 1"),
        (
            lambda: play(greedy(3), LinearBandit(FEATURES, jnp.ones(2)), jax.random.key(0), rounds=3),
            "features has width 2; the agent was made for dimension 3",
        ),
        (
            lambda: play(greedy(2), LinearBandit(FEATURES, jnp.ones(2)), jax.random.key(0), rounds=0),
            "rounds is 0; it must be at least 1",
        ),
        (lambda: box_bandit(jax.random.key(0), dimension=2, actions=0), "actions is 0"),
        (lambda: box_bandit(jax.random.key(0), dimension=2, actions=2, noise_scale=0.0), "noise_scale is 0.0"),
        (
            lambda: require_positive_definite(jnp.stack([jnp.eye(2), jnp.diag(jnp.asarray([1.0, -0.5]))])),
            "covariance 1 of 2 has smallest eigenvalue -0.5",
        ),
        (lambda: require_positive_definite(jnp.full((2, 2), jnp.nan)), "smallest eigenvalue nan"),
    ],
)
def test_a_mistake_is_answered_in_a_sentence(call, sentence):
    with pytest.raises(ValueError, match=sentence):
        call()


def test_definiteness_is_not_checked_under_jit():
    with pytest.raises(TypeError, match="covariance is a tracer"):
        jax.jit(require_positive_definite)(jnp.eye(2))


def broken(agent):
    """The agent, but its prior covariance has an eigenvalue below 0."""

    def init(key):
        state = agent.init(key)
        posterior = Gaussian(jnp.zeros(2), jnp.diag(jnp.asarray([1.0, -0.5])))
        return state._replace(posterior=posterior) if isinstance(state, Hypermodel) else posterior

    return agent._replace(init=init)


@pytest.mark.parametrize("agent", [thompson_sampling(2), hyperagent(2, index_dimension=3)])
def test_a_posterior_that_is_not_positive_definite_is_said(agent, key):
    bandit = LinearBandit(FEATURES, jnp.ones(2))
    with pytest.raises(PosteriorError, match="covariance 0 of 1 has smallest eigenvalue"):
        play(broken(agent), bandit, key, rounds=3)
    with pytest.raises(PosteriorError, match="covariance 0 of 1 has smallest eigenvalue"):
        require_sound(jax.jit(lambda k: play(broken(agent), bandit, k, rounds=3))(key).state)
    require_sound(play(agent, bandit, key, rounds=3).state)
