"""Signals whose expected gradient is a theorem, by exact enumeration in float64: pairs of answers that are compared."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_llm import categorical
from jaxrl_llm.objectives import RECIPES
from jaxrl_llm.objectives import SignalInputs
from jaxrl_llm.objectives import advantages_of
from jaxrl_llm.objectives import policy_loss

V, T, WEIGHT = 2, 2, 1.5
ANSWERS = np.array(list(itertools.product(range(V), repeat=T)))
PAIRS = np.array(list(itertools.product(range(len(ANSWERS)), repeat=2)))
TOKENS = ANSWERS[PAIRS.ravel()]
CONTEXTS = np.stack([np.zeros(len(TOKENS), int), 1 + TOKENS[:, 0]], axis=1)
GROUPS = np.repeat(np.arange(len(PAIRS)), 2)


@pytest.fixture(scope="module")
def world():
    rng = np.random.default_rng(2)
    student, teacher = (jnp.asarray(rng.normal(size=(1 + V, V))) for _ in range(2))
    return student, teacher, jnp.asarray(rng.uniform(size=len(ANSWERS)))


def answers_log_prob(logits):
    contexts = np.stack([np.zeros(len(ANSWERS), int), 1 + ANSWERS[:, 0]], axis=1)
    return categorical.log_prob(logits[contexts], jnp.asarray(ANSWERS)).sum(1)


def objective(student, teacher, rewards):
    log_law = answers_log_prob(student)
    return jnp.sum(jnp.exp(log_law) * (log_law - answers_log_prob(teacher) - WEIGHT * rewards))


def inputs(student, teacher, rewards, values=None):
    mask = jnp.ones(TOKENS.shape, bool)
    of_rows = rewards[PAIRS.ravel()]
    here = student[CONTEXTS]
    return SignalInputs(
        response_mask=mask,
        rewards=of_rows,
        rewards_t=jnp.stack([jnp.zeros_like(of_rows), of_rows], axis=1),
        group_ids=jnp.asarray(GROUPS),
        step_ids=jnp.zeros(TOKENS.shape, int),
        actor_ids=jnp.zeros(TOKENS.shape, int),
        ended=jnp.ones(len(TOKENS), bool),
        log_prob_old=categorical.log_prob(here, jnp.asarray(TOKENS)),
        log_prob_behaviour=categorical.log_prob(here, jnp.asarray(TOKENS)),
        log_prob_ref=categorical.log_prob(teacher[CONTEXTS], jnp.asarray(TOKENS)),
        kl_ref_t=categorical.kl(here, teacher[CONTEXTS]),
        values=values,
    )


def expected_gradient(recipe, given, student, teacher):
    """Every pair once, in proportion to its probability under the student; the loss is that of the recipe."""
    law = jnp.exp(answers_log_prob(student))
    weight = jnp.repeat(law[PAIRS[:, 0]] * law[PAIRS[:, 1]], 2) / 2
    advantages = advantages_of(recipe, given)
    if advantages.ndim == 1:
        advantages = jnp.broadcast_to(advantages[:, None], TOKENS.shape)

    def loss(moving):
        def of_row(tokens, contexts, a):
            total, count = policy_loss(
                recipe,
                log_prob=categorical.log_prob(moving[contexts], tokens)[None],
                advantages=a[None],
                response_mask=jnp.ones((1, T), bool),
                kl_ref_t=categorical.kl(moving[contexts], teacher[contexts])[None],
            ).loss
            return total / count

        rows = jax.vmap(of_row)(jnp.asarray(TOKENS), jnp.asarray(CONTEXTS), advantages)
        return jnp.sum(weight * rows)

    return np.asarray(jax.grad(loss)(student))


def test_sparse_imitation_is_the_gradient(world):
    exact = np.asarray(jax.grad(objective)(*world))
    student, teacher, rewards = world
    for advantage in ("sparse_imitation", "sparse_imitation_exact"):
        recipe = dataclasses.replace(RECIPES["hybrid"], advantage=advantage, reward_weight=WEIGHT)
        given = inputs(*world)
        np.testing.assert_allclose(expected_gradient(recipe, given, student, teacher), exact, atol=1e-13)
        # A group of one has no baseline, and is unbiased all the same.
        alone = dataclasses.replace(given, group_ids=jnp.arange(len(TOKENS)))
        np.testing.assert_allclose(expected_gradient(recipe, alone, student, teacher), exact, atol=1e-13)
        flipped = inputs(student, teacher, -rewards)
        assert np.abs(expected_gradient(recipe, flipped, student, teacher) - exact).max() > 0.01
        frozen = dataclasses.replace(recipe, discount=0.0)
        assert np.abs(expected_gradient(frozen, given, student, teacher) - exact).max() > 1e-3
    assert np.abs(exact).max() > 0.01


def test_a_critic_of_any_value_leaves_the_policy_gradient(world):
    student, teacher, rewards = world
    exact = np.asarray(jax.grad(lambda z: -jnp.sum(jnp.exp(answers_log_prob(z)) * rewards))(student))
    plain = dataclasses.replace(RECIPES["rloo"], name="plain", advantage="gae", trace=1.0)
    of_context = jnp.asarray([0.3, -0.7, 1.1])
    values = of_context[CONTEXTS]
    given = inputs(student, teacher, rewards, values)
    np.testing.assert_allclose(expected_gradient(plain, given, student, teacher), exact, atol=1e-13)
    # With a trace below 1 only the true values do.
    law = jnp.exp(categorical.log_probs(student))
    later = (law[1:] * rewards.reshape(V, V)).sum(1)
    true = jnp.concatenate([jnp.sum(law[0] * later)[None], later])
    short = dataclasses.replace(plain, trace=0.3)
    right = dataclasses.replace(given, values=true[CONTEXTS])
    np.testing.assert_allclose(expected_gradient(short, right, student, teacher), exact, atol=1e-13)
    assert np.abs(expected_gradient(short, given, student, teacher) - exact).max() > 0.01
    # V-trace on policy is the discounted return; scaled by one number, so the direction is the same.
    augmented = dataclasses.replace(plain, advantage="divergence_augmented", discount=1.0)
    scaled = expected_gradient(augmented, right, student, teacher)
    ratio = scaled[np.abs(exact) > 1e-3] / exact[np.abs(exact) > 1e-3]
    np.testing.assert_allclose(ratio, ratio[0], rtol=1e-10)
    assert ratio[0] > 0
