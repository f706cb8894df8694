"""The grammar of plans."""

import re

import pytest
from hypothesis import given
from hypothesis import settings
from hypothesis import strategies as st

from jaxrl_llm.workforce import Assignment
from jaxrl_llm.workforce import Plan
from jaxrl_llm.workforce import PlanError
from jaxrl_llm.workforce import Step
from jaxrl_llm.workforce import check_plan
from jaxrl_llm.workforce import parse_plan
from jaxrl_llm.workforce import render_plan
from jaxrl_llm.workforce.plans import MOST_STEPS
from jaxrl_llm.workforce.workers.wording import filled
from jaxrl_llm.workforce.workers.wording import named

# Any text, and pieces of the grammar, which are what could be mistaken for it.
PIECES = st.sampled_from(["| after: 1", " |", "after: 2", "worker: x", "1. ", "|", "a", "#", "\r", "\u2028", "'", " "])
TEXTS = (st.text() | st.lists(PIECES).map("".join)).map(str.strip)


@st.composite
def plans(draw: st.DrawFn) -> Plan:
    """Plans that can be carried out: each step comes after some of a random order's earlier ones."""
    count = draw(st.integers(1, 6))
    order = draw(st.permutations(range(1, count + 1)))
    steps = {}
    for place, number in enumerate(order):
        after = draw(st.sets(st.sampled_from(order[:place]))) if place else set()
        text = draw(TEXTS)
        if not text or "\n" in text or " | " in f"{text} " or re.search(r"#\d", text):
            text = "x"
        uses = "".join(f" and #{other}" for other in sorted(after) if draw(st.booleans()))
        worker = draw(st.sampled_from([None, "files", "a|b", "#1", "worker:", "after:"]))
        steps[number] = Step(f"{text}{uses}", tuple(sorted(after)), worker)
    return Plan(tuple(steps[number] for number in sorted(steps)))


@settings(max_examples=100, deadline=None)
@given(plans())
def test_a_plan_that_is_written_and_read_is_the_same(plan: Plan) -> None:
    assert parse_plan(render_plan(plan)) == plan


@settings(max_examples=100, deadline=None)
@given(st.text() | st.lists(PIECES | st.just("\n")).map("".join))
def test_any_text_is_a_plan_or_a_sentence(text: str) -> None:
    try:
        plan = parse_plan(text)
    except PlanError:
        return  # and no other error
    assert parse_plan(render_plan(plan)) == plan


def test_blanks_around_lines_do_not_count() -> None:
    text = "\n  1. capital of France \n\n2. numbers in #1.txt | worker: files | after: 1\n"
    expected = Plan((Step("capital of France"), Step("numbers in #1.txt", (1,), "files")))
    assert parse_plan(text) == expected


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("", "plan is empty"),
        ("  \n \n", "plan is empty"),
        ("find the capital", "'find the capital' is no step"),
        ("1. a\n3. b", "number 3; it must be 2"),
        ("01. a", "number 01; it must be 1"),
        ("1. a | after: 2", "step 1 comes after step 2, and the plan has 1"),
        ("1. a | after: 1", "in a circle: 1 after 1"),
        ("1. a | after: 2\n2. b | after: 1", "in a circle: "),
        ("1. a\n2. b | after: 1, 1", r"step 2 comes after \(1, 1\)"),
        ("1. a\n2. use #1", "step 2 uses #1 and does not come after step 1"),
        ("1. a\n2. b | after: 1 | after: 1", "text 'b | after: 1'"),
        ("1. a | after: 99999999999999999999", "more than 9 digits"),
        ("1. a\n2. use #000000001", "step 2 uses #1 and"),
        ("\n".join(f"{n}. a" for n in range(1, MOST_STEPS + 2)), f"more than {MOST_STEPS} steps"),
    ],
)
def test_what_is_no_plan_is_refused_in_a_sentence(text: str, sentence: str) -> None:
    with pytest.raises(PlanError, match=sentence):
        parse_plan(text)


def test_a_number_of_thousands_of_digits_is_no_reference() -> None:
    """Python reads none of more than 4300 digits, and says so in another error than the room expects."""
    text = "look #" + "1" * 5000
    plan = parse_plan(f"1. {text}")
    assert plan == Plan((Step(text),))
    assert filled(Assignment("", text, {1: "x"})) == text
    assert named(Assignment("", text, {1: "x"}), "r{}") == (text, {})


@pytest.mark.parametrize("step", [Step(""), Step(" a"), Step("a\nb"), Step("a | b"), Step("a", worker="two words")])
def test_what_cannot_be_written_is_refused(step: Step) -> None:
    with pytest.raises(PlanError, match="step 1"):
        check_plan(Plan((step,)))
