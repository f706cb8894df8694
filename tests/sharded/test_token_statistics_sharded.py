"""With tokens sharded over eight devices, values and gradients are those of one device."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxrl_kernels import Reference
from jaxrl_kernels import token_loss
from jaxrl_kernels import token_statistics
from tests.kernels import head_oracle as oracle

ROWS = 48


def functions():
    """Summed losses through either op, as functions of arrays that may be sharded."""

    def score(values, weight):
        total = values.log_prob + values.entropy**2 + values.kl + values.collision + values.total_variation
        return weight * total

    def by_statistics(hidden, head, hidden_ref, head_ref, targets, weight):
        values = token_statistics(
            hidden, head, targets, reference=Reference(hidden_ref, head_ref), implementation="xla", block=64
        )
        return jnp.sum(score(values, weight)), jnp.sum(jnp.ones_like(weight))

    def by_loss(hidden, head, hidden_ref, head_ref, targets, weight):
        return token_loss(
            hidden,
            head,
            targets,
            score,
            weight,
            reference=Reference(hidden_ref, head_ref),
            implementation="xla",
            block=64,
        )

    return {"token_statistics": by_statistics, "token_loss": by_loss}


def case():
    inputs = oracle.make_inputs(rows=ROWS)
    weight = jnp.asarray(np.random.default_rng(2).standard_normal(ROWS), jnp.float32)
    return (*inputs.arrays(), inputs.tokens, weight)


def mesh():
    assert jax.device_count() == 8
    return Mesh(np.array(jax.devices()), ("data",))


SPECS = (P("data"), P(), P("data"), P(), P("data"), P("data"))


@pytest.mark.parametrize("op", ["token_statistics", "token_loss"])
def test_compiler_sharding(op):
    arguments = case()
    function = functions()[op]
    gradient = jax.value_and_grad(function, (0, 1), has_aux=True)
    wanted = jax.jit(gradient)(*arguments)
    assert jnp.abs(wanted[1][1]).max() > 0.1
    devices = mesh()
    placed = [jax.device_put(x, NamedSharding(devices, spec)) for x, spec in zip(arguments, SPECS, strict=True)]
    actual = jax.jit(gradient)(*placed)
    assert actual[1][0].sharding.is_equivalent_to(NamedSharding(devices, P("data")), 2)
    for value, right in zip(jax.tree.leaves(actual), jax.tree.leaves(wanted), strict=True):
        assert oracle.error(value, right) < 1e-5


@pytest.mark.parametrize("op", ["token_statistics", "token_loss"])
def test_shard_map(op):
    arguments = case()
    function = functions()[op]
    wanted = jax.jit(jax.value_and_grad(function, (0, 1), has_aux=True))(*arguments)

    def local(*arrays):
        return jax.tree.map(lambda x: jax.lax.psum(x, "data"), function(*arrays))

    spread = jax.shard_map(local, mesh=mesh(), in_specs=SPECS, out_specs=(P(), P()))
    actual = jax.jit(jax.value_and_grad(spread, (0, 1), has_aux=True))(*arguments)
    for value, right in zip(jax.tree.leaves(actual), jax.tree.leaves(wanted), strict=True):
        assert oracle.error(value, right) < 1e-5
