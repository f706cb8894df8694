"""Games of the Atari 2600: what is shown, counted, begun again and refused."""

import importlib
import runpy
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from jaxrl_llm.environments.pixels import Atari
from jaxrl_llm.environments.pixels import HostAnswer
from jaxrl_llm.environments.pixels import HostGames


def _drawn(games: Atari, steps: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, len(games.actions), (steps, games.count))


def _play(games: Atari, actions: np.ndarray) -> HostAnswer:
    """Every answer, one axis more."""
    answers = [games.step(row) for row in actions]
    return HostAnswer(*(np.stack(field) for field in zip(*answers, strict=True)))


STEPS = 300
"""Of chance: one game of Breakout is over twice by then, the other one once."""
SEED = 6


@pytest.fixture(scope="module")
def breakout() -> Iterator[Atari]:
    """Five lives, soon lost."""
    games = Atari("breakout", 2, size=20, stack=2, threads=2, sticky=0.25, episodic_life=True)
    yield games
    games.close()


@pytest.fixture(scope="module")
def played(breakout: Atari) -> HostAnswer:
    breakout.reset(SEED)
    return _play(breakout, _drawn(breakout, STEPS))


def test_what_a_game_is(breakout: Atari) -> None:
    games: HostGames = breakout
    assert games.actions == ("NOOP", "FIRE", "RIGHT", "LEFT")
    assert games.name == "atari_breakout_20x20x2_skip_4_sticky_0.25_noops_30_frames_108000_lives_signs_minimal_4"
    assert games.observation_shape == (20, 20, 2)
    first = games.reset(0)
    assert (first.shape, first.dtype) == ((2, 20, 20, 2), np.uint8)
    assert not first[..., 0].any(), "before the first picture there is none"
    assert first[..., 1].any()


def test_an_answer_has_its_types_and_pictures_move_along(breakout: Atari, played: HostAnswer) -> None:
    assert played.observation.dtype == np.uint8
    assert played.observation.shape == (STEPS, 2, 20, 20, 2)
    assert played.reward.dtype == np.float32
    assert played.scores.dtype == np.float64
    assert all(field.dtype == bool for field in (played.terminated, played.truncated, played.real))
    goes_on = played.real[1:]
    np.testing.assert_array_equal(played.observation[1:, ..., 0][goes_on], played.observation[:-1, ..., 1][goes_on])
    assert not played.observation[..., 0][~played.real].any(), "a new game shows nothing of the one before"


def test_a_life_ends_and_the_game_goes_on(played: HostAnswer) -> None:
    over = ~np.isnan(played.scores)
    assert over.sum(axis=0).tolist() == [2, 1]
    np.testing.assert_array_equal(played.real[1:], ~over[:-1])
    assert not played.reward[~played.real].any()
    for game in range(2):
        end = int(np.argmax(over[:, game]))
        assert played.terminated[: end + 1, game].sum() == 5, "lives of a game, the last one's end included"
        assert played.terminated[end, game]


def test_a_score_is_of_a_whole_game(breakout: Atari, played: HostAnswer) -> None:
    plain = Atari("breakout", 2, size=20, stack=2, threads=1, sticky=0.25)
    plain.reset(SEED)
    answers = _play(plain, _drawn(breakout, STEPS))  # the same games, with one thread
    np.testing.assert_array_equal(answers.observation, played.observation)
    np.testing.assert_array_equal(answers.scores, played.scores)
    np.testing.assert_array_equal(answers.real, played.real)
    over = ~np.isnan(answers.scores)
    np.testing.assert_array_equal(answers.terminated, over)
    for game in range(2):
        ends = np.flatnonzero(over[:, game])
        parts = np.split(answers.reward[:, game], ends + 1)[: len(ends)]  # all of one: none is clipped here
        assert [part.sum() for part in parts] == answers.scores[ends, game].tolist()
        assert answers.scores[ends[-1], game] > 0


