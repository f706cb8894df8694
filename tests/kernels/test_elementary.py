"""e^x - 1 and e^x - 1 - x in float32 against float64: near zero, on both sides of the switch to the series, far out."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_kernels._token_statistics import elementary

NEAR_ZERO = np.geomspace(1e-8, 1e-2, 200)
AROUND_THE_SWITCH = np.unique(
    np.concatenate([elementary.NEAR + np.arange(-50, 51) * 2.0**-24, np.linspace(0.3, 0.7, 401)])
)
FAR = np.concatenate([np.linspace(1.0, 80.0, 200), [100.0, 1e4]])


def excess(x):
    """phi in float64: below 0.1 by its series, 18 terms."""
    terms, total = np.ones_like(x), np.zeros_like(x)
    for k in range(1, 20):
        terms = terms * x / k
        total = total + (terms if k > 1 else 0)
    return np.where(np.abs(x) < 0.1, total, np.expm1(x) - x)


def units(found, right):
    """Largest error in units of the last place of the right value."""
    return np.max(np.abs(found.astype(np.float64) - right) / np.spacing(np.abs(right).astype(np.float32)))


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("sizes", [NEAR_ZERO, AROUND_THE_SWITCH, FAR], ids=["near-zero", "switch", "far"])
@pytest.mark.parametrize(("function", "definition"), [(elementary.expm1, np.expm1), (elementary.excess, excess)])
def test_a_few_roundings(function, definition, sizes, sign):
    x = (sign * sizes).astype(np.float32)
    x = x[x < 88]  # above, e^x is beyond float32
    found, right = np.asarray(jax.jit(function)(jnp.asarray(x))), definition(x.astype(np.float64))
    assert found.dtype == np.float32
    # Just above the switch the plain form of phi has lost three bits.
    assert units(found, right) <= (8 if function is elementary.excess and sizes is AROUND_THE_SWITCH else 2)
    if sizes is NEAR_ZERO:
        assert units(np.exp(x) - 1 - (x if function is elementary.excess else 0), right) > 1000


@pytest.mark.parametrize("function", [elementary.expm1, elementary.excess])
def test_zero_is_exact(function):
    assert float(function(jnp.zeros(()))) == 0
