"""Plans: numbered steps with dependencies, and their grammar of one line a step.

    1. where Tantalum was discovered
    2. capital of #1 | after: 1
    3. numbers in readings/#2.txt | worker: files | after: 2

`#1` in a step stands for the result of step 1, which must be among those that the step comes after. A step may come
after any other; the lines stand in the order of the numbers.
"""

import graphlib
import re
from dataclasses import dataclass

MOST_STEPS = 20
"""Steps above which a plan is refused."""
REFERENCE = re.compile(r"#(\d{1,9})(?!\d)")
"""The result of a step, within the text of another one; more digits are no number of a step, and take long to read."""
BAR = " | "
"""What separates a step's text from what is said of it; no text may hold it."""
_LINE = re.compile(r"(\d+)\. (.+?)(?: \| worker: (\S+))?(?: \| after: (\d+(?:, \d+)*))?")


class PlanError(ValueError):
    """A plan cannot be carried out; the sentence goes to whoever wrote it."""


@dataclass(frozen=True)
class Step:
    """One subtask.

    Attributes:
        text: what to do, on one line.
        after: numbers of the steps whose results it needs, counted from 1, ascending.
        worker: who should do it; None leaves it to the coordinator.
    """

    text: str
    after: tuple[int, ...] = ()
    worker: str | None = None


@dataclass(frozen=True)
class Plan:
    """Steps, of which number 1 is the first; the answer of a task is the result of the last one."""

    steps: tuple[Step, ...]

    def step(self, number: int) -> Step:
        """The step of this number, counted from 1."""
        return self.steps[number - 1]

    @property
    def numbers(self) -> range:
        """1 .. the number of steps."""
        return range(1, len(self.steps) + 1)


def check_plan(plan: Plan) -> None:
    """Raise unless a plan can be written down, read back and carried out.

    Raises:
        PlanError: it is empty or too long, a text cannot stand on one line, a step comes after one that is not there,
            uses a result that it does not come after, or comes after itself through others.
    """
    if not plan.steps:
        raise PlanError("the plan is empty; it must have at least one step.")
    if len(plan.steps) > MOST_STEPS:
        raise PlanError(f"the plan has {len(plan.steps)} steps; it may have at most {MOST_STEPS}.")
    for number in plan.numbers:
        _check_step(number, plan)
    try:
        graphlib.TopologicalSorter({number: plan.step(number).after for number in plan.numbers}).prepare()
    except graphlib.CycleError as error:
        circle = " after ".join(str(number) for number in reversed(error.args[1]))
        raise PlanError(f"the steps of the plan wait for each other in a circle: {circle}.") from error


def _check_step(number: int, plan: Plan) -> None:
    step = plan.step(number)
    if not step.text or step.text != step.text.strip() or "\n" in step.text or BAR in step.text:
        raise PlanError(
            f"step {number} has the text {step.text!r}; it must be one line that is not blank, without spaces around "
            f"it and without {BAR!r} in it."
        )
    if step.worker is not None and not re.fullmatch(r"\S+", step.worker):
        raise PlanError(f"step {number} names the worker {step.worker!r}; a name is one word.")
    if list(step.after) != sorted(set(step.after)):
        raise PlanError(f"step {number} comes after {step.after}; the numbers must ascend, each of them once.")
    missing = [other for other in step.after if other not in plan.numbers]
    if missing:
        raise PlanError(f"step {number} comes after step {missing[0]}, and the plan has {len(plan.steps)}.")
    for other in map(int, REFERENCE.findall(step.text)):
        if other not in step.after:
            raise PlanError(f"step {number} uses #{other} and does not come after step {other}; add 'after: {other}'.")


def render_plan(plan: Plan) -> str:
    """A plan as text, a step a line.

    Raises:
        PlanError: see `check_plan`.
    """
    check_plan(plan)
    lines = []
    for number in plan.numbers:
        step = plan.step(number)
        worker = "" if step.worker is None else f"{BAR}worker: {step.worker}"
        after = f"{BAR}after: {', '.join(map(str, step.after))}" if step.after else ""
        lines.append(f"{number}. {step.text}{worker}{after}")
    return "\n".join(lines)


def parse_plan(text: str) -> Plan:
    """The plan that a text is; blank lines, and blanks around a line, do not count.

    Raises:
        PlanError: a line is no step, the numbers are not 1, 2, .., or the plan cannot be carried out.
    """
    steps: list[Step] = []
    for line in filter(None, (line.strip() for line in text.split("\n"))):
        found = _LINE.fullmatch(line)
        if found is None:
            raise PlanError(
                f"the line {line[:200]!r} is no step; a step reads '{len(steps) + 1}. what to do', then "
                "' | after: 1, 2' where it needs the results of others."
            )
        number, said, worker, after = found.groups()
        # Compared as text, which "01" and digits of other alphabets are not equal to.
        if number != str(len(steps) + 1):
            raise PlanError(f"a step has the number {number[:20]}; it must be {len(steps) + 1}.")
        if len(steps) == MOST_STEPS:
            raise PlanError(f"the plan has more than {MOST_STEPS} steps, which is the most.")
        steps.append(Step(said, _numbers(after), worker))
    plan = Plan(tuple(steps))
    check_plan(plan)
    return plan


def _numbers(text: str | None) -> tuple[int, ...]:
    # A number of thousands of digits is no step, and takes long to read.
    if text and max(map(len, text.split(", "))) > 9:
        raise PlanError("a step comes after one whose number has more than 9 digits.")
    return tuple(int(number) for number in text.split(", ")) if text else ()
