"""Algorithm 1 with whole-task replanning, several tasks at a time, and everything that workers can do wrong."""

import ast
import threading
import time
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import settings
from hypothesis import strategies as st

from jaxrl_llm.workforce import Answer
from jaxrl_llm.workforce import AnswerRequest
from jaxrl_llm.workforce import Assignment
from jaxrl_llm.workforce import Card
from jaxrl_llm.workforce import Limits
from jaxrl_llm.workforce import Outcome
from jaxrl_llm.workforce import Plan
from jaxrl_llm.workforce import PlanRequest
from jaxrl_llm.workforce import Said
from jaxrl_llm.workforce import Step
from jaxrl_llm.workforce import Workforce
from jaxrl_llm.workforce import render_plan
from tests.workforce.team import Does
from tests.workforce.team import First
from tests.workforce.team import Texts
from tests.workforce.team import echo


def one(planner: Texts, *workers: Does, limits: Limits | None = None) -> Outcome:
    return Workforce(planner, First(), workers, limits).run(["why?"])[0]


@pytest.mark.parametrize("replans", [0, 1, 2])
@pytest.mark.parametrize("fails", [0, 1, 2, 3])
def test_attempts_are_one_more_than_failures_up_to_the_replans(fails: int, replans: int) -> None:
    """A worker that fails f times: min(f, K) + 1 attempts, and an answer exactly where f <= K."""
    left = [fails]

    def work(assignment: Assignment) -> Answer:
        left[0] -= 1
        return Answer("tired", failed=True) if left[0] >= 0 else Answer("done")

    outcome = one(Texts("1. try"), Does(work), limits=Limits(replans=replans))
    assert outcome.attempts == min(fails, replans) + 1
    assert outcome.answer == ("done" if fails <= replans else None)
    assert outcome.counts.get("failed", 0) == min(fails, replans + 1)


def test_failures_are_told_to_the_next_plan_and_the_attempt_starts_clean() -> None:
    """Step 1 is done again in the second attempt, with the second plan, and nothing of the first one is left."""
    done: list[Assignment] = []

    def work(assignment: Assignment) -> Answer:
        done.append(assignment)
        return Answer("the door is locked", failed=True) if assignment.text == "open #1" else echo(assignment)

    planner = Texts(
        "1. find door\n2. open #1 | after: 1\n3. enter | after: 2", "1. find window\n2. climb #1 | after: 1"
    )
    # With a second place, a step would start at once if a result of the first attempt were left.
    outcome = one(planner, Does(work, capacity=2))
    assert outcome.answer == "climb #1(1=find window())"
    assert outcome.failures == (("step 2 failed at does: the door is locked",), ())
    assert [(a.text, dict(a.results)) for a in done] == [
        ("find door", {}),
        ("open #1", {1: "find door()"}),
        ("find window", {}),
        ("climb #1", {1: "find window()"}),
    ]
    first, second = planner.asked
    assert "locked" not in first.prompt
    assert "- does: does what it is told" in first.prompt
    assert second.prompt.startswith(first.prompt + planner.texts[0])
    assert "1. does: find door()\n2. does failed: the door is locked\nAttempt 1 failed." in second.prompt
    # Nobody got step 3, which was waiting for the one that failed.
    assert [claim[1].step for claim in outcome.claimed] == [1, 2, 1, 2]


def test_what_waits_for_a_place_is_withdrawn_when_the_attempt_fails() -> None:
    """Two steps of one worker with one place: the first fails, the second is never begun in this attempt."""
    begun: list[str] = []

    def work(assignment: Assignment) -> Answer:
        begun.append(assignment.text)
        return Answer("no", failed=assignment.text == "bad")

    outcome = one(Texts("1. bad\n2. other", "1. good"), Does(work))
    assert (outcome.answer, begun) == ("no", ["bad", "good"])


@st.composite
def works(draw: st.DrawFn) -> tuple[list[Plan], dict[str, int], int]:
    """Plans for several tasks, capacities of three workers, a seed."""
    tasks = []
    for _ in range(draw(st.integers(1, 3))):
        steps = []
        for number in range(1, draw(st.integers(1, 5)) + 1):
            after = draw(st.sets(st.sampled_from(range(1, number)))) if number > 1 else set()
            steps.append(Step(f"s{number}", tuple(sorted(after)), draw(st.sampled_from("abc"))))
        tasks.append(Plan(tuple(steps)))
    return tasks, {name: draw(st.integers(1, 3)) for name in "abc"}, draw(st.integers(0, 9))


class Known:
    """Knows the plan of each question."""

    def __init__(self, plans: dict[str, Plan]) -> None:
        self.plans = plans

    def plan(self, requests: Sequence[PlanRequest]) -> list[Said]:
        return [Said(render_plan(self.plans[request.question])) for request in requests]

    def synthesise(self, requests: Sequence[AnswerRequest]) -> list[Said | None]:
        return [Said(f" {request.results!r} ") for request in requests]


