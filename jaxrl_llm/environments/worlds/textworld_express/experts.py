"""Solutions of TextWorldExpress's games. Its own "gold paths" are random walks that end well, so these are ours.

`coin`: from every state a way of the fewest actions to the coin, on a map that was walked beside the episode.

The other games: what the gold path does besides walking about, in its order, without everything that the task is
solved without; and between two rooms the shortest way. That is no shortest solution, since the order is the gold
path's. What is read there and tells something new stays, since whoever learns from it must read it too. Such a path
holds only as long as it is followed.
"""

import functools
from collections.abc import Sequence
from typing import NamedTuple

from jaxrl_llm.environments.worlds.textworld_express.maps import Doors
from jaxrl_llm.environments.worlds.textworld_express.maps import Map
from jaxrl_llm.environments.worlds.textworld_express.maps import room_of
from jaxrl_llm.environments.worlds.textworld_express.maps import route
from jaxrl_llm.environments.worlds.textworld_express.maps import walk_map
from jaxrl_llm.environments.worlds.textworld_express.simulator import Simulator

TAKE_COIN = "take coin"
_WALKING = ("move ", "open door ", "close door ", "look around", "inventory")
_KEPT = 4096


class Errand(NamedTuple):
    """Something to do in a room; `told` where it must stay, for what it tells."""

    room: str
    action: str
    told: bool


@functools.lru_cache(maxsize=_KEPT)
def coin_map(settings: str, fold: str, seed: int) -> Map:
    """The map of a task of `coin`."""
    simulator = Simulator("coin", settings)
    try:
        return walk_map(simulator, seed, fold)
    finally:
        simulator.close()


def coin_action(found: Map, room: str, closed: Doors) -> str | None:
    """The first action of a shortest way to the coin; None where none was in sight in any room.

    Args:
        found: the map.
        room: where one is.
        closed: the doors that are closed now.
    """
    coin = next((place for place, listed in found.listed.items() if TAKE_COIN in listed), None)
    if coin is None:
        return None
    return next(iter((*route(found, room, coin, closed)[0], TAKE_COIN)))


@functools.lru_cache(maxsize=_KEPT)
def errands_path(game: str, settings: str, fold: str, seed: int) -> tuple[str, ...] | None:
    """A solution of a task made of its gold path; None where that does not solve it.

    It costs the task played some tens of times over: about a second for `twc`, some seconds for `cookingworld`.
    """
    simulator = Simulator(game, settings)
    try:
        errands = _gold_errands(simulator, seed, fold)
        if errands is None:
            return None
        found = walk_map(simulator, seed, fold)
        length, path = max(1, len(errands) // 2), _play(simulator, seed, fold, found, errands)
        while path is not None and length:  # leave out stretches, long ones first, until no single one can be spared
            spared, start = False, 0
            while start + length <= len(errands):
                fewer = errands[:start] + errands[start + length :]
                told = any(errand.told for errand in errands[start : start + length])
                shorter = None if told else _play(simulator, seed, fold, found, fewer)
                if shorter is None:
                    start += 1
                else:
                    errands, path, spared = fewer, shorter, True
            length = length if spared else length // 2
        return path
    finally:
        simulator.close()


def _gold_errands(simulator: Simulator, seed: int, fold: str) -> list[Errand] | None:
    """What the gold path does besides walking, as far as it can be taken; None where it does not solve the task."""
    simulator.begin(seed, fold, gold=True)
    gold = simulator.gold()
    shown, errands, told = simulator.begin(seed, fold), [], set()
    for action in gold:
        if action not in shown.admissible:
            continue
        room = room_of(shown)
        shown = simulator.step(action)
        if not action.startswith(_WALKING):
            errands.append(Errand(room, action, action.startswith("read ") and shown.text not in told))
            told.add(shown.text)
        if shown.won or shown.lost:
            break
    return errands if shown.won else None


def _play(simulator: Simulator, seed: int, fold: str, found: Map, errands: Sequence[Errand]) -> tuple[str, ...] | None:
    """The actions that do these errands, as far as the task is solved; None where one cannot be done, or it is not."""
    shown, closed, path = simulator.begin(seed, fold), found.closed, []
    for errand in errands:
        try:
            way, closed = route(found, room_of(shown), errand.room, closed)
        except (KeyError, ValueError):  # a room that the walk did not see, or no way that it knows
            return None
        for action in (*way, errand.action):
            if action not in shown.admissible:
                return None
            shown = simulator.step(action)
            path.append(action)
            if shown.won or shown.lost:
                return tuple(path) if shown.won else None
    return None
