"""How results of earlier steps get into the text of a step."""

import math
import re
from decimal import Decimal

from jaxrl_llm.workforce.plans import REFERENCE
from jaxrl_llm.workforce.protocol import Assignment

QUOTED = re.compile(r"'[^']*'|\"[^\"]*\"")


def filled(assignment: Assignment) -> str:
    """The step with each #1, #2, .. replaced by that result.

    In one pass, so that a result with a "#2" in it stays as it is.
    """
    return REFERENCE.sub(lambda found: assignment.results.get(int(found[1]), found[0]), assignment.text)


def named(assignment: Assignment, form: str) -> tuple[str, dict[int, str]]:
    """The step with each #1, #2, .. replaced by a name, and the results to bind to the names.

    For languages: a result never becomes part of a program.

    Args:
        assignment: the step.
        form: of a name, with {} for the number.

    Raises:
        ValueError: one stands within quotes, where its name would be a text.
    """
    used = {int(number) for number in REFERENCE.findall(assignment.text)} & {*assignment.results}
    for quoted in QUOTED.findall(assignment.text):
        if used & {int(number) for number in REFERENCE.findall(quoted)}:
            raise ValueError(f"no result is put within quotes, as in {quoted[:60]}; write #1 without them")
    text = re.sub(
        REFERENCE, lambda found: form.format(int(found[1])) if int(found[1]) in used else found[0], assignment.text
    )
    return text, {number: assignment.results[number] for number in sorted(used)}


def shown(value: object) -> str:
    """A value as a person writes it: a whole number without its .0, a small one without an exponent."""
    if isinstance(value, float) and math.isfinite(value):
        return str(int(value)) if value == int(value) else format(Decimal(repr(value)), "f")
    return "nothing" if value is None else str(value)
