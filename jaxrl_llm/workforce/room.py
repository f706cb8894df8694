"""The room itself: several tasks at a time, from the first plan to the last answer.

It works in rounds. In each, every task that needs a plan gets one, all in one call of the planner; steps whose
predecessors are done are posted; workers claim as many as they have places for; all claimed steps run side by side, and
what they give back is read in the order in which it was claimed. So what happens does not depend on who is faster: a
round lasts as long as its slowest step, at most the time limit.
"""

import collections
import difflib
import itertools
import random
import threading
from collections.abc import Sequence
from dataclasses import dataclass

from jaxrl_llm.checks import require_at_least
from jaxrl_llm.checks import require_positive
from jaxrl_llm.checks import require_sizes
from jaxrl_llm.workforce import attempts
from jaxrl_llm.workforce.attempts import Phase
from jaxrl_llm.workforce.attempts import TaskRun
from jaxrl_llm.workforce.calls import ANSWERED
from jaxrl_llm.workforce.calls import LATE
from jaxrl_llm.workforce.calls import Called
from jaxrl_llm.workforce.calls import call_all
from jaxrl_llm.workforce.channel import PacketId
from jaxrl_llm.workforce.channel import TaskChannel
from jaxrl_llm.workforce.plans import PlanError
from jaxrl_llm.workforce.plans import parse_plan
from jaxrl_llm.workforce.protocol import Answer
from jaxrl_llm.workforce.protocol import AnswerRequest
from jaxrl_llm.workforce.protocol import Assignment
from jaxrl_llm.workforce.protocol import AssignmentError
from jaxrl_llm.workforce.protocol import Card
from jaxrl_llm.workforce.protocol import Coordinator
from jaxrl_llm.workforce.protocol import Planner
from jaxrl_llm.workforce.protocol import PlanRequest
from jaxrl_llm.workforce.protocol import Said
from jaxrl_llm.workforce.protocol import Turn
from jaxrl_llm.workforce.protocol import Worker


@dataclass(frozen=True)
class Limits:
    """What a task may take.

    Attributes:
        replans: K, attempts after the first one.
        seconds: time limit of a step [s].
        longest: characters of a result; one that has more has failed, since its beginning would be another result.
    """

    replans: int = 2
    seconds: float = 60.0
    longest: int = 2000

    def __post_init__(self) -> None:
        """Raise a ValueError for limits that cannot be."""
        require_at_least("replans", self.replans, 0)
        require_positive("seconds", self.seconds)
        require_sizes(longest=self.longest)


@dataclass(frozen=True)
class Outcome:
    """What became of a task.

    Attributes:
        question: the task.
        answer: None where every attempt failed.
        attempts: how many there were.
        failures: of each attempt, why it failed; empty for one that did not.
        turns: everything that was said, in order.
        claimed: the order in which steps were claimed, among all tasks: (place, step's packet, worker).
        counts: "refused" plans, steps that "failed", of those the ones that "raised", were "late" or too "long".
    """

    question: str
    answer: str | None
    attempts: int
    failures: tuple[tuple[str, ...], ...]
    turns: tuple[Turn, ...]
    claimed: tuple[tuple[int, PacketId, str], ...]
    counts: dict[str, int]


