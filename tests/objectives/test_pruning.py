import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_llm import categorical
from jaxrl_llm.objectives import pruning

LOGITS = jnp.log(jnp.array([[0.5, 0.3, 0.15, 0.05], [0.9, 0.06, 0.03, 0.01]]))
LOG_MIN_P = float(np.log(0.2))


def test_pruned_log_prob_kept_and_mass():
    pruned = pruning.pruned_log_prob(LOGITS, jnp.array([1, 1]), log_min_p=LOG_MIN_P)
    np.testing.assert_allclose(pruned.log_prob, [np.log(0.3 / 0.95), 0.0], rtol=1e-5)
    np.testing.assert_array_equal(pruned.kept, [True, False])
    np.testing.assert_allclose(pruned.kept_mass, [0.95, 0.9], rtol=1e-5)


def test_gradient_is_the_residual_inside_and_exactly_zero_outside():
    def one(z, target):
        return pruning.pruned_log_prob(z, target, log_min_p=LOG_MIN_P).log_prob

    gradient = jax.vmap(jax.grad(one))(LOGITS, jnp.array([1, 1]))
    np.testing.assert_allclose(gradient[0], [-0.5 / 0.95, 1 - 0.3 / 0.95, -0.15 / 0.95, 0.0], rtol=1e-5)
    np.testing.assert_array_equal(gradient[1], np.zeros(4))
    assert gradient[0, 3] == 0


@pytest.mark.parametrize("shift", [-100.0, 100.0])
def test_shifted_logits_are_the_same_policy(shift):
    # An absolute mask value of -50 turns a pruned token into the most likely one here (errata F3.3).
    base = pruning.pruned_log_prob(LOGITS, jnp.array([0, 0]), log_min_p=LOG_MIN_P)
    moved = pruning.pruned_log_prob(LOGITS + shift, jnp.array([0, 0]), log_min_p=LOG_MIN_P)
    np.testing.assert_allclose(moved.log_prob, base.log_prob, atol=1e-4)
    keep = categorical.safe_set(LOGITS + shift, log_min_p=LOG_MIN_P)
    absolute = jax.nn.softmax(jnp.where(keep, LOGITS + shift, -50.0))
    if shift < 0:
        assert int(jnp.argmax(absolute[0])) == 3


def test_no_threshold_is_no_pruning():
    pruned = pruning.pruned_log_prob(LOGITS, jnp.array([3, 2]), log_min_p=-1e9)
    np.testing.assert_allclose(pruned.log_prob, categorical.log_prob(LOGITS, jnp.array([3, 2])), rtol=1e-6)
    np.testing.assert_allclose(pruned.kept_mass, [1.0, 1.0], rtol=1e-6)
    assert np.all(pruned.kept)


def test_weights():
    log_prob = jnp.log(jnp.array([[0.6, 0.5, 0.2], [0.6, 0.9, 0.5]]))
    behaviour = jnp.log(jnp.array([[0.5, 0.1, 0.4], [0.3, 0.5, 0.4]]))
    kept = jnp.array([[1, 1, 1], [1, 0, 0]], bool)
    mask = jnp.array([[1, 1, 1], [1, 1, 0]], bool)
    dirty = jnp.where(kept, log_prob, -jnp.inf)
    weights = pruning.pruned_token_weights(dirty, behaviour, kept, mask)
    np.testing.assert_allclose(weights, [[1.2, 2.0, 0.5], [2.0, 0.0, 1.0]], rtol=1e-5)
    whole = pruning.pruned_sequence_weights(dirty, behaviour, kept, mask, cap=10.0)
    np.testing.assert_allclose(whole, [1.2 * 5 * 0.5, 0.0], rtol=1e-5)
    slope = jax.grad(lambda x: pruning.pruned_token_weights(x, behaviour, kept, mask).sum())(log_prob)
    np.testing.assert_array_equal(slope, np.zeros((2, 3)))


def test_equals_the_kernels_from_hidden_states(key):
    from jaxrl_kernels import token_statistics

    keys = jax.random.split(key, 3)
    hidden, head = jax.random.normal(keys[0], (8, 4)), jax.random.normal(keys[1], (4, 11))
    targets = jax.random.randint(keys[2], (8,), 0, 11)
    stats = token_statistics(hidden, head, targets, log_min_p=-2.0)
    pruned = pruning.pruned_log_prob(hidden @ head, targets, log_min_p=-2.0)
    np.testing.assert_array_equal(stats.target_kept, pruned.kept)
    assert 0 < np.sum(pruned.kept) < 8
    np.testing.assert_allclose(stats.kept_mass, pruned.kept_mass, rtol=1e-5)
    inside = np.asarray(pruned.kept)
    np.testing.assert_allclose(np.asarray(stats.log_prob)[inside], np.asarray(pruned.log_prob)[inside], rtol=1e-4)


def test_bad_input_is_a_sentence(without_type_hook):
    with pytest.raises(ValueError, match=r"log_min_p is 0\.5; it must be at most 0"):
        pruning.pruned_log_prob(LOGITS, jnp.array([0, 0]), log_min_p=0.5)
    with pytest.raises(TypeError, match=r"targets is float32\[2\]; its dtype must be integer"):
        pruning.pruned_log_prob(LOGITS, jnp.ones(2), log_min_p=-1.0)


@pytest.mark.parametrize("target", [-100, -1, 4])
def test_a_target_that_is_no_token_is_refused_and_nan_inside_jit(target):
    logits, targets = jnp.zeros((2, 4)), jnp.array([1, target])
    with pytest.raises(ValueError, match=f"targets holds {target}"):
        pruning.pruned_log_prob(logits, targets, log_min_p=-1.0)
    found = jax.jit(lambda z, a: pruning.pruned_log_prob(z, a, log_min_p=-1.0))(logits, targets)
    np.testing.assert_array_equal(found.kept, [True, False])
    assert np.isfinite(found.log_prob[0])
    assert np.isnan(found.log_prob[1])
