import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_llm.checks import require_batch_values
from jaxrl_llm.objectives.advantages import batch_centred
from jaxrl_llm.objectives.advantages import batch_normalised
from jaxrl_llm.objectives.advantages import generalised_advantage_estimation
from jaxrl_llm.objectives.advantages import group_centred
from jaxrl_llm.objectives.advantages import group_centred_batch_normalised
from jaxrl_llm.objectives.advantages import group_normalised
from jaxrl_llm.objectives.advantages import group_size
from jaxrl_llm.objectives.advantages import informative_groups
from jaxrl_llm.objectives.advantages import leave_one_out

REWARDS = np.array([1.0, 0.0, 0.5, 0.25, 1.0, 3.0, 0.7], np.float32)
IDS = np.array([12, -4, 12, 12, -4, -4, 900001])  # interleaved, uneven, one alone
BY_GROUP = [group_normalised, group_centred, leave_one_out]


def by_hand(formula):
    out = np.zeros(len(REWARDS))
    for i, own in enumerate(IDS):
        group = REWARDS[own == IDS].astype(np.float64)
        others = np.delete(REWARDS, i)[np.delete(IDS, i) == own].astype(np.float64)
        out[i] = formula(REWARDS[i], group, others) if len(group) > 1 else 0.0
    return out


@pytest.mark.parametrize(
    ("function", "formula"),
    [
        (group_centred, lambda r, g, o: r - g.mean()),
        (group_normalised, lambda r, g, o: (r - g.mean()) / g.std(ddof=1)),
        (lambda r, i: group_normalised(r, i, ddof=0), lambda r, g, o: (r - g.mean()) / g.std(ddof=0)),
        (leave_one_out, lambda r, g, o: r - o.mean()),
    ],
    ids=["centred", "normalised ddof 1", "normalised ddof 0", "leave one out"],
)
def test_equals_the_formula_group_by_group(function, formula):
    value = np.asarray(jax.jit(function)(jnp.array(REWARDS), jnp.array(IDS)))
    np.testing.assert_allclose(value, by_hand(formula), rtol=2e-5, atol=1e-6)
    assert np.abs(value + by_hand(formula)).max() > 0.5  # the other sign


@pytest.mark.parametrize("function", BY_GROUP)
def test_order_and_labels_of_groups_do_not_matter(function):
    order = np.random.default_rng(0).permutation(len(REWARDS))
    value = np.asarray(function(jnp.array(REWARDS), jnp.array(IDS)))
    moved = function(jnp.array(REWARDS[order]), jnp.array(IDS[order]))
    np.testing.assert_allclose(moved, value[order], rtol=1e-6)
    relabelled = np.select([IDS == 12, IDS == -4], [0, 7], 3)
    np.testing.assert_allclose(function(jnp.array(REWARDS), jnp.array(relabelled)), value, rtol=1e-6)


@pytest.mark.parametrize("function", BY_GROUP)
def test_equal_rewards_give_exactly_zero(function):
    # 0.1 has no exact float32, and the mean of seven of them can miss it by one rounding.
    value = function(jnp.full(7, 0.1), jnp.array(IDS))
    np.testing.assert_array_equal(value, np.zeros(7))
    # Groups of every size up to 24 and of three rewards, in one batch.
    sizes = np.repeat(np.arange(1, 25), 3)
    rewards = np.repeat(np.tile(np.float32([0.1, 0.7, 1 / 3]), 24), sizes)
    ids = np.repeat(np.arange(len(sizes)), sizes)
    means = jnp.array(
        [np.float32(jnp.sum(jnp.asarray(rewards[ids == i]))) / np.float32(n) for i, n in enumerate(sizes)]
    )
    assert np.sum(np.asarray(means)[ids] != rewards) > 20  # so it matters that equality is tested
    np.testing.assert_array_equal(function(jnp.asarray(rewards), jnp.asarray(ids)), np.zeros(len(ids)))


@pytest.mark.parametrize("function", BY_GROUP)
def test_a_group_of_one_has_advantage_zero(function):
    assert float(function(jnp.array(REWARDS), jnp.array(IDS))[-1]) == 0


def test_normalised_advantages_have_unit_spread_whatever_the_scale():
    for scale in (1e-6, 1.0, 1e6):
        value = np.asarray(group_normalised(scale * jnp.array(REWARDS[:6]), jnp.zeros(6, int)))
        np.testing.assert_allclose(value.std(ddof=1), 1.0, rtol=1e-4)


def test_leave_one_out_is_the_scaled_centred_advantage():
    sizes = np.asarray(group_size(jnp.array(REWARDS), jnp.array(IDS)))
    np.testing.assert_array_equal(sizes, [3, 3, 3, 3, 3, 3, 1])
    value = leave_one_out(jnp.array(REWARDS), jnp.array(IDS))
    np.testing.assert_allclose(value, 1.5 * group_centred(jnp.array(REWARDS), jnp.array(IDS)), rtol=1e-5)


