"""What is timed of grouped products: one alone and a layer of experts, against the same dense products alone."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array

from jaxrl_kernels import combine_rows
from jaxrl_kernels import gather_rows
from jaxrl_kernels import group_rows
from jaxrl_kernels import grouped_matmul


@dataclass(frozen=True)
class GroupedShape:
    """Size of a layer: T tokens, k experts of each, width D, inner width F, E experts, dtype of the inputs."""

    tokens: int
    chosen: int
    width: int
    inner: int
    experts: int
    dtype: str

    @property
    def name(self) -> str:
        """Key of this shape in the results."""
        return f"T{self.tokens}_k{self.chosen}_D{self.width}_F{self.inner}_E{self.experts}_{self.dtype}"

    @property
    def flop(self) -> int:
        """Work of one product of all rows."""
        return 2 * self.tokens * self.chosen * self.width * self.inner


class GroupedInputs(NamedTuple):
    """A layer of experts, and sorted rows with their cotangents for the products alone."""

    tokens: Array
    router: Array
    gate: Array
    up: Array
    down: Array
    rows: Array
    inner: Array
    other: Array
    sizes: Array


def make_inputs(shape: GroupedShape) -> GroupedInputs:
    """Gaussian inputs; the groups are those of a random router, unequal as at the start of training."""
    keys = jax.random.split(jax.random.key(0), 8)
    pairs, wide, narrow = shape.tokens * shape.chosen, shape.width, shape.inner
    sides = [(shape.tokens, wide), (wide, shape.experts)]
    sides += [(shape.experts, wide, narrow)] * 2 + [(shape.experts, narrow, wide)]
    sides += [(pairs, wide), (pairs, narrow), (pairs, narrow)]
    arrays = [jax.random.normal(key, side, jnp.dtype(shape.dtype)) for key, side in zip(keys, sides, strict=True)]
    arrays[1:5] = (x / x.shape[-2] ** 0.5 for x in arrays[1:5])
    ids = lax.top_k(arrays[0] @ arrays[1], shape.chosen)[1]
    sizes = group_rows(ids, shape.experts).group_sizes
    return GroupedInputs(*arrays, sizes)  # pyright: ignore[reportCallIssue]


def _dense(x: Array, weights: Array, dy: Array) -> tuple[Array, Array, Array]:
    """The product and both gradients with as many rows in every group."""
    x, dy = (z.reshape(weights.shape[0], -1, z.shape[1]) for z in (x, dy))
    return (
        jnp.einsum("end,edf->enf", x, weights),
        jnp.einsum("enf,edf->end", dy, weights),
        jnp.einsum("end,enf->edf", x, dy),
    )


def products(inputs: GroupedInputs):
    """One product forward and backward on equal groups: what no grouping can be faster than."""
    return _dense(inputs.rows, inputs.gate, inputs.inner)


def op(inputs: GroupedInputs):
    """The same on the groups of the router."""
    y, pull = jax.vjp(lambda x, weights: grouped_matmul(x, weights, inputs.sizes), inputs.rows, inputs.gate)
    return y, *pull(inputs.inner)


def layer_products(inputs: GroupedInputs):
    """The three products of a gated layer forward and backward on equal groups, and nothing else."""
    return (
        _dense(inputs.rows, inputs.gate, inputs.inner),
        _dense(inputs.rows, inputs.up, inputs.other),
        _dense(inputs.inner, inputs.down, inputs.rows),
    )


def _experts(tokens: Array, router: Array, gate: Array, up: Array, down: Array, chosen: int) -> Array:
    weights, ids = lax.top_k(jax.nn.sigmoid(tokens @ router), chosen)
    groups = group_rows(ids, gate.shape[0])
    rows = gather_rows(tokens, groups)
    # Side by side the two read the rows once, and make one gradient of them.
    both = grouped_matmul(rows, jnp.concatenate([gate, up], axis=2), groups.group_sizes)
    opened, passed = jnp.split(both, 2, axis=1)
    hidden = jax.nn.silu(opened) * passed
    return combine_rows(grouped_matmul(hidden, down, groups.group_sizes), groups, weights)


def layer(inputs: GroupedInputs):
    """Route, gather, gate, up, down and combine, with the gradients of the tokens and of all weights."""
    chosen = inputs.rows.shape[0] // inputs.tokens.shape[0]
    y, pull = jax.vjp(partial(_experts, chosen=chosen), *inputs[:5])
    return y, *pull(inputs.tokens)


PROGRAMS: dict[str, Callable[[GroupedInputs], object]] = {
    "grouped/products": products,
    "grouped/grouped_matmul": op,
    "layer/products": layer_products,
    "layer/experts": layer,
}
"""Programs of one shape, by name."""

PRODUCTS = {"grouped": 3, "layer": 9}
"""Products of all rows that the programs of a kind execute."""


def errors(inputs: GroupedInputs, values: tuple[Array, Array, Array]) -> dict[str, float]:
    """Largest error of the product and of its gradients against float64, relative to the largest value."""
    x, weights, dy = (np.asarray(z, np.float64) for z in (inputs.rows, inputs.gate, inputs.inner))
    wanted = [np.zeros(dy.shape), np.zeros(x.shape), np.zeros(weights.shape)]
    ends = np.cumsum(inputs.sizes)
    for group, (first, end) in enumerate(zip(ends - np.asarray(inputs.sizes), ends, strict=True)):
        rows = slice(first, end)
        wanted[0][rows], wanted[1][rows] = x[rows] @ weights[group], dy[rows] @ weights[group].T
        wanted[2][group] = x[rows].T @ dy[rows]
    found = [
        np.abs(np.asarray(z, np.float64) - right).max() / np.abs(right).max()
        for z, right in zip(values, wanted, strict=True)
    ]
    return {"product": float(f"{found[0]:.2g}"), "gradient": float(f"{max(found[1:]):.2g}")}
