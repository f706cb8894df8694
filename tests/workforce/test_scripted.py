"""Planner and coordinator without a model, and the planner as a policy."""

from collections.abc import Sequence

import pytest

from jaxrl_llm.models.tokenizers import ByteTokenizer
from jaxrl_llm.workforce import AssignmentError
from jaxrl_llm.workforce import Card
from jaxrl_llm.workforce import Plan
from jaxrl_llm.workforce import PolicyPlanner
from jaxrl_llm.workforce import Said
from jaxrl_llm.workforce import ScriptedPlanner
from jaxrl_llm.workforce import Step
from jaxrl_llm.workforce import Turn
from jaxrl_llm.workforce import WordCoordinator
from jaxrl_llm.workforce import Workforce
from jaxrl_llm.workforce import encode_prompt
from jaxrl_llm.workforce import encode_turns
from jaxrl_llm.workforce.search import Index
from jaxrl_llm.workforce.search import words
from tests.workforce.team import Does
from tests.workforce.team import echo

TOKENIZER = ByteTokenizer()
CARDS = (
    Card("maps", "finds capitals and borders of countries"),
    Card("sums", "computes sums and products of numbers"),
    Card("library", "reads files, and numbers in files"),
)


def test_a_step_goes_to_the_worker_with_its_words() -> None:
    steps = (
        Step("capitals of France"),
        Step("numbers in a.txt files"),
        Step("products of #1", (1,)),
        Step("go, maps!"),
    )
    assert WordCoordinator().assign("", Plan(steps), CARDS) == ["maps", "library", "sums", "maps"]
    # Names may be given to others: what counts is what is on the cards.
    swapped = (Card("b", CARDS[2].description), Card("a", CARDS[0].description), Card("c", CARDS[1].description))
    assert WordCoordinator().assign("", Plan(steps[:3]), swapped) == ["a", "b", "c"]


def test_the_worker_that_a_plan_names_is_taken() -> None:
    assert WordCoordinator().assign("", Plan((Step("capitals", worker="sums"),)), CARDS) == ["sums"]


def test_a_step_without_a_known_word_is_refused() -> None:
    with pytest.raises(AssignmentError, match="step 1, 'sing', has no word of any worker's description"):
        WordCoordinator().assign("", Plan((Step("sing"),)), CARDS)


def test_a_question_without_a_plan_is_a_mistake() -> None:
    with pytest.raises(ValueError, match="no plan is known of the question 'why"):
        Workforce(ScriptedPlanner({}), WordCoordinator(), [Does(echo)]).run(["why?"])


def test_a_policy_reads_the_record_and_writes_plans_and_answers() -> None:
    """The plan is wrong at first; what it reads then is all that was said, and what it writes is in the record."""
    read: list[str] = []

    def policy(prompt: Sequence[int]) -> str | Said:
        read.append(TOKENIZER.decode(prompt))
        return "no plan" if "Refused" not in read[-1] else Said("1. does it", (1, 2), (-0.1, -0.2))

    def answers(prompt: Sequence[int]) -> str:
        return f" {TOKENIZER.decode(prompt).split('does: ')[-1].splitlines()[0]}! "

    planner = PolicyPlanner(policy, TOKENIZER, answers=answers)
    outcome = Workforce(planner, WordCoordinator(), [Does(echo)]).run(["why?"])[0]
    assert outcome.answer == "does it()!"
    assert read[0].startswith("Question: why?\nWorkers:\n- does: does what it is told\n")
    assert read[1].startswith(read[0] + "no plan\nRefused: the line 'no plan' is no step")
    wrote = [turn.said for turn in outcome.turns if turn.actor == "planner"]
    assert wrote == [Said("no plan"), Said("1. does it", (1, 2), (-0.1, -0.2)), Said(" does it()! ", frozen=True)]
    plain = Workforce(PolicyPlanner(lambda _: "1. does it", TOKENIZER), WordCoordinator(), [Does(echo)]).run(["why?"])
    assert plain[0].answer == "does it()"


class Writes:
    """Writes a wrong plan, a right one and an answer, and keeps the tokens that it read."""

    def __init__(self) -> None:
        self.read: list[list[int]] = []

    def write(self, prompt: Sequence[int]) -> str:
        self.read.append([*prompt])
        return ("no plan", "1. does it", "42")[len(self.read) - 1]


def test_a_policy_has_read_the_tokens_that_stand_before_what_it_wrote_in_the_row() -> None:
    """In every attempt, the end tokens of earlier plans included: else its log-probs belong to another context."""
    policy = Writes()
    planner = PolicyPlanner(policy.write, TOKENIZER, answers=policy.write)
    (outcome,) = Workforce(planner, WordCoordinator(), [Does(echo)]).run(["why?"])
    row = encode_turns(outcome.turns, TOKENIZER, actors=("planner", "coordinator", "does"))
    starts = [row.steps.index(step) for step in range(3)]
    assert policy.read == [row.tokens[:start] for start in starts]
    assert policy.read[2].count(TOKENIZER.eos_id) == 2
    # Of a record in which nobody has chosen anything there is a prompt as well.
    assert encode_prompt((Turn("user", Said("abc")),), TOKENIZER) == [*b"abc"]


def test_what_another_policy_answered_is_not_learned_as_the_planners() -> None:
    def texts(planner: PolicyPlanner) -> list[str]:
        (outcome,) = Workforce(planner, WordCoordinator(), [Does(echo)]).run(["why?"])
        assert outcome.answer == "42"
        row = encode_turns(outcome.turns, TOKENIZER, actors=("planner", "coordinator", "does"))
        chosen = [[t for t, at in zip(row.tokens, row.steps, strict=True) if at == step] for step in range(3)]
        return [TOKENIZER.decode(ids) for ids in chosen]

    own, other = Writes(), Writes()
    assert texts(PolicyPlanner(own.write, TOKENIZER, answers=own.write)) == ["no plan", "1. does it", "42"]
    frozen = PolicyPlanner(other.write, TOKENIZER, answers=lambda _: "42")
    assert texts(frozen) == ["no plan", "1. does it", ""]


def test_search_finds_words_whatever_their_accents_and_breaks_ties_by_order() -> None:
    index = Index(["capital of Åland", "capital of Peru", "capital of Peru", "river"])
    assert words("Åländ's 2nd") == ("aland", "s", "2nd")
    assert index.search("CAPITAL aland")[0] == 0
    assert index.search("peru") == (1, 2)
    assert index.search("peru", most=1) == (1,)
    assert index.search("sea") == ()
    # Common words rank titles, and bring none in unless there is no other word.
    many = Index([f"capital of c{number}" for number in range(300)])
    assert many.search("the capital of c7") == (7,)
    assert many.search("capital of nowhere") == tuple(range(10))
    with pytest.raises(ValueError, match="at least one must have a word"):
        Index(["!"])