class Workforce:
    """A planner, a coordinator and workers, for one call at a time.

    Args:
        planner: writes plans.
        coordinator: says who does what.
        workers: do it; the order is that of their cards everywhere.
        limits: what a task may take.

    Raises:
        ValueError: there is no worker, or two of one name.
    """

    def __init__(
        self, planner: Planner, coordinator: Coordinator, workers: Sequence[Worker], limits: Limits | None = None
    ) -> None:
        self.planner, self.coordinator = planner, coordinator
        self.limits = Limits() if limits is None else limits
        self.workers = {worker.card.name: worker for worker in workers}
        if len(self.workers) < max(len(workers), 1):
            raise ValueError(
                f"workers are {[w.card.name for w in workers]}; expected at least one, each with its name."
            )
        self._given_up: dict[str, list[threading.Thread]] = {name: [] for name in self.workers}
        self._busy = threading.Lock()

    @property
    def cards(self) -> tuple[Card, ...]:
        """Of the workers, in their order."""
        return tuple(worker.card for worker in self.workers.values())

    def run(self, questions: Sequence[str], *, seed: int = 0) -> list[Outcome]:
        """Every task from its first plan to its end.

        Args:
            questions: the tasks.
            seed: of the order in which tasks take turns; everything else follows from it, the planner and the workers.

        Raises:
            ValueError: a blank question, or a planner or coordinator that does not answer each request.
            RuntimeError: another thread is in a call of this room.
        """
        # Places of workers are counted per call: two at once would give each place twice.
        if not self._busy.acquire(blocking=False):
            raise RuntimeError("this room is at work already; it takes one call at a time: make a second room.")
        try:
            return self._run(questions, seed)
        finally:
            self._busy.release()

    def _run(self, questions: Sequence[str], seed: int) -> list[Outcome]:
        order = [*range(len(questions))]
        random.Random(seed).shuffle(order)
        session = _Session(self, [attempts.begin(question, self.cards) for question in questions], order)
        while session.round():
            pass
        return [session.outcome(task) for task in range(len(questions))]

    def free(self, name: str) -> int:
        """Places of a worker that no call of earlier rounds still holds."""
        self._given_up[name] = [thread for thread in self._given_up[name] if thread.is_alive()]
        return self.workers[name].card.capacity - len(self._given_up[name])

    def work(self, calls: Sequence[tuple[str, Assignment]]) -> list[Called]:
        """All calls of a round; those that cannot be stopped keep their places."""
        called = call_all([(self.workers[name], assignment) for name, assignment in calls], self.limits.seconds)
        for (name, _), one in zip(calls, called, strict=True):
            self._given_up[name].append(one.thread)
        return called


