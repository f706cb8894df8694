"""TextWorldExpress in its own Java: promises, folds, experts against a search without a map, Java that fails."""

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from jaxrl_llm.environments.worlds import TextEpisodes
from jaxrl_llm.environments.worlds import check_text_world
from jaxrl_llm.environments.worlds import split_panels
from jaxrl_llm.environments.worlds.textworld_express import TextWorldExpress
from jaxrl_llm.environments.worlds.textworld_express import simulator as java
from jaxrl_llm.environments.worlds.textworld_express.maps import closed_doors
from jaxrl_llm.environments.worlds.textworld_express.maps import room_of
from jaxrl_llm.environments.worlds.textworld_express.simulator import Simulator
from jaxrl_llm.environments.worlds.textworld_express.world import FOLD_SEEDS
from jaxrl_llm.environments.worlds.textworld_express.world import FOLD_TASKS
from jaxrl_llm.environments.worlds.textworld_express.world import GAMES
from jaxrl_llm.environments.worlds.textworld_express.world import UNKNOWN


def java_process() -> subprocess.Popen:
    return java._gateway().java_process


@pytest.fixture
def fresh_java(monkeypatch):
    """A Java of the test's own, that answers within eight seconds."""
    java._end_java()
    monkeypatch.setattr(java, "ANSWER_SECONDS", 8.0)
    yield
    with contextlib.suppress(ProcessLookupError):
        java_process().send_signal(signal.SIGCONT)
    java._end_java()


@pytest.mark.parametrize("game", GAMES)
def test_a_game_keeps_its_promises(game) -> None:
    check_text_world(TextWorldExpress(game), seeds=[0, 1, FOLD_TASKS])


def test_panels_are_the_folds() -> None:
    simulator = Simulator("coin", "")
    for fold in FOLD_SEEDS:
        seeds = list(getattr(simulator._python, f"getSeeds{fold.capitalize()}")())
        assert seeds == list(range(FOLD_SEEDS[fold], FOLD_SEEDS[fold] + FOLD_TASKS))
    for measured in ("dev", "test"):
        world = TextWorldExpress("coin", measured=measured)
        train, measure = split_panels(world)
        assert (train.seeds.tolist(), measure.seeds.tolist()) == ([*range(1000)], [*range(1000, 2000)])
        for seed, fold in ((3, "train"), (1003, measured)):
            episode = world.reset(seed)
            assert episode.prompt.endswith(simulator.begin(FOLD_SEEDS[fold] + 3, fold).text)
            assert episode.prompt.startswith("Your task is to search the environment and find the coin.")
            episode.close()
    simulator.close()
    assert world.name == f"textworldexpress-1.1.0-coin-test-{world.turns}"
    assert TextWorldExpress("coin", "numLocations = 3, includeDoors=0").name.endswith("-numLocations=3,includeDoors=0")


def shortest(simulator: Simulator, seed: int, deepest: int) -> int | None:
    """Actions to the coin by breadth-first search that plays every way from the start; None beyond `deepest`."""
    queue, known = [()], set()
    for depth in range(1, deepest + 1):
        following = []
        for way in queue:
            shown = simulator.begin(seed, "train")
            doors = []
            for action in way:
                at = room_of(shown)
                shown = simulator.step(action)
                doors += [(at, action)] if action.startswith("open") else []
            if "take coin" in shown.admissible:
                return depth
            # Where one is and which doors stand open, whichever side they were opened from.
            state = (room_of(shown), frozenset(doors), frozenset(closed_doors(shown)))
            if state not in known:
                known.add(state)
                following += [(*way, action) for action in shown.admissible if action.startswith(("move", "open door"))]
        queue = following
    return None


