"""Chains of hops: from a thing along relations of a base to another thing."""

from typing import NamedTuple

from jaxrl_llm.workforce.facts.base import FactBase
from jaxrl_llm.workforce.facts.base import Relation


class Chain(NamedTuple):
    """Where a question starts, and along what.

    Attributes:
        start: the thing.
        relations: names, in the order in which they are followed; none stays at the start.
    """

    start: str
    relations: tuple[str, ...]

    @property
    def phrase(self) -> str:
        """In words: "the capital of the birth country of Zed"; with no relation, the start."""
        said = self.start
        for place, relation in enumerate(self.relations):
            said = f"{relation} of {'the ' if place else ''}{said}"
        return f"the {said}" if self.relations else said

    def end(self, base: FactBase) -> str | None:
        """Where it leads; None where a fact is missing."""
        there: str | None = self.start
        for relation in self.relations:
            there = None if there is None else base.value(relation, there)
        return there


def relation_chains(base: FactBase, *, most: int) -> list[tuple[Relation, ...]]:
    """Every chain of 1 .. `most` relations that fit each other, none of them twice."""
    chains = [(relation,) for relation in base.relations]
    found = list(chains)
    for _ in range(most - 1):
        chains = [
            (*chain, relation)
            for chain in chains
            for relation in base.relations
            if chain[-1].value == relation.subject and relation not in chain
        ]
        found += chains
    return found


def kinds(base: FactBase) -> dict[str, tuple[str, ...]]:
    """The things of each kind that something is said of, sorted."""
    found: dict[str, set[str]] = {}
    for relation in base.relations:
        found.setdefault(relation.subject, set()).update(base.subjects(relation.name))
    return {kind: tuple(sorted(things)) for kind, things in sorted(found.items())}
