"""What optimisers ask of parameters: which axes they have, which are matrices, in which dtype they are moved."""

from typing import Any

import jax
import optax
from flax import nnx

from jaxrl_llm.models.numerics import at_least_float32
from jaxrl_llm.typing import PyTree

STACKED = frozenset({"experts"})
"""Axes that number matrices or vectors which lie in one array: where they come first, each is treated by itself."""


def is_variable(leaf: Any) -> bool:
    """Whether it is a variable of a module, which may say its axes; a leaf of trees of parameters."""
    return isinstance(leaf, nnx.Variable)


def axes_of(leaf: Any) -> tuple[Any, ...]:
    """Logical axes of a variable without those that only number what is stacked; () where it does not say them."""
    axes = leaf.get_metadata().get("logical_axes", ()) if is_variable(leaf) else ()
    return tuple(axes[1:]) if axes and axes[0] in STACKED else tuple(axes)


def are_matrices(params: PyTree) -> PyTree:
    """For each variable or array, whether it has two axes or more beside one that numbers what is stacked.

    These are decayed; vectors (norm scales, biases, also one per expert) and scalars are not.
    """
    return jax.tree.map(lambda leaf: len(axes_of(leaf) or leaf.shape) >= 2, params, is_leaf=is_variable)


def in_float32(inner: optax.GradientTransformation) -> optax.GradientTransformation:
    """The same optimiser with its state and its changes in float32 or wider, whatever the parameters are in."""

    def wide(tree: PyTree) -> PyTree:
        return jax.tree.map(at_least_float32, tree)

    def update(updates, state, params=None):
        return inner.update(wide(updates), state, None if params is None else wide(params))

    return optax.GradientTransformation(lambda params: inner.init(wide(params)), update)
