"""A worker that searches facts: the best-ranked one whose title's words are all in the step."""

import threading

from jaxrl_llm.workforce.facts.base import FactBase
from jaxrl_llm.workforce.protocol import Answer
from jaxrl_llm.workforce.protocol import Assignment
from jaxrl_llm.workforce.protocol import Card
from jaxrl_llm.workforce.search import Index
from jaxrl_llm.workforce.search import words
from jaxrl_llm.workforce.workers.wording import filled

SHOWN = 3
"""Titles that a failure names."""


class FactsWorker:
    """Looks up one fact a step: "capital of France".

    Args:
        base: what it knows.
        name: of the worker.
        capacity: steps at a time.
    """

    def __init__(self, base: FactBase, *, name: str = "facts", capacity: int = 4) -> None:
        relations = ", ".join(relation.title(_a(relation.subject)) for relation in base.relations)
        self.card = Card(name, f"looks up one fact by its title: {relations}", capacity)
        self._values = [fact.value for fact in base.facts]
        self._titles = [base.title(fact) for fact in base.facts]
        self._index: Index | None = None
        self._lock = threading.Lock()

    def work(self, assignment: Assignment) -> Answer:
        """See `Worker.work`."""
        with self._lock:
            # Made at the first step: most who only need the card never search.
            self._index = self._index or Index(self._titles)
        query = filled(assignment)
        found, asked = self._index.search(query), {*words(query)}
        for place in found:
            if asked.issuperset(words(self._titles[place])):
                return Answer(self._values[place])
        nearest = "; ".join(self._titles[place] for place in found[:SHOWN]) or "none"
        return Answer(f"no fact has its title in {query!r}; the nearest are: {nearest}", failed=True)


def _a(noun: str) -> str:
    return f"an {noun}" if noun[0] in "aeiou" else f"a {noun}"
