import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest

from jaxrl_llm.objectives import divergence_augmented as augmented
from jaxrl_llm.objectives import surrogates

PHI = jnp.array([[0.1, -0.2, 0.3, 0.05]])
FOUR = jnp.ones((1, 4), bool)


def released_recursion(phi, ratio, discount):
    """The public code's recursion: the carried term takes phi of the step after its own (errata F8.1)."""
    out, carried = np.zeros(len(phi)), 0.0
    for t in reversed(range(len(phi))):
        out[t] = phi[t] + discount * carried
        wrong = phi[min(t + 1, len(phi) - 1)]
        carried = min(1, ratio[t]) * wrong + discount * min(1, ratio[t]) * carried
    return out


def test_discounted_sums_on_policy():
    value = augmented.multi_step_divergence(PHI, jnp.ones((1, 4)), FOUR, discount=0.9)
    np.testing.assert_allclose(value, [[0.19945, 0.1105, 0.345, 0.05]], rtol=1e-5)
    released = released_recursion(np.asarray(PHI)[0], np.ones(4), 0.9)
    np.testing.assert_allclose(released, [0.44695, -0.1145, 0.345, 0.05], rtol=1e-5)
    assert np.abs(np.asarray(value)[0] - released).max() > 0.2


def brute_force(phi, ratio, discount, cap):
    total = np.zeros(len(phi))
    for t in range(len(phi)):
        total[t] = phi[t]
        for u in range(t + 1, len(phi)):
            trace = np.prod([min(cap, ratio[j]) for j in range(t + 1, u)])
            total[t] += discount ** (u - t) * trace * min(1, ratio[u]) * phi[u]
    return total


@pytest.mark.parametrize("cap", [0.0, 0.5, 1.0])
def test_recursion_against_the_product_form(cap):
    rng = np.random.default_rng(1)
    phi, ratio = rng.normal(size=(3, 6)), np.exp(rng.normal(size=(3, 6)) * 0.5)
    mask = np.array([[1, 1, 1, 1, 1, 1], [0, 1, 0, 1, 1, 0], [0, 0, 0, 0, 0, 0]], bool)
    dirty = [jnp.where(jnp.asarray(mask), jnp.asarray(x, jnp.float32), jnp.nan) for x in (phi, ratio)]
    value = np.asarray(augmented.multi_step_divergence(*dirty, jnp.asarray(mask), discount=0.8, trace_cap=cap))
    for i in range(3):
        s = np.flatnonzero(mask[i])
        np.testing.assert_allclose(value[i, s], brute_force(phi[i, s], ratio[i, s], 0.8, cap), rtol=1e-4, atol=1e-6)
    assert np.all(value[~mask] == 0)
    if cap == 0.0:  # two terms
        expected = phi[0, 0] + 0.8 * min(1, ratio[0, 1]) * phi[0, 1]
        np.testing.assert_allclose(value[0, 0], expected, rtol=1e-5)


@pytest.mark.parametrize("name", augmented.PSEUDO_REWARDS[:4])
def test_pseudo_reward_is_the_gradient_of_its_divergence(name):
    """phi is f'(pi/pi_old) up to a constant, so sum_a phi(a) dpi(a) is the change of the divergence."""
    p, q = np.array([0.5, 0.2, 0.3]), np.array([0.4, 0.35, 0.25])
    f = {
        "kl": lambda x: x * np.log(x),
        "reverse_kl": lambda x: -np.log(x),
        "hellinger": lambda x: (np.sqrt(x) - 1) ** 2,
        "total_variation": lambda x: np.abs(x - 1) / 2,
    }[name]
    move = np.array([0.3, -0.1, -0.2])
    step = 1e-5
    slope = sum(s * (q * f((p + s * step * move) / q)).sum() for s in (1, -1)) / (2 * step)
    phi = augmented.pseudo_reward(
        jnp.log(jnp.asarray(p, jnp.float32)), jnp.log(jnp.asarray(q, jnp.float32)), divergence=name
    )
    np.testing.assert_allclose((np.asarray(phi) * move).sum(), slope, rtol=1e-3)
    if name == "total_variation":  # the released code multiplies by pi_old (errata F8.3)
        assert abs((q * np.asarray(phi) * move).sum() - slope) > 0.04