@settings(max_examples=40, deadline=None)
@given(works())
def test_every_step_is_claimed_once_after_those_before_it_and_none_is_lost(
    work: tuple[list[Plan], dict[str, int], int],
) -> None:
    plans, capacities, seed = work
    questions = {f"task {number}": plan for number, plan in enumerate(plans)}
    workers = [Does(echo, name=name, capacity=capacity) for name, capacity in capacities.items()]
    room = Workforce(Known(questions), First(), workers)
    outcomes = room.run([*questions], seed=seed)
    claims = sorted(claim for outcome in outcomes for claim in outcome.claimed)
    assert [place for place, *_ in claims] == [*range(sum(len(plan.steps) for plan in plans))]
    assert len({number for _, number, _ in claims}) == len(claims)
    for task, plan in enumerate(plans):
        results: dict[int, str] = {}
        for number, step in enumerate(plan.steps, start=1):
            results[number] = echo(Assignment("", step.text, {other: results[other] for other in step.after})).text
        assert outcomes[task].answer is not None
        assert ast.literal_eval(outcomes[task].answer) == results
        places = {number.step: place for place, number, _ in claims if number.task == task}
        assert all(places[other] < places[number] for number in places for other in plan.step(number).after)
    assert all(worker.most <= capacities[worker.card.name] for worker in workers)
    assert room.run([*questions], seed=seed) == outcomes


def test_tasks_and_steps_run_side_by_side_up_to_the_capacity() -> None:
    """Two places, two tasks: the calls meet each other, which they could not one after the other."""
    meeting = threading.Barrier(2, timeout=10)

    def work(assignment: Assignment) -> Answer:
        meeting.wait()
        return Answer(assignment.question)

    worker = Does(work, capacity=2)
    outcomes = Workforce(Texts("1. meet"), First(), [worker]).run(["left", "right"])
    assert [outcome.answer for outcome in outcomes] == ["left", "right"]
    assert worker.most == 2


def test_the_seed_decides_whose_turn_it_is_and_nothing_else() -> None:
    questions = [f"task {number}" for number in range(6)]

    def order(seed: int) -> list[int]:
        # The later a task comes, the faster it is.
        def work(assignment: Assignment) -> Answer:
            time.sleep(0.002 * (6 - int(assignment.question.split()[1])))
            return echo(assignment)

        outcomes = Workforce(Texts("1. go"), First(), [Does(work, capacity=3)]).run(questions, seed=seed)
        return [number.task for _, number, _ in sorted(claim for outcome in outcomes for claim in outcome.claimed)]

    assert order(0) == order(0)
    assert sorted(order(0)) == sorted(order(1)) == [*range(6)]
    assert order(0) != order(1)


def test_plans_that_are_none_cost_an_attempt_and_their_sentence_is_told() -> None:
    planner = Texts("", "1. a | after: 2\n2. b | after: 1", "1. fine")
    outcome = one(planner, Does(echo))
    assert outcome.answer == "fine()"
    assert outcome.counts == {"refused": 2}
    assert "the plan is empty" in outcome.failures[0][0]
    assert "in a circle" in outcome.failures[1][0]
    assert "Refused: the plan is empty; it must have at least one step.\nAttempt 1 failed." in planner.asked[1].prompt


def test_a_worker_that_the_coordinator_made_up_is_named_with_the_nearest() -> None:
    outcome = one(Texts("1. a | worker: doess"), Does(echo), limits=Limits(replans=0))
    assert outcome.answer is None
    assert outcome.failures == (
        ("step 1 is assigned to 'doess'; the workers are does. Did the coordinator mean 'does'?",),
    )


def test_a_worker_that_raises_or_exits_or_returns_something_else_has_failed() -> None:
    def work(assignment: Assignment) -> Answer:
        if assignment.text == "raise":
            raise KeyError("lost\nkey")
        if assignment.text == "exit":
            raise SystemExit
        return "a text" if assignment.text == "text" else Answer("ok")  # pyright: ignore[reportReturnType]

    outcome = one(Texts("1. raise", "1. exit", "1. text"), Does(work))
    assert [sentences[0] for sentences in outcome.failures] == [
        "step 1 failed at does: does raised KeyError: 'lost\\nkey'",
        "step 1 failed at does: does raised SystemExit:",
        "step 1 failed at does: does raised TypeError: it returned str, and must return an Answer with a text",
    ]
    assert outcome.counts == {"failed": 3, "raised": 3}


