from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxrl_llm.models.config import TransformerConfig
from jaxrl_llm.models.transformer import Transformer


@pytest.fixture(scope="session")
def random_transformer() -> Callable[..., Transformer]:
    """Makes a model of the given configuration; its norms and biases are not ones and zeros, so that tests see them."""

    def make(config: TransformerConfig, **dtypes) -> Transformer:
        graphdef, state = nnx.split(nnx.eval_shape(lambda: Transformer(config, rngs=nnx.Rngs(0), **dtypes)))
        rng = np.random.default_rng(0)

        def draw(leaf: jax.ShapeDtypeStruct) -> jax.Array:
            noise = rng.normal(size=leaf.shape)
            return jnp.asarray(1 + 0.3 * noise if len(leaf.shape) == 1 else leaf.shape[-2] ** -0.5 * noise, leaf.dtype)

        return nnx.merge(graphdef, jax.tree.map(draw, state))

    return make
