"""DeepSea: a grid that only a long run of right moves crosses, where each one costs a little."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array
from jaxtyping import Int

from jaxrl_llm.tabular import TabularMdp
from jaxrl_llm.typing import PRNGKey

MOVE_COST = 0.01
"""What crossing the whole grid costs."""

OPTIMUM = 1 - MOVE_COST


class DeepSea(NamedTuple):
    """The grid of one size: row h is step h, a state is a column, action `right[h, s]` moves right, the other left.

    Attributes:
        right: which of the two actions moves right in each cell [N, N].
    """

    right: Int[Array, "N N"]

    @property
    def size(self) -> int:
        """N."""
        return self.right.shape[0]

    @property
    def mdp(self) -> TabularMdp:
        """The same as arrays; N^3 numbers twice.

        A right move costs 0.01 / N; made in the last row and column it earns 1. One of 2^N sequences of moves does so:
        always right, for 0.99. The best of the others is never right, for 0.
        """
        size = self.size
        columns = jnp.arange(size)[None, :, None]
        moves_right = jnp.arange(2)[None, None, :] == self.right[:, :, None]  # [N, N, 2]
        following = jnp.clip(columns + jnp.where(moves_right, 1, -1), 0, size - 1)
        cost = jnp.where(moves_right, -MOVE_COST / size, 0.0)
        goal = moves_right[-1, -1].astype(cost.dtype)
        rewards = cost.at[-1, -1].add(goal)
        return TabularMdp(
            jax.nn.one_hot(following, size, dtype=cost.dtype), rewards, jax.nn.one_hot(0, size, dtype=cost.dtype)
        )


def deep_sea(key: PRNGKey, *, size: int) -> DeepSea:
    """DeepSea with a random action map in each cell.

    Source: Osband et al., as used by HyperAgent (arXiv 2402.10228): cost 0.01 / N of a right move, goal +1.

    Args:
        key: random key of the map.
        size: N.

    Returns:
        the grid.

    Raises:
        ValueError: if size is below 2.
    """
    if size < 2:
        raise ValueError(f"size is {size}; it must be at least 2.")
    return DeepSea(jax.random.randint(key, (size, size), 0, 2))
