"""Muon for the matrices of a model, another optimiser for the rest; which is which, the axes of a parameter say."""

import math
from typing import Any

import jax
import optax
from flax import nnx
from optax.contrib import MuonDimensionNumbers
from optax.contrib import scale_by_muon

from jaxrl_llm.models.numerics import at_least_float32
from jaxrl_llm.typing import PyTree

UPDATE_RMS = 0.2
"""Root mean square of the entries of an update at rate 1, about that of AdamW's."""

STEPS = 5
"""Of Newton-Schulz."""

STACKED = frozenset({"experts"})
"""Axes that number matrices or vectors which lie in one array: where they come first, each is treated by itself."""

NO_MATRIX = frozenset({"vocabulary", "rank"})
"""Axes of what is no matrix to Muon: embeddings and the output head, whose rows are tokens, and factors of adapters, of
which the product is the matrix."""


def _is_variable(leaf: Any) -> bool:
    return isinstance(leaf, nnx.Variable)


def _axes(leaf: Any) -> tuple[Any, ...]:
    """Logical axes of a variable without those that only number what is stacked; () where it does not say them."""
    axes = leaf.get_metadata().get("logical_axes", ()) if _is_variable(leaf) else ()
    return tuple(axes[1:]) if axes and axes[0] in STACKED else tuple(axes)


def are_matrices(params: PyTree) -> PyTree:
    """For each variable or array, whether it has two axes or more beside one that numbers what is stacked.

    These are decayed; vectors (norm scales, biases, also one per expert) and scalars are not.
    """
    return jax.tree.map(lambda leaf: len(_axes(leaf) or leaf.shape) >= 2, params, is_leaf=_is_variable)


def muon_labels(params: PyTree) -> PyTree:
    """For each variable "muon" or "rest".

    Muon takes what says its `logical_axes` and has two of them, none of `NO_MATRIX`; a stack [E, in, out] is E
    matrices. So embeddings, the output head, norms, biases, the correction bias of routers, adapters and arrays that do
    not say what their axes are go to the rest; the matrix of a router is a matrix.

    Raises:
        ValueError: nothing is for Muon.
    """

    def label(leaf: Any) -> str:
        axes = _axes(leaf)
        return "muon" if len(axes) == 2 and not NO_MATRIX.intersection(axes) else "rest"

    labels = jax.tree.map(label, params, is_leaf=_is_variable)
    if "muon" not in jax.tree.leaves(labels):
        raise ValueError(
            "optimizer is 'muon', and none of the parameters that learn is a matrix to it: adapters and arrays without "
            "logical_axes are not; it must be 'adamw' here."
        )
    return labels


def _scaled(update: Any, _: Any) -> Any:
    return UPDATE_RMS * math.sqrt(max(update.shape[-2:])) * update


def muon_and(
    rest: optax.GradientTransformation, rate: optax.Schedule, *, momentum: float, weight_decay: float
) -> optax.GradientTransformation:
    """Muon for matrices, `rest` for all else.

        M <- m M + (1 - m) G,    W <- W - rate (0.2 sqrt(max(in, out)) NS(m M + (1 - m) G) + decay W)

    NS(X), five steps of a quintic Newton-Schulz iteration from X / |X|_F, brings all singular values near 1 (0.7 to
    1.2), so that the entries of an update of full rank have a root mean square of about 0.2, whatever the shape; that
    is AdamW's size, and one rate serves both. Sources: Jordan et al. 2024 (the iteration; `optax.contrib`), Liu et al.
    2025, arXiv 2502.16982, section 2.2 (the scale), GLM-4.5, arXiv 2508.06471, section 2 (5 steps, 0.95, 0.2).

    What follows from it: the size of a gradient does not matter, so clipping changes the weight of a batch in M alone,
    and a matrix without gradients (an expert without tokens) goes on along M at full size.

    Args:
        rest: the optimiser of what `muon_labels` calls so.
        rate: of Muon.
        momentum: m.
        weight_decay: decay.

    Departures from the reports: m M and (1 - m) G are corrected for the start of M at 0 as optax does, each by its own
    factor. GLM-4.5 does not say which optimiser the rest has, nor where the output head belongs.
    """
    matrices = optax.chain(
        scale_by_muon(
            ns_steps=STEPS,
            beta=momentum,
            weight_dimension_numbers=lambda tree: jax.tree.map(lambda _: MuonDimensionNumbers(-2, -1), tree),
        ),
        optax.stateless_with_tree_map(_scaled),
        optax.add_decayed_weights(weight_decay),
        optax.scale_by_learning_rate(rate),
    )
    return optax.partition({"muon": matrices, "rest": rest}, muon_labels)


def in_float32(inner: optax.GradientTransformation) -> optax.GradientTransformation:
    """The same optimiser with its state and its changes in float32 or wider, whatever the parameters are in."""

    def wide(tree: PyTree) -> PyTree:
        return jax.tree.map(at_least_float32, tree)

    def update(updates, state, params=None):
        return inner.update(wide(updates), state, None if params is None else wide(params))

    return optax.GradientTransformation(lambda params: inner.init(wide(params)), update)
