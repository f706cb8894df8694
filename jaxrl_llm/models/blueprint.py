"""Names, sizes and costs of a decoder from its configuration alone, read off one layer of each kind.

The layer is never made: its shapes are enough. Nothing here lists its parts: they say themselves which tensors hold
them (`stored`).
"""

import functools
import math
from collections.abc import Iterable
from dataclasses import replace
from typing import Literal
from typing import NamedTuple

from flax import nnx

from jaxrl_llm.models.block import Block
from jaxrl_llm.models.config import TransformerConfig
from jaxrl_llm.models.further_token import FurtherToken
from jaxrl_llm.models.numerics import Numerics
from jaxrl_llm.models.stored_parts import stored_parts

Kind = Literal["dense", "sparse", "further"]
"""A dense layer, one with experts, one that predicts a token after the next one."""

MAKERS = {
    "dense": Block,
    "sparse": functools.partial(Block, sparse=True),
    "further": FurtherToken,
}
"""What makes a layer from a configuration, numerics and random numbers."""


class Layer(NamedTuple):
    """One layer of a kind.

    Attributes:
        shapes: of every tensor in checkpoints, [out, in], by its Hugging Face name inside the layer.
        parameters: numbers in the layer.
        active: those of them that take part in a token's forward pass.
        multiply_adds: of the products of one token, without attention's own. [multiply-adds]
    """

    shapes: dict[str, tuple[int, ...]]
    parameters: int
    active: int
    multiply_adds: int


@functools.lru_cache(maxsize=64)
def layer(config: TransformerConfig, kind: Kind) -> Layer:
    """A layer of a kind."""
    module = nnx.eval_shape(lambda: MAKERS[kind](config, Numerics(), nnx.Rngs(0)))
    parts = stored_parts(module)
    sizes = [math.prod(part.parameter.get_value().shape) for part in parts]
    used = 1.0 if config.experts is None else config.experts.chosen / config.experts.count
    active = [round(size * used) if part.stacked else size for size, part in zip(sizes, parts, strict=True)]
    return Layer(
        shapes={name: part.shape for part in parts for name in part.names},
        parameters=sum(sizes),
        active=sum(active),
        multiply_adds=sum(size for size, part in zip(active, parts, strict=True) if len(part.shape) == 2),
    )


def layers(config: TransformerConfig) -> Iterable[Layer]:
    """Every layer, from the bottom; those that predict further tokens are the last ones."""
    for kind, count in _counts(config).items():
        yield from (layer(config, kind) for _ in range(count))


def tensor_shapes(config: TransformerConfig) -> dict[str, tuple[int, ...]]:
    """The shape of every tensor in checkpoints, [out, in], by its Hugging Face name."""
    table = (config.vocab_size, config.hidden_size)
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": table}
    for index, one in enumerate(layers(config)):
        shapes |= {f"model.layers.{index}.{name}": shape for name, shape in one.shapes.items()}
    shapes["model.norm.weight"] = (config.hidden_size,)
    return shapes if config.tie_embeddings else {**shapes, "lm_head.weight": table}


def num_parameters(config: TransformerConfig, *, embeddings: bool = True) -> int:
    """Number of parameters.

    Args:
        config: of the model.
        embeddings: with the embeddings and the head, which count once where they are tied.
    """
    tables = config.vocab_size * config.hidden_size * (1 if config.tie_embeddings else 2)
    return _over_layers(config, "parameters") + config.hidden_size + embeddings * tables


def active_parameters(config: TransformerConfig) -> int:
    """Parameters of the layers and the last norm that take part in a token's forward pass: k of E experts."""
    return _over_layers(config, "active") + config.hidden_size


def multiply_adds_per_token(config: TransformerConfig) -> int:
    """Of the products of all layers but those that predict further tokens, without attention's own and without the
    head. [multiply-adds]
    """
    return _over_layers(replace(config, mtp_layers=0), "multiply_adds")


def _counts(config: TransformerConfig) -> dict[Kind, int]:
    """Layers of each kind, from the bottom."""
    dense = config.num_layers if config.experts is None else config.experts.dense_layers
    return {"dense": dense, "sparse": config.num_layers - dense, "further": config.mtp_layers}


def _over_layers(config: TransformerConfig, name: str) -> int:
    return sum(count * getattr(layer(config, kind), name) for kind, count in _counts(config).items() if count)