def test_pseudo_rewards_at_the_old_policy_and_their_gradient():
    log_prob = jnp.log(jnp.array([0.5, 0.2, 0.3]))
    for name in augmented.PSEUDO_REWARDS:
        value = augmented.pseudo_reward(log_prob, log_prob, divergence=name)
        np.testing.assert_allclose(value, log_prob if name == "entropy" else np.zeros(3), atol=1e-7)
        slope = jax.grad(lambda x, n=name: augmented.pseudo_reward(x, log_prob, divergence=n).sum())(log_prob)
        np.testing.assert_array_equal(slope, np.zeros(3))
    # A ratio of 1000 is clamped inside the exponential: 1 - exp(3) for the reverse KL.
    clamped = augmented.pseudo_reward(log_prob - 7.0, log_prob, divergence="reverse_kl")
    np.testing.assert_allclose(clamped, np.full(3, 1 - np.exp(3.0)), rtol=1e-5)


def test_v_trace_on_policy_is_the_return():
    rewards, values = jnp.array([[1.0, 0.0, 2.0]]), jnp.array([[0.3, -0.4, 0.9]])
    targets, q = augmented.v_trace(values, rewards, jnp.ones((1, 3)), jnp.ones((1, 3), bool), discount=0.9)
    np.testing.assert_allclose(targets, [[1 + 0.81 * 2, 0.9 * 2, 2.0]], rtol=1e-6)
    np.testing.assert_allclose(q, targets, rtol=1e-6)


def test_v_trace_against_its_sum_with_bootstrap_and_holes():
    rng = np.random.default_rng(2)
    values, rewards = rng.normal(size=(2, 5)), rng.normal(size=(2, 5))
    ratio = np.exp(rng.normal(size=(2, 5)) * 0.7)
    mask = np.array([[1, 1, 1, 1, 1], [0, 1, 0, 1, 1]], bool)
    last, discount = np.array([0.7, -0.2]), 0.9
    arrays = [jnp.where(jnp.asarray(mask), jnp.asarray(x, jnp.float32), jnp.nan) for x in (values, rewards, ratio)]
    targets, q = augmented.v_trace(
        *arrays, jnp.asarray(mask), discount=discount, bootstrap=jnp.asarray(last, jnp.float32)
    )
    for i in range(2):
        s = np.flatnonzero(mask[i])
        v, r, rho = np.append(values[i, s], last[i]), rewards[i, s], np.minimum(ratio[i, s], 1)
        expected = [
            v[t]
            + sum(
                discount ** (u - t) * np.prod(rho[t:u]) * rho[u] * (r[u] + discount * v[u + 1] - v[u])
                for u in range(t, len(s))
            )
            for t in range(len(s))
        ]
        np.testing.assert_allclose(np.asarray(targets)[i, s], expected, rtol=1e-4, atol=1e-5)
        expected_q = r + discount * np.append(expected[1:], last[i])
        np.testing.assert_allclose(np.asarray(q)[i, s], expected_q, rtol=1e-4, atol=1e-5)


def test_the_end_of_an_episode_cuts_the_value():
    # Garbage after the end of the row must not reach Q of its last step (errata F8.2).
    values, rewards = jnp.array([[0.5, 0.2, 99.0]]), jnp.array([[0.0, 1.0, 99.0]])
    mask = jnp.array([[1, 1, 0]], bool)
    _, q = augmented.v_trace(values, rewards, jnp.ones((1, 3)), mask, discount=0.9)
    np.testing.assert_allclose(q, [[0.9, 1.0, 0.0]], rtol=1e-6)


