"""What of TextWorldExpress's worlds needs neither its package nor Java; tests/worlds plays the games."""

import importlib.util
import itertools

import pytest

from jaxrl_llm.environments.worlds.textworld_express import TextWorldExpress
from jaxrl_llm.environments.worlds.textworld_express.maps import BACK
from jaxrl_llm.environments.worlds.textworld_express.maps import Map
from jaxrl_llm.environments.worlds.textworld_express.maps import route

#  a - b = c        "=" is a closed door
#  |       |
#  d = e - f
TOWN = Map(
    {
        "a": {"east": "b", "south": "d"},
        "b": {"west": "a", "east": "c"},
        "c": {"west": "b", "south": "f"},
        "d": {"north": "a", "east": "e"},
        "e": {"west": "d", "east": "f"},
        "f": {"west": "e", "north": "c"},
        "g": {},
    },
    frozenset({("b", "east"), ("c", "west"), ("d", "east"), ("e", "west")}),
    {},
)


def walk(start: str, actions: tuple[str, ...], closed: set):
    """Where these actions lead, and the doors that are closed then; None where one cannot be taken."""
    room, shut = start, {*closed}
    for action in actions:
        direction = action.split()[-1]
        if action.startswith("open"):
            shut -= {(room, direction), (TOWN.exits[room][direction], BACK[direction])}
        elif (room, direction) in shut or direction not in TOWN.exits[room]:
            return None
        else:
            room = TOWN.exits[room][direction]
    return room, shut


@pytest.mark.parametrize("opened", [frozenset(), frozenset({("b", "east"), ("c", "west")}), TOWN.closed])
def test_a_route_is_the_shortest_of_all_walks(opened) -> None:
    closed = TOWN.closed - opened
    for start, end in itertools.product("abcdef", repeat=2):
        actions, shut = route(TOWN, start, end, closed)
        assert walk(start, actions, closed) == (end, shut)
        steps = [f"{verb} {direction}" for verb in ("move", "open door to") for direction in ("east", "west", "north")]
        steps.append("move south")  # no door leads there
        if len(actions) > 4:
            continue
        for length in range(len(actions)):
            for shorter in itertools.product(steps, repeat=length):
                if all(word.split()[-1] in BACK for word in shorter):
                    found = walk_or_none(start, shorter, closed)
                    assert found is None or found[0] != end, (start, end, actions, shorter)


def walk_or_none(start: str, actions: tuple[str, ...], closed: set):
    try:
        return walk(start, actions, closed)
    except KeyError:  # a door that is none was opened
        return None


def test_a_room_without_a_way_is_said() -> None:
    with pytest.raises(ValueError, match="no way leads from 'a' to 'g'"):
        route(TOWN, "a", "g", TOWN.closed)


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"game": "zork"}, "game is 'zork'; there are: arithmetic, coin, cookingworld"),
        ({"measured": "train"}, "measured is 'train'; it must be 'dev' or 'test'"),
        ({"turns": 0}, "turns is 0; it must be at least 1"),
    ],
)
def test_bad_settings_are_named_before_anything_starts(settings, sentence) -> None:
    with pytest.raises(ValueError, match=sentence):
        TextWorldExpress(**settings)


def test_a_missing_package_is_named(monkeypatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "textworld_express" else find(name))
    with pytest.raises(ModuleNotFoundError, match=r"run: pip install 'jaxrl_llm\[worlds\]'"):
        TextWorldExpress()
