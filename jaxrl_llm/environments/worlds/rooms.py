"""Rooms: fetch the key, bring it to the door, on a map that is never shown.

A task names the room of the key, the room of the door and where one stands; what leads where must be learned:

    kBdF|A->      the key is in B, the door in F; you are in A, without the key
    e             go east
    C->           you are in C
    t             take the key
    C-!           there is none here

Six actions of one symbol: n, e, s, w to go, t to take the key, o to open the door. Opening it with the key earns 1 and
ends the episode. So a solution has length d(start, key) + 1 + d(key, door) + 1, and every value is known exactly.
"""

import dataclasses
from functools import cached_property
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from jaxrl_llm.environments.worlds.protocol import Answer
from jaxrl_llm.tabular import TabularMdp
from jaxrl_llm.typing import Array
from jaxrl_llm.typing import Bool
from jaxrl_llm.typing import Int

MOVES = "nesw"
TAKE, OPEN = 4, 5
UNREACHED = 10_000


class RoomsState(NamedTuple):
    """Where every row stands, whether it has the key, and its task."""

    room: Int[Array, " B"]
    has_key: Bool[Array, " B"]
    key_room: Int[Array, " B"]
    door_room: Int[Array, " B"]


@dataclasses.dataclass(frozen=True)
class Rooms:
    """Rooms on a grid, joined by a random tree of doors and a few more.

    Attributes:
        rows, columns: of the grid; rows * columns rooms, 3 to 26.
        extra: doors beyond those of the tree, as far as there are walls left to break.
        turns: actions after which an episode is cut off.
        map_seed: which map.

    Raises:
        ValueError: a size that cannot be, or too few turns to solve every task.
    """

    rows: int = 3
    columns: int = 4
    extra: int = 2
    turns: int = 24
    map_seed: int = 0

    def __post_init__(self) -> None:
        """Refuse impossible sizes."""
        if self.rows < 1 or self.columns < 1 or not 3 <= self.count <= 26:
            raise ValueError(
                f"rows x columns is {self.rows} x {self.columns}; there must be 3 to 26 rooms, each with its letter."
            )
        if self.extra < 0:
            raise ValueError(f"extra is {self.extra}; it must be at least 0.")
        longest = int(self.solution_length.max())
        if self.turns < longest:
            raise ValueError(f"turns is {self.turns}; the longest task of this map takes {longest}.")

    @property
    def count(self) -> int:
        """Rooms."""
        return self.rows * self.columns

    @property
    def name(self) -> str:
        """See `ArrayWorld.name`."""
        return f"rooms-{self.rows}x{self.columns}-{self.extra}-{self.map_seed}"

    @property
    def symbols(self) -> tuple[str, ...]:
        """See `ArrayWorld.symbols`."""
        return tuple("kd|->!") + tuple(chr(ord("A") + room) for room in range(self.count))

    @property
    def actions(self) -> tuple[str, ...]:
        """See `ArrayWorld.actions`."""
        return (*MOVES, "t", "o")

    @property
    def tasks(self) -> int:
        """Ordered choices of three different rooms."""
        return len(self._tasks)

    prompt_length = 8
    observation_length = 3

    @cached_property
    def exits(self) -> Int[np.ndarray, "R 4"]:
        """The room that each move leads to from each room; -1 where there is a wall."""
        rng, count = np.random.default_rng(self.map_seed), self.count
        letters = rng.permutation(count)
        walls = []
        for place in range(count):
            if (place + 1) % self.columns:
                walls.append((place, place + 1, 1, 3))
            if place + self.columns < count:
                walls.append((place, place + self.columns, 2, 0))
        exits, part = np.full((count, 4), -1), np.arange(count)
        left = []
        for wall in rng.permutation(len(walls)):
            one, other, there, back = walls[wall]
            if part[one] == part[other]:
                left.append(wall)
                continue
            part[part == part[other]] = part[one]
            exits[letters[one], there], exits[letters[other], back] = letters[other], letters[one]
        for wall in left[: self.extra]:
            one, other, there, back = walls[wall]
            exits[letters[one], there], exits[letters[other], back] = letters[other], letters[one]
        return exits

    @cached_property
    def distances(self) -> Int[np.ndarray, "R R"]:
        """Moves from one room to another."""
        found = np.where(np.eye(self.count, dtype=bool), 0, UNREACHED)
        for room, following in zip(*np.nonzero(self.exits >= 0), strict=True):
            found[room, self.exits[room, following]] = 1
        for middle in range(self.count):
            found = np.minimum(found, found[:, middle, None] + found[middle])
        return found

    @cached_property
    def _tasks(self) -> Int[np.ndarray, "M 3"]:
        """(start, key, door) of each seed."""
        rooms = np.arange(self.count)
        found = np.stack(np.meshgrid(rooms, rooms, rooms, indexing="ij"), axis=-1).reshape(-1, 3)
        start, key, door = found.T
        return found[(start != key) & (key != door) & (start != door)]

    @cached_property
    def solution_length(self) -> Int[np.ndarray, " M"]:
        """Actions of a shortest solution of each task."""
        start, key, door = self._tasks.T
        return self.distances[start, key] + 1 + self.distances[key, door] + 1

    def reset(self, seeds: Int[Array, " B"]) -> tuple[RoomsState, Int[Array, "B P"]]:
        """See `ArrayWorld.reset`."""
        start, key, door = jnp.asarray(self._tasks)[seeds].T
        state = RoomsState(start, jnp.zeros(start.shape, bool), key, door)
        k, d, bar = (jnp.full_like(start, self.symbols.index(symbol)) for symbol in "kd|")
        task = jnp.stack([k, self._letter(key), d, self._letter(door), bar], axis=1)
        return state, jnp.concatenate([task, self._shown(state, jnp.ones(start.shape, bool))], axis=1)

    def step(self, state: RoomsState, action: Int[Array, " B"]) -> tuple[RoomsState, Answer]:
        """See `ArrayWorld.step`."""
        moves = (action >= 0) & (action < len(MOVES))
        to = jnp.asarray(self.exits)[state.room, jnp.where(moves, action, 0)]
        goes = moves & (to >= 0)
        takes = (action == TAKE) & (state.room == state.key_room) & ~state.has_key
        opens = (action == OPEN) & (state.room == state.door_room) & state.has_key
        after = state._replace(room=jnp.where(goes, to, state.room), has_key=state.has_key | takes)
        valid = goes | takes | opens
        return after, Answer(self._shown(after, valid), opens.astype(jnp.float32), opens, valid)

    def expert(self, state: RoomsState) -> Int[Array, " B"]:
        """The first action of a shortest solution."""
        target = jnp.where(state.has_key, state.door_room, state.key_room)
        to = jnp.asarray(self.exits)[state.room]
        left = jnp.where(to >= 0, jnp.asarray(self.distances)[to, target[:, None]], UNREACHED)
        there = jnp.where(state.has_key, OPEN, TAKE)
        return jnp.where(state.room == target, there, jnp.argmin(left, axis=1))

    def mdp(self, seed: int) -> TabularMdp:
        """One task with H = turns as arrays, for exact planning: state has_key * R + room, the last one is the end."""
        count, actions = self.count, len(self.actions)
        start, key, door = (int(room) for room in self._tasks[seed])
        states = jnp.arange(2 * count)
        rooms = RoomsState(states % count, states >= count, jnp.full_like(states, key), jnp.full_like(states, door))
        kernels, rewards = [], []
        for action in range(actions):
            after, answer = self.step(rooms, jnp.full_like(states, action))
            to = jnp.where(answer.done, 2 * count, after.has_key * count + after.room)
            kernels.append(jnp.concatenate([jnp.eye(2 * count + 1)[to], jnp.eye(2 * count + 1)[-1:]]))
            rewards.append(jnp.concatenate([answer.reward, jnp.zeros(1)]))
        kernel, reward = jnp.stack(kernels, axis=1), jnp.stack(rewards, axis=1)
        return TabularMdp(
            jnp.broadcast_to(kernel, (self.turns, *kernel.shape)),
            jnp.broadcast_to(reward, (self.turns, *reward.shape)),
            jnp.eye(2 * count + 1)[start],
        )

    def _letter(self, room: Array) -> Array:
        return self.symbols.index("A") + room

    def _shown(self, state: RoomsState, valid: Bool[Array, " B"]) -> Int[Array, "B 3"]:
        holds = jnp.where(state.has_key, self.symbols.index("k"), self.symbols.index("-"))
        last = jnp.where(valid, self.symbols.index(">"), self.symbols.index("!"))
        return jnp.stack([self._letter(state.room), holds, last], axis=1)
