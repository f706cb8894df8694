"""The rooms of a task and the doors between them, found by walking through all of them once."""

import heapq
import re
from typing import NamedTuple

from jaxrl_llm.environments.worlds.textworld_express.simulator import Shown
from jaxrl_llm.environments.worlds.textworld_express.simulator import Simulator

BACK = {"north": "south", "south": "north", "east": "west", "west": "east"}
_ROOM = re.compile(r"You are in the ([^.]+)\.")
_CLOSED = re.compile(r"[Tt]o the (North|South|East|West) you see a closed ")

Doors = frozenset[tuple[str, str]]
"""(room, direction) of doors, each from both of its sides."""


class Map(NamedTuple):
    """Where the exits of a task's rooms lead.

    Attributes:
        exits: of each room, the room in each direction.
        closed: the doors that are closed at first.
        listed: of each room, the actions that could be taken there.
    """

    exits: dict[str, dict[str, str]]
    closed: Doors
    listed: dict[str, tuple[str, ...]]

    def sides(self, room: str, direction: str) -> Doors:
        """A door from both of its sides."""
        return frozenset({(room, direction), (self.exits[room][direction], BACK[direction])})


def room_of(shown: Shown) -> str:
    """The room that one is in; empty in games that have none."""
    found = _ROOM.search(shown.look)
    return found[1] if found else ""


def closed_doors(shown: Shown) -> set[str]:
    """The directions of the closed doors in sight."""
    return {direction.lower() for direction in _CLOSED.findall(shown.look)}


def walk_map(simulator: Simulator, seed: int, fold: str) -> Map:
    """Begins a task and walks through every room of it, opening every door: about five actions a room."""
    found, closed = Map({}, frozenset(), {}), set()

    def visit(shown: Shown) -> None:
        room, doors = room_of(shown), closed_doors(shown)
        found.exits[room], found.listed[room] = {}, shown.admissible
        for direction, back in BACK.items():
            if f"move {direction}" not in shown.admissible:
                continue
            if direction in doors:
                simulator.step(f"open door to {direction}")
            there = simulator.step(f"move {direction}")
            found.exits[room][direction] = room_of(there)
            if direction in doors:
                closed.update(found.sides(room, direction))
            if room_of(there) not in found.exits:
                visit(there)
            simulator.step(f"move {back}")

    visit(simulator.begin(seed, fold))
    return found._replace(closed=frozenset(closed))


def route(found: Map, start: str, end: str, closed: Doors) -> tuple[tuple[str, ...], Doors]:
    """The fewest actions from one room to another (Dijkstra: a move costs 1, one through a closed door 2).

    Args:
        found: the map.
        start, end: rooms.
        closed: the doors that are closed now.

    Returns:
        The actions; and the doors that are closed afterwards.

    Raises:
        ValueError: no way leads there.
    """
    queue: list[tuple[int, str, tuple[str, ...], Doors]] = [(0, start, (), closed)]
    done = set()
    while queue:
        cost, here, way, shut = heapq.heappop(queue)
        if here == end:
            return way, shut
        if here in done:
            continue
        done.add(here)
        for direction, to in sorted(found.exits[here].items()):
            opens = (here, direction) in shut
            steps = (f"open door to {direction}",) * opens + (f"move {direction}",)
            after = shut - found.sides(here, direction) if opens else shut
            heapq.heappush(queue, (cost + len(steps), to, (*way, *steps), after))
    raise ValueError(f"no way leads from {start!r} to {end!r}.")
