"""A worker that looks up facts: the one whose title is the step, and nothing but it."""

import threading

from jaxrl_llm.workforce.facts.base import FactBase
from jaxrl_llm.workforce.protocol import Answer
from jaxrl_llm.workforce.protocol import Assignment
from jaxrl_llm.workforce.protocol import Card
from jaxrl_llm.workforce.search import Index
from jaxrl_llm.workforce.search import words
from jaxrl_llm.workforce.workers.wording import filled

ARTICLES = frozenset({"a", "an", "the"})
SHOWN = 3
"""Titles that a failure names."""


class FactsWorker:
    """Looks up one fact a step: "capital of France", "the capital of France"; articles, case and accents do not count.

    A title that is only a part of the step is not taken: "mayor of the capital of France" does not ask for the capital.

    Args:
        base: what it knows.
        name: of the worker.
        capacity: steps at a time.
    """

    def __init__(self, base: FactBase, *, name: str = "facts", capacity: int = 4) -> None:
        relations = ", ".join(relation.title(_a(relation.subject)) for relation in base.relations)
        self.card = Card(name, f"looks up one fact by its title: {relations}", capacity)
        self._titles = [base.title(fact) for fact in base.facts]
        self._values = {_asked(title): fact.value for title, fact in zip(self._titles, base.facts, strict=True)}
        self._index: Index | None = None
        self._lock = threading.Lock()

    def work(self, assignment: Assignment) -> Answer:
        """See `Worker.work`."""
        query = filled(assignment)
        value = self._values.get(_asked(query))
        if value is not None:
            return Answer(value)
        with self._lock:
            # Made at the first miss: most never need it.
            self._index = self._index or Index(self._titles)
        nearest = "; ".join(self._titles[place] for place in self._index.search(query, most=SHOWN)) or "none"
        return Answer(f"no fact has the title {query!r}; the nearest are: {nearest}", failed=True)


def _asked(text: str) -> tuple[str, ...]:
    """The words without articles; the last one is no article: THE is an airport."""
    *rest, last = words(text) or ("",)
    return (*(word for word in rest if word not in ARTICLES), last)


def _a(noun: str) -> str:
    return f"an {noun}" if noun[0] in "aeiou" else f"a {noun}"
