import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_llm.objectives import corrections
from jaxrl_llm.objectives import divergences
from jaxrl_llm.objectives import ratios

LOG = jnp.array([[0.2, -0.5, 0.1, 9.0], [np.log(3.0), 0.1, 0.0, 0.0], [-1.0, np.log(8.0), 0.3, 0.0]])
MASK = jnp.array([[1, 1, 1, 0], [1, 1, 0, 0], [1, 1, 1, 1]], bool)
DIRTY = jnp.where(MASK, LOG, jnp.nan)
W = np.exp(np.asarray(LOG))
SEQ = np.array([np.exp(np.asarray(LOG)[i][np.asarray(MASK)[i]].sum()) for i in range(3)])
GEO = SEQ ** (1 / np.array([3, 2, 4]))
M = np.asarray(MASK)


def spread(per_sequence):
    return np.where(M, per_sequence[:, None], 1.0)


def test_log_ratio_ignores_what_is_masked():
    now = jnp.where(MASK, LOG, -jnp.inf)
    value, gradient = jax.value_and_grad(lambda x: ratios.token_log_ratio(x, now * 0.5, MASK).sum())(now)
    np.testing.assert_allclose(value, 0.5 * np.asarray(LOG)[M].sum(), rtol=1e-5)
    np.testing.assert_array_equal(gradient, M.astype(np.float32))


def test_ratios():
    np.testing.assert_allclose(ratios.token_ratio(DIRTY, MASK), np.where(M, W, 1.0), rtol=1e-6)
    np.testing.assert_allclose(ratios.sequence_ratio(DIRTY, MASK), SEQ, rtol=1e-5)
    np.testing.assert_allclose(ratios.geometric_ratio(DIRTY, MASK), GEO, rtol=1e-5)
    np.testing.assert_allclose(ratios.geometric_token_ratio(DIRTY, MASK), spread(GEO), rtol=1e-5)


def test_at_length_one_the_sequence_ratio_is_the_token_ratio():
    first = MASK & (jnp.arange(4)[None, :] == 0)
    np.testing.assert_allclose(ratios.geometric_ratio(DIRTY, first), ratios.token_ratio(DIRTY, first)[:, 0], rtol=1e-6)
    np.testing.assert_allclose(ratios.sequence_ratio(DIRTY, first), ratios.token_ratio(DIRTY, first)[:, 0], rtol=1e-6)


def test_gspo_token_has_the_gradient_of_gspo():
    a = jnp.array([1.0, -2.0, 0.5])
    lengths = jnp.sum(MASK, axis=1, dtype=jnp.float32)

    def by_sequence(x):
        return jnp.sum(a * ratios.geometric_ratio(x, MASK))

    def by_token(x):
        each = jnp.where(MASK, ratios.geometric_token_ratio(x, MASK), 0.0)
        return jnp.sum(a * each.sum(axis=1) / lengths)

    np.testing.assert_allclose(by_token(LOG), by_sequence(LOG), rtol=1e-6)
    np.testing.assert_allclose(jax.grad(by_token)(LOG), jax.grad(by_sequence)(LOG), rtol=1e-5)


def test_the_clamp_binds_at_its_limit_and_stops_the_gradient():
    far = jnp.array([-30.0, -20.0, 0.0, 19.0, 25.0])
    np.testing.assert_allclose(ratios.ratio_from_log(far), np.exp(np.clip(far, -20, 20)), rtol=1e-5)
    slopes = jax.vmap(jax.grad(ratios.ratio_from_log))(far)
    assert slopes[0] == 0
    assert slopes[4] == 0
    assert slopes[3] > 0


CORRECTIONS = {
    "token_truncated": (corrections.token_truncated, np.where(M, np.minimum(W, 2.0), 1.0)),
    "token_masked": (corrections.token_masked, np.where(M, np.where((W >= 0.5) & (W <= 5.0), W, 0.0), 1.0)),
    "sequence_truncated": (corrections.sequence_truncated, spread(np.minimum(SEQ, 2.0))),
    "sequence_masked": (corrections.sequence_masked, spread(np.where(SEQ <= 2.0, SEQ, 0.0))),
    "geometric_masked": (
        lambda x, m: corrections.geometric_masked(x, m, low=0.95, high=1.5),
        spread(((GEO >= 0.95) & (GEO <= 1.5)).astype(float)),
    ),
}


@pytest.mark.parametrize("name", CORRECTIONS)
def test_corrections(name):
    function, expected = CORRECTIONS[name]
    np.testing.assert_allclose(function(DIRTY, MASK), expected, rtol=1e-5)
    assert np.unique(expected[M].round(3)).size > 1  # the fixture has both sides of every threshold
    assert np.abs(expected - np.asarray(function(-LOG, MASK))).max() > 0.05  # the inverse ratio is another weight
    np.testing.assert_array_equal(jax.grad(lambda x: function(x, MASK).sum())(LOG), np.zeros((3, 4)))


def test_the_interval_acts_on_the_ratio_and_not_on_its_inverse():
    # A peer compares -log w with [log low, log high]; with 0.6 and 1.4 that keeps 0.714 to 1.667 (errata F2.14).
    w = jnp.log(jnp.array([[0.65, 1.5, 1.0]]))
    kept = corrections.token_masked(w, jnp.ones((1, 3), bool), low=0.6, high=1.4)
    np.testing.assert_allclose(kept, [[0.65, 0.0, 1.0]], rtol=1e-6)


def test_on_policy_every_weight_is_one():
    zeros = jnp.zeros((2, 3))
    for function, _ in CORRECTIONS.values():
        np.testing.assert_array_equal(function(zeros, jnp.ones((2, 3), bool)), np.ones((2, 3)))


def test_bad_input_is_a_sentence(without_type_hook):
    with pytest.raises(TypeError, match=r"response_mask is float32\[3, 4\]; its dtype must be boolean"):
        ratios.token_ratio(LOG, jnp.ones((3, 4)))
    with pytest.raises(TypeError, match=r"log_ratio_t is list"):
        ratios.token_ratio([[0.1]], jnp.ones((1, 1), bool))


def test_k3_is_not_negative_at_any_log_ratio():
    x = jnp.array([-jnp.inf, -1e12, -1e9, -50.0, -20.0, -1.0, 0.0, 1.0, 20.0, 50.0, 1e9, jnp.inf])
    value, slope = jax.vmap(jax.value_and_grad(divergences.k3))(x)
    assert np.all(value >= 0)
    assert np.all(np.diff(value[:7]) <= 0)
    assert np.all(np.diff(value[6:]) >= 0)
    assert np.all(slope[:4] == 0)  # beyond the clamp; a slope of 1 would have the wrong sign
    assert np.all(slope[7:] > 0)