def test_a_score_is_the_games_own_whatever_the_reward_is() -> None:
    """A hit in Assault is worth 21."""
    sizes = {"count": 1, "size": 8, "noops": 0, "max_frames": 100}
    signs, plain = Atari("assault", **sizes), Atari("assault", **sizes, clip_rewards=False)
    np.testing.assert_array_equal(signs.reset(0), plain.reset(0))
    actions = _drawn(plain, 77)
    clipped, own = _play(signs, actions), _play(plain, actions)
    assert set(own.reward[:, 0]) == {0, 21}
    np.testing.assert_array_equal(clipped.reward, own.reward / 21)
    ends = np.arange(24, 77, 26)  # 25 steps, and one that begins anew
    np.testing.assert_array_equal(np.flatnonzero(clipped.truncated), ends)
    scores = [own.reward[end - 24 : end + 1].sum() for end in ends]
    assert clipped.scores[ends, 0].tolist() == own.scores[ends, 0].tolist() == scores
    assert scores == [21, 21, 0]


def test_a_seed_is_a_game(breakout: Atari, played: HostAnswer) -> None:
    actions = _drawn(breakout, STEPS)[:30]
    first = breakout.reset(SEED)
    again = _play(breakout, actions)
    np.testing.assert_array_equal(again.observation, played.observation[:30])
    alone = Atari("breakout", 1, size=20, stack=2, sticky=0.25, episodic_life=True)
    np.testing.assert_array_equal(alone.reset(SEED), first[:1])
    np.testing.assert_array_equal(_play(alone, actions[:, :1]).observation, again.observation[:, :1])
    alone.reset(SEED + 1)
    others = _play(alone, actions[:, :1]).observation
    assert (others != again.observation[:, :1]).any()
    assert (others != again.observation[:, 1:]).any(), "seeds side by side share no game"


def test_a_game_is_cut_off() -> None:
    games = Atari("breakout", 1, size=8, stack=1, max_frames=12)
    games.reset(0)
    answer = _play(games, np.zeros((8, 1), int))
    np.testing.assert_array_equal(np.flatnonzero(answer.truncated), [2, 6])
    np.testing.assert_array_equal(np.flatnonzero(~answer.real), [3, 7])
    np.testing.assert_array_equal(answer.scores[[2, 6]], 0)
    assert not answer.terminated.any()


def _area(length: int, small: int) -> np.ndarray:
    """How much of each of `length` places a place of `small` covers, [small, length]; rows sum to 1."""
    edges = np.linspace(0, length, small + 1)
    places = np.arange(length)
    covered = np.minimum(edges[1:, None], places + 1) - np.maximum(edges[:-1, None], places)
    return np.clip(covered, 0, None) * small / length


MINIMAL = (0, 1, 3, 4)
"""The actions of Breakout by ALE's numbers of all: NOOP, FIRE, RIGHT, LEFT."""


@pytest.fixture(scope="module")
def console() -> Any:
    """ale-py's single game, which pictures are made from here."""
    ale_py: Any = importlib.import_module("ale_py")
    ale_py.ALEInterface.setLoggerMode(ale_py.LoggerMode.Error)
    console = ale_py.ALEInterface()
    console.setFloat("repeat_action_probability", 0.0)
    console.loadROM(importlib.import_module("ale_py.roms").get_rom_path("breakout"))
    return console


def test_pictures_are_the_screens_and_screenshots_too(console: Any) -> None:
    """Against ten lines on the single game: fire, hold the action four frames, brighter of two, mean over an area."""
    games = Atari("breakout", 1, size=42, stack=2, noops=0)
    actions = _drawn(games, 40)
    shown = [games.reset(0), *_play(games, actions).observation]
    console.reset_game()
    console.act(1)
    grey, colour = [console.getScreenGrayscale()], [console.getScreenRGB()]
    for action in actions[:, 0]:
        frames = []
        for _ in range(4):
            console.act(MINIMAL[action])
            frames.append((console.getScreenGrayscale(), console.getScreenRGB()))
        grey.append(np.maximum(frames[2][0], frames[3][0]))
        colour.append(np.maximum(frames[2][1], frames[3][1]))
    small = [_area(210, 42) @ screen @ _area(160, 42).T for screen in grey]
    for step, observation in enumerate(shown):
        np.testing.assert_allclose(observation[0, ..., 1], small[step], atol=0.51, err_msg=f"step {step}")
    assert np.ptp(np.stack(small), axis=0).max() > 50, "something moves"

    rows = iter(actions)
    seen: list[np.ndarray] = []

    def policy(observation: np.ndarray) -> np.ndarray:
        seen.append(observation)
        return next(rows)

    pictures = games.screenshots(policy, [0, 40, 7], seed=0)
    np.testing.assert_array_equal(np.stack(pictures), np.stack([colour[0], colour[40], colour[7]]))
    np.testing.assert_array_equal(np.stack(seen), np.stack(shown[:40]))


