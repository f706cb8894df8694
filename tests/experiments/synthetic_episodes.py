"""Episodes of a run that never was: groups of answers of one byte per token, some of them in two turns."""

from pathlib import Path

import numpy as np

from jaxrl_llm.models.tokenizers import ByteTokenizer
from jaxrl_llm.rollouts.collect.dialogs import Row
from jaxrl_llm.rollouts.collect.dialogs import rows_to_trajectories
from jaxrl_llm.trajectory import Trajectories
from jaxrl_llm.trajectory_files import write_trajectories
from jaxrl_llm.trajectory_texts import text_stretches

TOKENIZER = ByteTokenizer()
Turns = list[tuple[str, bool]]
"""Texts, and whether the policy chose them."""

EPISODES: list[tuple[int, float, Turns]] = [
    (0, 1.0, [("14 + 8 =\n", False), (" 22, as 14 + 6 = 20\nand 20 + 2 = 22.", True)]),
    (0, 0.0, [("14 + 8 =\n", False), (" 21", True)]),
    (1, 0.5, [("Search.\n", False), ("look <here>", True), ("\n2 hits\n", False), ("é 漢 it is", True)]),
    (1, -0.25, [("Search.\n", False), ("give up", True)]),
]


def columns(episodes: list[tuple[int, float, Turns]] = EPISODES) -> Trajectories:
    """The episodes as trajectories; an answer ends with the end token."""
    rows = []
    for _, _, turns in episodes:
        tokens, steps = [], []
        for number, (text, chosen) in enumerate(turns):
            ids = TOKENIZER.encode(text) + ([TOKENIZER.eos_id] if chosen else [])
            tokens += ids
            steps += [number // 2 if chosen else -1] * len(ids)
        rows.append(Row(np.array(tokens, np.int32), np.array(steps, np.int32)))
    return rows_to_trajectories(
        rows,
        width=max(len(row.tokens) for row in rows),
        pad_id=TOKENIZER.pad_id,
        group_ids=[group for group, _, _ in episodes],
        outcomes=[outcome for _, outcome, _ in episodes],
    )


def write_episodes(
    run: Path,
    step: int,
    episodes: list[tuple[int, float, Turns]] = EPISODES,
    *,
    pieces: bool = True,
    extra: bool = True,
) -> Path:
    """Write them as the trainer does: advantages rise along each row, and so does the KL divergence."""
    made = columns(episodes)
    counts = made.action_mask.sum(axis=1)
    ramp = np.arange(1, counts.max() + 1) / counts.max()
    signs = np.array([[1.0 if outcome > 0.25 else -1.0] for _, outcome, _ in episodes])
    further = {
        "advantages": (signs * ramp).astype(np.float32),
        "kl": np.broadcast_to(1e-3 * ramp, (len(counts), len(ramp))),
    }
    return write_trajectories(
        run / "episodes" / str(step),
        made,
        texts=text_stretches(made, lambda ids: TOKENIZER.decode(ids, skip_special_tokens=False)) if pieces else None,
        about={"step": step, "vocab_size": TOKENIZER.vocab_size},
        extra=further if extra else None,
    )
