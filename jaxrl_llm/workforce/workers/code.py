"""Workers that compute: Python programs in a sandbox, or arithmetic without running anything."""

from jaxrl_llm.workforce.protocol import Answer
from jaxrl_llm.workforce.protocol import Assignment
from jaxrl_llm.workforce.protocol import Card
from jaxrl_llm.workforce.workers.arithmetic import evaluate
from jaxrl_llm.workforce.workers.sandbox import Sandbox
from jaxrl_llm.workforce.workers.wording import named
from jaxrl_llm.workforce.workers.wording import shown

PREFIX = "compute "
"""How a step for these workers begins."""
DESCRIPTION = "compute, calculate a Python expression: sum, max, min, numbers(#1), + - * /"


class CodeWorker:
    """Runs "compute PROGRAM" in Python, in a sandbox; #1 is a text, and numbers(#1) the numbers in it.

    Args:
        sandbox: where.
        name: of the worker.
        capacity: steps at a time.
    """

    def __init__(self, sandbox: Sandbox, *, name: str = "code", capacity: int = 2) -> None:
        self.card, self._sandbox = Card(name, DESCRIPTION, capacity), sandbox

    def work(self, assignment: Assignment) -> Answer:
        """See `Worker.work`."""
        try:
            program, results = named(assignment, "r{}")
        except ValueError as error:
            return Answer(f"the program failed: {error}", failed=True)
        ran = self._sandbox.run(program.removeprefix(PREFIX), {f"r{number}": text for number, text in results.items()})
        if ran.error is not None:
            return Answer(f"the program failed: {ran.error}", failed=True)
        return Answer(ran.output.strip()) if ran.output.strip() else Answer("the program printed nothing", failed=True)


class ArithmeticWorker:
    """Computes "compute EXPRESSION" of numbers and lists without running it as a program; for where no sandbox is.

    Args:
        name: of the worker.
        capacity: steps at a time.
    """

    def __init__(self, *, name: str = "code", capacity: int = 4) -> None:
        self.card = Card(name, DESCRIPTION, capacity)

    def work(self, assignment: Assignment) -> Answer:
        """See `Worker.work`."""
        try:
            text, results = named(assignment, "r{}")
            value = evaluate(text.removeprefix(PREFIX), {f"r{number}": given for number, given in results.items()})
        except (ValueError, ArithmeticError) as error:
            return Answer(f"the expression failed: {error}", failed=True)
        return Answer(shown(value))