class _Session:
    """One call of `Workforce.run`: where its tasks are, and the channel."""

    def __init__(self, room: Workforce, runs: list[TaskRun], order: list[int]) -> None:
        self.room, self.runs, self.order, self.channel = room, runs, order, TaskChannel()
        self.places, self.claimed = itertools.count(), [list[tuple[int, PacketId, str]]() for _ in runs]
        self.counts = [collections.Counter[str]() for _ in runs]

    def round(self) -> bool:
        """Plan, post, claim, work, read, answer; false where no task goes on."""
        self._plan(self._in(Phase.PLANNING))
        for task in self._in(Phase.RUNNING):
            self._post(task)
        self._work()
        for task in self._in(Phase.RUNNING):
            if self.runs[task].failures[-1]:
                self.channel.withdraw(task)
            self.runs[task] = attempts.settled(self.runs[task], replans=self.room.limits.replans)
        self._answer(self._in(Phase.ANSWERING))
        return any(run.phase not in (Phase.DONE, Phase.FAILED) for run in self.runs)

    def outcome(self, task: int) -> Outcome:
        """What became of a task."""
        run = self.runs[task]
        claimed, counts = tuple(self.claimed[task]), dict(self.counts[task])
        return Outcome(run.question, run.answer, run.attempt, run.failures, run.turns, claimed, counts)

    def _in(self, phase: Phase) -> list[int]:
        return [task for task in self.order if self.runs[task].phase is phase]

    def _plan(self, tasks: list[int]) -> None:
        if not tasks:
            return
        requests = [PlanRequest(self.runs[task].question, self.room.cards, self.runs[task].turns) for task in tasks]
        for task, said in zip(tasks, _one_each("planner", self.room.planner.plan(requests), len(tasks)), strict=True):
            if not isinstance(said, Said):
                raise ValueError(f"the planner wrote a {type(said).__name__}; it must be a Said.")
            run = attempts.wrote(self.runs[task], said)
            try:
                plan = parse_plan(said.text)
                names = self.room.coordinator.assign(run.question, plan, self.room.cards)
                names = [*_one_each("coordinator", names, len(plan.steps))]
                self._require_known(names)
                self.runs[task] = attempts.planned(run, plan, names)
            except (PlanError, AssignmentError) as error:
                self.counts[task]["refused"] += 1
                self.runs[task] = attempts.refused(run, str(error))

    def _require_known(self, names: Sequence[str]) -> None:
        for number, name in enumerate(names, start=1):
            if name not in self.room.workers:
                near = difflib.get_close_matches(str(name), self.room.workers, n=1)
                hint = f" Did the coordinator mean {near[0]!r}?" if near else ""
                known = ", ".join(self.room.workers)
                raise AssignmentError(f"step {number} is assigned to {name!r}; the workers are {known}.{hint}")

    def _post(self, task: int) -> None:
        for step in self.runs[task].ready:
            run = self.runs[task]
            self.channel.post(PacketId(task, run.attempt, step), run.assignees[step - 1])
            self.runs[task] = attempts.posted(run, step)

    def _work(self) -> None:
        taken: list[tuple[PacketId, str]] = []
        for name in self.room.workers:
            waiting, free = self.channel.waiting(name), self.room.free(name)
            if free < 1:
                # Nobody knows when a place will be free again: waiting for one would hold up the tasks for ever.
                for number in waiting:
                    answer = Answer("all its places are held by calls that never returned", failed=True)
                    self._read(number, answer, LATE)
            for number in waiting[: max(free, 0)]:
                self.channel.claim(number, name)
                self.claimed[number.task].append((next(self.places), number, name))
                taken.append((number, name))
        called = self.room.work([(name, self._assignment(number)) for number, name in taken])
        for (number, _), one in zip(taken, called, strict=True):
            self.channel.give_back(number)
            self._read(number, one.answer, one.kind)
            self.channel.archive(number)

    def _assignment(self, number: PacketId) -> Assignment:
        run = self.runs[number.task]
        assert run.plan is not None
        step = run.plan.step(number.step)
        return Assignment(run.question, step.text, {other: run.results[other] for other in step.after})

    def _read(self, number: PacketId, answer: Answer, kind: str) -> None:
        """Take down what came back for a step; of a reason of failure at most `longest` characters."""
        limit, counts = self.room.limits.longest, self.counts[number.task]
        # Names of files may hold what no text of Unicode does, and no tokenizer takes.
        text = answer.text.encode("utf-8", "replace").decode("utf-8")
        if len(text) > limit:
            counts["long"] += 1
            long = f"the result has {len(text)} characters, and at most {limit} are taken; ask for less of it"
            answer, text = Answer("", failed=True), text[:limit] if answer.failed else long
        answer = answer._replace(text=text)
        if answer.failed:
            counts["failed"] += 1
            if kind != ANSWERED:
                counts[kind] += 1
        self.runs[number.task] = attempts.returned(self.runs[number.task], number.step, answer)

    def _answer(self, tasks: list[int]) -> None:
        if not tasks:
            return
        for task in tasks:
            self.runs[task] = attempts.asked(self.runs[task])
        requests = [AnswerRequest(run.question, run.turns, run.results) for run in (self.runs[task] for task in tasks)]
        said = _one_each("planner", self.room.planner.synthesise(requests), len(tasks))
        for task, answer in zip(tasks, said, strict=True):
            if not isinstance(answer, Said | None):
                raise ValueError(f"the planner answered with a {type(answer).__name__}; it must be a Said or None.")
            self.runs[task] = attempts.answered(self.runs[task], answer)


def _one_each(who: str, given: Sequence, count: int) -> Sequence:
    if len(given) != count:
        raise ValueError(f"the {who} gave {len(given)} texts for {count}; it must give one for each.")
    return given
