"""Dtypes by name; parameters that small updates move."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxrl_llm.models.config import tiny
from jaxrl_llm.models.dtypes import cast_model
from jaxrl_llm.models.dtypes import parse_dtype
from jaxrl_llm.models.transformer import Transformer


def test_names_of_dtypes():
    assert parse_dtype("float32") == jnp.float32
    assert parse_dtype("bfloat16") == jnp.bfloat16
    with pytest.raises(ValueError, match="'float16', in which gradients below 6e-8 are zero"):
        parse_dtype("float16")
    with pytest.raises(ValueError, match="dtype is 'int8'; it must be float32 or bfloat16"):
        parse_dtype("int8")


def moved(model: Transformer) -> float:
    """Share of parameters that a step of 1e-6, Adam's at that learning rate, changes."""
    before = jax.tree.leaves(nnx.state(model))
    after = [(x - jnp.asarray(1e-6, x.dtype)).astype(x.dtype) for x in before]
    changed = sum(int(jnp.sum(x != y)) for x, y in zip(before, after, strict=True))
    return changed / sum(x.size for x in before)


@pytest.mark.parametrize("param_dtype", [jnp.float32, jnp.bfloat16])
def test_parameters_are_float32_and_move(random_transformer, param_dtype):
    made = random_transformer(tiny(num_layers=1), param_dtype=param_dtype)
    model = cast_model(made, jnp.bfloat16)
    assert {x.dtype for x in jax.tree.leaves(nnx.state(model))} == {jnp.dtype(jnp.float32)}
    hidden = jax.eval_shape(lambda: model(jnp.zeros((1, 4), jnp.int32)))
    assert hidden.dtype == jnp.bfloat16
    # Near 1, where the norms are, 1e-6 is eight spacings of float32 and a two-thousandth of half a spacing of bfloat16.
    assert moved(model) == 1.0
    assert 0 < moved(model.astype(param_dtype=jnp.bfloat16)) < 0.02
    with pytest.raises(ValueError, match="must be float32 or bfloat16"):
        cast_model(made, np.float16)
