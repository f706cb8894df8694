"""Scanned layers are the layers one after the other, in a program that does not grow with their number."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxrl_llm.models.attention import Visibility
from jaxrl_llm.models.config import ExpertsConfig
from jaxrl_llm.models.config import tiny
from jaxrl_llm.models.experts import RouterBias
from jaxrl_llm.models.lora import LoraSettings
from jaxrl_llm.models.lora import add_lora
from jaxrl_llm.models.transformer import positions_of

EXPERTS = ExpertsConfig(count=4, chosen=2, width=16, shared=1, dense_layers=2)
TOKENS = jnp.arange(12).reshape(2, 6)
MASK = jnp.arange(6)[None] >= jnp.array([[0], [2]])


def through(model, *, selections=None, start=0, **options):
    x, positions = model.embed(TOKENS), positions_of(MASK)
    return model.rows(x, positions, Visibility(MASK), start=start, selections=selections, **options)


@pytest.fixture(scope="module")
def split(random_transformer):
    model = random_transformer(tiny(num_layers=5, experts=EXPERTS))
    # Adapters in the upper four: one dense layer without, one with, three with experts.
    model = add_lora(model, LoraSettings(rank=2), rngs=nnx.Rngs(0), first_layer=1)
    graphdef, state = nnx.split(model)
    return graphdef, jax.tree.map(lambda leaf: leaf + 0.01, state)


GIVEN = [jnp.full((2, 6, 2), layer).at[..., 1].set(3) for layer in range(2)]


@pytest.mark.parametrize(
    "options",
    [{"remat": True}, {"start": 3, "selections": GIVEN}],
    ids=["all layers, recomputed", "upper layers, experts given"],
)
def test_values_gradients_and_routes_are_those_of_the_layers_one_after_the_other(split, options):
    graphdef, state = split

    def loss(state, scan):
        passed = through(nnx.merge(graphdef, state), scan=scan, **options)
        scores = [jnp.sum(routes.scores**2) for routes in passed.routes if routes is not None]
        return jnp.sum(jnp.sin(passed.x), where=MASK[..., None]) + sum(scores), passed.routes

    both = jax.jit(lambda state: [jax.value_and_grad(loss, has_aux=True)(state, scan) for scan in (False, True)])
    ((expected, routes), gradient), ((got, got_routes), got_gradient) = both(state)
    np.testing.assert_allclose(got, expected, rtol=1e-6)
    assert [one is None for one in got_routes] == [one is None for one in routes]
    for one, other in zip(jax.tree.leaves(got_routes), jax.tree.leaves(routes), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5)
    for one, other in zip(jax.tree.leaves(got_gradient), jax.tree.leaves(gradient), strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=1e-5 * max(1.0, float(jnp.abs(other).max())))


def test_a_program_has_as_many_products_for_eight_layers_as_for_two(random_transformer):
    def text(layers: int, *, scan: bool) -> str:
        graphdef, state = nnx.split(random_transformer(tiny(num_layers=layers)))
        learned, rest = nnx.split_state(state, lambda path, value: not isinstance(value, RouterBias), ...)

        def loss(learned):
            return jnp.sum(through(nnx.merge(graphdef, learned, rest), scan=scan, remat=True).x)

        return jax.jit(jax.grad(loss)).lower(learned).as_text()

    two, eight, unrolled = text(2, scan=True), text(8, scan=True), text(8, scan=False)
    assert two.count("dot_general") == eight.count("dot_general")
    assert unrolled.count("dot_general") > 3 * eight.count("dot_general")
    # What is left to grow is the stacking of parameters and the cutting of their gradients.
    assert len(eight.splitlines()) - len(two.splitlines()) < 0.2 * (6 / 8) * len(unrolled.splitlines())
