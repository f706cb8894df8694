import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_llm.objectives import modulation

# Fixture of the notes on arXiv 2509.09265: k = k' = 1, zeta = 0.1, two trajectories of three and two steps.
A = jnp.array([1.0, -1.0])
H = jnp.array([[0.2, 1.0, 0.6], [0.4, 0.8, 9.0]])
STEPS = jnp.array([[1, 1, 1], [1, 1, 0]], bool)


def test_fixture():
    normalised = modulation.normalised_entropy(H, STEPS)
    np.testing.assert_allclose(normalised, [[0, 1, 0.5], [0.25, 0.75, 0]], atol=1e-6)
    scale = modulation.self_calibrating_scale(normalised, STEPS)
    np.testing.assert_allclose(scale, [[1.550110, 0.570254, 0.940189], [1.207227, 0.732220, 0]], atol=1e-5)
    clarity = modulation.future_clarity(normalised, STEPS)
    np.testing.assert_allclose(clarity, [[np.exp(-1), np.exp(-0.5), 0], [np.exp(-0.75), 0, 0]], atol=1e-6)
    final = modulation.modulated_advantages(A, H, STEPS)
    np.testing.assert_allclose(final, [[1.333741, 0.377750, 0.687033], [-1.413147, -0.985377, 0]], atol=1e-5)
    # With the sign of the exponent flipped, certain steps would be damped.
    assert abs(float(modulation.self_calibrating_scale(normalised, STEPS, sharpness=-1.0)[0, 0]) - 1.55) > 0.5


def test_scale_has_mean_one_and_the_result_mean_zero():
    normalised = modulation.normalised_entropy(H, STEPS)
    scale = np.asarray(modulation.self_calibrating_scale(normalised, STEPS, sharpness=2.3))
    np.testing.assert_allclose(scale[np.asarray(STEPS)].mean(), 1.0, rtol=1e-6)
    for function in (modulation.modulated_advantages, modulation.potential_modulated_advantages):
        final = np.asarray(function(A, H, STEPS))
        np.testing.assert_allclose(final[np.asarray(STEPS)].mean(), 0.0, atol=1e-6)
        assert final[1, 2] == 0


def test_potential_variant_by_hand():
    normalised = np.array([[0, 1, 0.5], [0.25, 0.75, 0]])
    scale = np.array([[1.550110, 0.570254, 0.940189], [1.207227, 0.732220, 0]])
    expected = np.asarray(A)[:, None] * scale - 0.3 * np.exp(-2.0 * normalised)
    expected = np.where(STEPS, expected - expected[np.asarray(STEPS)].mean(), 0.0)
    final = modulation.potential_modulated_advantages(A, H, STEPS, clarity_sharpness=2.0, clarity_weight=0.3)
    np.testing.assert_allclose(final, expected, atol=1e-5)


def test_a_scale_per_sign_keeps_the_sums_of_both_signs():
    a = jnp.array([1.5, -0.7, 0.4, 0.0])
    h = jnp.array([[0.2, 1.0, 0.6], [0.4, 0.8, 9.0], [0.1, 0.3, 0.0], [0.5, 0.5, 0.5]])
    steps = jnp.array([[1, 1, 1], [1, 1, 0], [1, 1, 1], [1, 0, 0]], bool)
    every = np.asarray(steps)
    plain = np.where(every, np.asarray(a)[:, None], 0.0)
    scaled = np.asarray(modulation.sign_preserving_advantages(a, h, steps, sharpness=1.7))
    for side in (plain > 0, plain < 0):
        np.testing.assert_allclose(scaled[side].sum(), plain[side].sum(), rtol=1e-6)
    np.testing.assert_array_equal(np.sign(scaled), np.sign(plain))
    # More where the policy was certain, by exp(k) from one end of the entropies to the other.
    np.testing.assert_allclose(scaled[0, 0] / scaled[0, 1], np.exp(1.7 * 0.8 / 1.0), rtol=1e-5)
    # The paper's scale keeps neither sum: its mean is 1 over steps, whatever advantage they carry.
    normalised = modulation.normalised_entropy(h, steps)
    printed = plain * np.asarray(modulation.self_calibrating_scale(normalised, steps, sharpness=1.7))
    assert abs(printed[plain > 0].sum() - plain[plain > 0].sum()) > 0.1


