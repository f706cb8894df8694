"""Pairs: which row is the liked one, what is dropped and counted, and sentences before anything is computed."""

import json

import numpy as np
import pytest

from jaxrl_llm.models.chat import CHATML
from jaxrl_llm.models.chat import SMOLLM2
from jaxrl_llm.rollouts.collect.preferences import PreferenceCollector
from jaxrl_llm.trajectory import check_trajectory


def said_by(role: str, text: str) -> dict:
    return {"role": role, "content": text}


PAIRS = [{"prompt": f"Say {number}.", "chosen": f"{number}", "rejected": f"no {number}"} for number in range(7)]
ANSWERS = [{name: [said_by("assistant", pair[name])] for name in ("chosen", "rejected")} for pair in PAIRS]
ASKED = [[said_by("user", pair["prompt"])] for pair in PAIRS]
AS_MESSAGES = [{"prompt": asked, **answers} for asked, answers in zip(ASKED, ANSWERS, strict=True)]
WITH_PROMPT = [
    {"prompt": asked[0]["content"], **{name: asked + answer for name, answer in answers.items()}}
    for asked, answers in zip(ASKED, ANSWERS, strict=True)
]


def collector(path, tokenizer, **settings) -> PreferenceCollector:
    return PreferenceCollector(path, tokenizer, **{"pairs": 3, "width": 80, "chat_format": CHATML, **settings})


@pytest.mark.parametrize("form", [PAIRS, AS_MESSAGES, WITH_PROMPT])
def test_a_pair_is_two_rows_of_one_group_the_liked_one_first(form, lines, letters) -> None:
    made = collector(lines(*form), letters, samples=1)
    batch = made.collect(None, None, 0, {})
    check_trajectory(batch.trajectories, vocab_size=letters.vocab_size)
    assert (made.shape.rows, made.shape.group_size, made.shape.groups) == (6, 2, 3)
    assert made.shape.prompt_length is None
    np.testing.assert_array_equal(batch.trajectories.group_ids, [0, 0, 1, 1, 2, 2])
    np.testing.assert_array_equal(batch.trajectories.returns, [1, 0, 1, 0, 1, 0])
    assert batch.trajectories.log_prob_behaviour is None
    for chosen, rejected in zip(batch.texts[::2], batch.texts[1::2], strict=True):
        assert rejected == f"no {chosen}"
    assert batch.samples[0]["chosen"] == batch.texts[0]
    assert batch.samples[0]["rejected"] == batch.texts[1]
    json.dumps([batch.samples, batch.metrics, batch.cursor])


def test_the_rows_of_a_pair_share_their_prompt(lines, smollm2) -> None:
    batch = collector(lines(*PAIRS), smollm2, chat_format=SMOLLM2).collect(None, None, 0, {}).trajectories
    for row in range(0, 6, 2):
        given = [batch.tokens[r][batch.token_mask[r] & ~batch.action_mask[r]] for r in (row, row + 1)]
        np.testing.assert_array_equal(*given)


def test_turns_of_the_prompt_are_given(lines, letters) -> None:
    prompt = [said_by("user", "a"), said_by("assistant", "earlier"), said_by("user", "b")]
    path = lines({"prompt": prompt, "chosen": "yes", "rejected": [*prompt, said_by("assistant", "no")]})
    batch = collector(path, letters, pairs=1, width=200).collect(None, None, 0, {})
    assert batch.texts == ("yes", "no")
    np.testing.assert_array_equal(batch.trajectories.step_ids.max(axis=1), [0, 0])


def test_equal_pairs_and_ties_are_dropped_and_counted(lines, letters) -> None:
    path = lines(
        {"prompt": "p", "chosen": "same", "rejected": "same"},
        {"prompt": "p", "chosen": "tie", "rejected": "eit", "score_chosen": 2, "score_rejected": 2.0},
        {"prompt": "p", "chosen": "good", "rejected": "bad", "score_chosen": 2, "score_rejected": 1},
        {"prompt": "p", "chosen": "fine", "rejected": "poor", "score_chosen": None, "score_rejected": 1},
        {"prompt": "p", "chosen": "x" * 200, "rejected": "long"},
    )
    made = collector(path, letters, pairs=10)
    batch = made.collect(None, None, 0, {})
    assert set(batch.texts) == {"good", "bad", "fine", "poor"}
    walked = batch.metrics["preferences/epochs"] * 5
    dropped = {name: batch.metrics[f"preferences/{name}"] for name in ("equal", "ties", "dropped")}
    assert sum(dropped.values()) == pytest.approx(walked - 10)
    assert all(4 <= count <= 6 for count in dropped.values())  # each about once per epoch, of five


