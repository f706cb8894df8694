"""Loads, their measures and the two ways to even them out, against loops in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_llm.objectives.balance import balance_metrics
from jaxrl_llm.objectives.balance import expert_loads
from jaxrl_llm.objectives.balance import sequence_balance_loss
from jaxrl_llm.objectives.balance import updated_router_bias

ROWS, LENGTH, EXPERTS, CHOSEN = 3, 6, 5, 2
MASK = np.arange(LENGTH) < np.array([[6], [4], [0]])


@pytest.fixture(scope="module")
def batch() -> tuple[np.ndarray, np.ndarray]:
    """Scores and selections; what stands at padding is no expert and no number."""
    random = np.random.default_rng(0)
    scores = random.uniform(0.1, 1, (ROWS, LENGTH, EXPERTS)).astype(np.float32)
    selection = np.argsort(-scores * [3, 2, 1, 1, 1], axis=-1)[..., :CHOSEN].astype(np.int32)
    scores[~MASK], selection[~MASK] = np.nan, 99
    return scores, selection


def test_loads_count_real_tokens(batch) -> None:
    _, selection = batch
    expected = np.bincount(selection[MASK].reshape(-1), minlength=EXPERTS)
    found = expert_loads(jnp.asarray(selection), jnp.asarray(MASK), num_experts=EXPERTS)
    np.testing.assert_array_equal(found, expected)
    assert float(found.sum()) == CHOSEN * MASK.sum()


@pytest.mark.parametrize(
    ("loads", "expected"),
    [
        ([4, 4, 4, 4], (0, 1, 0)),
        ([16, 0, 0, 0], (3, 0, 3)),
        ([8, 8, 0, 0], (1, 0.5, 2)),
        ([0, 0, 0, 0], (0, 0, 0)),
    ],
)
def test_measures_of_loads(loads: list[float], expected: tuple[float, float, float]) -> None:
    np.testing.assert_allclose(balance_metrics(jnp.array(loads, jnp.float32)), expected, atol=1e-6)


def test_the_bias_of_a_busy_expert_falls_and_the_mean_stays_zero() -> None:
    bias = jnp.array([0.5, -0.5, 0.25, -0.25])
    moved = updated_router_bias(bias, jnp.array([9.0, 1, 5, 1]), rate=0.125)
    np.testing.assert_allclose(moved, bias + jnp.array([-0.125, 0.125, -0.125, 0.125]), atol=1e-7)
    uneven = updated_router_bias(bias, jnp.array([10.0, 2, 2, 2]), rate=0.125)
    np.testing.assert_allclose(uneven - bias, [-0.1875, 0.0625, 0.0625, 0.0625], atol=1e-7)
    np.testing.assert_array_equal(updated_router_bias(bias + 1, jnp.array([9.0, 1, 5, 1]), rate=0.0), bias + 1)


def test_the_rule_evens_out_skewed_scores() -> None:
    """Scores that favour the first experts: the violation falls below a tenth of what it was."""
    scores = jax.random.uniform(jax.random.key(0), (1, 400, 8)) + jnp.linspace(1, 0, 8)[None, None]

    def step(bias, _):
        selection = jax.lax.top_k(scores + bias[None, None], 2)[1]
        loads = expert_loads(selection, jnp.ones((1, 400), bool), num_experts=8)
        return updated_router_bias(bias, loads, rate=0.01), balance_metrics(loads).violation

    violations = jax.lax.scan(step, jnp.zeros(8), length=150)[1]
    assert violations[0] > 1
    assert violations[-1] < 0.1 * violations[0]


def test_the_loss_of_sequences_equals_a_loop(batch) -> None:
    scores, selection = batch
    expected = 0.0
    for row in range(ROWS):
        real = MASK[row]
        if real.any():
            chosen = np.bincount(selection[row][real].reshape(-1), minlength=EXPERTS)
            share = EXPERTS / (CHOSEN * real.sum()) * chosen
            wide = scores[row][real].astype(np.float64)
            expected += float(share @ (wide / wide.sum(1, keepdims=True)).mean(0))
    given = jnp.asarray(selection), jnp.asarray(MASK)
    loss = jax.value_and_grad(lambda scores: sequence_balance_loss(scores, *given), has_aux=True)
    (found, count), slope = loss(jnp.asarray(scores))
    assert found == pytest.approx(expected, rel=1e-5)
    assert count == 2
    assert np.isfinite(slope).all()
    assert not np.asarray(slope)[~MASK].any()
    # The expert that was chosen most has its scores lowered, the one chosen least has them raised.
    loads = np.bincount(selection[0].reshape(-1), minlength=EXPERTS)
    assert slope[0, :, loads.argmax()].sum() > 0 > slope[0, :, loads.argmin()].sum()


def test_even_loads_cost_one_and_one_expert_for_all_costs_most() -> None:
    mask = jnp.ones((1, 4), bool)
    even = jnp.array([[[0, 1], [2, 3], [0, 1], [2, 3]]])
    assert sequence_balance_loss(jnp.full((1, 4, 4), 0.5), even, mask)[0] == pytest.approx(1)
    sharp = jnp.tile(jnp.array([1.0, 1.0, 0, 0]), (1, 4, 1))
    assert sequence_balance_loss(sharp, jnp.array([[[0, 1]] * 4]), mask)[0] == pytest.approx(2)


def test_scores_that_underflow_are_even() -> None:
    selection, mask = jnp.zeros((1, 1, 1), jnp.int32), jnp.ones((1, 1), bool)
    assert sequence_balance_loss(jnp.zeros((1, 1, 4)), selection, mask)[0] == 0


def test_no_experts_are_refused() -> None:
    with pytest.raises(ValueError, match="num_experts is 0; it must be at least 1"):
        expert_loads(jnp.zeros((1, 2, 1), int), jnp.ones((1, 2), bool), num_experts=0)
