"""Who takes part in a task, and what they say to each other: planner, coordinator, workers.

The roles of Workforce (Hu et al. 2025, arXiv 2505.23885, section 3): the planner writes and rewrites plans and knows of
no tool, the coordinator says which worker does which step, a worker sees the question, its step and the results of the
steps before it, and gives back its final result only. Workers do not speak with each other.
"""

import re
from collections.abc import Mapping
from collections.abc import Sequence
from dataclasses import dataclass
from dataclasses import field
from typing import NamedTuple
from typing import Protocol

from jaxrl_llm.workforce.plans import Plan

USER, PLANNER, COORDINATOR = "user", "planner", "coordinator"
"""Names of speakers that are no workers."""


class Said(NamedTuple):
    """What a policy wrote.

    Attributes:
        text: decoded, without its end.
        tokens: as they were sampled, the end token among them; None where nobody knows them.
        log_probs: of each token under the policy that sampled it [nats]; None where nobody recorded them.
        frozen: whether another policy than the actor's own wrote it, so that the actor learns nothing from it.
    """

    text: str
    tokens: tuple[int, ...] | None = None
    log_probs: tuple[float, ...] | None = None
    frozen: bool = False


@dataclass(frozen=True)
class Turn:
    """One text of the record of a task: the record is the turns one behind the other.

    Attributes:
        actor: who wrote it: a worker, or one of `USER`, `PLANNER`, `COORDINATOR`.
        said: what.
        acted: whether it is what the actor chose, as its policy wrote it; the others are reports.
    """

    actor: str
    said: Said
    acted: bool = False


@dataclass(frozen=True)
class Card:
    """What others know of a worker.

    Attributes:
        name: one word.
        description: what it can do; the planner and the coordinator read it.
        capacity: packets that it works on at a time.
    """

    name: str
    description: str
    capacity: int = 1

    def __post_init__(self) -> None:
        """Raise a ValueError for a card that cannot be."""
        if not re.fullmatch(r"\S+", self.name) or self.name in (USER, PLANNER, COORDINATOR):
            raise ValueError(f"name is {self.name!r}; it must be one word, none of {USER}, {PLANNER}, {COORDINATOR}.")
        if self.capacity < 1:
            raise ValueError(f"capacity of {self.name} is {self.capacity}; it must be at least 1.")


class Answer(NamedTuple):
    """What a worker gives back: a result, or the reason why there is none."""

    text: str
    failed: bool = False


@dataclass(frozen=True)
class Assignment:
    """What a worker is given.

    Attributes:
        question: the whole task.
        text: the step, with #1, #2, .. for results.
        results: of the steps before it, by their numbers.
    """

    question: str
    text: str
    results: Mapping[int, str] = field(default_factory=dict)


@dataclass(frozen=True)
class PlanRequest:
    """A task that needs a plan.

    Attributes:
        question: the task.
        cards: the workers.
        turns: everything that was said so far, earlier plans and why they failed among it.
    """

    question: str
    cards: tuple[Card, ...]
    turns: tuple[Turn, ...]

    @property
    def prompt(self) -> str:
        """The text that a plan continues, for planners of texts; for policies of tokens see `rows.encode_prompt`."""
        return "".join(turn.said.text for turn in self.turns)


@dataclass(frozen=True)
class AnswerRequest:
    """A task whose plan was carried out.

    Attributes:
        question: the task.
        turns: everything that was said so far.
        results: of every step, by its number; the last one is that of the plan's last step.
    """

    question: str
    turns: tuple[Turn, ...]
    results: Mapping[int, str]

    @property
    def prompt(self) -> str:
        """The text that the final answer continues; see `PlanRequest.prompt`."""
        return "".join(turn.said.text for turn in self.turns)


class Planner(Protocol):
    """Writes plans and final answers, for several tasks at a time, so that a model can sample them as one batch."""

    def plan(self, requests: Sequence[PlanRequest]) -> Sequence[Said]:
        """A plan in the grammar of `plans` for each request; what is no plan costs the task an attempt."""
        ...

    def synthesise(self, requests: Sequence[AnswerRequest]) -> Sequence[Said | None]:
        """The final answer of each request; None takes the result of its last step."""
        ...


class AssignmentError(ValueError):
    """A coordinator finds nobody for a step; the sentence goes to the planner."""


class Coordinator(Protocol):
    """Says who does what."""

    def assign(self, question: str, plan: Plan, cards: Sequence[Card]) -> Sequence[str]:
        """The name of a worker for each step.

        Raises:
            AssignmentError: there is none.
        """
        ...


class Worker(Protocol):
    """Does steps; in a thread of its own, up to `card.capacity` at a time."""

    @property
    def card(self) -> Card:
        """What others know of it."""
        ...

    def work(self, assignment: Assignment) -> Answer:
        """The result of a step, or why there is none. Errors, and silence beyond the time limit, are failures too."""
        ...
