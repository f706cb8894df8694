"""How results of earlier steps get into the text of a step."""

import math
import re

from jaxrl_llm.workforce.plans import REFERENCE
from jaxrl_llm.workforce.protocol import Assignment


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
    """
    used = {int(number) for number in REFERENCE.findall(assignment.text)} & {*assignment.results}
    text = re.sub(
        REFERENCE, lambda found: form.format(int(found[1])) if int(found[1]) in used else found[0], assignment.text
    )
    return text, {number: assignment.results[number] for number in sorted(used)}


def shown(value: object) -> str:
    """A value as a person writes it: a whole number without its .0."""
    if isinstance(value, float) and math.isfinite(value) and value == int(value):
        return str(int(value))
    return "nothing" if value is None else str(value)
