"""Where each axis of a parameter or activation lives on a mesh: a table of rules, and its application."""

import math
from collections.abc import Mapping
from typing import TypeVar

import jax
from flax import nnx
from jax.sharding import AbstractMesh
from jax.sharding import AxisType
from jax.sharding import Mesh
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec

from jaxrl_llm.models.config import TransformerConfig
from jaxrl_llm.typing import Array

Rules = Mapping[str, str | tuple[str, ...] | None]
"""Logical axis name to mesh axis name or names; None keeps the axis whole on every device."""

Tree = TypeVar("Tree")

MESH_AXES = ("data", "fsdp", "expert", "tensor")

ACTIVATION_AXES = ("batch", "sequence", "activation")

BATCH_AXES = ("data", "fsdp", "expert")
"""Over what sequences are spread."""

RULES: Rules = {
    # Parameters: the width is split over `fsdp`, and over `expert` where experts are not (gathered when used); the wide
    # side of each product over `tensor`.
    "vocabulary": "tensor",
    "hidden": ("fsdp", "expert"),
    "heads": "tensor",
    "kv_heads": "tensor",
    "intermediate": "tensor",
    "norm": None,
    "rank": None,
    "experts": "expert",
    "joined": "tensor",
    # Activations: sequences over all of these axes; the width stays whole, or every norm would have to communicate.
    "batch": BATCH_AXES,
    "sequence": None,
    "activation": None,
}
"""Data parallelism over `data`, parameters over `fsdp`, experts over `expert`, tensor parallelism over `tensor`."""


def make_mesh(*, data: int = 1, fsdp: int = 1, expert: int = 1, tensor: int = 1) -> Mesh:
    """A mesh of data * fsdp * expert * tensor devices with automatic layouts (jax.make_mesh would make them explicit).

    Raises:
        ValueError: when there are too few devices.
    """
    sizes = (data, fsdp, expert, tensor)
    needed, devices = math.prod(sizes), jax.devices()
    if needed > len(devices):
        named = " x ".join(f"{name}={size}" for name, size in zip(MESH_AXES, sizes, strict=True))
        raise ValueError(f"a mesh of {named} needs {needed} devices, there are {len(devices)}")
    return jax.make_mesh(sizes, MESH_AXES, axis_types=(AxisType.Auto,) * len(sizes), devices=devices[:needed])


def batch_axes(mesh: Mesh | AbstractMesh) -> tuple[str, ...]:
    """Those of `BATCH_AXES` that this mesh has."""
    return tuple(name for name in BATCH_AXES if name in mesh.shape)


def batch_devices(mesh: Mesh | AbstractMesh) -> int:
    """Over how many devices sequences are spread."""
    return math.prod(mesh.shape[name] for name in batch_axes(mesh))


def automatic_mesh() -> AbstractMesh | None:
    """The mesh that is set (`with jax.set_mesh(mesh)`), where its layouts are the compiler's: not in a shard_map."""
    mesh = jax.sharding.get_abstract_mesh()
    return None if mesh.empty or set(mesh.axis_types) != {AxisType.Auto} else mesh


def parse_mesh(text: str, config: TransformerConfig | None = None) -> Mesh:
    """The mesh that a text such as "data=2,fsdp=4,tensor=1" names; an axis that is left out has size 1.

    Args:
        text: sizes of the axes of `MESH_AXES`, in any order. Their product must be the number of devices or divide it;
            then the first of them are used.
        config: of the model that will live there; if given, `tensor` and `expert` must divide what they split.
            (`partition_specs` leaves an axis whole that a mesh does not divide, and every device would then compute all
            of it.)

    Raises:
        ValueError: in a sentence, for another axis, one named twice, a size that is no positive integer, a product that
            does not divide the number of devices, heads or an inner width that `tensor` does not divide, or experts
            that `expert` does not divide.
    """
    sizes: dict[str, int] = {}
    for part in text.split(","):
        name, sign, size = (piece.strip() for piece in part.partition("="))
        if name not in MESH_AXES or not sign:
            raise ValueError(
                f"mesh is {text!r}, with the part {part.strip()!r}; a part must be one of "
                f"{', '.join(MESH_AXES)} with its size, as in data=2,fsdp=4,tensor=1."
            )
        if name in sizes:
            raise ValueError(f"mesh is {text!r} and names {name} twice; every axis must be named once at most.")
        if not size.isascii() or not size.isdigit() or int(size) < 1:
            raise ValueError(f"mesh is {text!r} with {name} of size {size!r}; it must be an integer of at least 1.")
        sizes[name] = int(size)
    needed, present = math.prod(sizes.values()), jax.device_count()
    if present % needed:
        raise ValueError(
            f"mesh is {text!r}, a product of {needed}; it must be the number of devices, {present}, or divide it."
        )
    if config is not None:
        _check_tensor(sizes.get("tensor", 1), config)
        if config.experts is not None:
            require_even_experts(sizes.get("expert", 1), config.experts.count)
    return make_mesh(**sizes)


