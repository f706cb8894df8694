"""Rows of a model that its tokenizer has no text for: taken away where they are padding, refused where they are not.

Checkpoints round their vocabulary up to a multiple of 64 or 128. The rows beyond the tokenizer's ids were never
trained, mean nothing and cannot be decoded, but a softmax gives them probability. A model without these rows cannot
sample them anywhere, so sampler, scorer, reference, update and engines agree on the distribution without being told.
"""

from dataclasses import replace
from typing import cast

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from jax.sharding import NamedSharding

from jaxrl_llm.models.sharding import shardings
from jaxrl_llm.models.tokenizers import Tokenizer
from jaxrl_llm.models.transformer import Transformer


def crop_vocabulary(model: Transformer, size: int) -> Transformer:
    """The model with the first `size` ids only: its law is the given one's, renormalised over them.

        log pi_cropped(v) = log pi(v) - log sum_{u < size} pi(u)   [nats],   v < size

    Hidden states are the same. The other arrays are shared with the given model, which is left alone. On a mesh whose
    `tensor` axis does not divide `size`, the vocabulary axis becomes whole on every device (`models.sharding`).

    Args:
        model: with V rows, tied to its head or not, with adapters or without.
        size: ids that are kept. [tokens]

    Returns:
        a model with `size` rows; the given one where it has as many.

    Raises:
        ValueError: size is below 1 or above V.
    """
    rows = model.config.vocab_size
    if not 1 <= size <= rows:
        raise ValueError(f"size is {size}; it must be 1 .. {rows}, the rows of the model.")
    if size == rows:
        return model
    cropped = nnx.clone(model)
    cropped.config = replace(model.config, vocab_size=size)
    for parameter, axis in ((cropped.embedding, 0), (cropped.unembedding, 1)):
        if parameter is not None:
            _crop(parameter, axis, size)
    return cropped


def _crop(parameter: nnx.Param, axis: int, size: int) -> None:
    """Keep the first `size` entries along `axis`, laid out by the rules of the mesh they lie on."""
    array = parameter.get_value()

    def kept(x):
        return jax.lax.slice_in_dim(x, 0, size, axis=axis)

    if not isinstance(array.sharding, NamedSharding):
        parameter.set_value(kept(array))
        return
    shape = jax.ShapeDtypeStruct(jax.eval_shape(kept, array).shape, array.dtype)
    placement = shardings({"it": parameter.replace(shape)}, cast(Mesh, array.sharding.mesh))["it"].get_value()
    parameter.set_value(jax.jit(kept, out_shardings=placement)(array))


def require_texts(tokenizer: Tokenizer, vocab_size: int) -> None:
    """Raise unless the tokenizer has a text for every id that a model with `vocab_size` rows can sample.

    Control tokens have one. `load_pretrained` takes padding away; ids between others cannot be taken away without new
    numbers for those behind them.

    Raises:
        ValueError: naming the first such id, and what to do.
    """
    lacking = np.flatnonzero(~tokenizer.has_text(vocab_size))
    if not len(lacking):
        return
    count, first = len(lacking), int(lacking[0])
    if first >= tokenizer.vocab_size:
        raise ValueError(
            f"the model has {vocab_size} rows and the tokenizer {tokenizer.vocab_size} ids; a policy that is trained "
            f"must not sample the other {count}. Take them away: crop_vocabulary(model, {tokenizer.vocab_size})."
        )
    raise ValueError(
        f"the tokenizer has no text for {count} of the model's {vocab_size} ids, the first of them {first}, between "
        "others that have one; a policy that is trained must not sample them. Give them a text in the tokenizer."
    )
