"""Records as rows of tokens: the learners' texts are marked, everybody else's are context."""

import numpy as np
import pytest

from jaxrl_llm.models.tokenizers import ByteTokenizer
from jaxrl_llm.trajectory import check_trajectory
from jaxrl_llm.trajectory_texts import text_stretches
from jaxrl_llm.workforce import Answer
from jaxrl_llm.workforce import Outcome
from jaxrl_llm.workforce import Said
from jaxrl_llm.workforce import Turn
from jaxrl_llm.workforce import Workforce
from jaxrl_llm.workforce import actor_names
from jaxrl_llm.workforce import encode_turns
from jaxrl_llm.workforce import records_to_trajectories
from tests.workforce.team import Does
from tests.workforce.team import First
from tests.workforce.team import Texts

TOKENIZER = ByteTokenizer()
PLANS = ("1. fail", "1. work")
CARDS = (Does(lambda _: Answer("")).card,)
WIDTH = 800


def outcome(*plans: str) -> Outcome:
    worker = Does(lambda assignment: Answer("done" if assignment.text == "work" else "no", assignment.text == "fail"))
    return Workforce(Texts(*plans), First(), [worker]).run(["why?"])[0]


def test_a_record_becomes_a_row_whose_plans_are_chosen_and_whose_rest_is_context() -> None:
    short, long = outcome("1. work"), outcome(*PLANS)
    rows = records_to_trajectories(
        [short.turns, long.turns], TOKENIZER, cards=CARDS, rewards=[1.0, 0.5], group_ids=[7, 7], width=WIDTH, version=3
    )
    check_trajectory(rows, vocab_size=TOKENIZER.vocab_size)
    texts = text_stretches(rows, lambda ids: TOKENIZER.decode(ids))
    assert [part["role"] for part in texts[1]] == ["given", "chosen", "given", "chosen"]
    assert [part["text"] for part in texts[1] if part["role"] == "chosen"] == [*PLANS]
    given = texts[1][2]["text"]
    assert given == "\nAssigned: 1 does.\n1. does failed: no\nAttempt 1 failed. Write another plan.\nPlan:\n"
    assert [part["text"] for part in texts[0] if part["role"] == "chosen"] == ["1. work"]
    # Each plan ends with the end token, which is learned, and stands in its own step; the planner is actor 0.
    chosen = np.flatnonzero(rows.action_mask[1])
    lengths = [len(plan) + 1 for plan in PLANS]
    assert rows.step_ids[1, chosen].tolist() == [0] * lengths[0] + [1] * lengths[1]
    assert set(rows.actor_ids[1, chosen].tolist()) == {0}
    assert rows.tokens[1, chosen[-1]] == rows.tokens[1, chosen[lengths[0] - 1]] == TOKENIZER.eos_id
    np.testing.assert_array_equal(rows.returns, np.float32([1.0, 0.5]))
    assert rows.rewards[1, chosen[-1]] == 0.5
    assert rows.ended.all()
    assert rows.log_prob_behaviour is None
    assert set(rows.versions[rows.action_mask].tolist()) == {3}


def test_tokens_and_log_probs_are_those_of_the_sampler() -> None:
    """Tokens that the text would not be encoded to are kept as they are."""
    turns = (
        Turn("user", Said("ab")),
        Turn("planner", Said("x", (9, 8), (-0.5, -0.25)), acted=True),
        Turn("does", Said("cd")),
        Turn("planner", Said("y", (7,), (-1.0,)), acted=True),
    )
    rows = records_to_trajectories([turns], TOKENIZER, cards=CARDS, rewards=[1.0], group_ids=[0], width=8)
    check_trajectory(rows)
    assert rows.tokens[0].tolist() == [*b"ab", 9, 8, *b"cd", 7, TOKENIZER.pad_id]
    assert rows.log_prob_behaviour is not None
    assert rows.log_prob_behaviour[0].tolist() == [0, 0, -0.5, -0.25, 0, 0, -1.0, 0]
    assert rows.step_ids[0].tolist() == [-1, -1, 0, 0, -1, -1, 1, -1]


def test_actors_keep_their_numbers_whoever_learns() -> None:
    turns = (
        Turn("user", Said("a")),
        Turn("planner", Said("p"), acted=True),
        Turn("does", Said("w", (5,)), acted=True),
    )
    assert actor_names(CARDS) == ("planner", "coordinator", "does")
    both = encode_turns(turns, TOKENIZER, actors=actor_names(CARDS), learners=("planner", "does"))
    assert both.actors == [-1, 0, 0, 2]
    assert both.steps == [-1, 0, 0, 1]
    worker = encode_turns(turns, TOKENIZER, actors=actor_names(CARDS), learners=("does",))
    assert worker.actors == [-1, -1, -1, 2]
    assert worker.tokens == both.tokens
    # What nobody who learns wrote after the last chosen token is left out.
    assert len(encode_turns(turns, TOKENIZER, actors=actor_names(CARDS)).tokens) == 3


def test_a_record_that_is_too_long_keeps_its_beginning_and_has_not_ended() -> None:
    long = outcome(*PLANS)
    whole = encode_turns(long.turns, TOKENIZER, actors=actor_names(CARDS))
    first = len(long.turns[0].said.text) + len(PLANS[0]) + 1
    rows = records_to_trajectories(
        [long.turns] * 2, TOKENIZER, cards=CARDS, rewards=[1.0, 1.0], group_ids=[0, 0], width=len(whole.tokens) - 20
    )
    check_trajectory(rows)
    assert rows.token_mask.sum(axis=1).tolist() == [first, first]
    assert not rows.ended.any()
    assert rows.rewards[0, first - 1] == 1.0


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"width": 20}, r"record 0 has no chosen token among its first 20 \(width\)"),
        ({"learners": ("boss",)}, "learners name 'boss'; the actors are planner, coordinator, does"),
        ({"rewards": []}, "rewards has 0 entries for 1 records"),
        ({"group_ids": [1, 2]}, "group_ids has 2 entries for 1 records"),
        (
            {"records": [(Turn("planner", Said("x", (1,), (0.0, 0.0)), acted=True),)]},
            "a text of 1 tokens with 2 log-probs",
        ),
    ],
)
def test_what_cannot_be_a_row_is_refused_in_a_sentence(change: dict, sentence: str) -> None:
    given = {"records": [outcome("1. work").turns], "rewards": [1.0], "group_ids": [0], "width": WIDTH, **change}
    with pytest.raises(ValueError, match=sentence):
        records_to_trajectories(given.pop("records"), TOKENIZER, cards=CARDS, **given)
