"""Gradients of objectives by exact enumeration, in float64: what is unbiased, what is not, and which gradient an
estimator has.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_llm import categorical
from jaxrl_llm.objectives import RECIPES
from jaxrl_llm.objectives import divergences
from jaxrl_llm.objectives import policy_loss
from jaxrl_llm.objectives import sequence_advantages
from theory_checks import token_trees as trees

V, T = 3, 3


@pytest.fixture(scope="module")
def world():
    keys = jax.random.split(jax.random.key(2), 3)
    mu = trees.random_policy(keys[0], vocabulary=V, horizon=T)
    pi = trees.perturb(keys[1], mu, noise=0.4)
    return pi, mu, jax.random.uniform(keys[2], (V**T,))


def token_log_probs(policy):
    uniform = [jnp.zeros_like(z) for z in policy]
    return trees.token_log_ratios(policy, uniform) - jnp.log(V)


def close(one, other, tolerance=1e-12):
    scale = max(float(np.abs(x).max()) for x in jax.tree.leaves(other))
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        np.testing.assert_allclose(a, b, atol=tolerance * max(scale, 1.0))
    return scale


def far(one, other):
    pairs = zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True)
    return max(float(np.abs(a - b).max()) for a, b in pairs)


class TestEstimatorsOfTheKl:
    """Tokens from p, expectations by enumeration of the vocabulary."""

    logits = jnp.array([0.3, -1.2, 0.8, 0.1, -0.4])
    reference = jnp.array([-0.2, 0.5, 0.3, -1.0, 0.9])

    def expectation(self, estimator, z):
        p = jax.lax.stop_gradient(jax.nn.softmax(z))
        return jnp.sum(p * estimator(jax.nn.log_softmax(z) - jax.nn.log_softmax(self.reference)))

    @pytest.mark.parametrize("name", ["k1", "k3", "k1_straight_through", "k3_straight_through"])
    def test_unbiased_values(self, name):
        value = self.expectation(divergences.ESTIMATORS[name], self.logits)
        exact = categorical.kl(self.logits, self.reference)
        np.testing.assert_allclose(value, exact, rtol=1e-12)
        assert abs(exact - categorical.kl(self.reference, self.logits)) > 0.01

    def test_every_multiple_of_the_control_variate_is_unbiased(self):
        # k3 is one of a family, and the one that is never negative (errata F2.8).
        exact = categorical.kl(self.logits, self.reference)
        grid = jnp.linspace(-3, 3, 101)
        for beta in (-1.0, 0.0, 0.5, 1.0, 2.0):

            def estimator(x, beta=beta):
                return x + beta * jnp.expm1(-x)

            np.testing.assert_allclose(self.expectation(estimator, self.logits), exact, rtol=1e-12)
            assert bool(jnp.all(estimator(grid) >= -1e-15)) == (beta == 1.0)

    def test_k2_is_biased_at_third_order(self):
        errors = []
        for scale in (0.1, 0.05):
            z = self.reference + scale * (self.logits - self.reference)
            errors.append(float(self.expectation(divergences.k2, z) - categorical.kl(z, self.reference)))
        np.testing.assert_allclose(errors[0] / errors[1], 8.0, rtol=0.1)

    def test_which_gradient_each_one_has(self):
        forward = jax.grad(categorical.kl)(self.logits, self.reference)
        backward = jax.grad(lambda z: categorical.kl(self.reference, z))(self.logits)
        slopes = {
            n: jax.grad(lambda z, f=f: self.expectation(f, z))(self.logits) for n, f in divergences.ESTIMATORS.items()
        }
        np.testing.assert_allclose(slopes["k1"], np.zeros(5), atol=1e-15)
        np.testing.assert_allclose(slopes["k2"], forward, atol=1e-14)
        np.testing.assert_allclose(slopes["k3"], backward, atol=1e-14)
        for name in ("k1_straight_through", "k3_straight_through"):
            np.testing.assert_allclose(slopes[name], forward, atol=1e-14)
        assert np.abs(forward - backward).max() > 0.05

    def test_importance_weighted_k1_is_exact_off_policy(self):
        mu = jax.nn.softmax(self.reference * 0.3 + jnp.linspace(0.0, 0.8, 5))

        def loss(z):
            log_p = jax.nn.log_softmax(z)
            ratio = jnp.exp(log_p - jnp.log(mu))
            return jnp.sum(mu * divergences.importance_weighted_k1(ratio, log_p - jax.nn.log_softmax(self.reference)))

        value, slope = jax.value_and_grad(loss)(self.logits)
        np.testing.assert_allclose(value, categorical.kl(self.logits, self.reference), rtol=1e-12)
        np.testing.assert_allclose(slope, jax.grad(categorical.kl)(self.logits, self.reference), atol=1e-14)


def exact_loss(recipe, policy, behaviour, rewards, *, baseline=0.0, kl_t=None):
    """The recipe's loss as an expectation over sequences of `behaviour`: every sequence once, in proportion."""
    law = jax.lax.stop_gradient(jnp.exp(trees.sequence_log_probs(behaviour)))
    log_prob, log_prob_mu = token_log_probs(policy), token_log_probs(behaviour)
    terms = policy_loss(
        recipe,
        log_prob=log_prob,
        log_prob_old=log_prob_mu,
        log_prob_behaviour=log_prob_mu,
        advantages=law * (rewards - baseline) * law.size,
        response_mask=jnp.ones(log_prob.shape, bool),
        kl_t=kl_t,
    )
    return terms.loss[0] / terms.loss[1]