def test_modulation_is_a_constant_to_the_gradient():
    ids, mask = jnp.array([[0, 0, 1], [0, 1, 1]]), jnp.ones((2, 3), bool)

    def through(entropy):
        return jnp.sum(jnp.square(modulation.step_entropy(entropy, ids, mask, steps=2)[0]))

    np.testing.assert_array_equal(jax.grad(through)(H), np.zeros((2, 3)))
    for function in (
        modulation.modulated_advantages,
        modulation.potential_modulated_advantages,
        modulation.sign_preserving_advantages,
    ):
        slope = jax.grad(lambda a, f=function: jnp.sum(jnp.square(f(a, H, STEPS))))(A)
        np.testing.assert_array_equal(slope, np.zeros(2))


def test_the_bonus_has_no_sign():
    # All trajectories failed or all succeeded: no signal, yet steps are pushed, the last ones down (errata F4.2).
    nothing = jnp.zeros(2)
    pushed = np.asarray(modulation.modulated_advantages(nothing, H, STEPS, clarity_weight=0.05))
    assert pushed[0, 2] < 0
    assert pushed[1, 1] < 0
    assert pushed[0, 1] > 0
    without = modulation.modulated_advantages(nothing, H, STEPS, clarity_weight=0.0)
    np.testing.assert_array_equal(without, np.zeros((2, 3)))


def test_equal_entropies_leave_the_advantage_alone():
    same = jnp.full((2, 3), 0.7)
    final = modulation.modulated_advantages(A, same, STEPS, clarity_weight=0.0)
    expected = np.where(np.asarray(STEPS), np.asarray(A)[:, None] - 0.2, 0.0)
    np.testing.assert_allclose(final, expected, atol=1e-6)


def test_step_entropy_and_spreading():
    ids = jnp.array([[-1, 0, 0, -1, 1, 1, 1], [-1, 2, 2, 0, 7, -1, 1]])
    mask = jnp.array([[0, 1, 1, 1, 1, 1, 0], [0, 1, 1, 1, 1, 0, 1]], bool)
    entropy = jnp.array([[9.0, 1.0, 3.0, 9.0, 2.0, 4.0, 9.0], [9.0, 0.5, 1.5, 2.0, 9.0, 9.0, 6.0]])
    dirty = jnp.where(mask & (ids >= 0) & (ids < 3), entropy, jnp.nan)
    mean, exists = modulation.step_entropy(dirty, ids, mask, steps=3)
    np.testing.assert_allclose(mean, [[2.0, 3.0, 0.0], [2.0, 6.0, 1.0]])
    np.testing.assert_array_equal(exists, [[True, True, False], [True, True, True]])
    spread = modulation.spread_to_tokens(mean, ids, mask)
    np.testing.assert_allclose(spread, [[0, 2, 2, 0, 3, 3, 0], [0, 1, 1, 2, 0, 0, 6]])


def test_potential_shaping_telescopes_to_minus_the_potential():
    potential = jnp.array([[0.3, 0.9, 0.5], [0.2, 0.6, 9.0]])
    discount = 0.8
    shaped = np.asarray(modulation.potential_shaping(potential, STEPS, discount=discount))
    np.testing.assert_allclose(shaped[0], [0.8 * 0.9 - 0.3, 0.8 * 0.5 - 0.9, -0.5], rtol=1e-6)
    np.testing.assert_allclose(shaped[1], [0.8 * 0.6 - 0.2, -0.6, 0.0], rtol=1e-6)
    to_go = np.array([[sum(discount ** (j - k) * row[j] for j in range(k, 3)) for k in range(3)] for row in shaped])
    np.testing.assert_allclose(to_go, modulation.potential_bonus(potential, STEPS), atol=1e-6)


def test_no_step_at_all():
    none = jnp.zeros((2, 3), bool)
    np.testing.assert_array_equal(modulation.modulated_advantages(A, H * jnp.nan, none), np.zeros((2, 3)))


def test_bad_input_is_a_sentence(without_type_hook):
    with pytest.raises(TypeError, match=r"step_ids is float32\[1, 2\]; its dtype must be integer"):
        modulation.step_entropy(jnp.ones((1, 2)), jnp.ones((1, 2)), jnp.ones((1, 2), bool), steps=1)
    with pytest.raises(ValueError, match=r"advantages is float32\[2, 1\]; it must have 1 axes \[B\]"):
        modulation.modulated_advantages(A[:, None], H, STEPS)
