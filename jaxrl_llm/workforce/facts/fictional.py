"""A world that does not exist: countries, cities, metals and people with invented names, all from a seed.

Nothing in it can be known from reading, so a plan that skips a search cannot guess the answer.
"""

import random

from jaxrl_llm.checks import require_at_least
from jaxrl_llm.workforce.facts.base import Fact
from jaxrl_llm.workforce.facts.base import FactBase
from jaxrl_llm.workforce.facts.base import Relation
from jaxrl_llm.workforce.facts.base import Table
from jaxrl_llm.workforce.facts.readings import readings

STARTS = (
    "b",
    "br",
    "d",
    "dr",
    "f",
    "g",
    "gl",
    "h",
    "k",
    "kr",
    "l",
    "m",
    "n",
    "p",
    "pl",
    "r",
    "s",
    "st",
    "t",
    "tr",
    "v",
    "z",
)
VOWELS = ("a", "e", "i", "o", "u", "ai", "ou")
ENDS = ("l", "m", "n", "r", "s", "th", "x")
REGIONS = 4
RELATIONS = (
    Relation("discoverer", "metal", "person"),
    Relation("birth country", "person", "country"),
    Relation("capital", "country", "city"),
    Relation("mayor", "city", "person"),
    Relation("currency", "country", "currency"),
    Relation("largest export", "country", "metal"),
    Relation("region", "country", "region"),
)


def fictional_base(seed: int, *, size: int = 24) -> FactBase:
    """A world of `size` countries, with as many metals and people; a function of seed and size.

    Raises:
        ValueError: `size` is below 4.
    """
    require_at_least("size", size, 4)
    rng = random.Random(f"fictional world {seed} {size}")
    names = _Names(rng)
    countries, cities, metals, people, currencies = (names.some(size, ending) for ending in ("ia", "", "ium", "", "o"))
    regions = names.some(REGIONS, "os")

    def of(relation: str, subjects: list[str], values: list[str]) -> list[Fact]:
        # A permutation: every value is reached, and no two chains of the same length end in one place by chance alone.
        shuffled = rng.sample(values, len(values))
        return [Fact(relation, one, shuffled[place % len(values)]) for place, one in enumerate(subjects)]

    facts = [
        *of("discoverer", metals, people),
        *of("birth country", people, countries),
        *of("capital", countries, cities),
        *of("mayor", cities, people),
        *of("currency", countries, currencies),
        *of("largest export", countries, metals),
        *of("region", countries, regions),
    ]
    region = {fact.subject: fact.value for fact in facts if fact.relation == "region"}
    tables = {
        "countries": Table(
            ("country", "region", "area", "population"),
            tuple(
                (one, region[one], rng.randrange(1_000, 900_000), rng.randrange(10_000, 90_000_000))
                for one in countries
            ),
        ),
        "metals": Table(
            ("metal", "density", "melting"),
            tuple((one, rng.randrange(500, 23_000) / 1000, rng.randrange(200, 3_800)) for one in metals),
        ),
    }
    return FactBase(f"fictional-{seed}-{size}", RELATIONS, tuple(facts), tables, readings(cities, f"{seed} {size}"))


class _Names:
    """Names that no two things share, not even as a part."""

    def __init__(self, rng: random.Random) -> None:
        self._rng, self._taken = rng, list[tuple[str, str]]()

    def some(self, count: int, ending: str) -> list[str]:
        found: list[str] = []
        while len(found) < count:
            parts = (self._rng.choice(part) for part in (STARTS, VOWELS, ENDS, STARTS, VOWELS, ENDS))
            stem = "".join(parts)
            name = stem + ending
            # Stems, so that a person and a currency are not told apart by an ending alone.
            if not any(stem in other or taken in name for taken, other in self._taken):
                self._taken.append((stem, name))
                found.append(name.capitalize())
        return found
