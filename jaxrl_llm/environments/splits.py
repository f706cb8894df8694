"""Which problems are held out, and which generator key belongs to which step: both by hash, so the same everywhere."""

import hashlib
from collections.abc import Iterable
from typing import NamedTuple

from jaxrl_llm.environments.tasks import Problem

HELD_OUT_ONE_IN = 3


class Split(NamedTuple):
    """Problems to train on and problems to measure on; no identity is in both."""

    train: list[Problem]
    held_out: list[Problem]


def stable_key(*parts: object) -> int:
    """A generator key in [0, 2^31) that is a function of `parts` alone (sha256): the same on every machine.

    31 bits, since some generators hand their seed to NumPy, which takes no more than 32.
    """
    text = "/".join(str(part) for part in parts)
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big") >> 1


def is_held_out(identity: str) -> bool:
    """Whether the problems with this identity are never trained on: sha256(identity) mod 3 = 0, a fixed third of them.

    A function of the identity alone: the split does not depend on the seed, on the order of generation, or on the task,
    so two tasks that word the same problem differently agree about it.
    """
    return int(hashlib.sha256(identity.encode()).hexdigest(), 16) % HELD_OUT_ONE_IN == 0


def split(problems: Iterable[Problem]) -> Split:
    """The problems to train on, all of them in the order given; and those held out, the first of each identity."""
    train: list[Problem] = []
    held_out: dict[str, Problem] = {}
    for problem in problems:
        if is_held_out(problem.identity):
            held_out.setdefault(problem.identity, problem)
        else:
            train.append(problem)
    return Split(train, list(held_out.values()))
