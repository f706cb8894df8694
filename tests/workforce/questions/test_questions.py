"""Questions with exact answers: what is held out, and that an oracle's plans solve every one of them."""

import collections

import pytest

from jaxrl_llm.environments import Score
from jaxrl_llm.environments import check_task
from jaxrl_llm.workforce import ArithmeticWorker
from jaxrl_llm.workforce import FactBase
from jaxrl_llm.workforce import FactsWorker
from jaxrl_llm.workforce import FilesWorker
from jaxrl_llm.workforce import Limits
from jaxrl_llm.workforce import Question
from jaxrl_llm.workforce import Questions
from jaxrl_llm.workforce import ScriptedPlanner
from jaxrl_llm.workforce import TablesWorker
from jaxrl_llm.workforce import WordCoordinator
from jaxrl_llm.workforce import Workforce
from jaxrl_llm.workforce import fictional_base
from jaxrl_llm.workforce.facts import write_base


@pytest.fixture(scope="module")
def base() -> FactBase:
    return fictional_base(0, size=6)


@pytest.fixture(scope="module")
def questions(base: FactBase) -> tuple[Question, ...]:
    return Questions(base).all()


def test_the_scripted_team_solves_every_question_with_the_oracles_plan(
    base: FactBase, questions: tuple[Question, ...], tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Answers come from the base; here they come from searches, SQL, files and arithmetic."""
    folder = tmp_path_factory.mktemp("oracle") / "world"
    write_base(base, folder)
    workers = [FactsWorker(base), TablesWorker(folder / "tables"), FilesWorker(folder / "files"), ArithmeticWorker()]
    planner = ScriptedPlanner({question.text: question.plan for question in questions})
    room = Workforce(planner, WordCoordinator(), workers, Limits(replans=0))
    for start in range(0, len(questions), 64):
        some = questions[start : start + 64]
        for question, outcome in zip(some, room.run([one.text for one in some]), strict=True):
            assert outcome.answer == question.answer, (question.text, outcome.failures)
            used = {name for _, _, name in outcome.claimed}
            assert used == question.capabilities


def test_it_is_a_task_that_keeps_the_rules(base: FactBase) -> None:
    task = Questions(base, held_out_count=90)
    check_task(task)
    levels = collections.Counter(problem.metadata["question"].level for problem in task.held_out())
    assert levels == {1: 30, 2: 30, 3: 30}
    assert {problem.metadata["question"].level for problem in task.train(0, 0, 32)} == {1, 2, 3}
    assert task.train(0, 0, 8) != task.train(0, 1, 8)
    assert task.train(0, 0, 8) != task.train(1, 0, 8)


def test_entities_and_hops_are_held_out_each_by_its_hash(base: FactBase, questions: tuple[Question, ...]) -> None:
    task = Questions(base)
    trained = [question for question in questions if not question.held_out_by]
    measured = [question for question in questions if question.held_out_by]
    reasons = collections.Counter(question.held_out_by for question in questions)
    assert set(reasons) == {(), ("entity",), ("hops",), ("entity", "hops")}
    assert not {q.hops for q in trained} & {q.hops for q in measured if "hops" in q.held_out_by}
    assert not {q.start for q in trained} & {q.start for q in measured if "entity" in q.held_out_by}
    for problem in task.train(0, 0, 64):
        assert problem.metadata["question"].held_out_by == ()
    # Of another world: its names differ, so who is held out differs, and which hops are does not.
    other = Questions(fictional_base(1, size=6)).all()
    assert {q.hops for q in other if "hops" in q.held_out_by} == {q.hops for q in questions if "hops" in q.held_out_by}


def test_levels_are_numbers_of_capabilities(base: FactBase, questions: tuple[Question, ...]) -> None:
    kinds = {tuple(sorted(question.capabilities)) for question in questions}
    assert {("facts",), ("tables",), ("files",), ("code",), ("facts", "tables"), ("code", "files")} < kinds
    assert ("code", "facts", "files", "tables") in kinds
    only = Questions(base, levels=(2,))
    assert {len(question.capabilities) for question in only.all()} == {2}
    assert max(len(question.hops) for question in Questions(base, hops=1).all()) == 2


def test_an_answer_is_right_or_worth_nothing(base: FactBase) -> None:
    task = Questions(base)
    listed = next(q.problem for q in task.all() if "," in q.answer)
    number = next(q.problem for q in task.all() if q.capabilities == {"code"})
    assert task.score(listed, listed.answer + "\nmore").reward == 1
    assert task.score(listed, listed.answer.rsplit(", ", 1)[1]).reward == 0
    assert task.score(number, f"{number.answer}.0").reward == 1
    assert task.score(number, str(int(number.answer) + 1)).reward == 0
    assert task.score(number, "").reward == 0
    # A list that ends in the right number is no number, and hedging earns nothing.
    assert task.score(number, f"1, 2, {number.answer}") == Score(0.0, lenient=False, strict=False)
    assert task.score(number, f"maybe {number.answer}").reward == 0
    assert task.score(listed, listed.answer.replace(", ", ",")).reward == 0


def test_what_no_question_needs_is_refused(base: FactBase) -> None:
    with pytest.raises(ValueError, match=r"levels is \(4,\); it must be some of 1, 2 and 3"):
        Questions(base, levels=(4,))
    bare = FactBase("bare", base.relations, base.facts, {}, {})
    with pytest.raises(ValueError, match="bare has no question to train on that needs 2 capabilities"):
        Questions(bare, levels=(1, 2))
    # With a level twice, half of what is held out would be there twice.
    with pytest.raises(ValueError, match=r"levels is \(1, 1\); it must be some of 1, 2 and 3, each of them once"):
        Questions(base, levels=(1, 1))