def test_pairs_that_differ_only_beyond_the_cut_are_equal(lines, letters) -> None:
    path = lines(
        {"prompt": "p", "chosen": "abcX", "rejected": "abcY"}, {"prompt": "p", "chosen": "good", "rejected": "bad"}
    )
    settings = {"pairs": 2, "chat_format": None, "too_long": "cut"}
    cut = collector(path, letters, width=4, **settings).collect(None, None, 0, {})
    assert set(cut.texts) == {"goo", "bad"}
    assert cut.metrics["preferences/equal"] >= 1
    assert cut.metrics["preferences/cut"] == 4  # of "bad" the end token
    whole = collector(path, letters, width=9, **settings).collect(None, None, 0, {})
    assert set(whole.texts) == {"abcX", "abcY", "good", "bad"}
    assert whole.metrics["preferences/cut"] == 0


def test_a_run_that_stops_goes_on_the_same(lines, letters) -> None:
    path = lines(*PAIRS)
    cursor, whole = {}, []
    for step in range(6):
        whole.append(collector(path, letters, seed=2).collect(None, None, step, cursor))
        cursor = json.loads(json.dumps(whole[-1].cursor))
    made, cursor = collector(path, letters, seed=2), whole[2].cursor
    for step in (3, 4, 5):
        batch = made.collect(None, None, step, cursor)
        np.testing.assert_array_equal(batch.trajectories.tokens, whole[step].trajectories.tokens)
        cursor = batch.cursor
    chosen = [text for batch in whole for text in batch.texts[::2]]
    assert sorted(chosen[:7]) == sorted(chosen[7:14]) == [str(number) for number in range(7)]


BAD = {
    "missing": ({"prompt": "p", "chosen": "a"}, r"has the keys \['chosen', 'prompt'\]; expected"),
    "further": ({**PAIRS[0], "margin": 1}, "Further keys can be named to be ignored"),
    "type": ({**PAIRS[0], "rejected": 3}, "rejected in line 2 .* is a int; expected a text or a list of messages"),
    "empty": ({**PAIRS[0], "rejected": " "}, "has an empty response in message 2"),
    "user": ({**PAIRS[0], "chosen": [said_by("user", "x")]}, "chosen in line 2 .* has no response: it must go on"),
    "ends": (
        {**PAIRS[0], "chosen": [said_by("assistant", "x"), said_by("user", "y")]},
        "has no response: it ends with a turn of the user",
    ),
    "only the prompt": ({**PAIRS[0], "chosen": [said_by("user", "Say 0.")]}, "chosen in line 2 .* has no response"),
    "no prompt": ({**PAIRS[0], "prompt": []}, "prompt in line 2 .* has no messages"),
    "order": ({**PAIRS[0], "score_chosen": 1, "score_rejected": 2}, "the chosen answer must not have the lower one"),
    "nan": ({**PAIRS[0], "score_chosen": float("nan"), "score_rejected": 2}, "must not have the lower one"),
    "score": ({**PAIRS[0], "score_chosen": "high", "score_rejected": 2}, r"scores \['high', 2\]; expected numbers"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_a_line_that_cannot_be_used_is_named_before_anything_is_computed(name: str, lines, letters) -> None:
    bad, said = BAD[name]
    with pytest.raises(ValueError, match=said) as caught:
        collector(lines(PAIRS[0], bad), letters)
    assert "line 2 of " in str(caught.value)
    assert str(caught.value).endswith(".")


def test_keys_that_are_to_be_ignored_are(lines, letters) -> None:
    assert len(collector(lines({**PAIRS[0], "margin": 1}), letters, ignored=("margin",))) == 1


def test_only_equal_pairs_are_a_sentence(lines, letters) -> None:
    made = collector(lines({"prompt": "p", "chosen": "same", "rejected": "same"}), letters)
    with pytest.raises(ValueError, match="none of the 1 records can be used; all are ties, have equal answers, or"):
        made.collect(None, None, 0, {})
