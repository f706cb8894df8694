"""Rejection sampling: an answer passes every filter or is rejected for the first that it does not pass."""

import re
from collections.abc import Callable
from collections.abc import Iterable
from collections.abc import Mapping
from typing import NamedTuple

from jaxrl_llm.rollouts.select.answers import SampledAnswer

Filter = Callable[[SampledAnswer], bool]
"""True for an answer that passes."""


class Sifted(NamedTuple):
    """What passed, in its order, and how many answers were rejected for each reason, 0 included."""

    kept: list[SampledAnswer]
    rejected: dict[str, int]


def sift(answers: Iterable[SampledAnswer], filters: Mapping[str, Filter]) -> Sifted:
    """Answers that pass every filter; each of the others is counted once, under the first that it does not pass.

    Source: the filters of GLM-4.5's demonstrations (arXiv 2508.06471, section 3): form, length, repetition and
    truncation, then correctness where it can be verified, a reward model elsewhere, and the protocol of tools. The
    report has no thresholds. A filter of your own is any function of an `SampledAnswer`.

    Args:
        answers: of any questions.
        filters: by reason, in the order in which they are asked.
    """
    kept, rejected = [], dict.fromkeys(filters, 0)
    for answer in answers:
        reason = next((name for name, passes in filters.items() if not passes(answer)), None)
        if reason is None:
            kept.append(answer)
        else:
            rejected[reason] += 1
    return Sifted(kept, rejected)


def ended(answer: SampledAnswer) -> bool:
    """The answer came to its end: it was not truncated."""
    return answer.ended


def earned(least: float = 1.0) -> Filter:
    """The answer earned at least so much (of a verifier, 1 is right); nan is less than anything."""
    return lambda answer: answer.reward >= least


def long_between(low: int, high: int) -> Filter:
    """The answer has low to high tokens.

    Raises:
        ValueError: there is no such length.
    """
    if not 0 <= low <= high:
        raise ValueError(f"low is {low} and high {high}; 0 <= low <= high must hold.")
    return lambda answer: low <= answer.length <= high


def matching(pattern: str) -> Filter:
    """The whole answer has this form: a regular expression, whose dot stands for line ends too.

    Raises:
        ValueError: it is none.
    """
    try:
        form = re.compile(pattern, re.DOTALL)
    except re.error as error:
        raise ValueError(f"pattern is {pattern!r}, which is no regular expression ({error}).") from error
    return lambda answer: form.fullmatch(answer.text) is not None


def repeated_share(text: str, *, words: int) -> float:
    """1 - (different runs of so many words) / (all of them), 0 for a text without any: how much was said before.

    Args:
        text: cut into words at white space.
        words: per run.

    Raises:
        ValueError: fewer than 1 word.
    """
    if words < 1:
        raise ValueError(f"words is {words}; it must be at least 1.")
    said = text.split()
    runs = [tuple(said[start : start + words]) for start in range(len(said) - words + 1)]
    return 1 - len(set(runs)) / len(runs) if runs else 0.0


def unrepetitive(*, most: float, words: int = 4) -> Filter:
    """At most this share of the runs of words of the answer is said again.

    Raises:
        ValueError: a share outside [0, 1], or fewer than 1 word.
    """
    if not 0 <= most <= 1:
        raise ValueError(f"most is {most}; it must be in [0, 1].")
    repeated_share("", words=words)
    return lambda answer: repeated_share(answer.text, words=words) <= most
