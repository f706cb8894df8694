"""Value models, the replay buffer and neural agents: what they compute, store and choose."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxrl_llm.environments import LinearBandit
from jaxrl_llm.exploration import Learning
from jaxrl_llm.exploration import as_agent
from jaxrl_llm.exploration import count_parameters
from jaxrl_llm.exploration import empty_replay
from jaxrl_llm.exploration import ensemble
from jaxrl_llm.exploration import ensemble_plus
from jaxrl_llm.exploration import ensemble_plus_plus
from jaxrl_llm.exploration import epinet
from jaxrl_llm.exploration import given_features
from jaxrl_llm.exploration import hypermodel
from jaxrl_llm.exploration import indices
from jaxrl_llm.exploration import langevin_sampling
from jaxrl_llm.exploration import mlp
from jaxrl_llm.exploration import neural_greedy
from jaxrl_llm.exploration import neural_hyperagent
from jaxrl_llm.exploration import play
from jaxrl_llm.exploration import point
from jaxrl_llm.exploration.langevin import langevin_noise
from jaxrl_llm.exploration.replay import Data
from jaxrl_llm.exploration.replay import add
from jaxrl_llm.exploration.replay import sample

D, M, OUT, B, U = 3, 4, 2, 5, 6
FEATURES = mlp(D, (8,))
PRIOR_FEATURES = mlp(D, (7,))
LEARNING = Learning(optax.adam(1e-2), batch=16, capacity=64, start=4)
HYPERMODEL = hypermodel(FEATURES, index_dimension=M, prior_features=PRIOR_FEATURES, outputs=OUT)
MODELS = {
    "hypermodel": HYPERMODEL,
    "held": hypermodel(FEATURES, index_dimension=M, outputs=OUT, first_mean="zeros"),
    "ensemble": ensemble(FEATURES, members=M, prior_features=PRIOR_FEATURES, outputs=OUT),
    "epinet": epinet(FEATURES, index_dimension=M, outputs=OUT),
    "point": point(FEATURES, outputs=OUT),
}


@pytest.fixture
def optax_promotes():
    """Optimizers mix dtypes on their own account; what surrounds them is held to strict promotion by other tests."""
    with jax.numpy_dtype_promotion("standard"):
        yield


def inputs_and_indices(key, model):
    input_key, index_key = jax.random.split(key)
    return jax.random.normal(input_key, (B, D)), jax.random.normal(index_key, (B, U, model.index_dimension))


@pytest.mark.parametrize("name", MODELS)
def test_values_have_an_index_and_an_output_axis_and_inputs_do_not_mix(name, key):
    model = MODELS[name]
    trained, prior = model.init(key)
    inputs, over = inputs_and_indices(key, model)
    values = jax.jit(model.values)
    every = values(trained, prior, inputs, over)
    assert every.shape == (B, U, OUT)
    one = values(trained, prior, inputs[2:3], over[2:3, 1:2])
    np.testing.assert_allclose(every[2, 1], one[0, 0], rtol=1e-5, atol=1e-6)
    shared = values(trained, prior, inputs, over[:1])
    np.testing.assert_allclose(shared[0], every[0], rtol=1e-5, atol=1e-6)
    assert count_parameters(model) == sum(leaf.size for leaf in jax.tree.leaves(trained))


def test_a_hypermodel_is_its_formula(key):
    model = hypermodel(
        FEATURES, index_dimension=M, prior_features=PRIOR_FEATURES, outputs=OUT, posterior_scale=0.3, prior_scale=2.0
    )
    trained, prior = model.init(key)
    (parameters, layer), (prior_parameters, prior_layer) = trained, prior
    inputs, over = inputs_and_indices(key, model)
    phi, phi0 = FEATURES.apply(parameters, inputs), PRIOR_FEATURES.apply(prior_parameters, inputs)
    for b, u, a in ((0, 1, 0), (4, 5, 1)):
        learnt = phi[b] @ (layer.factor[a] @ over[b, u] + layer.mean[a])
        fixed = phi0[b] @ (prior_layer.factor[a] @ over[b, u] + prior_layer.mean[a])
        value = model.values(trained, prior, inputs, over)[b, u, a]
        np.testing.assert_allclose(value, 0.3 * learnt + 2.0 * fixed, rtol=1e-5)
    np.testing.assert_allclose(jnp.linalg.norm(prior_layer.factor, axis=-1), 1, rtol=1e-5)
    np.testing.assert_allclose(jnp.linalg.norm(prior_layer.mean), 1, rtol=1e-5)
    mean, factor = model.parts(trained, prior, inputs)
    linear = mean[:, None] + jnp.einsum("bom,bum->buo", factor, over)
    np.testing.assert_allclose(model.values(trained, prior, inputs, over), linear, rtol=1e-4, atol=1e-5)


def test_index_one_hot_picks_a_member_of_an_ensemble(key):
    model = MODELS["ensemble"]
    (parameters, layer), (prior_parameters, prior_layer) = model.init(key)
    inputs = jax.random.normal(key, (B, D))
    every = model.values((parameters, layer), (prior_parameters, prior_layer), inputs, jnp.eye(M)[None])
    for member in range(M):
        own, fixed = (jax.tree.map(lambda leaf, m=member: leaf[m], tree) for tree in (parameters, prior_parameters))
        expected = FEATURES.apply(own, inputs) @ layer[member]
        expected += PRIOR_FEATURES.apply(fixed, inputs) @ prior_layer[member]
        np.testing.assert_allclose(every[:, member], expected, rtol=1e-5, atol=1e-6)


def gradient_norm(tree):
    return sum(float(jnp.sum(jnp.abs(leaf))) for leaf in jax.tree.leaves(tree))


@pytest.mark.parametrize("name", ["held", "epinet"])
def test_what_is_held_constant_does_not_train_the_features(name, key):
    """The prior on held features, and the epinet: with the learnt mean at 0 nothing is left to train the features."""
    model = MODELS[name]
    trained, prior = model.init(key)
    inputs, over = inputs_and_indices(key, model)
    zeroed = jax.tree.map(jnp.zeros_like, trained[1])
    trained = (trained[0], zeroed, *trained[2:])
    gradient = jax.grad(lambda t: jnp.sum(model.values(t, prior, inputs, over)))(trained)
    assert gradient_norm(gradient[0]) == 0
    assert gradient_norm(gradient[1]) > 0
    held = jax.grad(lambda t: jnp.sum(HYPERMODEL.held_parts(t, fixed, inputs)[1]))
    free = jax.grad(lambda t: jnp.sum(HYPERMODEL.parts(t, fixed, inputs)[1]))
    start, fixed = HYPERMODEL.init(key)
    assert gradient_norm(held(start)[0]) == 0 < gradient_norm(free(start)[0])


def test_the_buffer_keeps_the_newest_data_and_samples_all_of_them(key):
    replay = empty_replay(3, input_shape=(2,), index_dimension=1)
    for number in range(5):
        row = Data(jnp.full(2, float(number)), jnp.asarray(number % 2), jnp.asarray(float(number)), jnp.ones(1))
        replay = add(replay, row)
        drawn = sample(replay, key, 200)
        assert set(np.asarray(drawn.rewards)) == set(range(max(0, number - 2), number + 1))
        np.testing.assert_array_equal(drawn.inputs[:, 0], drawn.rewards)
        np.testing.assert_array_equal(drawn.outputs, drawn.rewards % 2)
    assert int(replay.size) == replay.capacity == 3
    assert int(replay.added) == 5


def _head(outputs):
    return hypermodel(FEATURES, index_dimension=M, prior_features=PRIOR_FEATURES, outputs=outputs)


_MAKERS = {
    "hyperagent": lambda o: neural_hyperagent(_head(o), LEARNING),
    "fresh_draws": lambda o: neural_hyperagent(_head(o), LEARNING, update=indices.SPHERE, draws=3),
    "ensemble_plus_plus": lambda o: ensemble_plus_plus(_head(o), LEARNING),
    "ensemble_plus": lambda o: ensemble_plus(
        ensemble(FEATURES, members=M, prior_features=PRIOR_FEATURES, outputs=o), LEARNING
    ),
    "epinet": lambda o: neural_hyperagent(
        epinet(FEATURES, index_dimension=M, outputs=o),
        LEARNING,
        reference=indices.GAUSSIAN,
        update=indices.GAUSSIAN,
        draws=3,
    ),
    "langevin": lambda o: langevin_sampling(
        point(FEATURES, outputs=o), LEARNING._replace(optimizer=optax.identity()), step_size=0.05, temperature=1e-4
    ),
    "greedy": lambda o: neural_greedy(point(FEATURES, outputs=o), LEARNING),
    "epsilon": lambda o: neural_greedy(point(FEATURES, outputs=o), LEARNING, epsilon=0.3),
}


@pytest.mark.usefixtures("optax_promotes")
def test_each_member_of_an_ensemble_sees_the_full_noise(key):
    """What an update index makes of the stored perturbation has variance 1, for an ensemble as for a hypermodel."""
    for name, law in (("ensemble_plus", indices.ONE_HOT), ("hyperagent", indices.COORDINATE)):
        agent = _MAKERS[name](1)

        def stored(update_key, agent=agent):
            state = agent.update(agent.init(key), update_key, jnp.ones(D), 0, 0.5)
            return state.replay.data.perturbations[0]

        z = jax.vmap(stored)(jax.random.split(key, 4000))
        np.testing.assert_allclose(jnp.var(z @ law.update_set(M).T, axis=0), 1, atol=0.1)


NO_INDEX = ("langevin", "greedy", "epsilon")


@pytest.mark.parametrize("name", _MAKERS)
@pytest.mark.usefixtures("optax_promotes")
def test_agents_learn_only_when_due_and_never_their_prior(name, key):
    agent = _MAKERS[name](OUT)
    update = jax.jit(agent.update)
    start = state = agent.init(key)
    choice = int(jax.jit(agent.act)(state, key, jnp.ones((B, D))))
    assert 0 <= choice < B * OUT
    for number in range(4):
        before = state
        state = update(state, jax.random.fold_in(key, number), jnp.ones(D), number % OUT, 0.5)
        same = jax.tree.map(lambda a, b: bool(jnp.all(a == b)), state.trained, before.trained)
        # LEARNING.start is 4: the first three rounds only fill the buffer.
        assert all(jax.tree.leaves(same)) == (number < 3)
    assert jax.tree.all(jax.tree.map(lambda a, b: bool(jnp.all(a == b)), state.prior, start.prior))
    assert int(state.replay.added) == 4
    np.testing.assert_array_equal(state.replay.data.outputs[:4], [0, 1, 0, 1])
    assert len(np.unique(state.replay.data.perturbations[:4], axis=0)) == (1 if name in NO_INDEX else 4)


def bandit(key):
    """Ten actions; the two with a high mean are not near the others, and rewards are nearly free of noise."""
    features = jax.random.normal(key, (10, D))
    return LinearBandit(
        features / jnp.linalg.norm(features, axis=1, keepdims=True), jnp.asarray([1.0, -0.5, 0.3]), 0.05
    )


@pytest.mark.usefixtures("optax_promotes")
def test_hypermodels_find_the_best_action_where_greedy_stays_with_a_good_one():
    def regret(name):
        agent = as_agent(_MAKERS[name](1))
        keys = jax.random.split(jax.random.key(1), 8)
        return np.asarray(jax.jit(jax.vmap(lambda k: play(agent, bandit(k), k, rounds=160).regrets))(keys))

    regrets = {name: regret(name) for name in ("hyperagent", "greedy")}
    last = {name: value[:, -40:].mean() for name, value in regrets.items()}
    assert last["hyperagent"] < 0.1
    assert last["greedy"] > last["hyperagent"] + 0.1


def test_epsilon_is_how_often_a_choice_is_random(key):
    agent = neural_greedy(point(FEATURES, outputs=OUT), LEARNING, epsilon=0.3)
    state, inputs = agent.init(key), jax.random.normal(key, (B, D))
    chosen = np.bincount(
        jax.vmap(lambda k: agent.act(state, k, inputs))(jax.random.split(key, 4000)), minlength=B * OUT
    )
    assert abs(chosen.max() / 4000 - (0.7 + 0.3 / (B * OUT))) < 0.03
    assert np.sort(chosen)[:-1].min() > 4000 * 0.3 / (B * OUT) / 2


def test_langevin_steps_have_the_stationary_law_they_should(key):
    """J = (theta - 1)^2 of count data, temperature tau: theta ~ N(1, tau / (2 count)) up to the step size."""
    count, temperature = jnp.asarray(10.0), 0.5
    noisy = langevin_noise(optax.identity(), step_size=0.02, temperature=temperature)

    def step(theta, step_key):
        change, _ = noisy.update(2 * (theta - 1), noisy.init(theta), theta, key=step_key, count=count)
        return theta + change, theta

    _, walk = jax.lax.scan(step, jnp.zeros(4000), jax.random.split(key, 400))
    np.testing.assert_allclose(walk[-1].mean(), 1, atol=0.01)
    np.testing.assert_allclose(walk[-1].var(), temperature / (2 * 10), rtol=0.1)


@pytest.mark.usefixtures("optax_promotes")
@pytest.mark.parametrize("optimizer", [optax.adam(1e-2), optax.sgd(1e-2)], ids=["adam", "sgd"])
def test_langevin_refuses_an_optimizer_that_would_climb(optimizer, key):
    agent = langevin_sampling(point(FEATURES), LEARNING._replace(optimizer=optimizer), step_size=0.1, temperature=1e-3)
    with pytest.raises(ValueError, match="inner turns gradients around, as a whole optimizer does"):
        jax.jit(jax.vmap(agent.init))(jax.random.split(key, 2))


@pytest.mark.usefixtures("optax_promotes")
def test_langevin_takes_a_preconditioner(key):
    agent = langevin_sampling(
        point(FEATURES), LEARNING._replace(optimizer=optax.scale_by_rms()), step_size=0.1, temperature=1e-3
    )
    states = jax.jit(jax.vmap(agent.init))(jax.random.split(key, 2))
    assert jax.tree.leaves(states.optimizer)[0].shape[0] == 2


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda: hypermodel(FEATURES, index_dimension=0), "index_dimension is 0; it must be at least 1"),
        (lambda: hypermodel(FEATURES, index_dimension=2, prior_scale=0.0), "prior_scale is 0.0; it must be a positive"),
        (lambda: epinet(FEATURES, index_dimension=2, prior_scale=-1.0), "prior_scale is -1.0"),
        (lambda: ensemble(FEATURES, members=0, prior_features=FEATURES), "members is 0; it must be at least 1"),
        (
            lambda: ensemble(FEATURES, members=2, prior_features=mlp(D + 1)),
            r"prior_features take inputs of shape \(4,\)",
        ),
        (
            lambda: neural_hyperagent(point(FEATURES), LEARNING),
            "index_dimension of the model is 0; it must be",
        ),
        (
            lambda: neural_greedy(MODELS["ensemble"], LEARNING),
            "model has index_dimension 4; this agent needs",
        ),
        (
            lambda: hypermodel(FEATURES, index_dimension=2, prior_features=mlp(D + 1)),
            r"prior_features take inputs of shape \(4,\), features of \(3,\)",
        ),
        (lambda: neural_greedy(point(FEATURES), LEARNING._replace(noise_scale=0.0)), "noise_scale is 0.0"),
        (lambda: neural_greedy(point(FEATURES), LEARNING._replace(batch=0)), "batch is 0; it must be at least 1"),
        (lambda: neural_greedy(point(FEATURES), LEARNING, epsilon=1.5), r"epsilon is 1.5; it must be in \[0, 1\]"),
        (lambda: neural_greedy(point(FEATURES), LEARNING._replace(weight_decay=-1.0)), "weight_decay is -1.0"),
        (
            lambda: langevin_sampling(
                point(FEATURES), LEARNING._replace(optimizer=optax.identity()), step_size=0.1, temperature=0.0
            ),
            "temperature is 0.0; it must be a positive",
        ),
        (lambda: ensemble_plus_plus(MODELS["epinet"], LEARNING), "model has no held_parts"),
        (lambda: as_agent(_MAKERS["greedy"](2)), "agent has 2 outputs"),
        (lambda: empty_replay(0, input_shape=(1,), index_dimension=1), "capacity is 0"),
        (lambda: mlp(3, ()), r"len\(hidden\) is 0"),
        (
            lambda: given_features(3).apply((), jnp.ones((2, 4))),
            r"inputs have shape \(4,\) each; the features were made for \(3,\)",
        ),
        (
            lambda: HYPERMODEL.values(*HYPERMODEL.init(jax.random.key(0)), jnp.ones((1, D)), jnp.ones((1, 1, M + 1))),
            "indices has width 5",
        ),
    ],
)
def test_a_mistake_is_answered_in_a_sentence(call, sentence):
    with pytest.raises(ValueError, match=sentence):
        call()
