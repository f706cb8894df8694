"""Layers of equal structure as one program that is run for each of them, so that a program does not grow with depth."""

import itertools
from collections.abc import Sequence
from typing import Any
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from jaxrl_llm.models.block import Block
from jaxrl_llm.models.context import Context
from jaxrl_llm.models.experts import Routes
from jaxrl_llm.models.layers import Rotation
from jaxrl_llm.models.sharding import ACTIVATION_AXES
from jaxrl_llm.models.sharding import constrain
from jaxrl_llm.models.sharding import keep_layout
from jaxrl_llm.typing import Array
from jaxrl_llm.typing import Float
from jaxrl_llm.typing import Int


class Passed(NamedTuple):
    """What layers pass on.

    Attributes:
        x: to the next layer.
        contexts: of each layer, with the tokens in them.
        routes: of each layer's router; None of a dense one.
    """

    x: Float[Array, "B T D"]
    contexts: tuple[Context, ...]
    routes: tuple[Routes | None, ...]


def scan_layers(
    layers: Sequence[Block],
    x: Float[Array, "B T D"],
    rotation: Rotation,
    context: Context,
    selections: Sequence[Int[Array, "B T k"] | None],
    *,
    remat: bool,
) -> Passed:
    """One layer after the other, all in the same context; neighbours of equal structure (with experts or without, with
    adapters or without) are one `jax.lax.scan`.

    Parameters stay in their layers and are stacked inside the program. That holds those of such neighbours twice while
    it runs, and their gradients twice where they learn: of bfloat16 2 bytes a parameter each, split over devices as
    the parameters are.

    Args:
        layers: from the bottom.
        x: what goes into the first one.
        rotation: of the tokens' positions.
        context: what the tokens attend to; it keeps nothing.
        selections: experts of each token in each layer, where they were chosen before.
        remat: recompute each layer in the backward pass instead of keeping its activations.
    """
    routes: list[Routes | None] = []
    split = [(*nnx.split(layer), selection) for layer, selection in zip(layers, selections, strict=True)]
    for (graphdef, *_), run in itertools.groupby(split, key=lambda part: (part[0], _shapes(part[1:]))):
        parts = [part[1:] for part in run]

        def step(x: Array, part: Any, graphdef: Any = graphdef) -> tuple[Array, Routes | None]:
            state, selection = part
            # Said of each layer, so that its gradient is laid out before it is stacked.
            x, _, sent = nnx.merge(graphdef, keep_layout(state))(x, rotation, context, selection)
            return constrain(x, ACTIVATION_AXES), sent

        stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *parts)
        x, sent = jax.lax.scan(jax.checkpoint(step, prevent_cse=False) if remat else step, x, stacked)
        routes += [jax.tree.map(lambda leaf, index=index: leaf[index], sent) for index in range(len(parts))]
    return Passed(x, (context,) * len(layers), tuple(routes))


def _shapes(tree: Any) -> tuple[Any, ...]:
    leaves, structure = jax.tree.flatten(tree)
    return structure, *((leaf.shape, leaf.dtype) for leaf in leaves)
