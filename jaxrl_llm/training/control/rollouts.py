"""What an actor-critic learns from: T steps of each of B games, and the last few batches of them."""

from typing import Any
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxrl_llm.training.control.networks import Memory
from jaxrl_llm.typing import Array
from jaxrl_llm.typing import Bool
from jaxrl_llm.typing import Float
from jaxrl_llm.typing import Int
from jaxrl_llm.typing import PRNGKey
from jaxrl_llm.typing import PyTree


class Rollout(NamedTuple):
    """T steps of B games, and what each shows after the last one.

    shown: [B, T + 1, *shape]. began: [B, T + 1] true where a game begins. action: chosen. log_prob: of it under the
    policy that acted [nats]. reward: of the step. discount: of what follows, 0 where the game ends. cut: where the game
    was cut off, though more would have followed: nothing is learned from that step, and its value stands for the rest.
    real: false where no action was taken. memory: of the LSTM before the first step.
    """

    shown: Any
    began: Bool[Array, "B T1"]
    action: Int[Array, "B T"]
    log_prob: Float[Array, "B T"]
    reward: Float[Array, "B T"]
    discount: Float[Array, "B T"]
    cut: Bool[Array, "B T"]
    real: Bool[Array, "B T"]
    memory: Memory


class Replay(NamedTuple):
    """The last k batches.

    rollouts: [k, B, ...]; places that were not written yet hold anything. written: batches so far.
    """

    rollouts: Rollout
    written: Int[Array, ""]


def empty_replay(rollout: PyTree, batches: int) -> Replay:
    """Room for so many batches of the shapes of `rollout`."""
    room = jax.tree.map(lambda leaf: jnp.zeros((batches, *leaf.shape), leaf.dtype), rollout)
    return Replay(room, jnp.zeros((), jnp.int32))


def remember(replay: Replay, rollout: Rollout) -> Replay:
    """The replay with a batch more, in the place of the oldest."""
    place = replay.written % replay.rollouts.action.shape[0]
    rollouts = jax.tree.map(lambda room, new: room.at[place].set(new), replay.rollouts, rollout)
    return Replay(rollouts, replay.written + 1)


def draw(replay: Replay, key: PRNGKey, *, reuse: int, size: int) -> tuple[Int[Array, "U M"], Int[Array, "U M"]]:
    """Which games of which batches each update of an iteration reads, so that every game is read `reuse` times while
    its batch is kept.

    Args:
        replay: what is kept; until all places are written, those that are take the others' turns.
        key: of the order.
        reuse: how often a batch is used in all, over as many iterations as there are places.
        size: games per update.

    Returns:
        place and row of each game.
    """
    places, games = replay.rollouts.action.shape[:2]
    rounds = -(-reuse // places)
    order = jax.vmap(lambda key: jax.random.permutation(key, places * games))(jax.random.split(key, rounds))
    order = order.reshape(-1)[: reuse * games].reshape(-1, size)
    return order // games % jnp.minimum(replay.written, places), order % games


def take(replay: Replay, place: Int[Array, " M"], row: Int[Array, " M"]) -> Rollout:
    """Some games of some batches."""
    return jax.tree.map(lambda room: room[place, row], replay.rollouts)
