"""Rooms against exact planning and a walk written out; panels that never move; worlds that break a promise."""

import collections
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_llm import tabular
from jaxrl_llm.environments.worlds import Rooms
from jaxrl_llm.environments.worlds import check_world
from jaxrl_llm.environments.worlds import split_panels
from jaxrl_llm.environments.worlds.rooms import OPEN
from jaxrl_llm.environments.worlds.rooms import TAKE

SMALL = Rooms(2, 3, extra=1, turns=12)


@pytest.mark.parametrize("world", [SMALL, Rooms(), Rooms(1, 3, extra=0, turns=8), Rooms(5, 5, turns=40, map_seed=3)])
def test_a_world_keeps_its_promises(world) -> None:
    check_world(world)


@pytest.mark.parametrize("seed", range(4))
def test_a_map_is_connected_and_every_door_leads_back(seed) -> None:
    world = Rooms(map_seed=seed)
    exits = world.exits
    for room, move in zip(*np.nonzero(exits >= 0), strict=True):
        assert exits[exits[room, move], (move + 2) % 4] == room
    # A tree has one door fewer than rooms; each door is counted from both sides.
    assert (exits >= 0).sum() == 2 * (world.count - 1 + world.extra)
    seen, queue = {0}, collections.deque([0])
    while queue:
        for to in exits[queue.popleft()]:
            if to >= 0 and int(to) not in seen:
                seen.add(int(to))
                queue.append(int(to))
    assert len(seen) == world.count
    assert (world.distances < world.count).all()


def walk(world: Rooms, seed: int, actions: list[int]):
    """(text, reward, done, valid) of each action, by hand."""
    start, key, door = (int(room) for room in world._tasks[seed])
    room, held, found = start, False, []
    for action in actions:
        valid = done = False
        if 0 <= action < 4 and world.exits[room, action] >= 0:
            room, valid = int(world.exits[room, action]), True
        elif action == TAKE and room == key and not held:
            held = valid = True
        elif action == OPEN and room == door and held:
            valid = done = True
        found.append((f"{chr(65 + room)}{'k' if held else '-'}{'>' if valid else '!'}", float(done), done, valid))
        if done:
            break
    return found


def test_random_walks_are_those_written_out() -> None:
    rng, count, turns = np.random.default_rng(0), 60, 60
    seeds = rng.integers(0, SMALL.tasks, count)
    actions = rng.integers(-1, 6, (turns, count))

    @jax.jit
    def run(seeds, actions):
        state, prompt = SMALL.reset(seeds)
        return prompt, jax.lax.scan(SMALL.step, state, actions)[1]

    prompt, answers = jax.device_get(run(jnp.asarray(seeds), jnp.asarray(actions)))
    ends = 0
    for row, seed in enumerate(seeds):
        expected = walk(SMALL, int(seed), actions[:, row].tolist())
        start, key, door = (chr(65 + room) for room in SMALL._tasks[seed])
        assert "".join(SMALL.symbols[symbol] for symbol in prompt[row]) == f"k{key}d{door}|{start}->"
        for turn, (text, reward, done, valid) in enumerate(expected):
            assert "".join(SMALL.symbols[symbol] for symbol in answers.observation[turn, row]) == text
            assert answers.reward[turn, row] == reward
            assert (bool(answers.done[turn, row]), bool(answers.valid[turn, row])) == (done, valid)
        ends += expected[-1][2]
    assert ends >= 3, "some random walks come to the end"


def test_exact_values_are_the_lengths_of_solutions() -> None:
    for seed in range(0, SMALL.tasks, 17):
        mdp, length = SMALL.mdp(seed), int(SMALL.solution_length[seed])
        values = tabular.plan(mdp.transitions, mdp.rewards).values @ mdp.initial
        left = SMALL.turns - np.arange(SMALL.turns + 1)
        np.testing.assert_array_equal(values, left >= length)
        np.testing.assert_allclose(mdp.transitions.sum(-1), 1)


def test_the_expert_takes_a_shortest_way() -> None:
    world = Rooms()
    seeds = jnp.arange(world.tasks)
    state, _ = world.reset(seeds)
    done, steps = np.zeros(world.tasks, bool), np.zeros(world.tasks, int)
    for _ in range(world.turns):
        steps += ~done
        state, answer = world.step(state, world.expert(state))
        done |= np.asarray(answer.done)
    np.testing.assert_array_equal(steps, world.solution_length)


def test_panels_are_frozen_and_disjoint() -> None:
    train, measure = split_panels(Rooms())
    assert sorted([*train.seeds, *measure.seeds]) == list(range(Rooms().tasks))
    assert len(measure.seeds) == pytest.approx(Rooms().tasks / 3, rel=0.1)
    # Whoever changes these changes what earlier runs were measured on.
    assert train.sha256.startswith("f5b8979f")
    assert len(measure.seeds) == 437
    assert train.sha256 != measure.sha256
    assert split_panels(Rooms(map_seed=1))[0].sha256 != train.sha256
    with pytest.raises(ValueError, match="has 1 tasks, too few for a panel"):
        split_panels(Broken(tasks=1))


@pytest.mark.parametrize(
    ("sizes", "sentence"),
    [
        ({"rows": 1, "columns": 2}, r"rows x columns is 1 x 2; there must be 3 to 26 rooms"),
        ({"rows": 9, "columns": 9}, r"rows x columns is 9 x 9; there must be 3 to 26 rooms"),
        ({"rows": -3, "columns": -4}, r"rows x columns is -3 x -4"),
        ({"extra": -1}, r"extra is -1; it must be at least 0\."),
        ({"turns": 5}, r"turns is 5; the longest task of this map takes 13\."),
    ],
)
def test_impossible_rooms_are_refused(sizes, sentence) -> None:
    with pytest.raises(ValueError, match=sentence):
        Rooms(**sizes)


@dataclasses.dataclass(frozen=True)
class Broken:
    """Rooms that break one promise."""

    tasks: int = SMALL.tasks
    turns: int = SMALL.turns
    actions: tuple = SMALL.actions
    takes_anything: bool = False
    wanders: bool = False
    prompt_length: int = SMALL.prompt_length
    expert_sleeps: bool = False

    name, symbols, observation_length = "broken", SMALL.symbols, SMALL.observation_length

    def reset(self, seeds):
        return SMALL.reset(seeds)

    def step(self, state, action):
        after, answer = SMALL.step(state, action)
        if self.takes_anything:
            answer = answer._replace(valid=answer.valid | True)
        if self.wanders:
            after = after._replace(room=(after.room + 1) % SMALL.count)
        return after, answer

    def expert(self, state):
        return SMALL.expert(state) * (not self.expert_sleeps)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"tasks": 0}, "has 0 tasks and 12 turns"),
        ({"actions": ("n", "n")}, "has a symbol or an action twice"),
        ({"prompt_length": 7}, r"the prompt of broken has shape \(64, 8\); it must have 7 columns"),
        ({"takes_anything": True}, "takes an action that is none of its own"),
        ({"wanders": True}, "changes its state by an action that it refuses"),
        ({"expert_sleeps": True}, "the expert of broken does not solve task 0 within 12 turns"),
    ],
)
def test_a_broken_promise_is_named(change, sentence) -> None:
    check_world(Broken())
    with pytest.raises(ValueError, match=sentence):
        check_world(Broken(**change))
