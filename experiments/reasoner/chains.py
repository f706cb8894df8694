"""Chains of sums, differences and products modulo 5: easy with a scratchpad, hard without.

    3a+4b*3c-2        from 3: step a adds 4, step b multiplies by 3, step c takes 2 away, always modulo 5
    a+42b*31c-24      the scratchpad: each step once more, with the digit that it leads to
    4                 the answer

Nothing is multiplied by 0, so no step loses information, and every answer is as likely as any other whatever the last
steps are. Letters name the steps, so that the next one is found by what it is called.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass

from jaxrl_llm.environments import Problem
from jaxrl_llm.environments import Score
from jaxrl_llm.environments import is_held_out
from jaxrl_llm.environments import stable_key
from jaxrl_llm.models.glm_answers import parse_answer
from jaxrl_llm.models.glm_chat import GLM4_5

LETTERS = "abcdefghij"
MODULUS = 5


def applied(value: int, operation: str, digit: int) -> int:
    """What a step leads to."""
    result = {"+": value + digit, "-": value - digit, "*": value * digit}[operation]
    return result % MODULUS


@dataclass(frozen=True)
class Chain:
    """A chain.

    Attributes:
        start: the first digit.
        steps: operation and digit of each step.
    """

    start: int
    steps: tuple[tuple[str, int], ...]

    @classmethod
    def draw(cls, operations: int, rng: random.Random) -> "Chain":
        """One with so many steps."""

        def step() -> tuple[str, int]:
            operation = rng.choice("+-*")
            return operation, rng.randrange(1 if operation == "*" else 0, MODULUS)

        return cls(rng.randrange(MODULUS), tuple(step() for _ in range(operations)))

    @property
    def question(self) -> str:
        """As it is asked."""
        return str(self.start) + "".join(f"{name}{o}{d}" for name, (o, d) in zip(LETTERS, self.steps, strict=False))

    def worked(self, *, slips: float = 0.0, rng: random.Random | None = None) -> tuple[str, str]:
        """The scratchpad and the answer that it leads to.

        Args:
            slips: probability that a step leads to another digit; what follows goes on from there.
            rng: draws the slips.
        """
        value, pad = self.start, ""
        for name, (operation, digit) in zip(LETTERS, self.steps, strict=False):
            value = applied(value, operation, digit)
            if rng is not None and rng.random() < slips:
                value = (value + rng.randrange(1, MODULUS)) % MODULUS
            pad += f"{name}{operation}{digit}{value}"
        return pad, str(value)

    @property
    def answer(self) -> str:
        """The right one."""
        return self.worked()[1]


def chains(operations: int, count: int, *key: object, held_out: bool) -> list[Chain]:
    """Chains of 1 to so many steps, from one side of the split; the same for the same key."""
    rng, found = random.Random(stable_key("chains", operations, *key)), []
    while len(found) < count:
        chain = Chain.draw(rng.randint(1, operations), rng)
        if is_held_out(chain.question) == held_out:
            found.append(chain)
    return found


class ChainTask:
    """Chains as a task, asked as a chat: with thinking, without, or both in turn.

    The reward is 1 where the answer is right and has the form that was asked for: without thinking, nothing but the
    answer.
    """

    stop = ""

    def __init__(self, operations: int, *, modes: Sequence[bool], held_out_count: int) -> None:
        """Args:
        operations: most steps of a chain.
        modes: with thinking or without, in the order in which problems of a batch take turns.
        held_out_count: problems that are measured on, distinct ones.
        """
        self.operations, self.modes, self.held_out_count = operations, tuple(modes), held_out_count
        self.name = f"chains_{operations}_{'_'.join('thinking' if mode else 'direct' for mode in self.modes)}"

    def problem(self, chain: Chain, *, thinking: bool) -> Problem:
        """A chain as it is asked in one of the modes."""
        asked = GLM4_5.render([{"role": "user", "content": chain.question}], thinking=thinking)
        pad, answer = chain.worked()
        right = f"\n<think>{pad}</think>\n{answer}" if thinking else f"\n{answer}"
        about = {"thinking": thinking, "operations": len(chain.steps), "question": chain.question, "digit": answer}
        return Problem(prompt=asked, answer=right, identity=chain.question, metadata=about)

    def train(self, seed: int, step: int, count: int) -> list[Problem]:
        """See `Task.train`."""
        return self._problems(chains(self.operations, count, "train", seed, step, held_out=False))

    def held_out(self) -> list[Problem]:
        """See `Task.held_out`; every length has as many, as far as there are so many different ones."""
        rng = random.Random(stable_key("chains", self.operations, "measured"))
        found: dict[str, Chain] = {}
        tried = 0
        while len(found) < self.held_out_count:
            chain = Chain.draw(1 + tried % self.operations, rng)
            tried += 1
            if is_held_out(chain.question):
                found.setdefault(chain.question, chain)
        return self._problems(list(found.values()))

    def _problems(self, some: list[Chain]) -> list[Problem]:
        count = len(self.modes)
        return [self.problem(chain, thinking=self.modes[index % count]) for index, chain in enumerate(some)]

    def score(self, problem: Problem, text: str) -> Score:
        """See `Task.score`."""
        said = parse_answer(text)
        right = said.content == problem.metadata["digit"]
        formed = not said.faults and bool(said.thinking) == problem.metadata["thinking"]
        return Score(reward=float(right and formed), lenient=right, strict=right and formed)
