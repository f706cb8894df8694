"""Episodes that a run wrote down, token by token, as the terminal and the report show them."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from experiments.run_folder import RunFolder
from experiments.run_folder import UserError
from jaxrl_llm.trajectory import Actions
from jaxrl_llm.trajectory_files import Episodes
from jaxrl_llm.trajectory_files import TrajectoryFileError
from jaxrl_llm.trajectory_files import read_episodes
from jaxrl_llm.trajectory_texts import stretches

FOLDER = "episodes"
"""Where a run writes them: `episodes/<step>/`."""
ADVANTAGES, KL = "advantages", "kl"
"""Names of the columns that the trainer adds."""

MARKS = {"\n": "⏎", "\t": "⇥", "\r": "␍"}


@dataclasses.dataclass(frozen=True)
class Token:
    """One token, and what is known of it.

    Attributes:
        piece: its text; the number of the token where no text was written down.
        chosen: whether the policy chose it; the numbers below are those of chosen tokens.
        reward: what it earned.
        log_prob: under the policy that sampled [nats]; None where nobody knows.
        advantage, kl: what the update gave it, and how far the update moved the policy there [nats]; None where they
            were not written down.
    """

    piece: str
    chosen: bool
    reward: float = 0.0
    log_prob: float | None = None
    advantage: float | None = None
    kl: float | None = None


@dataclasses.dataclass(frozen=True)
class Episode:
    """One row.

    Attributes:
        row: its number.
        group: rows of one group are compared with each other.
        ended: whether it came to its end.
        earned: the sum of its rewards; not a number where it was dropped.
        tokens: its real tokens, in order.
    """

    row: int
    group: int
    ended: bool
    earned: float
    tokens: tuple[Token, ...]

    @property
    def chosen(self) -> tuple[Token, ...]:
        """The tokens that the policy chose."""
        return tuple(token for token in self.tokens if token.chosen)


def steps_written(run: RunFolder) -> list[int]:
    """The steps whose episodes are there, in order."""
    folder = run.path / FOLDER
    if not folder.is_dir():
        return []
    return sorted(int(path.name) for path in folder.iterdir() if path.is_dir() and path.name.isdecimal())


def read_step(run: RunFolder, step: int | None = None) -> tuple[int, list[Episode]]:
    """The episodes of a step, and the step; None takes the newest.

    Raises:
        UserError: the run wrote none, or none at that step, or what it wrote is damaged.
    """
    steps = steps_written(run)
    if not steps:
        raise UserError(f"{run.shown} has no episodes; a run writes them every --episodes-every steps.")
    step = steps[-1] if step is None else step
    if step not in steps:
        near = min(steps, key=lambda written: abs(written - step))
        raise UserError(f"{run.shown} has no episodes of step {step}; the nearest step with episodes is {near}.")
    # As it is named there: 7 may be written as 0007.
    folder = next(path for path in _folders(run) if int(path.name) == step)
    try:
        return step, episodes_of(read_episodes(folder))
    except TrajectoryFileError as error:
        raise UserError(str(error)) from error


def episodes_of(written: Episodes) -> list[Episode]:
    """The rows of a folder of trajectories, token by token."""
    t = written.trajectories
    groups, ended, returns = (np.asarray(values).tolist() for values in (t.group_ids, t.ended, t.returns))
    return [
        Episode(row, groups[row], ended[row], float(returns[row]), _tokens(written, row)) for row in range(len(groups))
    ]


def visible(text: str) -> str:
    """The text on one line, with nothing in it that could move a cursor, hide or reorder what stands around it."""
    return "".join(MARKS.get(letter, letter if letter.isprintable() else "\ufffd") for letter in text)


def largest_advantage(episodes: Sequence[Episode]) -> float:
    """The largest finite advantage of any token, without its sign; 0 where there is none."""
    found = [abs(token.advantage) for episode in episodes for token in episode.chosen if token.advantage is not None]
    return max((value for value in found if np.isfinite(value)), default=0.0)


def _folders(run: RunFolder) -> list[Path]:
    return [path for path in (run.path / FOLDER).iterdir() if path.is_dir() and path.name.isdecimal()]


def _tokens(written: Episodes, row: int) -> tuple[Token, ...]:
    t = written.trajectories
    ids, rewards = np.asarray(t.tokens)[row], np.asarray(t.rewards)[row]
    known = None if t.log_prob_behaviour is None else np.asarray(t.log_prob_behaviour)[row]
    pieces = _pieces(written.rows[row], written, row)
    extra = {name: _at_columns(written, name, row) for name in (ADVANTAGES, KL)}
    tokens = []
    for part in stretches(t, row):
        for column in range(part.start, part.stop):
            piece = pieces.get(column, f"[{ids[column]}]")
            if not part.chosen:
                tokens.append(Token(piece, False))
                continue
            log_prob = None if known is None else float(known[column])
            numbers = (extra[name].get(column) for name in (ADVANTAGES, KL))
            tokens.append(Token(piece, True, float(rewards[column]), log_prob, *numbers))
    return tuple(tokens)


def _at_columns(written: Episodes, name: str, row: int) -> dict[int, float]:
    """A further column by the place of its token in the row."""
    if name not in written.extra:
        return {}
    values = written.extra[name]
    actions = Actions.of(written.trajectories, width=values.shape[1])
    return {
        int(column): float(value)
        for column, value, real in zip(actions.columns[row], values[row], actions.mask[row], strict=True)
        if real
    }


def _pieces(line: dict[str, Any], written: Episodes, row: int) -> dict[int, str]:
    """The text of each token by its column, where they were written down and fit."""
    parts = stretches(written.trajectories, row)
    texts = line.get("text")
    if not isinstance(texts, list) or len(texts) != len(parts):
        return {}
    found = {}
    for part, text in zip(parts, texts, strict=True):
        pieces = text.get("pieces") if isinstance(text, dict) else None
        if isinstance(pieces, list) and len(pieces) == part.stop - part.start:
            found |= {part.start + index: str(piece) for index, piece in enumerate(pieces)}
    return found
