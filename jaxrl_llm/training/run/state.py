"""What a run carries from one update to the next, and its fingerprint."""

import dataclasses
import hashlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxrl_llm.typing import Array
from jaxrl_llm.typing import Int
from jaxrl_llm.typing import PRNGKey
from jaxrl_llm.typing import PyTree


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """The arrays that change during training; all of them are donated to the update and saved in a checkpoint.

    Frozen parameters are not here: they never change, so they are never copied nor saved.

    Attributes:
        step: rollout batches finished.
        updates: optimiser steps applied, skipped ones not counted.
        skipped: updates skipped so far because the loss or the gradient was not finite.
        skipped_in_a_row: the same, since the last applied update.
        key: the run's root key; every random number comes from it by folding in integers, so it stays as it is.
        params: the trained parameters.
        opt_state: the optimiser's state.
        critic: parameters of the critic; no leaves where there is none.
        critic_opt_state: the state of its optimiser.
    """

    step: Int[Array, ""]
    updates: Int[Array, ""]
    skipped: Int[Array, ""]
    skipped_in_a_row: Int[Array, ""]
    key: PRNGKey
    params: PyTree
    opt_state: PyTree
    critic: PyTree = ()
    critic_opt_state: PyTree = ()

    @classmethod
    def create(
        cls,
        params: PyTree,
        optimizer: optax.GradientTransformation,
        seed: int,
        critic: tuple[PyTree, PyTree] = ((), ()),
    ) -> "TrainState":
        """The state before the first step; it takes `params` over: the first update donates their buffers.

        Args:
            params: the trained parameters.
            optimizer: of the policy.
            seed: of the root key.
            critic: parameters and optimiser state of a critic.
        """
        # One array per counter: a buffer shared between two leaves cannot be donated twice.
        counters = {name: jnp.zeros((), jnp.int32) for name in ("step", "updates", "skipped", "skipped_in_a_row")}
        return cls(
            key=jax.random.key(seed),
            params=params,
            opt_state=jax.jit(optimizer.init)(params),
            critic=critic[0],
            critic_opt_state=critic[1],
            **counters,
        )


def named_leaves(tree: PyTree) -> dict[str, Any]:
    """The leaves by the path that leads to them, in the tree's order."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in leaves}


def _plain(leaf: Array) -> np.ndarray:
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        leaf = jax.random.key_data(leaf)
    return np.ascontiguousarray(leaf)


def state_hash(tree: PyTree) -> str:
    """SHA-256 over path, dtype, shape and bytes of every leaf: equal exactly when the trees are equal bit for bit."""
    digest = hashlib.sha256()
    for name, leaf in named_leaves(tree).items():
        array = _plain(leaf)
        digest.update(f"{name}:{array.dtype}:{array.shape};".encode())
        digest.update(array.view(np.uint8).data if array.ndim else array.tobytes())
    return digest.hexdigest()