def test_screenshots_are_of_the_first_game_and_end_with_it(breakout: Atari, played: HostAnswer) -> None:
    """With sticky actions and random beginnings too; the two simulators that make them stay together."""
    rows = iter(_drawn(breakout, STEPS)[:, :1])
    seen: list[np.ndarray] = []

    def policy(observation: np.ndarray) -> np.ndarray:
        seen.append(observation)
        return next(rows)

    end = int(np.argmax(~np.isnan(played.scores[:, 0]))) + 1
    pictures = breakout.screenshots(policy, [end - 2, end + 1], seed=SEED)
    assert len(pictures) == 1
    assert len(seen) == end
    np.testing.assert_array_equal(np.concatenate(seen[1:]), played.observation[: end - 1, 0])
    grey = pictures[0] @ np.array([0.299, 0.587, 0.114])
    small = _area(210, 20) @ grey @ _area(160, 20).T
    np.testing.assert_allclose(small, played.observation[end - 3, 0, ..., 1], atol=4)


def test_another_action_set_has_another_name() -> None:
    games = Atari("breakout", 1, size=16, all_actions=True)
    assert len(games.actions) == 18
    assert games.name.endswith("_all_18")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"game": "MsPacman"}, r"game is 'MsPacman', which ale-py does not have; did you mean ms_pacman"),
        ({"game": "chess playing"}, r"video_chess|there are adventure, "),
        ({"count": 0}, r"count is 0; it must be a whole number from 1 to 4096\."),
        ({"size": 84.0}, r"size is 84\.0; it must be a whole number from 1 to 160\."),
        ({"size": 1000}, r"size is 1000; it must be a whole number from 1 to 160\."),
        ({"sticky": 1.5}, r"sticky is 1\.5; it must be a probability below 1\."),
        ({"sticky": float("nan")}, r"sticky is nan; it must be a probability below 1\."),
        ({"noops": True}, r"noops is True; it must be a whole number from 0 to 1000\."),
        ({"threads": 0}, r"threads is 0; it must be a whole number from 1 to 4096\."),
    ],
)
def test_arguments_out_of_range(arguments: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Atari(**arguments)


def test_actions_out_of_range(breakout: Atari) -> None:
    breakout.reset(0)
    with pytest.raises(ValueError, match=r"actions\[1\] is 4; breakout has those from 0 to 3: NOOP, FIRE, "):
        breakout.step(np.array([0, 4]))
    with pytest.raises(ValueError, match=r"actions have shape \(3,\); it must be \(2,\)"):
        breakout.step(np.zeros(3, int))
    with pytest.raises(TypeError, match="actions have dtype float64; they must be whole numbers"):
        breakout.step(np.zeros(2))
    with pytest.raises(ValueError, match=r"seed is -1; it must be a whole number from 0"):
        breakout.reset(-1)


def test_games_begin_before_they_are_played_and_end() -> None:
    games = Atari("breakout", 1, size=16)
    with pytest.raises(RuntimeError, match=r"call reset\(seed\) before step"):
        games.step(np.zeros(1, int))
    games.close()
    games.close()
    with pytest.raises(RuntimeError, match="the games have been closed"):
        games.reset(0)


@pytest.mark.parametrize(
    ("module", "words"), [("ale_py", "need ale-py"), ("gymnasium", "need gymnasium beside ale-py")]
)
def test_a_missing_package_is_said(module: str, words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ModuleNotFoundError, match=rf"{words} \(GPL-2.0\); run: pip install 'jaxrl_llm\[atari-gpl\]'"):
        Atari()


def test_the_class_is_there_without_the_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("ale_py", "gymnasium"):
        monkeypatch.setitem(sys.modules, module, None)
    assert "Atari" in runpy.run_path(str(sys.modules[Atari.__module__].__file__))
