"""Statistics of tokens under a mesh: each device of its own tokens, over its own part of the vocabulary."""

from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import AbstractMesh
from jax.sharding import PartitionSpec

from jaxrl_kernels import Reference
from jaxrl_kernels import TokenStatistics
from jaxrl_llm.models.sharding import RULES
from jaxrl_llm.models.sharding import axes_spec
from jaxrl_llm.models.sharding import batch_axes
from jaxrl_llm.models.sharding import gathered
from jaxrl_llm.models.sharding import mesh_axes
from jaxrl_llm.typing import Array
from jaxrl_llm.typing import Float
from jaxrl_llm.typing import Int

TENSOR = "tensor"

Statistics = Callable[..., TokenStatistics]
"""(hidden, head, targets, reference=, vocabulary_mesh_axis=) -> statistics of [N] arrays."""


def statistics_over_devices(
    mesh: AbstractMesh,
    statistics: Statistics,
    hidden: Float[Array, "N D"],
    head: Float[Array, "_ _"],
    targets: Int[Array, " N"],
    *,
    vocabulary_axis: int,
    reference: Reference | None,
) -> TokenStatistics:
    """`statistics` in a shard_map: rows over the axes of sequences, the vocabulary over `tensor` where it divides it.

    Blocks of the vocabulary are then as wide as one device has room for, and nothing is sent but what the rules split
    of the head (gathered once, its gradient reduced once) and, over `tensor`, sums of N / devices numbers.

    Args:
        mesh: that is set; its axes of sequences divide N.
        statistics: of one device.
        hidden, head, targets, vocabulary_axis, reference: as for `jaxrl_kernels.token_statistics`.
    """
    axes = ("vocabulary", "hidden") if vocabulary_axis == 0 else ("hidden", "vocabulary")
    by_row = PartitionSpec(batch_axes(mesh))

    def spec_of(matrix: Array) -> PartitionSpec:
        return axes_spec(axes, matrix.shape, mesh.shape, RULES)

    own = spec_of(head)
    others = None if reference is None else spec_of(reference.head)
    axis = TENSOR if TENSOR in mesh_axes(own[vocabulary_axis]) else None

    def local(hidden: Array, head: Array, targets: Array, reference: Reference | None) -> TokenStatistics:
        head = gathered(head, own, but=(TENSOR,))
        if reference is not None and others is not None:
            reference = Reference(reference.hidden, gathered(reference.head, others, but=(TENSOR,)))
        return statistics(hidden, head, targets, reference=reference, vocabulary_mesh_axis=axis)

    specs: tuple[Any, Any] = by_row, others
    of_reference = None if others is None else Reference(*specs)
    spread = jax.shard_map(local, in_specs=(by_row, own, by_row, of_reference), out_specs=by_row)
    return spread(hidden, head, targets, reference)
