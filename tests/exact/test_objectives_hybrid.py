"""The dense and sparse decomposition of imitation plus reward, by exact enumeration in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_llm import categorical
from jaxrl_llm.objectives import hybrid
from theory_checks import token_trees as trees

V, T, WEIGHT = 3, 3, 1.5


@pytest.fixture(scope="module")
def world():
    keys = jax.random.split(jax.random.key(7), 3)
    student = trees.random_policy(keys[0], vocabulary=V, horizon=T)
    teacher = trees.random_policy(keys[1], vocabulary=V, horizon=T)
    return student, teacher, jax.random.uniform(keys[2], (V**T,))


def uniform_of(policy):
    return [jnp.zeros_like(z) for z in policy]


def objective(policy, teacher, rewards):
    log_law = trees.sequence_log_probs(policy)
    return jnp.sum(jnp.exp(log_law) * (log_law - trees.sequence_log_probs(teacher) - WEIGHT * rewards))


def contexts_kl(policy, teacher):
    kl = [categorical.kl(p, q) for p, q in zip(policy, teacher, strict=True)]
    return jnp.stack([jnp.repeat(x, V ** (T - t)) for t, x in enumerate(kl)], axis=1)


def field(policy, teacher, rewards, *, discount=1.0, rao_blackwell=False, future=True, baseline=0.0):
    """Expected gradient of the hybrid loss: every sequence once, in proportion to its probability under the student."""

    def loss(moving):
        law = jax.lax.stop_gradient(jnp.exp(trees.sequence_log_probs(policy)))
        log_ratio = trees.token_log_ratios(policy, teacher)
        kl_t = contexts_kl(moving, teacher)
        log_prob = trees.token_log_ratios(moving, uniform_of(policy)) - jnp.log(V)
        every = jnp.ones(kl_t.shape, bool)
        divergence = contexts_kl(policy, teacher) if rao_blackwell else log_ratio
        coefficient = hybrid.sparse_coefficient(
            divergence if future else 0 * divergence,
            hybrid.terminal_rewards(rewards, every),
            every,
            discount=discount,
            reward_weight=WEIGHT,
            baseline=jnp.full(rewards.shape, baseline),
        )
        return jnp.sum(law[:, None] * hybrid.hybrid_losses(kl_t, log_prob, coefficient))

    return jax.grad(loss)(policy)


def flat(tree):
    return np.concatenate([np.asarray(x).ravel() for x in tree])


def test_the_decomposition_is_the_gradient(world):
    exact = flat(jax.grad(objective)(*world))
    for options in ({}, {"rao_blackwell": True}, {"baseline": 0.4}):
        np.testing.assert_allclose(flat(field(*world, **options)), exact, atol=1e-13)
    assert np.abs(exact).max() > 0.01
    # The future divergence cannot be dropped, the sign of the reward not flipped.
    assert np.abs(flat(field(*world, future=False)) - exact).max() > 0.01
    assert np.abs(flat(field(world[0], world[1], -world[2])) - exact).max() > 0.01


def test_the_optimum_is_the_teacher_tilted_by_the_reward(world):
    _, teacher, rewards = world
    log_law = trees.sequence_log_probs(teacher) + WEIGHT * rewards
    best_value = -float(jax.nn.logsumexp(log_law))
    # Conditionals of the tilted law, depth by depth.
    optimum, level = [], log_law
    for _ in range(T):
        level = level.reshape(-1, V)
        optimum.insert(0, level)
        level = jax.nn.logsumexp(level, axis=1)
    np.testing.assert_allclose(objective(optimum, teacher, rewards), best_value, rtol=1e-12)
    assert np.abs(flat(field(optimum, teacher, rewards))).max() < 1e-14
    # A KL term in the loss, without the future divergence, pulls away from the optimum: it is another fixed point.
    assert np.abs(flat(field(optimum, teacher, rewards, future=False))).max() > 1e-3


def test_discount_below_one_is_not_a_gradient_field(world):
    policy, teacher, rewards = world
    shapes = [z.shape for z in policy]
    sizes = np.cumsum([0] + [z.size for z in policy])

    def as_vector(x, discount):
        parts = [x[a:b].reshape(s) for a, b, s in zip(sizes[:-1], sizes[1:], shapes, strict=True)]
        return jnp.concatenate([g.ravel() for g in field(parts, teacher, rewards, discount=discount)])

    point = jnp.concatenate([z.ravel() for z in policy])
    asymmetry = {}
    for discount in (0.0, 0.5, 1.0):
        # Differences of the field itself: automatic differentiation would stop where the loss stops its gradient.
        moves = 1e-5 * jnp.eye(point.size)
        along = jax.jit(jax.vmap(lambda move, d=discount: as_vector(point + move, d) - as_vector(point - move, d)))
        jacobian = np.asarray(along(moves)) / 2e-5
        asymmetry[discount] = np.abs(jacobian - jacobian.T).max() / np.abs(jacobian).max()
    assert asymmetry[0.0] > 0.01
    assert asymmetry[0.5] > 0.01
    assert asymmetry[1.0] < 1e-8


def test_dense_gradient_norm_vanishes_at_the_teacher_and_for_confident_students():
    teacher = jnp.array([0.3, -0.5, 0.2])
    assert float(jnp.max(jnp.abs(hybrid.dense_gradient(teacher + 4.0, teacher)))) < 1e-14
    confident = jnp.array([40.0, 0.0, 0.0])
    assert float(jnp.linalg.norm(hybrid.dense_gradient(confident, teacher))) < 1e-14
    z = jnp.array([1.0, -0.3, 0.4])
    p, log_ratio = jax.nn.softmax(z), categorical.log_probs(z) - categorical.log_probs(teacher)
    bound = jnp.max(jnp.square(log_ratio - jnp.sum(p * log_ratio))) * jnp.sum(p * p)
    assert float(jnp.sum(jnp.square(hybrid.dense_gradient(z, teacher)))) <= float(bound)
