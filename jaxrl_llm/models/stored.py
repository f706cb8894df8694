"""Tensors in files, described before they are read, and whether they are those of a model."""

import os
from collections.abc import Iterable
from collections.abc import Mapping
from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from jaxrl_llm.models.blueprint import num_parameters
from jaxrl_llm.models.blueprint import tensor_shapes
from jaxrl_llm.models.config import TransformerConfig
from jaxrl_llm.models.files import ModelFileError

Tensors = Mapping[str, np.ndarray]

DERIVED = "rotary_emb.inv_freq"
"""End of the names of tensors in old checkpoints that follow from the configuration."""

COPIES = ("embed_tokens.weight", "shared_head.head.weight")
"""Of the embeddings and the head, beside each layer that predicts a further token."""

CHUNK = 2**20
"""Numbers that are looked at together."""

SMALLEST_BLOCK = 9
"""Tensors of a block without biases and norms of heads."""


class StoredTensors(Tensors):
    """Tensors by their Hugging Face names, each read when it is asked for.

    Attributes:
        shapes: the shape of each.
        dtypes: the dtype of each, by numpy's name, as it is read.
    """

    shapes: Mapping[str, tuple[int, ...]]
    dtypes: Mapping[str, str]


def check_layers(config: TransformerConfig, tensors: int, *, source: str) -> None:
    """Raise a ModelFileError where there are fewer tensors than so many layers have, before their names are made."""
    if config.num_layers > 1024 and config.num_layers * SMALLEST_BLOCK > tensors:
        raise ModelFileError(
            f"{source} lacks tensors: it is to have {config.num_layers} layers, and has {tensors} tensors."
        )


def check_fit(config: TransformerConfig, tensors: Tensors, *, source: str) -> None:
    """Raise a ModelFileError unless the tensors are those of the configuration, by name, shape and kind.

    Tensors in files are judged by their description; nothing is read.
    """
    check_layers(config, len(tensors), source=source)
    wanted = tensor_shapes(config)
    _check_names(tensors, wanted, config, source)
    wrong = []
    for name, expected in wanted.items():
        if isinstance(tensors, StoredTensors):
            found, dtype = tensors.shapes[name], jnp.dtype(tensors.dtypes[name])
        else:
            found, dtype = tensors[name].shape, tensors[name].dtype
        if found != expected or not jnp.issubdtype(dtype, jnp.floating):
            wrong.append(f"{name} is {dtype} {list(found)}, expected floats {list(expected)}")
    if wrong:
        raise ModelFileError(f"{source} has tensors that do not fit the model: {shortened(wrong)}.")


def check_memory(config: TransformerConfig, item_size: int, *, source: str) -> None:
    """Raise a ModelFileError where this machine cannot hold the parameters at `item_size` bytes each."""
    needed = num_parameters(config) * item_size
    try:
        there = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError, AttributeError):  # the system does not say
        return
    if needed > there:
        raise ModelFileError(f"{source} is a model of {needed / 1e9:.0f} GB; this machine has {there / 1e9:.0f} GB.")


def require_finite(tensor: np.ndarray, name: str, *, source: str, dtype: DTypeLike = np.float32) -> np.ndarray:
    """The tensor, whose numbers must be finite as they are, and in the dtype in which they will be kept.

    Raises:
        ModelFileError: some are not; the sentence says how many.
    """
    flat, broken = tensor.reshape(-1), 0
    with np.errstate(over="ignore", invalid="ignore"):
        for start in range(0, len(flat), CHUNK):
            part = flat[start : start + CHUNK].astype(jnp.dtype(dtype), copy=False)
            broken += len(part) - int(np.count_nonzero(np.isfinite(part)))
    if broken:
        raise ModelFileError(
            f"{source} has {broken} of {len(flat)} numbers in {name:.200} that are NaN or infinite in "
            f"{jnp.dtype(dtype).name}; expected finite weights."
        )
    return tensor


def shortened(names: Sequence[str], *, most: int = 8) -> str:
    """The names as a list in words, cut after `most` of them, and each after 200 characters."""
    rest = len(names) - most
    return ", ".join(f"{name:.200}" for name in names[:most]) + (f" and {rest} more" if rest > 0 else "")


def _check_names(tensors: Tensors, wanted: Iterable[str], config: TransformerConfig, source: str) -> None:
    missing = sorted(set(wanted) - set(tensors))
    if missing:
        raise ModelFileError(f"{source} lacks {len(missing)} tensors: {shortened(missing)}.")
    optional = {"lm_head.weight"} if config.tie_embeddings else set()
    further = [f"model.layers.{config.num_layers + layer}." for layer in range(config.mtp_layers)]
    optional |= {f"{layer}{copy}" for layer in further for copy in COPIES}
    unknown = sorted(name for name in set(tensors) - set(wanted) - optional if not name.endswith(DERIVED))
    if unknown:
        raise ModelFileError(f"{source} has {len(unknown)} tensors that this architecture lacks: {shortened(unknown)}.")
