"""A ring buffer of data with their perturbations, as a pytree of fixed shapes."""

from typing import Any
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array
from jaxtyping import Float
from jaxtyping import Int

from jaxrl_llm.checks import require_at_least
from jaxrl_llm.typing import PRNGKey


class Data(NamedTuple):
    """Data of B rounds.

    Attributes:
        inputs: x [B, *input_shape].
        outputs: a, which output's value was observed [B].
        rewards: r [B].
        perturbations: z, drawn once with the datum and never again [B, M].
    """

    inputs: Array
    outputs: Int[Array, " B"]
    rewards: Float[Array, " B"]
    perturbations: Float[Array, "B M"]


class Replay(NamedTuple):
    """The newest data, at most a capacity.

    Attributes:
        data: rows of the buffer; those not yet written hold zeros and are never sampled.
        added: how many rows were ever written.
    """

    data: Data
    added: Int[Array, ""]

    @property
    def capacity(self) -> int:
        """How many rows there is room for."""
        return self.data.rewards.shape[0]

    @property
    def size(self) -> Int[Array, ""]:
        """How many rows have been written: |D|."""
        return jnp.minimum(self.added, self.capacity)


def empty_replay(
    capacity: int, *, input_shape: tuple[int, ...], index_dimension: int, input_dtype: Any = None
) -> Replay:
    """A buffer with room for `capacity` rows.

    Raises:
        ValueError: if capacity is below 1.
    """
    require_at_least("capacity", capacity, 1)
    inputs = jnp.zeros((capacity, *input_shape), jnp.result_type(float) if input_dtype is None else input_dtype)
    rows = Data(inputs, jnp.zeros(capacity, int), jnp.zeros(capacity), jnp.zeros((capacity, index_dimension)))
    return Replay(rows, jnp.zeros((), int))


def add(replay: Replay, datum: Data) -> Replay:
    """Write one row (leaves without the leading axis), in place of the oldest one where the buffer is full."""
    place = replay.added % replay.capacity
    rows = jax.tree.map(
        lambda all_rows, row: jax.lax.dynamic_update_index_in_dim(all_rows, row.astype(all_rows.dtype), place, 0),
        replay.data,
        jax.tree.map(jnp.asarray, datum),
    )
    return Replay(rows, replay.added + 1)


def sample(replay: Replay, key: PRNGKey, count: int) -> Data:
    """`count` rows, independent and uniform over those written; row 0, which is zeros, if there are none."""
    places = jax.random.randint(key, (count,), 0, jnp.maximum(replay.size, 1))
    return jax.tree.map(lambda rows: rows[places], replay.data)
