"""What the expert of a text world does, as demonstrations: JSON lines that say where they come from.

    {"messages": [{"role": "user", "content": the prompt}, {"role": "assistant", "content": an action},
                  {"role": "user", "content": the answer}, ..], "world": .., "seed": .., "panel": .., "expert": ..}

A collector of demonstrations reads them where it is told to ignore `PROVENANCE`.
"""

import json
from pathlib import Path
from typing import NamedTuple

from jaxrl_llm.durable import write_whole
from jaxrl_llm.environments.worlds.episodes import STEP_SECONDS
from jaxrl_llm.environments.worlds.episodes import TextEpisodes
from jaxrl_llm.environments.worlds.panels import Panel
from jaxrl_llm.environments.worlds.text import TextWorld

PROVENANCE = ("world", "seed", "panel", "expert", "reward")
"""Keys of a line beside its messages: name of the world, task, SHA-256 of the panel, whose expert, what it earned."""


class Written(NamedTuple):
    """Episodes of a panel: solved and written; not solved, or without an expert; dropped, since the world hung."""

    solved: int
    unsolved: int
    dropped: int


def write_expert(world: TextWorld, panel: Panel, path: str | Path, *, seconds: float = STEP_SECONDS) -> Written:
    """Plays every task of a panel by the expert, and writes down what solves it: the last reply earned something.

    The file is there when it is whole.

    Args:
        world: the world.
        panel: of that world, the one to train on.
        path: of the JSON lines.
        seconds: a step may take [s].

    Returns:
        How many episodes came to what.

    Raises:
        ValueError: the panel is of another world, or no task of it was solved.
    """
    if panel.world != world.name:
        raise ValueError(f"the panel is of {panel.world}; the world is {world.name}.")
    path, counts = Path(path), dict.fromkeys(Written._fields, 0)
    expert = f"{type(world).__module__}.{type(world).__qualname__}"
    with write_whole(path) as file:
        for seed in panel.seeds.tolist():
            outcome, messages, reward = _play(world, seed, seconds)
            counts[outcome] += 1
            if outcome == "solved":
                about = (world.name, seed, panel.sha256, expert, reward)
                file.write(json.dumps({"messages": messages, **dict(zip(PROVENANCE, about, strict=True))}) + "\n")
        if not counts["solved"]:
            raise ValueError(f"the expert of {world.name} solves none of the {len(panel.seeds)} tasks of the panel.")
    return Written(**counts)


def _play(world: TextWorld, seed: int, seconds: float) -> tuple[str, list[dict[str, str]], float]:
    """One episode: what came of it, its messages, what it earned."""
    episodes, reward = TextEpisodes(world, [seed], seconds=seconds), 0.0
    messages = [{"role": "user", "content": episodes.prompts[0]}]
    try:
        for _ in range(world.turns):
            (action,) = episodes.expert()
            (reply,) = episodes.step([action]) if action is not None else (None,)
            if action is None or reply is None:
                break
            reward += reply.reward
            messages.append({"role": "assistant", "content": action})
            if reply.done:
                return ("solved" if reply.reward > 0 else "unsolved"), messages, reward
            messages.append({"role": "user", "content": reply.text})
        return ("dropped" if episodes.dropped[0] else "unsolved"), messages, reward
    finally:
        episodes.close()
