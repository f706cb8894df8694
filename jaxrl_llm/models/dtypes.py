"""Dtypes by name, and a model that computes in one while its parameters stay float32."""

import jax.numpy as jnp

from jaxrl_llm.models.transformer import Transformer


def parse_dtype(text: str) -> jnp.dtype:
    """The dtype named "float32" or "bfloat16".

    Raises:
        ValueError: in a sentence, for float16, whose range needs a scaled loss, and for any other name.
    """
    if text == "float16":
        raise ValueError(
            "dtype is 'float16', in which gradients below 6e-8 are zero and values above 65504 infinite, and no loss "
            "is scaled here to keep them between; it must be float32 or bfloat16."
        )
    if text not in ("float32", "bfloat16"):
        raise ValueError(f"dtype is {text!r}; it must be float32 or bfloat16.")
    return jnp.dtype(text)


def cast_model(model: Transformer, dtype: jnp.dtype | type) -> Transformer:
    """The same model with its products in `dtype` and its parameters in float32, the masters that the optimiser moves.

    Parameters never become bfloat16. Neighbours there are 2^-8 to 2^-7 of the value apart, and an update of less than
    half of that is rounded away: of weights around 0.04, a step of 1e-6 changes those below about 4e-4, one in a
    hundred. In float32 they are 2^-24 to 2^-23 apart, and all of them move. Every product casts its matrix on the way,
    so parameters and optimiser take the memory of float32, and activations half of it.

    Raises:
        ValueError: another dtype than float32 and bfloat16.
    """
    return model.astype(param_dtype=jnp.float32, compute_dtype=parse_dtype(jnp.dtype(dtype).name))
