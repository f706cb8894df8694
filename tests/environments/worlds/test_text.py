"""Text worlds that break one promise each; batches in which a world hangs, at its beginning, in a step, at its end."""

import threading
import time

import numpy as np
import pytest

from jaxrl_llm.environments.time_limits import TimeLimitError
from jaxrl_llm.environments.worlds import TextEpisodes
from jaxrl_llm.environments.worlds import check_text_world
from tests.environments.worlds.countdown import Countdown


@pytest.mark.parametrize("expert", [True, False])
def test_a_sound_world_passes_and_everything_is_let_go(expert) -> None:
    world = Countdown(expert=expert)
    check_text_world(world, seeds=range(4))
    assert world.open == 0


@pytest.mark.parametrize(
    ("broken", "sentence"),
    [
        ("seeds", "begins task -1, although its tasks are 0 .. 3"),
        ("prompt", "begun twice, it shows two different things"),
        ("silent", "the prompt has no text"),
        ("lists", "'7' is listed as admissible and refused"),
        ("unlisted", "the expert's action '1' is not among the admissible ones"),
        ("pays on", "after the end '0' is answered with"),
        ("goes on", "after the end '0' is answered with"),
        ("moves", "'' changes what is admissible"),
        ("pays", "'' is not refused"),
        ("takes anything", "'' is not refused"),
        ("nothing", "'' is not refused"),
        ("forgets", "'' changes what is admissible"),
        ("shared", "an episode disturbs another of its task|is answered otherwise"),
        ("clock", "are not answered alike twice"),
        ("nan", "has the reward nan"),
        ("never pays", "the expert does not solve it within 6 turns"),
        ("lists at the end", "is the last and still lists actions"),
        ("gives up", "the expert gives up after"),
        ("sleeps", "'9' is not among the admissible ones"),
    ],
)
def test_a_broken_promise_is_named(broken, sentence) -> None:
    with pytest.raises(ValueError, match=sentence):
        check_text_world(Countdown(broken=broken), seeds=range(4))


@pytest.mark.parametrize(
    ("world", "seeds", "sentence"),
    [
        (Countdown(tasks=0), [0], "has 0 tasks and 6 turns"),
        (Countdown(name=""), [0], "must have a name"),
        (Countdown(), [4], r"seeds is \[4\]; there must be some, of 0 \.\. 3"),
        (Countdown(), [], r"seeds is \[\]"),
    ],
)
def test_what_cannot_be_checked_is_refused(world, seeds, sentence) -> None:
    with pytest.raises(ValueError, match=sentence):
        check_text_world(world, seeds=seeds)


def play(episodes: TextEpisodes, turns: int = 6) -> np.ndarray:
    earned = np.zeros(len(episodes.prompts))
    for _ in range(turns):
        actions = [action or "" for action in episodes.expert()]
        for row, reply in enumerate(episodes.step(actions)):
            earned[row] += reply.reward if reply else 0
    return earned


@pytest.mark.parametrize("in_a_thread", [False, True])
@pytest.mark.parametrize("hangs", ["", "reset", "step", "close"])
def test_what_hangs_is_dropped_and_the_others_go_on(hangs, in_a_thread) -> None:
    world, found = Countdown(hangs=hangs), []

    def run() -> None:
        began = time.monotonic()
        episodes = TextEpisodes(world, [0, 1, 2, 1], seconds=0.2)
        earned = play(episodes)
        episodes.close()
        found.extend([episodes, earned, time.monotonic() - began])

    if in_a_thread:
        thread = threading.Thread(target=run)
        thread.start()
        thread.join()
    else:
        run()
    episodes, earned, seconds = found
    lost = hangs in ("reset", "step")
    hung = [False, lost, False, lost]
    np.testing.assert_array_equal(episodes.dropped, hung)
    np.testing.assert_array_equal(earned, [1, not lost, 1, not lost])
    np.testing.assert_array_equal(episodes.done, earned)
    assert [prompt == "" for prompt in episodes.prompts] == [hangs == "reset" and row for row in hung]
    assert world.open == 0
    assert seconds < 5


def test_rows_that_are_over_are_not_asked_again() -> None:
    episodes = TextEpisodes(Countdown(), [0, 2])
    assert episodes.prompts == ["Count down from 2", "Count down from 4"]
    assert episodes.admissible == [("1",), ("3",)]
    first = episodes.step(["1", "no"])
    assert [reply.valid for reply in first if reply] == [True, False]
    second = episodes.step(["0", "3"])
    assert second[0] is not None
    assert second[0].done
    assert episodes.admissible == [(), ("2",)]
    assert episodes.step(["again", "2"])[0] is None
    assert episodes.expert() == [None, "1"]
    np.testing.assert_array_equal(episodes.done, [True, False])
    episodes.close()
    assert episodes.step(["0", "1"]) == [None, None]


def test_a_world_that_fails_is_not_dropped_in_silence() -> None:
    world = Countdown(tasks=2)
    with pytest.raises(ValueError, match="seed is 5"):
        TextEpisodes(world, [0, 5])
    assert world.open == 0, "what was begun before is let go"
    with pytest.raises(ValueError, match="seeds is empty"):
        TextEpisodes(world, [])
    with pytest.raises(ValueError, match="seconds is 0; it must be positive"):
        TextEpisodes(world, [0], seconds=0)
    with pytest.raises(ValueError, match="there are 1 actions for 2 episodes"):
        TextEpisodes(world, [0, 1]).step(["1"])
    with pytest.raises(TimeLimitError, match="outer"):
        outer_limit_still_rings()


def outer_limit_still_rings() -> None:
    from jaxrl_llm.environments.time_limits import time_limit

    with time_limit(0.2, what="outer"):
        TextEpisodes(Countdown(hangs="reset"), [1], seconds=30)
