"""What an inference engine does to the weights: state in, state out, jit- and vmap-able.

Quantisation acts on matrices; norms and biases stay, as engines keep them. Blocks lie along the axis that a product
sums over: the input of a kernel, the width of an embedding. Merge adapters first (`models.lora.merge_lora`), as an
engine that is sent the weights has them.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxrl_llm.rollouts.perturb.rounding import Rounding
from jaxrl_llm.rollouts.perturb.rounding import quantise_fp8
from jaxrl_llm.rollouts.perturb.rounding import quantise_int8
from jaxrl_llm.rollouts.perturb.rounding import round_to_bf16
from jaxrl_llm.typing import Array
from jaxrl_llm.typing import PyTree

WeightPerturbation = Callable[[PyTree], PyTree]
"""Parameters of a model in, as `nnx.split` gives them; parameters of the same structure out."""


def _round_matrices(state: PyTree, rounding: Rounding) -> PyTree:
    def act(path: tuple, leaf: Array) -> Array:
        name = jax.tree_util.keystr(path, simple=True, separator=".")
        if "low_rank" in name:
            raise ValueError(f"state has an adapter at {name}; merge it first with merge_lora, then quantise.")
        if leaf.ndim < 2:
            return leaf
        if name.startswith("embedding"):  # [vocabulary, width]
            return rounding(leaf)
        return jnp.swapaxes(rounding(jnp.swapaxes(leaf, -1, -2)), -1, -2)  # [.., in, out]

    return jax.tree_util.tree_map_with_path(act, state)


def bf16_weights(state: PyTree) -> PyTree:
    """Every parameter rounded to bfloat16, norms and biases included: a sync of the weights in half precision."""
    return jax.tree.map(round_to_bf16, state)


def int8_weights(state: PyTree, *, block: int = 32) -> PyTree:
    """Every matrix by `rounding.quantise_int8`.

    Raises:
        ValueError: block < 1, or adapters that are not merged.
    """
    return _round_matrices(state, functools.partial(quantise_int8, block=block))


def fp8_weights(state: PyTree, *, block: int = 128) -> PyTree:
    """Every matrix by `rounding.quantise_fp8`.

    Raises:
        ValueError: block < 1, or adapters that are not merged.
    """
    return _round_matrices(state, functools.partial(quantise_fp8, block=block))


def chain_weights(*perturbations: WeightPerturbation) -> WeightPerturbation:
    """One after the other, the first one first; without any, the identity."""

    def chained(state: PyTree) -> PyTree:
        for perturbation in perturbations:
            state = perturbation(state)
        return state

    return chained


class History(NamedTuple):
    """The last lag + 1 states, oldest first, along a new first axis: lag + 1 times the memory of one state."""

    states: PyTree


def start_history(state: PyTree, *, lag: int) -> History:
    """A history in which nothing has changed for `lag` steps.

    Raises:
        ValueError: lag < 0.
    """
    if lag < 0:
        raise ValueError(f"lag must be at least 0 steps, got {lag}")
    return History(jax.tree.map(lambda leaf: jnp.stack([leaf] * (lag + 1)), state))


def push(history: History, state: PyTree) -> History:
    """The history after one more step, which forgets its oldest state."""
    return History(jax.tree.map(lambda old, new: jnp.concatenate([old[1:], new[None]]), history.states, state))


def stale_weights(history: History) -> PyTree:
    """The state of `lag` steps ago: what an engine samples with when it is synced late."""
    return jax.tree.map(lambda leaf: leaf[0], history.states)
