"""Short sums and differences from reasoning-gym, worked examples in front, for small pretrained models."""

from collections.abc import Callable

from jaxrl_llm.environments.generated import Entry
from jaxrl_llm.environments.generated import GeneratedTask
from jaxrl_llm.environments.splits import is_held_out


def signed_terms(expression: str) -> tuple[int, ...]:
    """The terms of a chain of sums and differences: "7 - 3 + 12" gives (7, -3, 12).

    Raises:
        ValueError: `expression` is something else.
    """
    tokens = expression.split()
    signs = {"+": 1, "-": -1}
    if len(tokens) % 2 == 0 or any(token not in signs for token in tokens[1::2]):
        raise ValueError(f"expression is {expression!r}; it must be numbers joined by + and -, with spaces between.")
    numbers = [int(token) for token in tokens[::2]]
    return numbers[0], *(signs[sign] * number for sign, number in zip(tokens[1::2], numbers[1:], strict=True))


def sum_identity(expression: str) -> str:
    """Canonical form of a chain of sums: its signed terms, sorted, so "3 + 12" and "12 + 3" are one problem."""
    return "sum:" + ",".join(str(term) for term in sorted(signed_terms(expression)))


def worked(expression: str, *, wording: str = "") -> str:
    """One worked example on a line of its own, `wording` in front of it."""
    return f"{wording}{expression} = {sum(signed_terms(expression))}\n"


def addition(
    name: str,
    *,
    largest: int,
    smallest: int = 0,
    terms: int = 2,
    shots: tuple[str, ...] = (),
    wording: str = "",
    place_credit: float = 0.5,
    wordy_reward: float = 0.5,
    held_out_count: int = 128,
) -> GeneratedTask:
    """Sums of whole numbers that are uniform in [smallest, largest]: "12 + 7 = " after worked examples, one a line.

    The generator is reasoning-gym's basic_arithmetic without parentheses, whose numbers are uniform in [0, 10^digits].
    The prompt ends in a space, as a digit has no space in its token and the answer is then digits alone.

    Args:
        name: of the task.
        largest, smallest: bounds of the numbers, both included.
        terms: how many numbers are added.
        shots: expressions worked out in front of every problem; problems to train on, never held-out ones.
        wording: text in front of each expression, "Sum: " for example; part of the prompt, never of the identity.
        place_credit: what a wrong sum earns per fraction of right places, in [0, 1); 0 rewards right sums only.
        wordy_reward: what a right sum earns that has other text around it, in [0, 1].
        held_out_count: see `GeneratedTask`.

    Raises:
        ValueError: impossible bounds, or a worked example is a held-out problem.
    """
    if not 0 <= smallest < largest:
        raise ValueError(f"smallest is {smallest} and largest is {largest}; 0 <= smallest < largest must hold.")
    digits = len(str(largest - 1))
    config = {
        "operators": ("+",),
        "allow_parentheses": False,
        "allow_negation": False,
        "min_terms": terms,
        "max_terms": terms,
        "min_digits": digits,
        "max_digits": digits,
    }
    bounds = (smallest, largest)
    return GeneratedTask(
        name=name,
        dataset="basic_arithmetic",
        config=config,
        prompt=_worked_prompt(shots, wording),
        identity=_identity,
        keep=lambda entry: all(bounds[0] <= value <= bounds[1] for value in signed_terms(_expression(entry))),
        place_credit=place_credit,
        wordy_reward=wordy_reward,
        held_out_count=held_out_count,
    )


def chain_sum(
    name: str,
    *,
    digits: tuple[int, int],
    terms: int = 2,
    shots: tuple[str, ...] = (),
    wording: str = "",
    held_out_count: int = 128,
) -> GeneratedTask:
    """Chains of + and - over numbers with equally many digits: "12 - 7 = " after worked examples, one a line.

    Args:
        name: of the task.
        digits: fewest and most digits of the numbers of a chain.
        terms: numbers in a chain.
        shots: see `addition`.
        wording: see `addition`.
        held_out_count: see `GeneratedTask`.

    Raises:
        ValueError: a worked example is a held-out problem.
    """
    return GeneratedTask(
        name=name,
        dataset="chain_sum",
        config={"min_terms": terms, "max_terms": terms, "min_digits": digits[0], "max_digits": digits[1]},
        prompt=_worked_prompt(shots, wording),
        identity=_identity,
        held_out_count=held_out_count,
    )


def _expression(entry: Entry) -> str:
    return entry["metadata"]["expression"]


def _identity(entry: Entry) -> str:
    return sum_identity(_expression(entry))


def _worked_prompt(shots: tuple[str, ...], wording: str) -> Callable[[Entry], str]:
    """Entry -> the worked examples and then the expression.

    Raises:
        ValueError: a worked example is a held-out problem.
    """
    leaked = [shot for shot in shots if is_held_out(sum_identity(shot))]
    if leaked:
        raise ValueError(f"shots has {leaked[0]!r}, which is a held-out problem; it must be one to train on.")
    prefix = "".join(worked(shot, wording=wording) for shot in shots)
    return lambda entry: f"{prefix}{wording}{_expression(entry)} = "
