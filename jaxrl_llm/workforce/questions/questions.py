"""Questions with exact answers, by how many capabilities they need, and the plan of an oracle for each.

A question is a chain of hops and what is asked of its end. Two things are held out, each by a hash: entities (a fixed
third of the things that chains start from) and hops (a fixed third of the combinations of relations and ask). Training
questions have neither; questions to measure on have one of them, or both.
"""

import functools
from collections.abc import Iterator
from dataclasses import dataclass

from jaxrl_llm.checks import require_sizes
from jaxrl_llm.environments.splits import is_held_out
from jaxrl_llm.environments.splits import stable_key
from jaxrl_llm.environments.tasks import Problem
from jaxrl_llm.environments.tasks import Score
from jaxrl_llm.environments.tasks import before_stop
from jaxrl_llm.workforce.facts.base import FactBase
from jaxrl_llm.workforce.plans import Plan
from jaxrl_llm.workforce.plans import Step
from jaxrl_llm.workforce.questions.asks import CODE
from jaxrl_llm.workforce.questions.asks import FACTS
from jaxrl_llm.workforce.questions.asks import Ask
from jaxrl_llm.workforce.questions.asks import asks
from jaxrl_llm.workforce.questions.hops import Chain
from jaxrl_llm.workforce.questions.hops import kinds
from jaxrl_llm.workforce.questions.hops import relation_chains

MOST_CAPABILITIES = 3
"""Levels are 1, 2 and this one, which is "at least as many"."""
SUMS = 100
"""Questions of pure arithmetic."""


@dataclass(frozen=True)
class Question:
    """A question and all that is known of it.

    Attributes:
        text: what is asked.
        answer: the only right one.
        plan: of an oracle.
        capabilities: of the workers that the plan needs.
        start: the entity that it begins with.
        hops: relations and ask, by name.
    """

    text: str
    answer: str
    plan: Plan
    capabilities: frozenset[str]
    start: str
    hops: tuple[str, ...]

    @property
    def level(self) -> int:
        """1, 2 or 3 (at least three) capabilities."""
        return min(len(self.capabilities), MOST_CAPABILITIES)

    @property
    def held_out_by(self) -> tuple[str, ...]:
        """Why it is never trained on: "entity", "hops", both or neither."""
        return _held_out_by(self.start, self.hops)

    @property
    def problem(self) -> Problem:
        """As tasks have it; the question itself is in its metadata."""
        return Problem(self.text, self.answer, f"{self.start}: {', '.join(self.hops)}", {"question": self})


@functools.lru_cache(maxsize=2**18)
def _held_out_by(start: str, hops: tuple[str, ...]) -> tuple[str, ...]:
    named = {"entity": f"entity {start}", "hops": f"hops {' '.join(hops)}"}
    return tuple(name for name, identity in named.items() if is_held_out(identity))