def test_the_way_to_the_coin_is_a_shortest() -> None:
    world, simulator, lengths = TextWorldExpress("coin", "numLocations=6"), Simulator("coin", "numLocations=6"), []
    for seed in range(8):
        way = play(world, seed)
        lengths.append(len(way))
        assert shortest(simulator, seed, len(way)) == len(way)
    simulator.close()
    assert max(lengths) >= 4, "some are long enough to take a wrong turn"


def play(world: TextWorldExpress, seed: int, before: tuple[str, ...] = ()) -> list[str]:
    episode, way, earned = world.reset(seed), [], 0.0
    for action in before:
        episode.step(action)
    while (action := episode.expert()) is not None:
        reply = episode.step(action)
        way.append(action)
        earned += reply.reward
        assert len(way) <= world.turns
    episode.close()
    assert reply.done
    assert earned == pytest.approx(1)
    return way


def test_the_expert_finds_the_coin_from_anywhere_and_past_any_door() -> None:
    world = TextWorldExpress("coin")
    for seed in range(5):
        rng, episode, before, admissible = np.random.default_rng(seed), world.reset(seed), [], ()
        for _ in range(20):
            admissible = [action for action in admissible or episode.admissible if action != "take coin"]
            before.append(str(rng.choice(admissible)))
            admissible = episode.step(before[-1]).admissible
        episode.close()
        assert any(action.startswith("close door") for action in before)
        play(world, seed, tuple(before))


@pytest.mark.parametrize(
    ("game", "longest"), [("twc", 25), ("mapreader", 20), ("cookingworld", 50), ("peckingorder", 12)]
)
def test_errands_solve_a_game_and_hold_while_they_are_followed(game, longest) -> None:
    world = TextWorldExpress(game)
    for seed in (2, 1002):
        assert len(play(world, seed)) <= longest
    episode = world.reset(2)
    assert episode.expert() is not None
    episode.step("no action at all")
    assert episode.expert() is not None, "what is refused changes nothing"
    episode.step("inventory" if "inventory" in episode.admissible else episode.admissible[-1])
    assert episode.expert() is None, "off the path nobody knows"
    episode.close()


def test_no_errand_can_be_spared() -> None:
    world, simulator = TextWorldExpress("twc"), Simulator("twc", "")
    way = play(world, 0)
    for left_out in range(len(way)):
        shown = simulator.begin(0, "train")
        for action in (*way[:left_out], *way[left_out + 1 :]):
            if action in shown.admissible:
                shown = simulator.step(action)
        assert not shown.won, way[left_out]
    simulator.close()


def test_a_recipe_is_read_before_it_is_cooked() -> None:
    way = play(TextWorldExpress("cookingworld"), 0)
    assert "read cookbook" in way
    assert way[-2:] == ["prepare meal", "eat meal"]


def test_an_unknown_action_is_refused_in_the_words_of_the_simulator() -> None:
    simulator, episode = Simulator("coin", ""), TextWorldExpress("coin").reset(0)
    before = simulator.begin(0, "train")
    said = simulator.step("dance")
    assert said.text == episode.step("dance").text == UNKNOWN
    assert (said.look, said.admissible) == (before.look, before.admissible)
    for action in ("", "\0", "\r\n", "\ud800", "move north\nmove north", "x" * 1_000_000, "MOVE NORTH", " move north"):
        assert episode.step(action)[:4] == (UNKNOWN, 0.0, False, False)
    simulator.close()
    episode.close()


def test_sorting_is_left_out_for_a_reason() -> None:
    """Two episodes of one task of `sorting` disturb each other; where they no longer do, it can come in."""
    one, other = Simulator("sorting", ""), Simulator("sorting", "")
    one.begin(0, "train", gold=True)
    gold = one.gold()
    alone = [one.begin(0, "train"), *(one.step(action) for action in gold)]
    assert alone[-1].won
    one.begin(0, "train")
    other.begin(0, "train")
    assert [one.step(action) for action in gold] != alone[1:]
    with pytest.raises(ValueError, match="game is 'sorting'; there are: arithmetic, coin"):
        TextWorldExpress("sorting")


