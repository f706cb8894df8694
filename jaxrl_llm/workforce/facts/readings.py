"""Files of readings, one per city: numbers that nobody knows, made from a seed."""

import random
from collections.abc import Iterable


def readings(cities: Iterable[str], seed: str) -> dict[str, str]:
    """A text of a week's readings for each city, by path; a function of the city and the seed."""
    files = {}
    for city in cities:
        rng = random.Random(f"readings {seed} {city}")
        lines = "\n".join(f"{day}: {rng.randrange(10, 1000)}" for day in WEEK)
        files[path_of(city)] = f"Readings of the gauge in {city}.\n{lines}\n"
    return files


def path_of(city: str) -> str:
    """Where a city's readings are."""
    return f"readings/{city}.txt"


def numbers_of(text: str) -> list[int]:
    """The readings in such a text."""
    return [int(line.partition(": ")[2]) for line in text.splitlines()[1:]]


WEEK = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
