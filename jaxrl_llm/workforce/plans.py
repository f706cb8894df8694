"""Plans: numbered steps with dependencies, and their grammar of one line a step.

    1. where Tantalum was discovered
    2. capital of #1 | after: 1
    3. numbers in readings/#2.txt | worker: files | after: 2

`#1` in a step stands for the result of step 1, which must be among those that the step comes after. A step may come
after any other; the lines stand in the order of the numbers.
"""

import graphlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass

MOST_STEPS = 20
"""Steps above which a plan is refused."""
REFERENCE = re.compile(r"#(\d{1,9})(?!\d)")
"""The result of a step, within the text of another one; more digits are no number of a step, and take long to read."""
BAR = " | "
"""What separates a step's text from what is said of it; no text may hold it."""
LONGEST_WORD = 24
"""Letters of a word, before a reference and after it too, in a plan that `plan_grammar` takes."""
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


def plan_grammar(*, most_steps: int = 8, most_words: int = 24, workers: Sequence[str] = ()) -> str:
    """A grammar of plans in Lark's notation, for `rollouts.constrained.Grammar.from_lark`; `parse_plan` takes each one.

    It holds all that `check_plan` asks for, since a step comes after earlier ones only: so there is no circle, and no
    step is missing. A parameter is carried along a step: bit j - 1 says that #j was used and not yet named behind
    'after: ', five bits hold the number of the step and six that of its words.

    Narrower than `parse_plan`: steps come after earlier ones; a text is words with one blank between them, without '|',
    each of up to `LONGEST_WORD` letters or as many before and after its one reference; '#' is that of a reference.

    Args:
        most_steps: of a plan, up to `MOST_STEPS`.
        most_words: of a step's text, up to 63.
        workers: names that a step may give; without any, none does.

    Raises:
        ValueError: a number outside its range, or a name that is no word.
    """
    for name, number, most in (("most_steps", most_steps, MOST_STEPS), ("most_words", most_words, 63)):
        if not 1 <= number <= most:
            raise ValueError(f"{name} must be in 1 .. {most}, got {number}")
    for worker in workers:
        if not worker.isprintable() or not re.fullmatch(r"\S+", worker):
            raise ValueError(f"workers has the name {worker!r}; a name is one word.")
    steps, used, step, words = range(1, most_steps + 1), "[0:20]", "[20:25]", "[25:31]"
    letter, no_digit = r"[^\s\x00-\x1f\x7f|#]", r"[^\s\x00-\x1f\x7f|#\d]"
    rules = ["start: step_1"]
    rules += [f'step_{k}: "{k}. " text::{k << 20}' for k in steps]
    rules += ["text::_: WORD more::_"]
    rules += [f"    | USING_{j} more::set_bit({j - 1}) %if gt({step}, {j})" for j in steps[:-1]]
    rules += [f'more::_: " " text::incr({words}) %if lt({words}, {most_words - 1})', "    | after::_"]
    rules += ["    | WORKER after::_"] * bool(workers)
    rules += [f"after::_: next::_ %if is_zeros({used})"]
    rules += [f'    | " | after: " from_1::_ %if gt({step}, 1)'] * (most_steps > 1)
    for j in steps[:-1]:
        # Number j or a later one, each below the step's own; what was used is not passed over.
        further = j + 1 < most_steps
        rules += [f'from_{j}::_: "{j}" beyond_{j}::_ %if gt({step}, {j})']
        rules += [f"    | from_{j + 1}::_ %if bit_clear({j - 1})"] * further
        rules += [f"beyond_{j}::_: next::_ %if is_zeros([{j}:20])"]
        rules += [f'    | ", " from_{j + 1}::_ %if gt({step}, {j + 1})'] * further
    rules += [
        f'next::_: "" %if le({step}, {most_steps})',
        *(f'    | "\\n" step_{k} %if eq({step}, {k - 1})' for k in steps[1:]),
    ]
    rules += [f"WORD: /{letter}{{1,{LONGEST_WORD}}}/"]
    part = f"{letter}{{0,{LONGEST_WORD}}}"
    rules += [f"USING_{j}: /{part}#{j}({no_digit}{part})?/" for j in steps[:-1]]
    names = " | ".join(json.dumps(f"{BAR}worker: {worker}", ensure_ascii=False) for worker in workers)
    rules += [f"WORKER: {names}"] * bool(workers)
    return "\n".join(rules)
