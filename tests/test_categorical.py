"""Statistics from logits against NumPy sums, at the edges where probabilities vanish, and against the kernels."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_llm import categorical

V = 7


@pytest.fixture(params=[0.1, 1.0, 20.0])
def logits(request, key):
    one, two = jax.random.split(key)
    return request.param * jax.random.normal(one, (5, V)), request.param * jax.random.normal(two, (5, V))


def softmax64(z):
    z = np.asarray(z, np.float64)
    p = np.exp(z - z.max(-1, keepdims=True))
    return p / p.sum(-1, keepdims=True)


EXPECTED = {
    "kl": lambda p, q: (p * np.log(p / q)).sum(-1),
    "total_variation": lambda p, q: np.abs(p - q).sum(-1) / 2,
    "chi_square": lambda p, q: (p**2 / q).sum(-1) - 1,
}
ALONE = {
    "entropy": lambda p: -(p * np.log(p)).sum(-1),
    "collision": lambda p: (p**2).sum(-1),
    "max_log_prob": lambda p: np.log(p.max(-1)),
}


@pytest.mark.parametrize("name", EXPECTED)
def test_two_distributions(logits, name):
    value = getattr(categorical, name)(*logits)
    expected = EXPECTED[name](softmax64(logits[0]), softmax64(logits[1]))
    np.testing.assert_allclose(value, expected, rtol=2e-4, atol=1e-7)
    if name != "total_variation":  # a divergence the other way round is another number
        swapped = getattr(categorical, name)(*logits[::-1])
        assert np.abs(np.asarray(swapped) - expected).max() > 1e-3 * np.abs(expected).max()


def plain_kl(z, w):
    log_p, log_q = categorical.log_probs(z), categorical.log_probs(w)
    return jnp.sum(jnp.exp(log_p) * (log_p - log_q), axis=-1)


@pytest.mark.parametrize("scale", [1.5e-3, 1e-2, 1.0])
def test_a_small_kl_keeps_its_digits(scale, key):
    """At 1e-6 nats the plain sum of p log(p / q) in float32 is wrong by per cents, this one by its last digits."""
    keys = jax.random.split(key)
    z = 3 * jax.random.normal(keys[0], (64, 1000))
    w = z + scale * jax.random.normal(keys[1], z.shape)
    p, q = softmax64(z), softmax64(w)
    expected = (p * np.log(p / q)).sum(-1)
    if scale == 1.5e-3:
        assert 3e-7 < np.median(expected) < 3e-6
        assert np.abs(plain_kl(z, w) / expected - 1).max() > 0.03
    np.testing.assert_allclose(categorical.kl(z, w), expected, rtol=2e-3)
    gradient = jax.grad(lambda z: categorical.kl(z, w).sum())(z)
    of_ref = jax.grad(lambda w: categorical.kl(z, w).sum())(w)
    np.testing.assert_allclose(gradient, p * (np.log(p / q) - expected[:, None]), atol=1e-3 * scale)
    np.testing.assert_allclose(of_ref, q - p, atol=1e-3 * scale)


def test_a_kl_of_distributions_far_apart_does_not_overflow():
    """p falls below the smallest float where q is large, and the other way round."""
    z, w = jnp.array([0.0, -300.0, -1.0]), jnp.array([-300.0, 0.0, -1.0])
    # Both have the normaliser 1 + 1/e, so that only the first two entries have a log-ratio, 300 and -300.
    np.testing.assert_allclose(categorical.kl(z, w), 300 / (1 + np.exp(-1.0)), rtol=1e-5)
    for gradient in jax.grad(categorical.kl, (0, 1))(z, w):
        assert np.isfinite(gradient).all()


@pytest.mark.parametrize("name", ALONE)
def test_one_distribution(logits, name):
    np.testing.assert_allclose(
        getattr(categorical, name)(logits[0]), ALONE[name](softmax64(logits[0])), rtol=1e-4, atol=1e-6
    )


def test_log_prob_of_targets(logits):
    targets = jnp.array([0, 6, 3, 3, 1])
    expected = np.log(softmax64(logits[0])[np.arange(5), np.asarray(targets)])
    np.testing.assert_allclose(categorical.log_prob(logits[0], targets), expected, rtol=1e-4, atol=1e-5)


def test_shifting_all_logits_changes_nothing(logits):
    # A shift costs digits of the logits themselves, so the tolerance follows its size.
    for name in EXPECTED:
        f = getattr(categorical, name)
        np.testing.assert_allclose(f(logits[0] + 8.0, logits[1]), f(*logits), rtol=1e-3, atol=1e-5)
    keep = categorical.safe_set(logits[0], log_min_p=-1.0)
    np.testing.assert_array_equal(categorical.safe_set(logits[0] - 100.0, log_min_p=-1.0), keep)


def test_excluded_entries_are_exact_zeros_with_finite_gradients():
    z, w = jnp.array([1.0, -jnp.inf, 0.5]), jnp.array([0.3, 0.2, -jnp.inf])
    p = softmax64([1.0, -np.inf, 0.5])
    np.testing.assert_allclose(categorical.entropy(z), -(p[[0, 2]] * np.log(p[[0, 2]])).sum(), rtol=1e-6)
    assert np.isinf(categorical.kl(z, w))
    assert np.isinf(categorical.chi_square(z, w))
    np.testing.assert_allclose(
        categorical.kl(w[:2], z[jnp.array([0, 2])]), categorical.kl(w[:2], jnp.array([1.0, 0.5]))
    )
    full = jnp.array([0.2, -0.1, 0.4])
    q = softmax64(full)
    np.testing.assert_allclose(categorical.kl(z, full), (p * np.log(np.where(p > 0, p, 1) / q)).sum(), rtol=1e-5)
    np.testing.assert_allclose(categorical.chi_square(z, full), (p**2 / q).sum() - 1, rtol=1e-5)
    for f in (categorical.entropy, categorical.collision, lambda z: categorical.kl(z, full)):
        assert np.all(np.isfinite(jax.grad(f)(z)))
        assert jax.grad(f)(z)[1] == 0


def test_closed_form_gradients(logits):
    # d KL / dz = p (l - KL), d H / dz = -p (log p + H), d C / dz = 2 p (p - C).
    z, w = logits[0][0], logits[1][0]
    p, q = softmax64(z), softmax64(w)
    log_p, log_ratio = np.log(p), np.log(p / q)
    pairs = [
        (jax.grad(categorical.kl)(z, w), p * (log_ratio - (p * log_ratio).sum())),
        (jax.grad(categorical.entropy)(z), -p * (log_p - (p * log_p).sum())),
        (jax.grad(categorical.collision)(z), 2 * p * (p - (p**2).sum())),
    ]
    for ours, expected in pairs:
        np.testing.assert_allclose(ours, expected, atol=2e-5 * max(1.0, np.abs(expected).max()))


def test_safe_set_and_its_mass():
    z = jnp.log(jnp.array([0.5, 0.3, 0.15, 0.05]))
    keep = categorical.safe_set(z, log_min_p=np.log(0.2))
    np.testing.assert_array_equal(keep, [True, True, True, False])
    np.testing.assert_allclose(categorical.kept_mass(z, keep), 0.95, rtol=1e-6)
    restricted = categorical.restrict(z, keep)
    np.testing.assert_allclose(jnp.exp(categorical.log_probs(restricted)), [10 / 19, 6 / 19, 3 / 19, 0], rtol=1e-6)
    gradient = jax.grad(lambda z: categorical.log_prob(categorical.restrict(z, keep), jnp.array(1)))(z)
    np.testing.assert_allclose(gradient, [-10 / 19, 13 / 19, -3 / 19, 0], rtol=1e-5)


def test_a_vocabulary_of_one():
    z = jnp.array([[3.0]])
    assert float(categorical.entropy(z)[0]) == 0
    assert float(categorical.kl(z, z)[0]) == 0
    assert float(categorical.collision(z)[0]) == 1


def test_equals_the_kernels_from_hidden_states(key):
    from jaxrl_kernels import Reference
    from jaxrl_kernels import token_statistics

    keys = jax.random.split(key, 5)
    hidden, head = jax.random.normal(keys[0], (6, 4)), jax.random.normal(keys[1], (4, V))
    hidden_ref, head_ref = jax.random.normal(keys[2], (6, 4)), jax.random.normal(keys[3], (4, V))
    targets = jax.random.randint(keys[4], (6,), 0, V)
    stats = token_statistics(hidden, head, targets, reference=Reference(hidden_ref, head_ref))
    z, w = hidden @ head, hidden_ref @ head_ref
    for ours, theirs in [
        (categorical.log_prob(z, targets), stats.log_prob),
        (categorical.entropy(z), stats.entropy),
        (categorical.collision(z), stats.collision),
        (categorical.max_log_prob(z), stats.max_log_prob),
        (categorical.kl(z, w), stats.kl),
        (categorical.kl(w, z), stats.kl_reverse),
        (categorical.total_variation(z, w), stats.total_variation),
        (categorical.chi_square(z, w), stats.chi_square),
    ]:
        np.testing.assert_allclose(ours, theirs, rtol=2e-4, atol=1e-5)


INF = np.inf
EDGES = {
    "a probability below the smallest number": ([0.0, -200.0], [0.0, -INF], INF, INF),
    "the same in the wider rows": ([1.0, -200.0, 0.5, -INF], [0.0, -INF, 1.0, -INF], INF, INF),
    "a probability": ([0.0, 1.0], [0.0, -INF], INF, INF),
    "none in either": ([0.0, 1.0, -INF], [0.0, 1.0, -INF], 0.0, 0.0),
    "none in the first": ([0.0, -INF], [0.0, 0.0], np.log(2), 1.0),
    "both below the smallest number": ([0.0, -150.0], [0.0, -250.0], None, np.exp(-50.0)),
    "too large for the dtype": ([0.0, 0.0], [0.0, -300.0], 150.0 - np.log(2), INF),
}


@pytest.mark.parametrize("case", EDGES)
def test_divergences_where_probabilities_vanish(case):
    z, w, kl, chi = EDGES[case]
    z, w = jnp.array(z, jnp.float32), jnp.array(w, jnp.float32)
    if kl is not None:
        np.testing.assert_allclose(categorical.kl(z, w), kl, rtol=1e-6, atol=1e-7)
    np.testing.assert_allclose(categorical.chi_square(z, w), chi, rtol=1e-3, atol=1e-7)
    for divergence in (categorical.kl, categorical.chi_square):
        value, gradients = jax.value_and_grad(divergence, argnums=(0, 1))(z, w)
        assert all(np.isfinite(g).all() for g in gradients)
        assert np.isfinite(value) or not any(np.any(g) for g in gradients)


def test_a_row_that_is_no_distribution_is_nan_and_not_infinite():
    empty, full = jnp.full(3, -jnp.inf), jnp.zeros(3)
    for row in (empty, jnp.array([0.0, jnp.nan, 1.0])):
        for pair in ((row, full), (full, row), (row, row)):
            assert np.isnan(categorical.kl(*pair))
            assert np.isnan(categorical.chi_square(*pair))


def test_sums_of_probabilities_are_at_most_one(key):
    logits = 3 * jax.random.normal(key, (200, 300))
    everything = jnp.ones(logits.shape, bool)
    raw = jnp.sum(jnp.exp(categorical.log_probs(logits)), axis=-1)
    assert jnp.max(raw) > 1  # what a sum rounds to
    assert jnp.max(categorical.kept_mass(logits, everything)) <= 1
    assert jnp.max(categorical.collision(jnp.where(jnp.arange(300) == 0, 40.0, logits))) <= 1


@pytest.mark.parametrize("target", [-1, -3, -100, 4, 5, 2**31 - 1])
def test_a_target_that_is_no_token_is_refused_and_nan_inside_jit(target):
    logits, targets = jnp.zeros((2, 4)).at[:, 1].set(2.0), jnp.array([1, target])
    with pytest.raises(ValueError, match=rf"targets holds {target}; each must be a token of the vocabulary, 0 .. 3"):
        categorical.log_prob(logits, targets)
    found = jax.jit(categorical.log_prob)(logits, targets)
    assert np.isnan(found[1])
    np.testing.assert_allclose(found[0], categorical.log_prob(logits[0], jnp.array(1)))
    gradient = jax.jit(jax.grad(lambda z: categorical.log_prob(z, targets)[0]))(logits)
    assert np.isfinite(gradient).all()
    assert not gradient[1].any()


@pytest.mark.parametrize("kind", [jnp.int8, jnp.int16, jnp.int32])
def test_targets_of_a_narrow_type_in_a_wide_vocabulary(kind):
    logits = jnp.arange(400.0)[None] / 400
    found = categorical.log_prob(logits, jnp.array([100], kind))
    np.testing.assert_array_equal(found, categorical.log_probs(logits)[:, 100])