def test_root_mean_square_scale():
    a, mask = jnp.array([[3.0, 4.0, jnp.nan]]), jnp.array([[1, 1, 0]], bool)
    scaled = augmented.scaled_by_root_mean_square(a, mask)
    np.testing.assert_allclose(scaled, [[3 / np.sqrt(12.5), 4 / np.sqrt(12.5), 0]], rtol=1e-6)
    np.testing.assert_array_equal(augmented.scaled_by_root_mean_square(0 * a[:, :2], mask[:, :2]), [[0.0, 0.0]])


def test_the_three_losses_are_compositions():
    """As the public code writes them: -adv rho + reg rho sg(D); the clip on adv - reg D; the truncated weight."""
    rng = np.random.default_rng(3)
    a, d, now, old = (jnp.asarray(rng.normal(size=(2, 4)) * s, jnp.float32) for s in (1.0, 0.5, 0.4, 0.4))
    shaped = augmented.augmented_advantages(a, d, coefficient=0.7)
    ratio = jnp.exp(now - old)
    np.testing.assert_allclose(
        surrogates.importance_weighted(ratio, shaped), -a * ratio + 0.7 * ratio * d, rtol=1e-4, atol=1e-6
    )
    slopes = jax.grad(
        lambda x: surrogates.clipped_weight(x, jnp.exp(x - old), shaped, clip_low=1.0, clip_high=0.0).sum()
    )(now)
    np.testing.assert_allclose(slopes, -jnp.minimum(ratio, 1) * (a - 0.7 * d), rtol=1e-4, atol=1e-6)


def test_everything_is_a_constant_to_the_gradient():
    def total(x):
        phi = augmented.pseudo_reward(x, x * 0.5)
        targets, q = augmented.v_trace(x, x, x, FOUR)
        return jnp.sum(augmented.multi_step_divergence(phi, x, FOUR) + targets + q)

    np.testing.assert_array_equal(jax.grad(total)(PHI), np.zeros((1, 4)))


def test_bad_input_is_a_sentence(without_type_hook):
    with pytest.raises(ValueError, match="divergence is 'KL'; it must be one of kl, reverse_kl"):
        augmented.pseudo_reward(PHI, PHI, divergence="KL")


def test_a_discount_of_each_step_ends_episodes_within_a_row():
    rng = np.random.default_rng(3)
    phi, values, rewards = (jnp.asarray(rng.normal(size=(2, 6)), jnp.float32) for _ in range(3))
    ratio, every = jnp.exp(0.5 * jnp.asarray(rng.normal(size=(2, 6)), jnp.float32)), jnp.ones((2, 6), bool)
    bootstrap = jnp.asarray(rng.normal(size=2), jnp.float32)
    cut = jnp.full((2, 6), 0.8).at[:, 2].set(0.0)
    charge = augmented.multi_step_divergence(phi, ratio, every, discount=cut)
    targets = augmented.v_trace(values, rewards, ratio, every, discount=cut, bootstrap=bootstrap)
    for part, last in ((slice(0, 3), None), (slice(3, 6), bootstrap)):
        piece = [x[:, part] for x in (phi, values, rewards, ratio, every)]
        alone = augmented.multi_step_divergence(piece[0], piece[3], piece[4], discount=0.8)
        np.testing.assert_allclose(charge[:, part], alone, rtol=1e-5, atol=1e-6)
        goals = augmented.v_trace(piece[1], piece[2], piece[3], piece[4], discount=0.8, bootstrap=last)
        for whole, one in zip(targets, goals, strict=True):
            np.testing.assert_allclose(whole[:, part], one, rtol=1e-5, atol=1e-6)
    with pytest.raises((ValueError, jaxtyping.TypeCheckError), match="discount"):
        augmented.multi_step_divergence(phi, ratio, every, discount=cut[:, 1:])
