"""Facts are found by their titles."""

from jaxrl_llm.workforce import Answer
from jaxrl_llm.workforce import Assignment
from jaxrl_llm.workforce import FactsWorker
from jaxrl_llm.workforce import fictional_base
from jaxrl_llm.workforce.facts import Fact
from jaxrl_llm.workforce.facts import FactBase
from jaxrl_llm.workforce.facts import Relation


def test_a_title_that_is_part_of_another_is_not_mistaken_for_it() -> None:
    facts = tuple(
        Fact("capital", country, capital)
        for country, capital in (
            ("Guinea", "Conakry"), ("Guinea-Bissau", "Bissau"), ("Equatorial Guinea", "Malabo"), ("Åland", "Mariehamn"),
        )
    )  # fmt: skip
    worker = FactsWorker(FactBase("small", (Relation("capital", "island", "city"),), facts, {}, {}))
    assert worker.card.description == "looks up one fact by its title: capital of an island"
    for fact in facts:
        assert worker.work(Assignment("", "the capital of #1", {1: fact.subject})) == Answer(fact.value)
    missing = worker.work(Assignment("", "capital of Peru"))
    assert missing.failed
    assert missing.text.startswith("no fact has the title 'capital of Peru'; the nearest are: capital of Guinea; ")
    assert worker.work(Assignment("", "sing")).text.endswith("the nearest are: none")


def test_a_title_that_is_a_part_of_the_step_is_no_answer_to_it() -> None:
    facts = (
        Fact("capital", "Guinea", "Conakry"), Fact("capital", "France", "Paris"), Fact("capital", "Ærø", "Marstal"),
        Fact("country of the airport", "THE", "Brazil"), Fact("country of the airport", "CDG", "France"),
    )  # fmt: skip
    relations = (Relation("capital", "country", "city"), Relation("country of the airport", "airport", "country"))
    worker = FactsWorker(FactBase("small", relations, facts, {}, {}))
    for step in (
        "capital of Equatorial Guinea", "mayor of the capital of France", "country of the airport of XYZ", "capital of",
        "country of the airport of", "France", "capital of France and Guinea", "capital of R", "",
    ):  # fmt: skip
        assert worker.work(Assignment("", step)).failed, step
    for step, value in {
        "The capital of FRANCE": "Paris", "a capital of the Guinea": "Conakry", "capital of ærø": "Marstal",
        "country of the airport of THE": "Brazil", "the country of airport of cdg": "France",
    }.items():  # fmt: skip
        assert worker.work(Assignment("", step)) == Answer(value), step


def test_every_fact_of_a_world_is_found() -> None:
    base = fictional_base(1)
    worker = FactsWorker(base)
    for fact in base.facts:
        assert worker.work(Assignment("", base.title(fact))) == Answer(fact.value)