def test_on_policy_score_function_is_the_policy_gradient(world):
    pi, _, rewards = world
    exact = jax.grad(lambda p: jnp.sum(jnp.exp(trees.sequence_log_probs(p)) * rewards))(pi)
    for baseline in (0.0, 0.7):
        for name in ("reinforce", "rloo", "trm"):
            recipe = dataclasses.replace(RECIPES[name], mask="none")
            slope = jax.grad(
                lambda p, r=recipe, b=baseline: exact_loss(r, p, jax.lax.stop_gradient(pi), rewards, baseline=b)
            )(pi)
            scale = close(jax.tree.map(lambda x: -x, slope), exact)
            assert scale > 1e-3
            assert far(slope, exact) > scale  # the other sign
    # A length in the denominator makes it another gradient only by a factor here, where all lengths are equal.
    slope = jax.grad(lambda p: exact_loss(RECIPES["gspo"], p, jax.lax.stop_gradient(pi), rewards))(pi)
    close(jax.tree.map(lambda x: -T * x, slope), exact)


def test_the_printed_group_objective_is_zero_and_the_meant_one_has_most_of_the_policy_gradient(world):
    """K = 2 answers, every pair once, in proportion; errata F10.1."""
    pi, _, rewards = world
    pairs, size = [jnp.ravel(x) for x in jnp.meshgrid(*[jnp.arange(V**T)] * 2, indexing="ij")], V ** (2 * T)
    answers = jnp.stack(pairs, axis=1).ravel()
    law = jnp.exp(trees.sequence_log_probs(pi))
    weight = jnp.repeat(law[pairs[0]] * law[pairs[1]], 2) * size
    recipe, groups = RECIPES["group_reinforce"], jnp.repeat(jnp.arange(size), 2)
    advantages = sequence_advantages(recipe, rewards[answers], groups)
    np.testing.assert_allclose(jnp.sum(advantages.reshape(size, 2), axis=1), 0.0, atol=1e-15)

    def loss(p):
        log_prob = token_log_probs(p)[answers]
        mask = jnp.ones(log_prob.shape, bool)
        terms = policy_loss(recipe, log_prob=log_prob, advantages=weight * advantages, response_mask=mask)
        return terms.loss[0] / terms.loss[1]

    exact = jax.grad(lambda p: jnp.sum(jnp.exp(trees.sequence_log_probs(p)) * rewards))(pi)
    scale = close(jax.tree.map(lambda x: -2 * x, jax.grad(loss)(pi)), exact)
    assert scale > 1e-3


def test_token_importance_weighting_is_the_gradient_of_the_surrogate(world):
    pi, mu, rewards = world
    recipe = dataclasses.replace(RECIPES["trm"], mask="none")
    exact = jax.grad(lambda p: trees.error_of_surrogate(p, mu, rewards)[1])(pi)
    slope = jax.grad(lambda p: exact_loss(recipe, p, mu, rewards))(pi)
    close(jax.tree.map(lambda x: -x, slope), exact)
    # It is not the policy gradient off-policy: contexts are still those of mu.
    true = jax.grad(lambda p: jnp.sum(jnp.exp(trees.sequence_log_probs(p)) * rewards))(pi)
    assert far(exact, true) > 1e-3


def context_values(per_context):
    """[V^T, T] values at the context of each token from one array per depth."""
    columns = [jnp.repeat(x, V ** (T - t)) for t, x in enumerate(per_context)]
    return jnp.stack(columns, axis=1)


def test_masked_gradient_is_normalised_by_all_sequences_with_the_mask_frozen(world):
    pi, mu, rewards = world
    _, kl, _ = trees.divergences(pi, mu)
    kl_t = context_values(kl)
    threshold = float(jnp.median(jnp.max(kl_t, axis=1)))
    recipe = dataclasses.replace(RECIPES["trm_max"], mask_maximum=threshold)
    accepted = jnp.max(kl_t, axis=1) <= threshold
    assert 0.2 < float(jnp.mean(accepted)) < 0.8
    law = jnp.exp(trees.sequence_log_probs(mu))

    def masked_surrogate(p):
        ratios = jnp.exp(trees.token_log_ratios(p, mu))
        return jnp.sum(law * jnp.where(accepted, rewards, 0.0) * ratios.sum(1))

    exact = jax.grad(masked_surrogate)(pi)

    def loss(p, recipe=recipe):
        # The exact KL is computed from the trained policy itself: its gradient must not leak through the mask.
        return exact_loss(recipe, p, mu, rewards, kl_t=context_values(trees.divergences(p, mu)[1]))

    slope = jax.grad(loss)(pi)
    close(jax.tree.map(lambda x: -x, slope), exact)
    other = jax.grad(lambda p: loss(p, dataclasses.replace(recipe, normalise_by="accepted")))(pi)
    assert far(other, slope) > 1e-3


def test_the_masked_surrogate_depends_on_the_baseline(world):
    # E_mu[M sum_t (rho_t - 1)] is not zero, so a baseline changes the direction of the gradient (errata F2.16).
    pi, mu, rewards = world
    kl_t = context_values(trees.divergences(pi, mu)[1])
    recipe = dataclasses.replace(RECIPES["trm_max"], mask_maximum=float(jnp.median(jnp.max(kl_t, axis=1))))
    free = dataclasses.replace(recipe, mask="none")
    slopes = [
        [jax.grad(lambda p, r=r, b=b: exact_loss(r, p, mu, rewards, baseline=b, kl_t=kl_t))(pi) for b in (0.0, 0.5)]
        for r in (recipe, free)
    ]
    assert far(*slopes[0]) > 1e-3
    close(*slopes[1])
