"""Every public function of bounds under jit, vmap and grad, and lowered for accelerators that are not here."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export

from jaxrl_llm.bounds import BOUND_NAMES
from jaxrl_llm.bounds import SHARP
from jaxrl_llm.bounds import BoundInputs
from jaxrl_llm.bounds import largest_max_kl
from jaxrl_llm.bounds.inverse import LARGEST
from jaxrl_llm.bounds.surrogate_error import PRINTED
from tests.public_calls import FUNCTIONS
from tests.public_calls import call
from tests.public_calls import good_call

NAMES = [name for name in FUNCTIONS if name.startswith("bounds.")]
NO_SLOPE = (
    "bounds.masked_guarantee.context_mask",
    "bounds.masked_guarantee.sampled_hit_probability",
    "bounds.sampled.sampled_worst_surrogate_error",
    "bounds.sampled.sampled_sequence_tv_one_sided",
)
"""What counts, or is constant where all ratios are above 1."""


def floats_of(name):
    """(function of its floating arguments alone, those arguments as arrays)."""
    arguments, _ = good_call(name)
    moving = {}
    for key, value in arguments.items():
        array = getattr(value, "dtype", None)
        if isinstance(value, (float, BoundInputs)) or (array is not None and jnp.issubdtype(array, jnp.floating)):
            moving[key] = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), value)
    fixed = {key: value for key, value in arguments.items() if key not in moving}

    def function(moving):
        result = call(name, {**fixed, **moving})
        return [x for x in jax.tree.leaves(result) if hasattr(x, "dtype")]

    return function, moving


@pytest.mark.parametrize("name", NAMES)
def test_jit_vmap_grad_and_lowering(name):
    function, moving = floats_of(name)
    plain = function(moving)
    assert plain
    twice = jax.tree.map(lambda x: jnp.stack([x, x]), moving)
    for one, other in zip(plain, jax.jit(jax.vmap(function))(twice), strict=True):
        if not jnp.issubdtype(one.dtype, jnp.floating):
            continue  # which bound is the smallest may be decided by a rounding
        np.testing.assert_allclose(np.asarray(other[1], float), np.asarray(one, float), rtol=1e-4, atol=1e-6)

    def total(moving):
        numbers = [x for x in function(moving) if jnp.issubdtype(x.dtype, jnp.floating)]
        return sum((jnp.sum(jnp.where(jnp.isfinite(x), x, 0.0)) for x in numbers), jnp.zeros(()))

    slopes = jax.tree.leaves(jax.jit(jax.grad(total))(moving))
    assert all(bool(jnp.all(jnp.isfinite(slope))) for slope in slopes)
    if name not in NO_SLOPE and moving:
        assert any(bool(jnp.any(slope != 0)) for slope in slopes)
    lowered = export.export(jax.jit(function), platforms=("tpu", "cuda"))(moving)
    assert set(lowered.platforms) == {"tpu", "cuda"}


def test_every_bound_is_in_the_table():
    assert {f"bounds.surrogate_error.{name}_sharp" for name in BOUND_NAMES} <= set(NAMES)
    assert all(inspect.isfunction(FUNCTIONS[name]) for name in NAMES)


@pytest.mark.parametrize(("table", "name"), [(t, n) for t in (PRINTED, SHARP) for n in t])
def test_the_inverse_of_every_bound(table, name):
    # The largest delta that keeps the bound below a target: met there, and not a percent beyond.
    bound, horizon, target = table[name], 64, 0.05
    delta = float(jax.jit(lambda t: largest_max_kl(bound, target=t, horizon=horizon))(target))
    assert 0 < delta < LARGEST
    slope = float(jax.jit(jax.grad(lambda t: largest_max_kl(bound, target=t, horizon=horizon)))(target))
    ahead = float(largest_max_kl(bound, target=1.01 * target, horizon=horizon))
    np.testing.assert_allclose(slope, (ahead - delta) / (0.01 * target), rtol=0.05)
    from_scalars = FUNCTIONS["bounds.inputs.bound_inputs_from_scalars"]
    assert float(bound(from_scalars(max_kl=delta, horizon=horizon))) <= target * (1 + 1e-4)
    assert float(bound(from_scalars(max_kl=1.01 * delta, horizon=horizon))) > target
