"""Holds a text world to what every text world promises."""

import math
from collections.abc import Iterable
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from jaxrl_llm.environments.worlds.text import Reply
from jaxrl_llm.environments.worlds.text import TextEpisode
from jaxrl_llm.environments.worlds.text import TextWorld

HOSTILE = (
    "",
    " \n\t",
    "\0\x1b[2J\r",
    "qwxz " * 4_000,
    "\u2603 \U0001f6d2 \u053b",
    "\ud800",
    "%s{0}$(x)[[]]\\",
    "]search[",
    "search[",
)
"""What a model may write that no world knows as an action: empty, control characters, very long, half a surrogate."""


class _Walk(NamedTuple):
    """What was done in one episode, and what was answered."""

    actions: list[str]
    replies: list[Reply]


def check_text_world(world: TextWorld, *, seeds: Iterable[int] = range(8), branches: int = 4) -> None:
    """Hold a text world to what every one promises, along the expert's way, or a random one where there is no expert.

    It begins its tasks anew for each branch that it tries: seeds * turns * branches * turns / 2 steps at most.

    Args:
        world: the world.
        seeds: tasks that are tried.
        branches: admissible actions that are tried in each state.

    Raises:
        ValueError: naming the promise that is broken, and the task.
    """
    tried = list(seeds)
    if not world.name or world.tasks < 1 or world.turns < 1:
        raise ValueError(
            f"the world {world.name!r} has {world.tasks} tasks and {world.turns} turns; it must have a name and one "
            "of each."
        )
    if not tried or min(tried) < 0 or max(tried) >= world.tasks:
        raise ValueError(f"seeds is {tried}; there must be some, of 0 .. {world.tasks - 1}.")
    _check_seeds_refused(world)
    for seed in tried:
        walk = _walk(world, seed)
        _check_again(world, seed, walk)
        _check_hostile(world, seed, walk)
        _check_admissible(world, seed, walk, branches)
    _check_interleaved(world, tried)


def _check_seeds_refused(world: TextWorld) -> None:
    for seed in (-1, world.tasks):
        try:
            world.reset(seed).close()
        except ValueError:
            continue
        raise ValueError(f"{world.name} begins task {seed}, although its tasks are 0 .. {world.tasks - 1}.")


def _require(world: TextWorld, seed: int, holds: bool, broken: str) -> None:
    if not holds:
        raise ValueError(f"{world.name}, task {seed}: {broken}.")


def _check_reply(world: TextWorld, seed: int, action: str, reply: Reply) -> None:
    what = f"the reply to {action[:40]!r}"
    _require(world, seed, isinstance(reply.text, str) and bool(reply.text.strip()), f"{what} has no text")
    _require(world, seed, math.isfinite(reply.reward), f"{what} has the reward {reply.reward}")
    _require(world, seed, not (reply.done and reply.admissible), f"{what} is the last and still lists actions")


def _walk(world: TextWorld, seed: int) -> _Walk:
    """The expert's way to the end; without one, a random way through admissible actions."""
    episode, rng = world.reset(seed), np.random.default_rng(seed)
    _require(world, seed, bool(episode.prompt.strip()), "the prompt has no text")
    has_expert, admissible = episode.expert() is not None, episode.admissible
    walk = _Walk([], [])
    for _ in range(world.turns):
        if has_expert:
            action = episode.expert()
            _require(world, seed, action is not None, f"the expert gives up after {walk.actions}")
            listed = not admissible or action in admissible
            _require(world, seed, listed, f"the expert's action {action!r} is not among the admissible ones")
        elif admissible:
            action = admissible[int(rng.integers(len(admissible)))]
        else:
            break
        reply = episode.step(str(action))
        _check_reply(world, seed, str(action), reply)
        _require(world, seed, reply.valid, f"{action!r} is refused: {reply.text!r}")
        walk.actions.append(str(action))
        walk.replies.append(reply)
        admissible = reply.admissible
        if reply.done:
            break
    solved = bool(walk.replies) and walk.replies[-1].done and sum(reply.reward for reply in walk.replies) > 0
    _require(world, seed, solved or not has_expert, f"the expert does not solve it within {world.turns} turns")
    if walk.replies and walk.replies[-1].done:
        for action in (*walk.actions[-1:], ""):
            after = episode.step(action)
            final = after.done and not after.valid and after.reward == 0
            _require(world, seed, final, f"after the end {action!r} is answered with {after}")
            _check_reply(world, seed, action, after)
    episode.close()
    return walk