def test_informative_groups():
    rewards = jnp.array([1.0, 1.0, 0.0, 1.0, 0.3])
    np.testing.assert_array_equal(
        informative_groups(rewards, jnp.array([5, 5, 8, 8, 1])), [False, False, True, True, False]
    )


def test_batch_forms():
    r = REWARDS.astype(np.float64)
    np.testing.assert_allclose(batch_centred(jnp.array(REWARDS)), r - r.mean(), atol=1e-6)
    np.testing.assert_allclose(batch_normalised(jnp.array(REWARDS)), (r - r.mean()) / r.std(ddof=1), atol=1e-5)
    centred = by_hand(lambda r, g, o: r - g.mean())
    expected = (centred - centred.mean()) / centred.std(ddof=1)
    value = group_centred_batch_normalised(jnp.array(REWARDS), jnp.array(IDS))
    np.testing.assert_allclose(value, expected, atol=1e-5)


def test_generalised_advantage_estimation_against_the_definition():
    rng = np.random.default_rng(1)
    rewards, values = rng.normal(size=(2, 6)).astype(np.float32), rng.normal(size=(2, 6)).astype(np.float32)
    mask = np.array([[0, 1, 1, 0, 1, 0], [1, 1, 0, 0, 0, 0]], bool)  # a hole: a tool's answer inside a response
    discount, trace = 0.9, 0.7
    dirty = [jnp.where(jnp.array(mask), jnp.array(x), jnp.nan) for x in (rewards, values)]
    advantages, returns = generalised_advantage_estimation(*dirty, jnp.array(mask), discount=discount, trace=trace)
    for row in range(2):
        steps = np.flatnonzero(mask[row])
        r, v = rewards[row, steps].astype(np.float64), np.append(values[row, steps].astype(np.float64), 0.0)
        delta = r + discount * v[1:] - v[:-1]
        expected = [sum((discount * trace) ** (j - i) * delta[j] for j in range(i, len(r))) for i in range(len(r))]
        np.testing.assert_allclose(np.asarray(advantages)[row, steps], expected, rtol=1e-4, atol=1e-6)
        np.testing.assert_allclose(np.asarray(returns)[row, steps], expected + v[:-1], rtol=1e-4, atol=1e-6)
    assert np.all(np.asarray(advantages)[~mask] == 0)
    assert np.all(np.asarray(returns)[~mask] == 0)


def test_trace_one_is_monte_carlo_minus_value():
    rewards, values, mask = jnp.array([[0.0, 0.0, 2.0]]), jnp.array([[0.3, 0.5, 0.1]]), jnp.ones((1, 3), bool)
    advantages, _ = generalised_advantage_estimation(rewards, values, mask)
    np.testing.assert_allclose(advantages, 2.0 - values, rtol=1e-6)


def test_bad_input_is_a_sentence(without_type_hook):
    with pytest.raises(ValueError, match=r"rewards is float32\[2, 2\]; it must have 1 axes \[B\]"):
        group_centred(jnp.ones((2, 2)), jnp.ones((2, 2), int))
    with pytest.raises(TypeError, match=r"rewards is int32\[3\]; its dtype must be floating"):
        group_centred(jnp.ones(3, int), jnp.ones(3, int))
    with pytest.raises(ValueError, match="their shapes must be equal"):
        group_centred(jnp.ones(3), jnp.ones(2, int))
    with pytest.raises(ValueError, match="ddof is 2"):
        group_normalised(jnp.ones(3), jnp.ones(3, int), ddof=2)


def test_values_of_a_batch_are_checked_before_a_run():
    good = {"rewards": jnp.ones(3), "response_mask": jnp.ones((3, 2), bool), "group_ids": jnp.array([1, 1, 2])}
    require_batch_values(**good)
    with pytest.raises(ValueError, match=r"rewards\[1\] is nan; every reward must be finite"):
        require_batch_values(**{**good, "rewards": jnp.array([1.0, jnp.nan, 0.0])})
    with pytest.raises(ValueError, match=r"response_mask\[2\] is empty"):
        require_batch_values(**{**good, "response_mask": jnp.array([[1, 0], [1, 1], [0, 0]], bool)})
    with pytest.raises(ValueError, match=r"a group \(id 2\) of 1 sequences"):
        require_batch_values(**good, minimum_group_size=2)
    with pytest.raises(TypeError, match="rewards is a tracer"):
        jax.jit(lambda r: require_batch_values(**{**good, "rewards": r}))(jnp.ones(3))
