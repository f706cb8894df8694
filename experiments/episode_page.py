"""A few episodes as a part of the report: each token on the colour of its advantage, its numbers on hover."""

import math
from collections.abc import Sequence
from typing import Any

from experiments.episodes import MARKS
from experiments.episodes import Episode
from experiments.episodes import Token
from experiments.episodes import largest_advantage
from experiments.episodes import read_step
from experiments.episodes import steps_written
from experiments.run_folder import RunFolder
from experiments.run_folder import UserError

SHOWN = 6
"""Episodes in a report."""
MOST_TOKENS = 400
"""Chosen tokens of an episode that are shown."""
LEAST_SHARE = 0.2
"""Strength of the colour of the smallest advantage, of that of the largest."""
MOST_GIVEN = 600
"""Letters of a stretch that was given; of a longer one its end is shown."""


def episodes_section(run: RunFolder) -> dict[str, Any] | None:
    """What the template shows of the newest episodes: a sentence where they are damaged, None where there are none."""
    if not steps_written(run):
        return None
    try:
        step, episodes = read_step(run)
    except UserError as error:
        return {"note": f"The newest episodes cannot be shown: {error}", "command": "", "scale": "", "rows": []}
    shown = choose(episodes, SHOWN)
    scale = largest_advantage(shown)
    known = any(token.advantage is not None for episode in shown for token in episode.chosen)
    return {
        "note": f"{len(shown)} of the {len(episodes)} episodes of step {step}: of each group the best and the worst.",
        "command": f"python -m experiments show {run.shown} --step {step}",
        "scale": f"{scale:.3g}" if known and scale else "",
        "rows": [_row(episode, scale) for episode in shown],
    }


def choose(episodes: Sequence[Episode], most: int) -> list[Episode]:
    """The best and the worst of each group; the groups whose two differ most come first."""
    groups: dict[int, list[Episode]] = {}
    for episode in episodes:
        groups.setdefault(episode.group, []).append(episode)
    ends = []
    for members in groups.values():
        ranked = sorted((m for m in members if math.isfinite(m.earned)), key=lambda m: -m.earned) or members
        ends.append([ranked[0], ranked[-1]] if len(ranked) > 1 else ranked)
    ends.sort(key=lambda pair: pair[-1].earned - pair[0].earned)
    return [episode for pair in ends for episode in pair][:most]


def _row(episode: Episode, scale: float) -> dict[str, Any]:
    said = [f"group {episode.group}", f"return {episode.earned:g}", f"{len(episode.chosen)} tokens chosen"]
    advantages = {token.advantage for token in episode.chosen if token.advantage is not None}
    if len(advantages) == 1:
        said.append(f"advantage {advantages.pop():+.3g} at each")
    if not episode.ended:
        said.append("cut off")
    spans: list[dict[str, str]] = []
    given, left = "", MOST_TOKENS
    for token in episode.tokens:
        if not token.chosen:
            given += token.piece
            continue
        if given:
            spans.append(_given(given))
            given = ""
        if not left:
            spans.append({"kind": "given", "text": " …", "title": "", "style": "", "reward": ""})
            break
        left -= 1
        spans.append(_chosen(token, scale))
    if given and left:
        spans.append(_given(given))
    return {"title": f"Row {episode.row}", "facts": " · ".join(said), "spans": spans}


def _given(text: str) -> dict[str, str]:
    cut = text if len(text) <= MOST_GIVEN else "… " + text[-MOST_GIVEN:]
    return {"kind": "given", "text": _printable(cut), "title": "given", "style": "", "reward": ""}


def _chosen(token: Token, scale: float) -> dict[str, str]:
    numbers = [
        ("advantage", token.advantage, "+.3g", ""),
        ("KL", token.kl, ".2g", " nats"),
        ("log-prob", token.log_prob, ".3g", " nats"),
        ("reward", token.reward or None, "+g", ""),
    ]
    title = ", ".join(f"{name} {value:{form}}{unit}" for name, value, form, unit in numbers if value is not None)
    share = 0.0  # of half of the colour: more would make the letters on it hard to read
    if token.advantage is not None and scale and math.isfinite(token.advantage):
        # What is not zero is seen to be so.
        share = LEAST_SHARE + (1 - LEAST_SHARE) * min(abs(token.advantage) / scale, 1.0) if token.advantage else 0.0
    kind = "up" if (token.advantage or 0) > 0 else "down" if (token.advantage or 0) < 0 else "even"
    return {
        "kind": kind,
        "text": _printable(token.piece),
        "title": title,
        "style": f"--share:{50 * share:.0f}%",
        "reward": f"{token.reward:+g}" if token.reward else "",
    }


def _printable(text: str) -> str:
    """Text whose line breaks are seen and followed; letters that cannot be printed are shown as such."""
    out = []
    for letter in text:
        if letter == "\n":
            out.append(MARKS["\n"] + "\n")
        else:
            out.append(MARKS.get(letter, letter if letter.isprintable() else "\ufffd"))
    return "".join(out)