def test_a_worker_that_computes_for_ever_is_stopped_and_the_others_go_on() -> None:
    def work(assignment: Assignment) -> Answer:
        while assignment.question == "hang":
            pass
        return Answer("ok")

    room = Workforce(Texts("1. go"), First(), [Does(work, capacity=2)], Limits(replans=0, seconds=0.2))
    hung, fine = room.run(["hang", "go"])
    assert (hung.answer, fine.answer) == (None, "ok")
    assert hung.failures == (("step 1 failed at does: no answer within 0.2 s",),)
    assert hung.counts == {"failed": 1, "late": 1}
    assert room.free("does") == 2


def test_a_worker_that_cannot_be_stopped_keeps_its_place_and_tasks_do_not_wait_for_it() -> None:
    """The only place is held: the next task fails at once, and is served again when the call returns."""
    release = threading.Event()

    def work(assignment: Assignment) -> Answer:
        if assignment.question == "hang":
            release.wait()
        return Answer("ok")

    room = Workforce(Texts("1. go"), First(), [Does(work)], Limits(replans=0, seconds=0.1))
    assert room.run(["hang"])[0].counts == {"failed": 1, "late": 1}
    assert room.free("does") == 0
    waited = room.run(["go"])[0]
    assert waited.failures == (("step 1 failed at does: all its places are held by calls that never returned",),)
    release.set()
    while not room.free("does"):
        time.sleep(0.001)
    assert room.run(["go"])[0].answer == "ok"


def test_a_result_that_is_too_long_has_failed_and_the_planner_reads_why() -> None:
    """The beginning of "100, 250" is "100, 2", which is another result."""
    planner, limits = Texts("1. go"), Limits(longest=6, replans=1)
    outcome = one(planner, Does(lambda _: Answer("100, 250")), limits=limits)
    assert (outcome.answer, outcome.counts) == (None, {"long": 2, "failed": 2})
    assert "1. does failed: the result has 8 characters, and at most 6 are taken;" in planner.asked[1].prompt
    # Of a reason the beginning is a reason still.
    reason = one(Texts("1. go"), Does(lambda _: Answer("because", failed=True)), limits=limits)
    assert reason.failures == (("step 1 failed at does: becaus",),) * 2
    assert one(Texts("1. go"), Does(lambda _: Answer("100, 2")), limits=limits).answer == "100, 2"


def test_half_a_surrogate_pair_becomes_a_question_mark() -> None:
    """Names of files that are no UTF-8 hold such halves, and no tokenizer takes them."""
    outcome = one(Texts("1. go"), Does(lambda _: Answer("a\udce9b")))
    assert outcome.answer == "a?b"
    assert "1. does: a?b\n" in [turn.said.text for turn in outcome.turns]


def test_a_room_takes_one_call_at_a_time() -> None:
    said: list[str] = []

    def work(assignment: Assignment) -> Answer:
        try:
            room.run(["inside"])
        except RuntimeError as error:
            said.append(str(error))
        return Answer("ok")

    room = Workforce(Texts("1. go"), First(), [Does(work)])
    assert room.run(["outside"])[0].answer == "ok"
    assert said == ["this room is at work already; it takes one call at a time: make a second room."]
    # The next call is taken.
    assert room.run(["outside"])[0].answer == "ok"


def test_a_room_that_cannot_be_is_refused() -> None:
    with pytest.raises(ValueError, match=r"workers are \[\]; expected at least one"):
        Workforce(Texts(""), First(), [])
    with pytest.raises(ValueError, match="each with its name"):
        Workforce(Texts(""), First(), [Does(echo), Does(echo)])
    with pytest.raises(ValueError, match="name is 'planner'"):
        Card("planner", "")
    with pytest.raises(ValueError, match="capacity of a is 0"):
        Card("a", "", 0)
    with pytest.raises(ValueError, match="replans is -1"):
        Limits(replans=-1)
    with pytest.raises(ValueError, match="seconds is 0"):
        Limits(seconds=0)
    with pytest.raises(ValueError, match="longest is 0"):
        Limits(longest=0)
    with pytest.raises(ValueError, match="a question is ' '; it must have text"):
        Workforce(Texts(""), First(), [Does(echo)]).run([" "])


class Few(Known):
    """A planner that answers fewer requests than it was given."""

    def plan(self, requests: Sequence[PlanRequest]) -> list[Said]:
        return []


def test_a_planner_that_leaves_requests_out_is_a_mistake() -> None:
    with pytest.raises(ValueError, match="the planner gave 0 texts for 1; it must give one for each"):
        Workforce(Few({}), First(), [Does(echo)]).run(["why?"])


class Bare(Texts):
    """A planner whose final answers are texts alone."""

    def synthesise(self, requests: Sequence[AnswerRequest]) -> list[str]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return ["42"] * len(requests)


def test_a_final_answer_that_is_a_text_alone_is_a_mistake() -> None:
    with pytest.raises(ValueError, match="the planner answered with a str; it must be a Said or None"):
        Workforce(Bare("1. go"), First(), [Does(echo)]).run(["why?"])  # pyright: ignore[reportArgumentType]
