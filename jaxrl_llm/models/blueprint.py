"""Names, sizes and costs of a decoder from its configuration alone, read off one layer of each kind.

The layer is never made: its shapes are enough. Nothing here lists its parts: they say themselves which tensors hold them
(`stored`).
"""

import functools
import math
from collections.abc import Iterable
from typing import NamedTuple

from flax import nnx

from jaxrl_llm.models.block import Block
from jaxrl_llm.models.config import TransformerConfig
from jaxrl_llm.models.numerics import Numerics
from jaxrl_llm.models.stored_parts import stored_parts


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
def layer(config: TransformerConfig, *, sparse: bool) -> Layer:
    """A layer with experts, or a dense one."""
    # Its sizes do not depend on how many layers there are, of which the initial weights alone know.
    block = nnx.eval_shape(lambda: Block(config, Numerics(), nnx.Rngs(0), sparse=sparse))
    parts = stored_parts(block)
    idle = 1.0
    if sparse:
        assert config.experts is not None
        idle = config.experts.chosen / config.experts.count
    sizes = [(math.prod(part.parameter.get_value().shape), part) for part in parts]
    active = [round(size * idle) if len(part.names) > 1 else size for size, part in sizes]
    return Layer(
        shapes={name: part.shape for part in parts for name in part.names},
        parameters=sum(size for size, _ in sizes),
        active=sum(active),
        multiply_adds=sum(size for size, part in zip(active, parts, strict=True) if len(part.shape) == 2),
    )


def layers(config: TransformerConfig) -> Iterable[Layer]:
    """Every layer, from the bottom."""
    return (layer(config, sparse=config.is_sparse(index)) for index in range(config.num_layers))


def tensor_shapes(config: TransformerConfig) -> dict[str, tuple[int, ...]]:
    """The shape of every tensor in checkpoints, [out, in], by its Hugging Face name."""
    table = (config.vocab_size, config.hidden_size)
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": table}
    for index, kind in enumerate(layers(config)):
        shapes |= {f"model.layers.{index}.{name}": shape for name, shape in kind.shapes.items()}
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
    """Of the products of all layers, without attention's own and without the head. [multiply-adds]"""
    return _over_layers(config, "multiply_adds")


def _over_layers(config: TransformerConfig, name: str) -> int:
    dense = config.num_layers if config.experts is None else config.experts.dense_layers
    total = dense * getattr(layer(config, sparse=False), name) if dense else 0
    if dense < config.num_layers:
        total += (config.num_layers - dense) * getattr(layer(config, sparse=True), name)
    return total
