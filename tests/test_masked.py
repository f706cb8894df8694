"""Masked reductions: a mask equals a slice, garbage under the mask cannot get out, and an empty mask gives zero."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_llm.masked import masked_count
from jaxrl_llm.masked import masked_max
from jaxrl_llm.masked import masked_mean
from jaxrl_llm.masked import masked_min
from jaxrl_llm.masked import masked_sum
from jaxrl_llm.masked import masked_sum_count
from jaxrl_llm.masked import safe_divide

X = np.array([[1.0, -2.0, 3.0, 5.0], [0.5, 7.0, -1.0, 2.0]], np.float32)
MASK = np.array([[1, 0, 1, 1], [0, 1, 0, 0]], bool)
GARBAGE = jnp.where(jnp.array(MASK), X, jnp.array([[0, jnp.nan, 0, 0], [jnp.inf, 0, -jnp.inf, jnp.nan]]))

REDUCTIONS = {
    "sum": (masked_sum, np.sum),
    "mean": (masked_mean, np.mean),
    "max": (masked_max, np.max),
    "min": (masked_min, np.min),
    "count": (masked_count, np.size),
}


@pytest.mark.parametrize("name", REDUCTIONS)
@pytest.mark.parametrize("axis", [None, 1])
def test_a_mask_equals_a_slice(name, axis):
    ours, theirs = REDUCTIONS[name]
    value = ours(GARBAGE, jnp.array(MASK), axis=axis)
    expected = theirs(X[MASK]) if axis is None else [theirs(row[keep]) for row, keep in zip(X, MASK, strict=True)]
    np.testing.assert_allclose(value, expected, rtol=1e-6)


@pytest.mark.parametrize("reduce", [masked_sum, masked_mean, masked_max, masked_min])
def test_gradient_is_zero_and_finite_under_the_mask(reduce):
    gradient = jax.grad(lambda x: reduce(x, jnp.array(MASK)))(GARBAGE)
    assert np.all(np.isfinite(gradient))
    assert np.all(np.asarray(gradient)[~MASK] == 0)
    assert np.any(np.asarray(gradient)[MASK] != 0)


def test_gradient_through_a_function_of_the_masked_values():
    # The usual trap: log of padding is -inf, its derivative infinite, and 0 * inf is NaN.
    x = jnp.where(jnp.array(MASK), 2.0, 0.0)
    safe = jax.grad(lambda x: masked_sum(jnp.log(jnp.where(jnp.array(MASK), x, 1.0)), jnp.array(MASK)))(x)
    assert np.all(np.isfinite(safe))


def test_empty_mask():
    none = jnp.zeros(MASK.shape, bool)
    assert float(masked_sum(GARBAGE, none)) == 0
    assert float(masked_mean(GARBAGE, none)) == 0
    assert float(masked_count(GARBAGE, none)) == 0
    assert float(masked_max(GARBAGE, none)) == -np.inf
    assert float(masked_min(GARBAGE, none)) == np.inf
    assert np.all(np.asarray(jax.grad(lambda x: masked_mean(x, none))(GARBAGE)) == 0)


def test_sums_and_counts_of_parts_add_up():
    whole = masked_sum_count(GARBAGE, jnp.array(MASK))
    parts = [masked_sum_count(GARBAGE[i], jnp.array(MASK[i])) for i in range(2)]
    np.testing.assert_allclose(whole[0], parts[0][0] + parts[1][0])
    np.testing.assert_allclose(whole[1], parts[0][1] + parts[1][1])
    # Dividing each part first, the mistake this form prevents, gives another number.
    assert abs(float(safe_divide(*whole)) - np.mean([float(safe_divide(*part)) for part in parts])) > 0.1


def test_a_mask_of_ones_axes_is_spread_before_it_is_counted():
    assert float(masked_count(jnp.ones((3, 4)), jnp.ones((3, 1), bool))) == 12


def test_safe_divide():
    total, count = jnp.array([3.0, 5.0]), jnp.array([2.0, 0.0])
    np.testing.assert_allclose(safe_divide(total, count), [1.5, 0.0])
    slopes = jax.grad(lambda c: jnp.sum(safe_divide(total, c)))(count)
    np.testing.assert_allclose(slopes, [-0.75, 0.0])


def test_keeps_the_dtype_and_works_under_vmap():
    half = masked_sum_count(jnp.ones((2, 3), jnp.bfloat16), jnp.ones((2, 3), bool))
    assert all(part.dtype == jnp.bfloat16 for part in half)
    rows = jax.vmap(masked_mean)(GARBAGE, jnp.array(MASK))
    np.testing.assert_allclose(rows, masked_mean(GARBAGE, jnp.array(MASK), axis=1))
