"""Experts spread over the devices of a mesh axis: every token meets all its experts, wherever they are."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import AbstractMesh
from jax.sharding import PartitionSpec

from jaxrl_llm.models.sharding import batch_axes
from jaxrl_llm.models.sharding import batch_devices
from jaxrl_llm.models.sharding import gathered
from jaxrl_llm.models.sharding import mesh_axes
from jaxrl_llm.models.sharding import partition_specs
from jaxrl_llm.models.sharding import require_even_experts
from jaxrl_llm.typing import Array
from jaxrl_llm.typing import Float
from jaxrl_llm.typing import Int

AXIS = "expert"
TENSOR = "tensor"

Parts = tuple[Any, Any, Any]
"""Products of gate, up and down; kernels [E, in, out] come first in each."""


def mix_over_devices(
    mesh: AbstractMesh,
    mix: Callable[[Parts, Array, Array, Array], Array],
    parts: Parts,
    rows: Float[Array, "N D"],
    chosen: Int[Array, "N k"],
    weights: Float[Array, "N k"],
) -> Float[Array, "N D"]:
    """`experts.mix`, where each of the P devices of the axis `expert` holds E / P experts and N / devices of the rows.

    The devices of the axis show each other their rows, each sums what its own experts say of all of them, and the sums
    are added up where the rows came from: an all-gather and a reduce-scatter, whose gradients are each other's. That is
    dropless with fixed shapes, whoever chooses what, and exact but for the order of P summands, in the dtype of rows.
    With n = N / devices each device sends (P - 1) n (2 D numbers of the rows' dtype + 8 k bytes), and twice the first
    for the gradient; an exchange of rows with their experts' devices alone sends at most min(k, P - 1) / (P - 1) of it.
    Room is made for the worst case, P n k rows of every width; products are made of the rows that are there.

    What `fsdp` splits is gathered here, so that the gradient goes back as a reduce-scatter; an inner width that
    `tensor` splits is summed over it.

    Args:
        mesh: that is set, with the axis.
        mix: of experts that are all on this device; an id behind the last of them is nobody's.
        parts: gate, up and down.
        rows: one for each token; if the devices do not divide them they are filled up with nobody's.
        chosen: experts of each token.
        weights: of their outputs.

    Raises:
        ValueError: the axis does not divide the experts.
    """
    graphdef, state = nnx.split(parts)
    leaves, structure = jax.tree.flatten(state)
    specs = jax.tree.leaves(partition_specs(state, mesh), is_leaf=lambda leaf: isinstance(leaf, PartitionSpec))
    experts, devices = parts[0].kernel.shape[0], mesh.shape[AXIS]
    require_even_experts(devices, experts)
    here = experts // devices
    split_inside = any(TENSOR in mesh_axes(entry) for spec in specs for entry in spec)

    def local(leaves: list[Array], rows: Array, chosen: Array, weights: Array) -> Array:
        whole = [gathered(leaf, spec, but=(AXIS, TENSOR)) for leaf, spec in zip(leaves, specs, strict=True)]
        rows, chosen, weights = (jax.lax.all_gather(x, AXIS, tiled=True) for x in (rows, chosen, weights))
        own = chosen - here * jax.lax.axis_index(AXIS).astype(chosen.dtype)
        own = jnp.where((own >= 0) & (own < here), own, here)
        said = mix(nnx.merge(graphdef, jax.tree.unflatten(structure, whole)), rows, own, weights)
        if split_inside:
            said = jax.lax.psum(said, TENSOR)
        return jax.lax.psum_scatter(said, AXIS, scatter_dimension=0, tiled=True)

    by_row = PartitionSpec(batch_axes(mesh))
    count, fill = rows.shape[0], ((0, -rows.shape[0] % batch_devices(mesh)), (0, 0))
    filled = jnp.pad(rows, fill), jnp.pad(chosen, fill, constant_values=experts), jnp.pad(weights, fill)
    spread = jax.shard_map(local, in_specs=(specs, *(by_row,) * 3), out_specs=by_row)
    return spread(leaves, *filled)[:count]
