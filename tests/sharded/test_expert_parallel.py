"""Experts on the devices of a mesh axis say what they say on one device, whoever is chosen."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxrl_llm.models.config import ExpertsConfig
from jaxrl_llm.models.config import tiny
from jaxrl_llm.models.experts import Experts
from jaxrl_llm.models.lora import LoraSettings
from jaxrl_llm.models.lora import add_lora
from jaxrl_llm.models.numerics import Numerics
from jaxrl_llm.models.sharding import make_mesh
from jaxrl_llm.models.sharding import parse_mesh
from jaxrl_llm.models.sharding import partition_specs
from jaxrl_llm.models.sharding import shard
from jaxrl_llm.models.transformer import Transformer

SETTINGS = ExpertsConfig(count=8, chosen=2, width=16, shared=1)
MESHES = ({"fsdp": 2, "expert": 4}, {"data": 2, "expert": 2, "tensor": 2})

SELECTIONS = {
    "even": lambda token: np.stack([token % 8, (token + 3) % 8], -1),
    "all to two of one device": lambda token: np.stack([token * 0 + 5, token * 0 + 4], -1),
    "experts without tokens": lambda token: np.stack([token % 3, token % 3 + 5], -1),
}


def gradient_and_value(state, graphdef, x, selection):
    def loss(state, x):
        out, routes = nnx.merge(graphdef, state)(x, selection)
        return jnp.sum(jnp.sin(3 * out)) + jnp.sum(routes.scores**2), out

    return jax.value_and_grad(loss, (0, 1), has_aux=True)(state, x)


@pytest.fixture(scope="module")
def layer():
    return nnx.split(Experts(tiny(experts=SETTINGS), SETTINGS, Numerics(), nnx.Rngs(0)))


@pytest.mark.parametrize("mesh", MESHES, ids=lambda shape: "x".join(shape))
def test_value_and_gradients_are_those_of_one_device(layer, mesh):
    """Three rows are no multiple of the devices, nor are 15 tokens: nobody's rows fill them up."""
    graphdef, state = layer
    x = jax.random.normal(jax.random.key(1), (3, 5, 32))
    step = jax.jit(lambda state, x, selection: gradient_and_value(state, graphdef, x, selection))
    mesh = make_mesh(**mesh)
    for choose in SELECTIONS.values():
        selection = jnp.asarray(choose(np.arange(15)).reshape(3, 5, 2), jnp.int32)
        expected = step(state, x, selection)
        with jax.set_mesh(mesh):
            got = step(shard(state, mesh), x, selection)
        for one, other in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
            np.testing.assert_allclose(one, other, rtol=0, atol=1e-5 * max(1.0, float(jnp.abs(other).max())))


def test_each_device_holds_its_experts_and_the_exchange_is_two_collectives(layer):
    graphdef, state = layer
    mesh = make_mesh(fsdp=2, expert=4)
    specs = partition_specs(state, mesh)
    assert specs["gate"]["kernel"].get_value() == jax.P("expert", "fsdp", None)
    assert specs["shared"]["up"]["kernel"].get_value() == jax.P(("fsdp", "expert"), None)
    x = jnp.zeros((8, 4, 32))

    def text(mesh):
        with jax.set_mesh(mesh):
            return jax.jit(lambda state, x: nnx.merge(graphdef, state)(x)[0]).lower(state, x).as_text()

    assert "reduce_scatter" in text(mesh)
    assert "all_gather" not in text(make_mesh(fsdp=8)), "nothing changes without the axis"


def test_adapters_of_experts_are_spread_as_their_kernels():
    settings = LoraSettings(rank=2, projections=("gate", "up", "down"))
    model = Transformer(tiny(num_layers=1, experts=SETTINGS), rngs=nnx.Rngs(0))
    model = add_lora(model, settings, rngs=nnx.Rngs(1))
    graphdef, state = nnx.split(model)
    state = jax.tree.map(lambda leaf: leaf + 0.01, state)  # B is zero at the start
    tokens = jax.random.randint(jax.random.key(0), (8, 4), 0, 64)

    def loss(state):
        return jnp.sum(jnp.sin(nnx.merge(graphdef, state)(tokens)))

    expected, mesh = jax.jit(jax.grad(loss))(state), make_mesh(fsdp=2, expert=2, tensor=2)
    with jax.set_mesh(mesh):
        got = jax.jit(jax.grad(loss))(shard(state, mesh))
    for one, other in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=2e-5 * max(1.0, float(jnp.abs(other).max())))


def test_an_axis_that_does_not_divide_the_experts_is_refused():
    config = tiny(experts=ExpertsConfig(count=6, chosen=2, width=16))
    with pytest.raises(ValueError, match=r"expert is 4; it must divide experts.count, which is 6 in this model"):
        parse_mesh("expert=4", config)
    model = Transformer(config, rngs=nnx.Rngs(0))
    with jax.set_mesh(make_mesh(expert=4)), pytest.raises(ValueError, match=r"expert is 4; it must divide"):
        jax.eval_shape(lambda: model(jnp.zeros((4, 4), jnp.int32)))