class Questions:
    """A task (see `environments.Task`): the questions of a base at some levels.

    Args:
        base: where they are answered.
        levels: how many capabilities a question may need: 1, 2, 3 (3 and more).
        hops: most relations of a chain.
        held_out_count: at most this many questions are in `held_out`.

    Raises:
        ValueError: a level that is none, or no question of that kind.
    """

    stop = "\n"

    def __init__(
        self,
        base: FactBase,
        *,
        levels: tuple[int, ...] = (1, 2, MOST_CAPABILITIES),
        hops: int = 3,
        held_out_count: int = 256,
    ) -> None:
        require_sizes(hops=hops, held_out_count=held_out_count)
        if not levels or not set(levels) <= {*range(1, MOST_CAPABILITIES + 1)} or len(set(levels)) < len(levels):
            raise ValueError(f"levels is {levels}; it must be some of 1, 2 and {MOST_CAPABILITIES}, each of them once.")
        self.base, self.levels, self._count = base, tuple(levels), held_out_count
        self.name = f"workforce {base.name} {' '.join(map(str, levels))}"
        self._all = self._made(hops)

    def train(self, seed: int, step: int, count: int) -> list[Problem]:
        """`count` questions of which neither start nor hops are held out.

        A level, then hops, then a start, each equally likely: else the longest chains and the commonest kind of thing
        would be nearly all there is.
        """
        found = []
        for index in range(count):
            keys = [stable_key("workforce", self.name, seed, step, index, part) for part in ("level", "hops", "start")]
            pool = self._train[self.levels[keys[0] % len(self.levels)]]
            questions = [*pool.values()][keys[1] % len(pool)]
            found.append(questions[keys[2] % len(questions)].problem)
        return found

    def held_out(self) -> list[Problem]:
        """Questions whose start or hops are held out, by a fixed shuffle, the levels in turn."""
        return [one.problem for one in self._held_out[: self._count]]

    @functools.cached_property
    def _held_out(self) -> list[Question]:
        by_level = [
            sorted(
                (one for one in self.all() if one.held_out_by and one.level == level),
                key=lambda one: (stable_key("hops", one.hops, one.start), one.text),
            )
            for level in self.levels
        ]
        longest = max(map(len, by_level))
        return [pool[place] for place in range(longest) for pool in by_level if place < len(pool)]

    def score(self, problem: Problem, text: str) -> Score:
        """1 for the answer and nothing but it, 0 for anything else; numbers are compared by value."""
        given = before_stop(text, self.stop).strip()
        # A list is compared as it stands: with its commas it may read as one number of many digits.
        listed = "," in problem.answer
        right = given == problem.answer if listed else Score.exact(given, problem.answer).strict
        return Score(float(right), right, right)

    def all(self) -> tuple[Question, ...]:
        """Every question, in a fixed order."""
        return self._all

    def _made(self, hops: int) -> tuple[Question, ...]:
        made = (*_chained(self.base, hops), *_sums())
        found = tuple(one for one in made if one.level in self.levels)
        for level in self.levels:
            if not any(one.level == level and not one.held_out_by for one in found):
                raise ValueError(f"{self.base.name} has no question to train on that needs {level} capabilities.")
        return found

    @functools.cached_property
    def _train(self) -> dict[int, dict[tuple[str, ...], list[Question]]]:
        pools: dict[int, dict[tuple[str, ...], list[Question]]] = {level: {} for level in self.levels}
        for one in self.all():
            if not one.held_out_by:
                pools[one.level].setdefault(one.hops, []).append(one)
        return pools


def _chained(base: FactBase, hops: int) -> Iterator[Question]:
    things = kinds(base)
    known = asks(base)
    for ask in known:
        for start in things.get(ask.kind, ()):
            yield from _question(base, Chain(start, ()), ask)
    for chain in relation_chains(base, most=hops):
        names = tuple(relation.name for relation in chain)
        for start in base.subjects(chain[0].name):
            yield from _question(base, Chain(start, names), None)
            for ask in known:
                if ask.kind == chain[-1].value:
                    yield from _question(base, Chain(start, names), ask)


def _question(base: FactBase, chain: Chain, ask: Ask | None) -> Iterator[Question]:
    """The question, unless something that it needs is not known."""
    end = chain.end(base)
    answer = end if end is None or ask is None else ask.answer(base, end)
    if answer is None:
        return
    steps = [
        Step(f"{relation} of {chain.start if not place else f'#{place}'}", (place,) if place else ())
        for place, relation in enumerate(chain.relations)
    ]
    text = f"What is {chain.phrase}?"
    if ask is not None:
        text = ask.phrase.format(chain.phrase)
        after = (len(steps),) if steps else ()
        steps += ask.steps(f"#{len(steps)}" if steps else chain.start, after, len(steps) + 1)
    needed = (frozenset({FACTS}) if chain.relations else frozenset()) | (ask.capabilities if ask else frozenset())
    hops = (*chain.relations, *((ask.name,) if ask else ()))
    yield Question(text, answer, Plan(tuple(steps)), needed, chain.start, hops)


def _sums() -> Iterator[Question]:
    for number in range(SUMS):
        one, other, third = (stable_key("sum", number, part) % 90 + 10 for part in range(3))
        text, plan = f"What is {one} * {other} - {third}?", Plan((Step(f"compute {one} * {other} - {third}"),))
        yield Question(
            text, str(one * other - third), plan, frozenset({CODE}), f"{one} {other} {third}", ("arithmetic",)
        )