def _replay(episode: TextEpisode, actions: Sequence[str]) -> list[Reply]:
    return [episode.step(action) for action in actions]


def _check_again(world: TextWorld, seed: int, walk: _Walk) -> None:
    one, other = world.reset(seed), world.reset(seed)
    same = (one.prompt, one.admissible) == (other.prompt, other.admissible)
    _require(world, seed, same, "begun twice, it shows two different things")
    _require(world, seed, _replay(one, walk.actions) == walk.replies, f"{walk.actions} are not answered alike twice")
    one.close()
    _require(world, seed, _replay(other, walk.actions) == walk.replies, "an episode disturbs another of its task")
    other.close()
    one.close()


def _check_hostile(world: TextWorld, seed: int, walk: _Walk) -> None:
    """What the world cannot take is refused in its own words, and what follows is as if it had not been said."""
    episode = world.reset(seed)
    admissible = episode.admissible
    for turn in range(len(walk.actions) + 1):
        for action in HOSTILE if turn == 0 else HOSTILE[turn % len(HOSTILE) :][:1]:
            reply = episode.step(action)
            _check_reply(world, seed, action, reply)
            refused = not reply.valid and not reply.done and reply.reward == 0
            _require(world, seed, refused, f"{action[:40]!r} is not refused: {str(reply)[:200]}")
            _require(world, seed, reply.admissible == admissible, f"{action[:40]!r} changes what is admissible")
        if turn == len(walk.actions):
            break
        reply = episode.step(walk.actions[turn])
        unmoved = reply == walk.replies[turn]
        _require(world, seed, unmoved, f"a refused action changes the reply to {walk.actions[turn]!r}: {reply}")
        admissible = reply.admissible
        if reply.done:
            break
    episode.close()


def _check_admissible(world: TextWorld, seed: int, walk: _Walk, branches: int) -> None:
    first = world.reset(seed)
    listed = [first.admissible, *(reply.admissible for reply in walk.replies)]
    first.close()
    rng = np.random.default_rng(seed)
    for turn, admissible in enumerate(listed):
        for index in rng.permutation(len(admissible))[:branches]:
            episode, action = world.reset(seed), admissible[int(index)]
            _replay(episode, walk.actions[:turn])
            reply = episode.step(action)
            _check_reply(world, seed, action, reply)
            _require(world, seed, reply.valid, f"{action!r} is listed as admissible and refused: {reply.text!r}")
            episode.close()


def _check_interleaved(world: TextWorld, seeds: list[int]) -> None:
    """Episodes of all tasks step by turns, and one is closed in the middle: each answers as it does alone."""
    walks = [_walk(world, seed) for seed in seeds]
    episodes = [world.reset(seed) for seed in seeds]
    for turn in range(max(len(walk.actions) for walk in walks)):
        for row, (seed, walk) in enumerate(zip(seeds, walks, strict=True)):
            if turn >= len(walk.actions) or (row == 0 and turn == 1 and len(seeds) > 1):
                episodes[row].close()
            elif row > 0 or turn < 1 or len(seeds) == 1:
                reply = episodes[row].step(walk.actions[turn])
                alone = reply == walk.replies[turn]
                _require(world, seed, alone, f"beside other episodes {walk.actions[turn]!r} is answered otherwise")
    for episode in episodes:
        episode.close()
