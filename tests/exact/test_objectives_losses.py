"""Likelihood, distillation and preference losses in float64: gradients in closed form, and where they are least."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_llm import categorical
from jaxrl_llm.objectives import distillation
from jaxrl_llm.objectives import likelihood
from jaxrl_llm.objectives import preferences

B, R, V = 3, 4, 5
MASK = jnp.asarray([[1, 1, 1, 0], [0, 1, 0, 1], [0, 0, 0, 0]], bool)


@pytest.fixture(scope="module")
def logits():
    rng = np.random.default_rng(4)
    return jnp.asarray(rng.normal(size=(B, R, V))), jnp.asarray(rng.normal(size=(B, R, V)))


def test_likelihood_and_its_gradient(logits):
    z, _ = logits
    tokens = jnp.asarray(np.random.default_rng(1).integers(0, V, (B, R)))

    def loss(z):
        return likelihood.negative_log_likelihood(categorical.log_prob(z, tokens), MASK)

    p, total = np.asarray(jax.nn.softmax(z)), 0.0
    for i, t in zip(*np.nonzero(MASK), strict=True):
        total -= np.log(p[i, t, tokens[i, t]])
    np.testing.assert_allclose(loss(z), (total, 5.0), rtol=1e-12)
    assert total > 0
    expected = np.where(MASK[..., None], p - np.eye(V)[tokens], 0.0)
    np.testing.assert_allclose(jax.grad(lambda z: loss(z)[0])(z), expected, atol=1e-14)


def test_distillation_and_its_gradients(logits):
    z, ref = logits
    p, q = np.asarray(jax.nn.softmax(z)), np.asarray(jax.nn.softmax(ref))
    forward, reverse = (q * np.log(q / p)).sum(-1), (p * np.log(p / q)).sum(-1)
    cases = (
        (lambda z: distillation.forward_kl(categorical.kl(ref, z), MASK), forward, p - q),
        (
            lambda z: distillation.reverse_kl(categorical.kl(z, ref), MASK),
            reverse,
            p * (np.log(p / q) - reverse[..., None]),
        ),
    )
    for loss, value, slope in cases:
        np.testing.assert_allclose(loss(z), (value[np.asarray(MASK)].sum(), 5.0), rtol=1e-12)
        np.testing.assert_allclose(
            jax.grad(lambda z, f=loss: f(z)[0])(z), np.where(MASK[..., None], slope, 0), atol=1e-14
        )
    assert np.abs(cases[0][2] - cases[1][2]).max() > 0.01
    # Both are least, and flat, at the reference.
    for loss, _, _ in cases:
        np.testing.assert_allclose(jax.grad(lambda z, f=loss: f(z)[0])(ref), np.zeros((B, R, V)), atol=1e-14)


def of_answers(z, ref, pairs):
    """Pairs (winner, loser) of one-token answers, each a group of its own, as `dpo` takes them."""
    tokens = jnp.asarray(np.array(pairs).reshape(-1, 1))
    rows = tokens.shape[0]
    log_prob, log_prob_ref = (jnp.take(categorical.log_probs(x), tokens) for x in (z, ref))
    rewards = jnp.asarray(np.tile([1.0, 0.0], len(pairs)))
    return log_prob, log_prob_ref, jnp.ones((rows, 1), bool), jnp.asarray(np.repeat(np.arange(len(pairs)), 2)), rewards


def test_dpo_is_least_at_the_tilted_reference():
    rng = np.random.default_rng(8)
    ref, rewards, beta = jnp.asarray(rng.normal(size=V)), rng.uniform(size=V), 0.3
    pairs = [(i, j) for i in range(V) for j in range(V) if i != j]
    # Bradley-Terry: i is preferred to j with probability sigmoid(r_i - r_j).
    chance = jnp.asarray([1 / (1 + np.exp(rewards[j] - rewards[i])) for i, j in pairs])

    def expected(z, beta=beta):
        def one(pair, weight):
            given = of_answers(z, ref, [pair])
            return weight * preferences.dpo(*given, beta=beta)[0]

        return sum(one(pair, weight) for pair, weight in zip(pairs, chance, strict=True))

    best = ref + rewards / beta
    np.testing.assert_allclose(jax.grad(expected)(best), np.zeros(V), atol=1e-13)
    for wrong in (ref, ref - rewards / beta, ref + rewards * beta):
        assert expected(wrong) > expected(best) + 1e-3
        assert np.abs(jax.grad(expected)(wrong)).max() > 1e-2


def test_dpo_gradient_in_closed_form():
    rng = np.random.default_rng(3)
    s = jnp.asarray(rng.normal(size=(2, R)))
    ref, mask = jnp.asarray(rng.normal(size=(2, R))), jnp.asarray([[1, 1, 0, 1], [1, 0, 1, 0]], bool)
    given = (mask, jnp.zeros(2, int), jnp.asarray([0.2, 0.9]))  # the second is preferred
    slope = np.asarray(jax.grad(lambda x: preferences.dpo(x, ref, *given, beta=0.4)[0])(s))
    total = np.where(mask, np.asarray(s - ref), 0).sum(1)
    push = 0.4 / (1 + np.exp(0.4 * (total[1] - total[0])))
    np.testing.assert_allclose(slope, np.where(mask, np.array([[push], [-push]]), 0.0), atol=1e-14)
    assert push > 0.1
    np.testing.assert_array_equal(jax.grad(lambda x: preferences.dpo(s, x, *given)[0])(ref), np.zeros((2, R)))


def test_ipo_is_least_at_a_finite_margin():
    ref, tau = jnp.asarray([0.3, -0.2]), 0.25
    # The first is preferred in three of four pairs.
    pairs = [(0, 1), (0, 1), (1, 0), (0, 1)]

    def loss(z):
        return preferences.ipo(*of_answers(z, ref, pairs), tau=tau)[0]

    best = ref + jnp.asarray([(2 * 0.75 - 1) / (2 * tau), 0.0])
    np.testing.assert_allclose(jax.grad(loss)(best), np.zeros(2), atol=1e-13)
    np.testing.assert_allclose(loss(best), 3 * (1 - 2) ** 2 + (-1 - 2) ** 2, rtol=1e-12)
    for wrong in (ref, ref - (best - ref)):
        assert loss(wrong) > loss(best) + 0.1
