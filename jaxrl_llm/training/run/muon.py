"""Muon for the matrices of a model, another optimiser for the rest; which is which, the axes of a parameter say."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import optax
from optax.contrib import MuonDimensionNumbers
from optax.contrib import scale_by_muon

from jaxrl_llm.models.sharding import constrain
from jaxrl_llm.training.run.parameters import axes_of
from jaxrl_llm.training.run.parameters import is_variable
from jaxrl_llm.typing import PyTree

UPDATE_RMS = 0.2
"""Root mean square of the entries of an update at rate 1, about that of AdamW's."""

STEPS = 5
"""Of Newton-Schulz."""

NO_MATRIX = frozenset({"vocabulary", "rank"})
"""Axes of what is no matrix to Muon: embeddings and the output head, whose rows are tokens, and factors of adapters, of
which the product is the matrix."""


def muon_labels(params: PyTree) -> PyTree:
    """For each variable "muon" or "rest".

    Muon takes what says its `logical_axes` and has two of them, none of `NO_MATRIX`; a stack [E, in, out] is E
    matrices. So embeddings, the output head, norms, biases, the correction bias of routers, adapters and arrays that do
    not say what their axes are go to the rest; the matrix of a router is a matrix.

    Raises:
        ValueError: nothing is for Muon.
    """

    def label(leaf: Any) -> str:
        axes = axes_of(leaf)
        return "muon" if len(axes) == 2 and not NO_MATRIX.intersection(axes) else "rest"

    labels = jax.tree.map(label, params, is_leaf=is_variable)
    if "muon" not in jax.tree.leaves(labels):
        raise ValueError(
            "optimizer is 'muon', and none of the parameters that learn is a matrix to it: adapters and arrays without "
            "logical_axes are not; it must be 'adamw' here."
        )
    return labels


def _exact(inner: optax.GradientTransformation) -> optax.GradientTransformation:
    """The same, with matrix products in the full precision of their dtype: accelerators do less unless asked."""

    def update(updates: Any, state: Any, params: Any = None) -> Any:
        with jax.default_matmul_precision("highest"):
            return inner.update(updates, state, params)

    return optax.GradientTransformation(inner.init, update)


def _one_after_the_other(inner: optax.GradientTransformation) -> optax.GradientTransformation:
    """The same, with variables of equal shape and axes in one loop: one program serves all of them. It stacks gradients
    and means, which are held twice meanwhile.
    """

    step: Any = inner.update

    def update(updates: Any, state: Any, params: Any = None) -> Any:
        del params
        variables, structure = jax.tree.flatten(updates, is_leaf=is_variable)
        means = jax.tree.leaves(state.mu, is_leaf=is_variable)
        alike: dict[Any, list[int]] = {}
        for index, variable in enumerate(variables):
            axes = variable.get_metadata()["logical_axes"]
            alike.setdefault((axes, variable.shape, variable.dtype), []).append(index)
        for (axes, *_), indices in alike.items():

            def one(pair: tuple[Any, Any], axes: Any = axes) -> tuple[Any, Any]:
                gradient, mean = (constrain(x, axes) for x in pair)
                [change], after = step([gradient], state._replace(mu=[mean]))
                return constrain(change, axes), constrain(after.mu[0], axes)

            stacks = tuple(jnp.stack([tree[index].get_value() for index in indices]) for tree in (variables, means))
            changes, moved = jax.lax.map(one, stacks)
            for place, index in enumerate(indices):
                variables[index] = variables[index].replace(changes[place])
                means[index] = means[index].replace(moved[place])
        _, after = step([], state._replace(mu=[]))
        return structure.unflatten(variables), after._replace(mu=structure.unflatten(means))

    return optax.GradientTransformation(inner.init, update)


def _scaled(update: Any, _: Any) -> Any:
    return UPDATE_RMS * math.sqrt(max(update.shape[-2:])) * update


def muon_and(
    rest: optax.GradientTransformation,
    rate: optax.Schedule,
    *,
    momentum: float,
    weight_decay: float,
    scan: bool = False,
) -> optax.GradientTransformation:
    """Muon for matrices, `rest` for all else.

        M <- m M + (1 - m) G,    W <- W - rate (0.2 sqrt(max(in, out)) NS(m M + (1 - m) G) + decay W)

    NS(X), five steps of a quintic Newton-Schulz iteration from X / |X|_F, brings singular values above |X|_F / 100 to
    0.68 .. 1.14; smaller ones grow by at most 3.4445^5 = 485, and to at most 1.21. The entries of an update have a root
    mean square of 0.2 times that of the new singular values: 0.15 to 0.21 for Gaussian gradients of 24 x 8 to 1024 x
    64, and about 0.2 sqrt(r / n) where r of n singular values are all that there is. That is about AdamW's size, so one
    rate serves both. The products are float32 by name, on accelerators too. Sources: Jordan et al. 2024 (the iteration;
    `optax.contrib`), Liu et al. 2025, arXiv 2502.16982, section 2.2 (the scale), GLM-4.5, arXiv 2508.06471, section 2
    (5 steps, 0.95, 0.2).

    What follows from it: the size of a gradient does not matter, so clipping changes the weight of a batch in M alone,
    and a matrix without gradients (an expert without tokens) goes on along M at full size.

    Args:
        rest: the optimiser of what `muon_labels` calls so.
        rate: of Muon.
        momentum: m.
        weight_decay: decay.
        scan: matrices of equal size one after the other in a loop, so that a program does not grow with their number.

    Departures from the reports: m M and (1 - m) G are corrected for the start of M at 0 as optax does, each by its own
    factor. GLM-4.5 does not say which optimiser the rest has, nor where the output head belongs.
    """
    inner = scale_by_muon(
        ns_steps=STEPS,
        beta=momentum,
        weight_dimension_numbers=lambda tree: jax.tree.map(lambda _: MuonDimensionNumbers(-2, -1), tree),
    )
    matrices = optax.chain(
        _exact(_one_after_the_other(inner) if scan else inner),
        optax.stateless_with_tree_map(_scaled),
        optax.add_decayed_weights(weight_decay),
        optax.scale_by_learning_rate(rate),
    )
    return optax.partition({"muon": matrices, "rest": rest}, muon_labels)
