"""Answers with and without thinking as one set of demonstrations, in a file that says where each line comes from.

    {"prompt": .., "response": .., "identity": of the question, "mode": .., "reward": .., "source": ..}

A `DemonstrationCollector` reads it where it is told to ignore `PROVENANCE`.
"""

import dataclasses
import json
import math
from collections.abc import Iterable
from collections.abc import Sequence
from pathlib import Path

from jaxrl_llm.durable import write_whole
from jaxrl_llm.environments import stable_key
from jaxrl_llm.rollouts.select.answers import SampledAnswer

PROVENANCE = ("identity", "mode", "reward", "source")
"""Keys of a line beside prompt and response."""


@dataclasses.dataclass(frozen=True)
class Mode:
    """How a policy is told whether to think.

    Attributes:
        name: in the file.
        asks: ends the question.
        opens: begins the answer, in the place of white space. Neither is said twice.
        never: what no answer has after that.
    """

    name: str
    asks: str = ""
    opens: str = ""
    never: tuple[str, ...] = ()


THINKING = Mode("thinking")
"""Answers as they were sampled: they begin with their thinking."""

DIRECT = Mode("direct", asks="/nothink", opens="<think></think>\n", never=("<think>", "</think>"))
"""Answers without thinking, as GLM-4.5 is asked for them (arXiv 2508.06471)."""


def unpaired(
    thinking: Iterable[SampledAnswer], direct: Iterable[SampledAnswer], *, share: float = 0.5, seed: int = 0
) -> tuple[list[SampledAnswer], list[SampledAnswer]]:
    """Both without the questions that the other keeps: no question is answered with and without thinking.

    Pairs of both answers to a question leak thinking into direct answers (arXiv 2510.12680: 1,085 tokens of a direct
    answer with them, 585 with unpaired questions and two phases).

    Args:
        thinking, direct: answers in the two modes.
        share: of the questions that both have, the part that thinking keeps, up to chance.
        seed: of that chance; it and the identity alone decide.

    Raises:
        ValueError: a share outside [0, 1].
    """
    if not 0 <= share <= 1:
        raise ValueError(f"share is {share}; it must be in [0, 1].")
    thinking, direct = list(thinking), list(direct)
    both = {answer.identity for answer in thinking} & {answer.identity for answer in direct}
    kept = {identity for identity in both if stable_key(seed, identity) < share * 2**31}
    return (
        [answer for answer in thinking if answer.identity not in both - kept],
        [answer for answer in direct if answer.identity not in kept],
    )


def write_demonstrations(
    path: str | Path, parts: Sequence[tuple[Mode, Sequence[SampledAnswer]]], *, source: str
) -> dict[str, int]:
    """Write answers as JSON lines; the file is there when it is whole.

    Args:
        path: of the file.
        parts: answers by mode.
        source: what answered: a run and its step, for example.

    Returns:
        lines of each mode.

    Raises:
        ValueError: nothing to write, two modes of one name, or an answer without text, with what its mode never has, or
            with a reward that is no number.
    """
    counts = {mode.name: len(answers) for mode, answers in parts}
    if len(counts) < len(parts) or not sum(counts.values()):
        raise ValueError(f"parts has the answers {counts}; it must have some, and each mode once.")
    lines = [_line(mode, answer, source) for mode, answers in parts for answer in answers]
    with write_whole(Path(path)) as file:
        file.writelines(lines)
    return counts


def _line(mode: Mode, answer: SampledAnswer, source: str) -> str:
    text, opened = answer.text, mode.opens.strip()
    if opened:
        text = text.lstrip()
        text = text if text.startswith(opened) else mode.opens + text
    said = text[len(opened) :]
    if not said.strip() or not math.isfinite(answer.reward):
        raise ValueError(
            f"the answer to {answer.question!r} is {answer.text!r} with the reward {answer.reward}; it must have a "
            "text and a finite reward."
        )
    if found := [tag for tag in mode.never if tag in said]:
        raise ValueError(
            f"the answer to {answer.question!r} has {found[0]!r} in {said!r:.80}; answers of the mode {mode.name!r} "
            "have none."
        )
    question = answer.question if answer.question.endswith(mode.asks) else answer.question + mode.asks
    about = dict(zip(PROVENANCE, (answer.identity, mode.name, answer.reward, source), strict=True))
    record = {"prompt": question, "response": text, **about}
    return json.dumps(record, ensure_ascii=False) + "\n"
