"""The tasks that come with the project, by name."""

from collections.abc import Callable
from functools import partial

from jaxrl_llm.environments.arithmetic import addition
from jaxrl_llm.environments.arithmetic import chain_sum
from jaxrl_llm.environments.generated import Entry
from jaxrl_llm.environments.generated import GeneratedTask
from jaxrl_llm.environments.strings import StringTask
from jaxrl_llm.environments.strings import ascending
from jaxrl_llm.environments.strings import backwards
from jaxrl_llm.environments.strings import either_direction
from jaxrl_llm.environments.strings import unchanged
from jaxrl_llm.environments.tasks import Task
from jaxrl_llm.environments.tasks import register

SUM_SHOTS = ("3 + 5", "14 + 8")
"""Worked examples in front of the sums, one a line: of the plain lists of sums tried, the untrained SmolLM2-135M scores
best with these two (0.45 on 128 held-out sums to 49). Words in front of each sum, longer prompts, can score higher."""

WORDED_SHOTS = ("3 + 5", "14 + 8", "27 + 15")
"""Worked examples in front of the large sums, each after "Sum: ": the untrained SmolLM2-135M gets 0.42 of 512 sums with
this prompt, 0.45 with the question of reasoning-gym, which is nearly twice as long, and 0.29 with a plain list."""

LEVELS = ("sums_to_10", "sums_to_30", "sums_to_49", "sums_to_99")
"""Names of sums of two numbers by difficulty, easiest first, for a `Curriculum`."""


def _same_numbers(entry: Entry) -> str:
    """The numbers of a greatest-common-divisor problem, sorted."""
    return "gcd:" + ",".join(str(number) for number in sorted(entry["metadata"]["numbers"]))


TASKS: dict[str, Callable[[], Task]] = {
    # Two numbers of 0 .. N; 66, 496, 1275 and 5050 distinct problems.
    "sums_to_10": partial(addition, "sums_to_10", largest=10, shots=SUM_SHOTS),
    "sums_to_30": partial(addition, "sums_to_30", largest=30, shots=SUM_SHOTS),
    "sums_to_49": partial(addition, "sums_to_49", largest=49, shots=SUM_SHOTS),
    "sums_to_99": partial(addition, "sums_to_99", largest=99, shots=WORDED_SHOTS, wording="Sum: "),
    "three_sums": partial(addition, "three_sums", largest=10, terms=3, shots=("1 + 2 + 3", "8 + 7 + 9")),
    "sums_and_differences": partial(
        chain_sum, "sums_and_differences", digits=(1, 2), shots=("3 + 5", "9 - 2", "14 + 8")
    ),
    # reasoning-gym's own wording and settings; a small pretrained model gets next to nothing on them.
    "gcd": partial(GeneratedTask, "gcd", "gcd", {"max_value": 30}, identity=_same_numbers),
    "letter_counting": partial(GeneratedTask, "letter_counting", "letter_counting"),
    # Strings of digits for models that start from random weights.
    "copy_digits": partial(StringTask, "copy_digits", unchanged, unchanged),
    "sort_digits": partial(StringTask, "sort_digits", ascending, ascending),
    "reverse_digits": partial(StringTask, "reverse_digits", backwards, either_direction),
}
"""Name -> factory of every task of the project."""

for _name, _factory in TASKS.items():
    register(_name, _factory)