def test_several_processes_play_at_once_and_alike() -> None:
    program = (
        "from jaxrl_llm.environments.worlds.textworld_express import TextWorldExpress, simulator\n"
        "one = TextWorldExpress('coin').reset(5)\n"
        "while (action := one.expert()) is not None: print(action, one.step(action))\n"
        "print(simulator._gateway().gateway_parameters.port)\n"
    )
    command = [sys.executable, "-c", program]
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    said = [process.communicate(timeout=200)[0].splitlines() for process in processes]
    assert [process.returncode for process in processes] == [0, 0, 0]
    assert len({tuple(lines[:-1]) for lines in said}) == 1
    assert len({lines[-1] for lines in said}) == 3, "each has a port of its own"
    assert len(said[0]) > 2


def test_games_are_used_again_and_java_ends_with_its_process() -> None:
    world = TextWorldExpress("twc")
    free = java._free[(java._gateway().java_process.pid, "twc", "")]
    before = len(free)
    for seed in range(5):
        world.reset(seed).close()
    assert len(free) == before
    program = (
        "import os, signal\n"
        "from jaxrl_llm.environments.worlds.textworld_express import TextWorldExpress, simulator\n"
        "TextWorldExpress('coin').reset(0)\n"
        "print(simulator._gateway().java_process.pid, flush=True)\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True, timeout=200)
    number = int(done.stdout)
    for _ in range(100):
        try:
            os.kill(number, 0)
        except ProcessLookupError:
            return
        if "State:\tZ" in Path(f"/proc/{number}/status").read_text():
            return  # dead; whoever adopts it has not looked yet
        time.sleep(0.1)
    pytest.fail("Java outlives the process that started it")


@pytest.mark.parametrize("in_a_thread", [False, True])
def test_a_java_that_hangs_costs_the_episode_only(fresh_java, in_a_thread) -> None:
    world, found = TextWorldExpress("coin"), []
    seeds = [0] if in_a_thread else [0, 1]

    def run() -> None:
        episodes = TextEpisodes(world, seeds, seconds=30 if in_a_thread else 4)
        alone = episodes.step(["look around"] * len(seeds))
        java_process().send_signal(signal.SIGSTOP)
        found.append(episodes.step(["inventory"] * len(seeds)))
        java_process().send_signal(signal.SIGCONT)
        found.append(episodes.dropped)
        episodes.close()
        again = TextEpisodes(world, seeds, seconds=30)
        found.append(again.step(["look around"] * len(seeds)) == alone)
        again.close()

    if in_a_thread:
        thread = threading.Thread(target=run)
        thread.start()
        thread.join()
    else:
        run()
    assert found[0] == [None] * len(seeds)
    assert found[1].all()
    assert found[2], "a late answer is taken for none of another episode"


def test_a_java_that_dies_is_named_and_replaced(fresh_java) -> None:
    world = TextWorldExpress("coin")
    episode, before = world.reset(0), world.reset(0).prompt
    java_process().kill()
    java_process().wait()
    with pytest.raises(RuntimeError, match="the Java process of TextWorldExpress has ended"):
        episode.step("look around")
    episode.close()
    assert world.reset(0).prompt == before


@pytest.mark.parametrize(
    ("game", "settings", "sentence"),
    [
        (
            "coin",
            "numLocations=99",
            "settings 'numLocations=99': Number of locations must be",
        ),
        ("coin", "colour=3", r"Unrecognized property name \(colour\)"),
    ],
)
def test_settings_that_are_none_are_refused_in_its_words(game, settings, sentence) -> None:
    with pytest.raises(ValueError, match=sentence):
        TextWorldExpress(game, settings)


def test_a_machine_without_java_is_told_what_to_install(monkeypatch) -> None:
    java._end_java()
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(FileNotFoundError, match="apt-get install default-jre-headless"):
        TextWorldExpress("coin")
