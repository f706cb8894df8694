"""Kernels of attention under a mesh: rows and heads attend apart, so each device runs the kernel on its own."""

from collections.abc import Callable

import jax
from jax.sharding import PartitionSpec

from jaxrl_llm.models.attention.visibility import Visibility
from jaxrl_llm.models.sharding import automatic_mesh
from jaxrl_llm.models.sharding import batch_axes
from jaxrl_llm.models.sharding import batch_devices
from jaxrl_llm.typing import Array
from jaxrl_llm.typing import Float


def on_each_device(
    kernel: Callable[[Array, Array, Array, Visibility], Array],
    query: Float[Array, "B T H hd"],
    keys: Float[Array, "B KV T hd"],
    values: Float[Array, "B KV T hd"],
    visibility: Visibility,
) -> Float[Array, "B T H hd"]:
    """`kernel`, which the compiler cannot split, in a shard_map over the mesh that is set; nothing is sent.

    Rows are split as sequences are, heads over `tensor`; what the mesh does not divide is computed by all.
    """
    mesh = automatic_mesh()
    if mesh is None or mesh.size == 1:
        return kernel(query, keys, values, visibility)
    rows = batch_axes(mesh) if query.shape[0] % batch_devices(mesh) == 0 else None
    heads = "tensor" if keys.shape[1] % mesh.shape.get("tensor", 1) == 0 and "tensor" in mesh.shape else None
    of_keys = PartitionSpec(rows, heads)
    specs = (PartitionSpec(rows, None, heads), of_keys, of_keys, PartitionSpec(rows))
    # Kernels do not say over what their results vary.
    return jax.shard_map(kernel, in_specs=specs, out_specs=specs[0], check_vma=False)(query, keys, values, visibility)
