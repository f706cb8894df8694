"""One policy-gradient step on the logits, against the step itself, in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_llm.bounds import logit_dynamics
from jaxrl_llm.bounds.mismatch import gaussian_log_prob_variance


@pytest.fixture(scope="module", params=[2, 5, 40])
def case(request):
    rng = np.random.default_rng(request.param)
    p = rng.dirichlet(np.full(request.param, 0.4), 300) + 1e-12
    p = jnp.asarray(p / p.sum(1, keepdims=True))
    return p, jnp.asarray(rng.integers(0, request.param, 300))


def residual(p, action):
    return jax.nn.one_hot(action, p.shape[-1], dtype=p.dtype) - p


def test_norm_is_that_of_the_gradient_of_the_log_probability(case):
    p, action = case
    gradient = jax.vmap(jax.grad(lambda z, a: jax.nn.log_softmax(z)[a]))(jnp.log(p), action)
    np.testing.assert_allclose(gradient, residual(p, action), atol=1e-12)
    chosen, collision = jnp.take_along_axis(p, action[:, None], 1)[:, 0], jnp.sum(p * p, 1)
    norm = jnp.linalg.norm(gradient, axis=1)
    np.testing.assert_allclose(logit_dynamics.update_norm(chosen, collision), norm, atol=1e-9)
    np.testing.assert_allclose(logit_dynamics.update_norm(chosen, collision, step=-0.3), 0.3 * norm, atol=1e-9)
    np.testing.assert_allclose(gaussian_log_prob_variance(chosen, collision, scale=1.0), jnp.square(norm), atol=1e-12)
    wrong = jnp.sqrt(1 - 2 * chosen - collision + 2)  # a sign of C
    assert float(jnp.max(jnp.abs(wrong - norm))) > 0.1


def test_range_from_the_probability_alone(case):
    p, action = case
    vocabulary = p.shape[-1]
    chosen = jnp.take_along_axis(p, action[:, None], 1)[:, 0]
    norm = jnp.linalg.norm(residual(p, action), axis=1)
    low, high = logit_dynamics.update_norm_range(chosen, vocabulary=vocabulary)
    assert bool(jnp.all((low - 1e-12 <= norm) & (norm <= high + 1e-12)))
    for rest, end in (
        (jnp.full(vocabulary - 1, 0.3 / (vocabulary - 1)), 0),
        (jnp.zeros(vocabulary - 1).at[0].set(0.3), 1),
    ):
        q = jnp.concatenate([jnp.asarray([0.7]), rest])
        attained = jnp.linalg.norm(residual(q, jnp.asarray(0)))
        bounds = logit_dynamics.update_norm_range(jnp.asarray(0.7), vocabulary=vocabulary)
        np.testing.assert_allclose(attained, bounds[end], rtol=1e-12)


def test_expectation_over_the_sampled_action(case):
    p, _ = case
    collision = jnp.sum(p * p, 1)
    norms = jnp.stack(
        [jnp.linalg.norm(residual(p, jnp.full(p.shape[0], a)), axis=1) for a in range(p.shape[1])], axis=1
    )
    np.testing.assert_allclose(
        logit_dynamics.expected_squared_update_norm(collision), jnp.sum(p * norms**2, 1), atol=1e-12
    )
    low, high = logit_dynamics.expected_update_norm_range(collision)
    mean = jnp.sum(p * norms, 1)
    assert bool(jnp.all((low <= mean + 1e-12) & (mean <= high + 1e-12)))


def test_sharp_range_of_the_expected_norm(case):
    p, _ = case
    vocabulary = p.shape[-1]
    norms = jnp.stack([jnp.linalg.norm(residual(p, jnp.full(p.shape[0], a)), axis=1) for a in range(vocabulary)], 1)
    mean, collision = jnp.sum(p * norms, 1), jnp.sum(p * p, 1)
    low, high = logit_dynamics.expected_update_norm_range_sharp(collision, vocabulary=vocabulary)
    assert bool(jnp.all((low <= mean + 1e-12) & (mean <= high + 1e-12)))
    # sqrt(2) times the looser bound at least, and 1 % more is broken by the uniform policy, which attains both ends.
    assert bool(jnp.all(low >= 2**0.5 * logit_dynamics.expected_update_norm_range(collision)[0]))
    ends = logit_dynamics.expected_update_norm_range_sharp(jnp.asarray(1 / vocabulary), vocabulary=vocabulary)
    uniform = jnp.linalg.norm(residual(jnp.full(vocabulary, 1 / vocabulary), jnp.asarray(0)))
    np.testing.assert_allclose(ends, [uniform, uniform], rtol=1e-12)


def test_first_order_changes_of_log_probs_and_entropy(case):
    p, action = case
    p = 0.9 * p + 0.1 / p.shape[-1]
    step = 1e-6

    def moved(sign):
        z = jnp.log(p) + sign * step * residual(p, action)
        return jax.nn.log_softmax(z)

    def entropy(log_p):
        return -jnp.sum(jnp.exp(log_p) * log_p, axis=-1)

    np.testing.assert_allclose(
        logit_dynamics.log_prob_changes(p, action), (moved(1) - moved(-1)) / (2 * step), atol=1e-8
    )
    slope = (entropy(moved(1)) - entropy(moved(-1))) / (2 * step)
    np.testing.assert_allclose(logit_dynamics.entropy_change(p, action), slope, atol=1e-8)
    np.testing.assert_allclose(logit_dynamics.entropy_change(p, action, step=-2.0), -2.0 * slope, atol=1e-7)
    assert float(jnp.max(jnp.abs(slope))) > 0.05


def test_fixture_and_an_action_that_rises_with_another():
    p = jnp.asarray([0.7, 0.2, 0.1])
    collision = jnp.full(3, 0.54)
    np.testing.assert_allclose(
        logit_dynamics.update_norm(p, collision, step=0.1), [0.0374166, 0.1067708, 0.1157584], rtol=1e-6
    )
    np.testing.assert_allclose(logit_dynamics.expected_squared_update_norm(collision)[0], 0.46, rtol=1e-12)
    changes = logit_dynamics.log_prob_changes(p, jnp.asarray(1), step=1.0)
    # Reinforcing action 1 raises action 2 as well: p_2 = 0.1 < C - p_1 = 0.34.
    np.testing.assert_allclose(changes, [0.54 - 0.9, 1 - 0.4 + 0.54, 0.54 - 0.3], rtol=1e-12)


def test_shannon_entropy_does_not_order_the_gradient_but_renyi_does():
    # (errata F4.1)
    one, two = np.array([0.5, 0.5]), np.array([0.7] + [0.05] * 6)
    shannon = [-(p * np.log(p)).sum() for p in (one, two)]
    norms = [float(logit_dynamics.expected_squared_update_norm(jnp.asarray((p**2).sum()))) for p in (one, two)]
    np.testing.assert_allclose(shannon, [0.693, 1.148], atol=1e-3)
    assert shannon[1] > shannon[0]
    assert norms[1] < norms[0]


def test_bad_input_is_a_sentence():
    with pytest.raises(ValueError, match="vocabulary is 1; it must be at least 2"):
        logit_dynamics.update_norm_range(jnp.asarray(0.5), vocabulary=1)


def test_near_certainty_in_float32_norms_and_variances_keep_their_sign_and_scale():
    """1 - 2 p + C loses its digits near p = 1, and came out negative."""
    z = np.linspace(3, 16, 200)[:, None] * (np.arange(50) == 0)
    p = np.exp(z - np.log(np.exp(z).sum(1, keepdims=True)))
    chosen, collision = (jnp.asarray(x, jnp.float32) for x in (p[:, 0], (p * p).sum(1)))
    truth = (1 - p[:, 0]) ** 2 + (p[:, 1:] ** 2).sum(1)
    assert np.min(np.float32(1) - 2 * np.asarray(chosen) + np.asarray(collision)) < 0
    for value in (
        logit_dynamics.squared_update_norm(chosen, collision),
        gaussian_log_prob_variance(chosen, collision, scale=1.0),
    ):
        assert np.all(value[chosen < 1] > 0)
        confident = np.asarray(chosen) < 0.999
        np.testing.assert_allclose(value[confident], truth[confident], rtol=0.3)
        assert np.all(value <= 2 * jnp.square(1 - chosen))
    over = jnp.float32(1.0000001)
    assert logit_dynamics.expected_squared_update_norm(over) == 0
    for low_high in (
        logit_dynamics.expected_update_norm_range(over),
        logit_dynamics.expected_update_norm_range_sharp(over, vocabulary=5),
    ):
        np.testing.assert_array_equal(low_high, [0, 0])


@pytest.mark.parametrize("action", [-1, -100, 5, 6])
def test_an_action_that_does_not_exist_is_refused_and_nan_inside_jit(action):
    p, actions = jnp.full((1, 5), 0.2), jnp.array([action])
    for change in (logit_dynamics.log_prob_changes, logit_dynamics.entropy_change):
        with pytest.raises(ValueError, match=f"targets holds {action}"):
            change(p, actions)
        assert np.isnan(jax.jit(change)(p, actions)).all()