def _check_tensor(tensor: int, config: TransformerConfig) -> None:
    split = {
        "num_heads": config.num_heads,
        "num_kv_heads": config.num_kv_heads,
        "intermediate_size": config.intermediate_size,
    }
    if config.experts is not None:
        split["experts.width"] = config.experts.width
    for name, size in split.items():
        if size % tensor:
            raise ValueError(f"tensor is {tensor}; it must divide {name}, which is {size} in this model.")


def require_even_experts(devices: int, experts: int) -> None:
    """Every device of the axis `expert` holds as many experts.

    Raises:
        ValueError: it cannot.
    """
    if experts % devices:
        raise ValueError(f"expert is {devices}; it must divide experts.count, which is {experts} in this model.")


def axes_spec(
    axes: tuple[str, ...], shape: tuple[int, ...], mesh_shape: Mapping[str, int], rules: Rules
) -> PartitionSpec:
    """Rules applied to one array; an axis that the mesh does not divide evenly stays whole. A mesh axis splits one axis
    of an array, the first that asks for it.
    """
    entries, free = [], {name for name, size in mesh_shape.items() if size > 1}
    for axis, size in zip(axes, shape, strict=True):
        if axis not in rules:
            raise ValueError(f"logical axis {axis!r} has no sharding rule; the rules name {', '.join(sorted(rules))}")
        rule = rules[axis]
        names = (rule,) if isinstance(rule, str) else tuple(rule or ())
        names = tuple(name for name in names if name in free)
        split = bool(names) and size % math.prod(mesh_shape[name] for name in names) == 0
        entries.append(names if split else None)
        free.difference_update(names if split else ())
    return PartitionSpec(*entries)


def mesh_axes(entry: str | tuple[str, ...] | None) -> tuple[str, ...]:
    """Names in an entry of a PartitionSpec."""
    return (entry,) if isinstance(entry, str) else tuple(entry or ())


def gathered(part: Array, spec: PartitionSpec, *, but: tuple[str, ...]) -> Array:
    """In a shard_map: what the spec splits, put together again along all mesh axes `but` these. The gradient goes back
    as a reduce-scatter.
    """
    for axis, entry in enumerate(spec):
        names = tuple(name for name in mesh_axes(entry) if name not in but)
        part = jax.lax.all_gather(part, names, axis=axis, tiled=True) if names else part
    return part


def partition_specs(state: Tree, mesh: Mesh | AbstractMesh, rules: Rules = RULES) -> Tree:
    """The same tree with a PartitionSpec for each array.

    Args:
        state: parameters, gradients or optimiser state: any tree in which the model's variables carry `logical_axes`.
            Arrays outside such variables (step counters, keys) are replicated.
        mesh: the mesh; an array axis whose length it does not divide stays whole.
        rules: logical axis to mesh axes.
    """

    def variable_specs(leaf):
        if not isinstance(leaf, nnx.Variable):
            return PartitionSpec()
        value = leaf.get_value()
        axes = leaf.get_metadata().get("logical_axes", (None,) * value.ndim)
        if all(axis is None for axis in axes):
            return leaf.replace(PartitionSpec())
        return leaf.replace(axes_spec(axes, value.shape, mesh.shape, rules))

    return jax.tree.map(variable_specs, state, is_leaf=lambda leaf: isinstance(leaf, nnx.Variable))


def shardings(state: Tree, mesh: Mesh, rules: Rules = RULES) -> Tree:
    """The same tree with a NamedSharding for each array, as `jax.jit` and checkpoint readers take it."""
    return jax.tree.map(lambda spec: NamedSharding(mesh, spec), partition_specs(state, mesh, rules))


def shard(state: Tree, mesh: Mesh, rules: Rules = RULES) -> Tree:
    """Place every array of the tree on the mesh according to the rules."""
    return jax.device_put(state, shardings(state, mesh, rules))


def constrain(array: Array, axes: tuple[str, ...], rules: Rules = RULES) -> Array:
    """Say how an activation is laid out, if a mesh is set (`with jax.set_mesh(mesh)`); the array itself otherwise."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return array
    automatic = {
        name: size
        for name, size, kind in zip(mesh.axis_names, mesh.axis_sizes, mesh.axis_types, strict=True)
        if kind == AxisType.Auto
    }
    if not automatic:
        return array
    return jax.lax.with_sharding_constraint(array, axes_spec(axes, array.shape, automatic, rules))


def keep_layout(tree: Tree) -> Tree:
    """Lay parameters out by the sharding rules, if a mesh is set: each step must return what the next one takes."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return tree
    return jax.lax.with_sharding_constraint(tree, partition_specs(tree, mesh))
