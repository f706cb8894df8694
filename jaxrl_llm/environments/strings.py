"""Tasks on short strings of digits, for small transformers that start from random weights and read bytes.

The reward is dense, so that reinforcement learning has something to follow from the first step.
"""

import functools
import itertools
from collections.abc import Callable
from dataclasses import dataclass

from jaxrl_llm.environments.splits import Split
from jaxrl_llm.environments.splits import split
from jaxrl_llm.environments.splits import stable_key
from jaxrl_llm.environments.tasks import Problem
from jaxrl_llm.environments.tasks import Score
from jaxrl_llm.environments.tasks import before_stop


def ascending(text: str) -> str:
    """The letters in order: "3102" gives "0123"."""
    return "".join(sorted(text))


def backwards(text: str) -> str:
    """The letters from last to first: "3102" gives "2013"."""
    return text[::-1]


def unchanged(text: str) -> str:
    """The letters as they are."""
    return text


def either_direction(text: str) -> str:
    """The same for a string and its reverse."""
    return min(text, text[::-1])


@dataclass(frozen=True)
class StringTask:
    """Answer a string of digits by a fixed transformation of it.

    Attributes:
        name: what it is registered as.
        transform: string -> right answer, of the same length.
        canonical: string -> canonical form; strings with the same one are one problem, on the same side of the split.
        alphabet: the letters.
        length: how many of them a problem has.
        held_out_count: at most this many problems are in held_out().
        stop: the text that ends an answer.
    """

    name: str
    transform: Callable[[str], str]
    canonical: Callable[[str], str]
    alphabet: str = "0123456789"
    length: int = 4
    held_out_count: int = 128
    stop: str = "\n"

    def train(self, seed: int, step: int, count: int) -> list[Problem]:
        """`count` problems whose identity is not held out, each string equally likely."""
        pool = self._split.train
        return [pool[stable_key("train", seed, step, index) % len(pool)] for index in range(count)]

    def held_out(self) -> list[Problem]:
        """`held_out_count` of the held-out problems, one of each identity, by a fixed shuffle."""
        return sorted(self._split.held_out, key=lambda problem: stable_key(problem.prompt))[: self.held_out_count]

    def score(self, problem: Problem, text: str) -> Score:
        """Reward: the fraction of places that are right, of as many as the longer of text and answer has.

            sum_i 1[text_i = answer_i] / max(len(text), len(answer))

        Strict and lenient are both equality.
        """
        text = before_stop(text, self.stop)
        right = sum(given == wanted for given, wanted in zip(text, problem.answer, strict=False))
        solved = text == problem.answer
        return Score(reward=right / max(len(text), len(problem.answer)), lenient=solved, strict=solved)

    @functools.cached_property
    def _split(self) -> Split:
        """All strings over the alphabet, in a fixed shuffle, so that each identity is shown by an arbitrary member."""
        strings = ("".join(letters) for letters in itertools.product(self.alphabet, repeat=self.length))
        shuffled = sorted(strings, key=lambda string: stable_key(self.name, string))
        parts = split(self._problem(string) for string in shuffled)
        if not parts.train or not parts.held_out:
            raise ValueError(
                f"{self.name}: alphabet {self.alphabet!r} and length {self.length} give {len(shuffled)} strings, "
                "too few to train on some and hold out others."
            )
        return parts

    def _problem(self, string: str) -> Problem:
        return Problem(f"{string}>", self.transform(string), f"{self.name}:{self.canonical(string)}")
