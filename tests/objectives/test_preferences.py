"""Losses of pairs against loops over rows, and what groups, masks and equal rewards do."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_llm.objectives import distillation
from jaxrl_llm.objectives import likelihood
from jaxrl_llm.objectives import preferences

B, R = 7, 4
GROUPS = np.array([5, 2, 5, 2, 5, 9, 5])
REWARDS = np.array([1.0, 0.0, 0.5, 0.3, 0.5, 0.7, 0.9], np.float32)
LENGTHS = np.array([4, 2, 3, 1, 2, 4, 0])  # the last row is none


def batch():
    rng = np.random.default_rng(6)
    mask = np.arange(R) < LENGTHS[:, None]
    log_prob, ref = (-rng.exponential(1.0, (B, R)).astype(np.float32) for _ in range(2))
    return [jnp.asarray(x) for x in (log_prob, ref, mask, GROUPS, REWARDS)]


def log_ratios():
    log_prob, ref, mask, *_ = (np.asarray(x) for x in batch())
    return np.array([sum(float(log_prob[i, t]) - float(ref[i, t]) for t in range(R) if mask[i, t]) for i in range(B)])


PAIRS = [(0, 2), (0, 4), (3, 1)]
"""(preferred, other): 2 and 4 are equal, 5 is alone, 6 has no token."""


def test_pairs_are_the_rows_of_a_group_with_more_and_with_less():
    *_, mask, groups, rewards = batch()
    found = np.asarray(preferences.preferred(rewards, groups, mask))
    assert list(zip(*np.nonzero(found), strict=True)) == PAIRS
    np.testing.assert_array_equal(preferences.dropped_pairs(rewards, groups, mask), (1.0, 4.0))
    # NaN is above and below nothing: its pairs are dropped, and counted.
    np.testing.assert_array_equal(preferences.dropped_pairs(rewards.at[0].set(jnp.nan), groups, mask), (3.0, 4.0))


def test_losses_equal_loops_over_pairs():
    s, given = log_ratios(), batch()
    dpo = sum(math.log(1 + math.exp(-0.3 * (s[i] - s[j]))) for i, j in PAIRS)
    ipo = sum(((s[i] - s[j]) - 1 / (2 * 0.3)) ** 2 for i, j in PAIRS)
    np.testing.assert_allclose(preferences.dpo(*given, beta=0.3), (dpo, 3.0), rtol=1e-5)
    np.testing.assert_allclose(preferences.ipo(*given, tau=0.3), (ipo, 3.0), rtol=1e-5)
    # Preferring the other side is another loss, and so is a mean over tokens.
    flipped = [*given[:4], -given[4]]
    assert abs(float(preferences.dpo(*flipped, beta=0.3)[0]) - dpo) > 0.01
    assert abs(float(preferences.ipo(*flipped, tau=0.3)[0]) - ipo) > 0.1


def test_gradients_push_the_preferred_up():
    given = batch()
    for loss in (preferences.dpo, preferences.ipo):
        close = [given[1], *given[1:]]  # at the reference every pair pulls with all it has
        slope = np.asarray(jax.grad(lambda x, f=loss, g=close: f(x, *g[1:])[0])(close[0]))
        mask = np.asarray(given[2])
        assert np.all(slope[0][mask[0]] < 0)
        assert np.all(slope[[2, 4]][mask[[2, 4]]] > 0)
        assert np.all(slope[3][mask[3]] < 0)
        assert np.all(slope[1][mask[1]] > 0)
        np.testing.assert_array_equal(slope[[5, 6]], 0)
        np.testing.assert_array_equal(slope[~mask], 0)


def test_metrics_say_what_they_are():
    s, given = log_ratios(), batch()
    metrics = preferences.preference_metrics(*given, beta=0.3)
    expected = {
        "accuracy": sum(s[i] > s[j] for i, j in PAIRS),
        "margin": 0.3 * sum(s[i] - s[j] for i, j in PAIRS),
        "log_ratio_preferred": sum(s[i] for i, _ in PAIRS),
        "log_ratio_other": sum(s[j] for _, j in PAIRS),
    }
    assert set(metrics) == {*expected, "dropped"}
    for name, total in expected.items():
        np.testing.assert_allclose(metrics[name], (total, 3.0), rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(metrics["dropped"], (1.0, 4.0))
    assert 0 < expected["accuracy"] < 3
    slope = jax.grad(lambda x: sum(m[0] for m in preferences.preference_metrics(x, *given[1:]).values()))(given[0])
    np.testing.assert_array_equal(slope, np.zeros((B, R)))


LOSSES = {
    "dpo": preferences.dpo,
    "ipo": preferences.ipo,
    "negative_log_likelihood": lambda log_prob, ref, mask, groups, rewards: likelihood.negative_log_likelihood(
        log_prob, mask
    ),
    "forward_kl": lambda log_prob, ref, mask, groups, rewards: distillation.forward_kl(-log_prob, mask),
    "reverse_kl": lambda log_prob, ref, mask, groups, rewards: distillation.reverse_kl(-log_prob, mask),
}


@pytest.mark.parametrize("name", LOSSES)
def test_batches_that_keep_groups_whole_add_up_and_padding_is_nothing(name):
    loss, given = LOSSES[name], batch()

    def both(arrays):
        value, slope = jax.value_and_grad(lambda x: loss(x, *arrays[1:])[0])(arrays[0])
        return np.asarray(value), np.asarray(slope), np.asarray(loss(*arrays)[1])

    whole = both(given)
    parts = [np.flatnonzero(np.isin(GROUPS, ids)) for ids in ((5,), (2, 9))]
    cut = [both([x[rows] for x in given]) for rows in parts]
    np.testing.assert_allclose(sum(x[0] for x in cut), whole[0], rtol=1e-5)
    np.testing.assert_allclose(sum(x[2] for x in cut), whole[2])
    for rows, (_, slope, _) in zip(parts, cut, strict=True):
        np.testing.assert_allclose(slope, whole[1][rows], rtol=1e-5, atol=1e-7)
    # Order of rows does not matter; what is masked may be anything, also in the gradient.
    order = np.array([4, 6, 1, 0, 5, 3, 2])
    np.testing.assert_allclose(both([x[order] for x in given])[0], whole[0], rtol=1e-5)
    dirty = [jnp.where(given[2], x, jnp.nan) for x in given[:2]]
    for one, other in zip(both([*dirty, *given[2:]]), whole, strict=True):
        np.testing.assert_array_equal(one, other)
    nothing = both([*dirty, jnp.zeros_like(given[2]), *given[3:]])
    assert nothing[0] == 0
    assert nothing[2] == 0
    np.testing.assert_array_equal(nothing[1], np.zeros((B, R)))


def test_far_margins_stay_finite():
    given = batch()
    for far in itertools.product((-3e4, 3e4), (0.1, 5.0)):
        moved = [given[0].at[0].set(far[0]), *given[1:]]
        value, slope = jax.value_and_grad(lambda x, g=moved, b=far[1]: preferences.dpo(x, *g[1:], beta=b)[0])(moved[0])
        assert np.isfinite(value)
        assert np.isfinite(slope).all()


def test_a_weight_of_nothing_is_refused():
    with pytest.raises(ValueError, match="beta is 0; it must be at least 1e-30"):
        preferences.dpo(*batch(), beta=0)
    with pytest.raises(ValueError, match=r"tau is -1.0; it must be at least 1e-30"):
        preferences.ipo(*batch(), tau=-1.0)


@pytest.mark.parametrize("name", ["dpo", "ipo"])
@pytest.mark.parametrize("side", [0, 1])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_row_of_no_pair_reaches_no_gradient(name, side, value):
    given = batch()
    expected = jax.grad(lambda x: LOSSES[name](x, *given[1:])[0])(given[0])
    given[side] = given[side].at[5, 0].set(value)  # alone in its group
    slope = jax.grad(lambda x: LOSSES[name](x, *given[1:])[0])(given[0])
    np.testing.assert_array_equal(slope, expected)
