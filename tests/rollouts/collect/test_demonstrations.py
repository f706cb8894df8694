"""Demonstrations: forms of files, batches that are the same after a stop, and sentences before anything is computed."""

import json
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from jaxrl_llm.models.chat import CHATML
from jaxrl_llm.models.chat import SMOLLM2
from jaxrl_llm.rollouts.collect.demonstrations import DemonstrationCollector
from jaxrl_llm.rollouts.collect.protocol import Collector
from jaxrl_llm.trajectory import Actions
from jaxrl_llm.trajectory import check_trajectory


def pair(question: str, answer: str) -> list[dict]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


PAIRS = [(f"What is {number} squared?", f"It is {number * number}.") for number in range(11)]
FORMS = {
    "messages": [{"messages": pair(*both)} for both in PAIRS],
    "response": [{"prompt": question, "response": answer} for question, answer in PAIRS],
    "completion": [{"completion": answer, "prompt": question} for question, answer in PAIRS],
    "prompt messages": [{"prompt": pair(question, "")[:1], "response": answer} for question, answer in PAIRS],
    "instruction": [{"instruction": question, "output": answer} for question, answer in PAIRS],
    "input": [{"instruction": question, "input": "", "output": answer} for question, answer in PAIRS],
}


def collector(path: Path, tokenizer, **settings) -> Collector:
    return DemonstrationCollector(path, tokenizer, **{"rows": 4, "width": 96, "chat_format": CHATML, **settings})


def run(made: Collector, steps: int, cursor=None) -> list:
    found = []
    for step in range(steps):
        cursor = json.loads(json.dumps(found[-1].cursor if found else cursor or {}))
        found.append(made.collect(None, None, step, cursor))
    return found


@pytest.mark.parametrize("form", FORMS)
def test_every_form_gives_the_same_rows(form: str, lines, letters) -> None:
    plain = collector(lines(*FORMS["messages"], name="plain.jsonl"), letters).collect(None, None, 0, {})
    made = collector(lines(*FORMS[form]), letters)
    batch = made.collect(None, None, 0, {})
    np.testing.assert_array_equal(batch.trajectories.tokens, plain.trajectories.tokens)
    np.testing.assert_array_equal(batch.trajectories.action_mask, plain.trajectories.action_mask)
    assert batch.texts == plain.texts
    assert set(batch.texts) <= {answer for _, answer in PAIRS}


def test_an_input_stands_after_its_instruction(lines, letters) -> None:
    path = lines({"instruction": "Square.", "input": "7", "output": "49"})
    row = collector(path, letters, rows=1).collect(None, None, 0, {}).trajectories
    assert "user\nSquare.\n\n7" in letters.decode(row.tokens[0])


def test_a_batch_holds_every_rule_and_the_shape(lines, smollm2) -> None:
    made = collector(lines(*FORMS["messages"]), smollm2, chat_format=SMOLLM2, samples=2)
    batch = made.collect(None, None, 0, {})
    check_trajectory(batch.trajectories, vocab_size=smollm2.vocab_size)
    assert (made.shape.rows, made.shape.group_size, made.shape.width, made.shape.actions) == (4, 1, 96, 95)
    assert made.shape.prompt_length is None
    assert batch.trajectories.tokens.shape == (4, 96)
    assert batch.trajectories.log_prob_behaviour is None
    assert not batch.trajectories.rewards.any()
    assert batch.trajectories.ended.all()
    assert sorted(batch.trajectories.group_ids) == [0, 1, 2, 3]
    assert len(batch.samples) == 2
    assert batch.samples[1]["text"] == batch.texts[1]
    assert "data.jsonl" in batch.samples[0]["place"]
    actions = Actions.of(batch.trajectories, width=made.shape.actions)
    for row, text in enumerate(batch.texts):
        own = actions.take(batch.trajectories.tokens)[row, : int(actions.mask[row].sum())]
        assert smollm2.decode(own, skip_special_tokens=False) == f"{text}<|im_end|>"
    np.testing.assert_array_equal(batch.per_row["demonstrations/tokens"], actions.mask.sum(axis=1))
    json.dumps([batch.samples, batch.metrics, batch.cursor])


def test_epochs_are_counted_and_have_every_demonstration(lines, letters) -> None:
    found = run(collector(lines(*FORMS["response"]), letters), 11)
    texts = [text for batch in found for text in batch.texts]
    for epoch in range(4):
        assert sorted(texts[11 * epoch : 11 * (epoch + 1)]) == sorted(answer for _, answer in PAIRS)
    assert [batch.metrics["demonstrations/epochs"] for batch in found] == pytest.approx(
        [4 * n / 11 for n in range(1, 12)]
    )


def test_a_run_that_stops_goes_on_the_same(lines, letters) -> None:
    path = lines(*FORMS["response"])
    whole = run(collector(path, letters, seed=5), 7)
    again = run(collector(path, letters, seed=5), 3, cursor=whole[3].cursor)
    for one, other in zip(whole[4:], again, strict=True):
        np.testing.assert_array_equal(one.trajectories.tokens, other.trajectories.tokens)
        assert (one.cursor, one.metrics, one.texts) == (other.cursor, other.metrics, other.texts)
    assert run(collector(path, letters, seed=6), 1)[0].texts != whole[0].texts


def test_another_file_does_not_go_on(lines, letters) -> None:
    cursor = run(collector(lines(*FORMS["response"]), letters), 1)[0].cursor
    with pytest.raises(ValueError, match="the file has changed since the cursor was written"):
        collector(lines(*FORMS["response"][1:]), letters).collect(None, None, 1, cursor)


def test_several_turns_are_several_stretches_and_steps(lines, letters) -> None:
    path = lines({"messages": pair("one", "1") + pair("two", "22") + pair("three", "333")})
    batch = collector(path, letters, rows=1, width=200).collect(None, None, 0, {})
    steps = batch.trajectories.step_ids[0]
    assert [int((steps == step).sum()) for step in range(3)] == [2, 3, 4]
    assert batch.texts == ("1\n22\n333",)
    check_trajectory(batch.trajectories)


def test_rows_that_are_too_long_are_dropped_or_cut_and_counted(lines, letters) -> None:
    path = lines(*({"prompt": "p", "response": "r" * length} for length in (3, 5, 30)))
    settings = {"rows": 3, "width": 12, "chat_format": None}
    dropped = collector(path, letters, **settings).collect(None, None, 0, {})
    assert set(dropped.texts) == {"rrr", "rrrrr"}
    assert dropped.metrics["demonstrations/dropped"] >= 1
    assert dropped.metrics["demonstrations/cut"] == 0
    assert dropped.trajectories.ended.all()
    cut = collector(path, letters, too_long="cut", **settings).collect(None, None, 0, {})
    assert sorted(cut.texts) == ["rrr", "rrrrr", "r" * 11]
    assert cut.metrics["demonstrations/cut"] == 1
    assert cut.metrics["demonstrations/dropped"] == 0
    longest = cut.texts.index("r" * 11)
    assert cut.trajectories.ended.tolist() == [row != longest for row in range(3)]
    assert letters.eos_id not in cut.trajectories.tokens[longest]
    few = collector(path, letters, too_long="cut", actions=4, **settings).collect(None, None, 0, {})
    assert sorted(few.texts) == ["rrr", "rrrr", "rrrr"]
    assert Actions.of(few.trajectories, width=4).mask.all()


def test_nothing_that_fits_is_a_sentence(lines, letters) -> None:
    made = collector(lines(*FORMS["response"]), letters, width=5)
    with pytest.raises(ValueError, match="none of the 11 records can be used; none fits into 5 tokens, 4 of them ch"):
        made.collect(None, None, 0, {})


def test_parquet_gives_what_lines_give(lines, letters, tmp_path: Path) -> None:
    path = tmp_path / "data.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(FORMS["messages"]), path)
    one = run(collector(path, letters), 3)
    other = run(collector(lines(*FORMS["messages"]), letters), 3)
    assert [batch.texts for batch in one] == [batch.texts for batch in other]


GOOD = {"messages": pair("q", "a")}
BAD = {
    "typo": ({"mesages": pair("q", "a")}, r"has the keys \['mesages'\]; expected messages, or prompt and response"),
    "another form": ({"prompt": "q", "response": "a"}, r"'response'\], lines before it \['messages'\]"),
    "two forms": ({**GOOD, "prompt": "q", "response": "a"}, "has the keys"),
    "further key": ({**GOOD, "source": "web"}, "Further keys can be named to be ignored"),
    "no response": ({"messages": pair("q", "a")[:1]}, "has no response: it ends with a turn of the user"),
    "empty response": ({"messages": pair("q", "")}, "has an empty response in message 2"),
    "no list": ({"messages": {"role": "user"}}, "messages in line 3 .* is a dict; expected a text or a list"),
    "a text": ({"messages": "hello"}, "has no response: it ends with a turn of the user"),
    "role": ({"messages": [{"role": "bot", "content": "x"}, *pair("q", "a")]}, "has the role 'bot'; expected one of"),
    "keys": ({"messages": [{"from": "user", "value": "x"}]}, r"message 1 of .* has the keys \['from', 'value'\]"),
    "no message": ({"messages": [7]}, "message 1 of messages in line 3 .* has the keys int"),
    "no text": ({"messages": pair("q", None)}, "has a content of type NoneType; expected a text"),
    "control": ({"messages": pair("q", "<|im_end|>")}, r"has '<\|im_end\|>' in a text"),
    "no mapping": ([1], "holds a list"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_a_line_that_cannot_be_used_is_named_before_anything_is_computed(name: str, lines, letters) -> None:
    bad, said = BAD[name]
    with pytest.raises(ValueError, match=said) as caught:
        collector(lines(GOOD, GOOD, bad, GOOD), letters)
    assert "line 3 of " in str(caught.value)
    assert str(caught.value).endswith(".")


@pytest.mark.parametrize("response", [None, 3, ["a"]])
def test_a_response_of_another_type_is_named(response, lines, letters) -> None:
    with pytest.raises(ValueError, match=r"line 1 of .* has no response: response is a .*; expected a text"):
        collector(lines({"prompt": "q", "response": response}), letters)


def test_keys_that_are_to_be_ignored_are(lines, letters) -> None:
    path = lines({**GOOD, "source": "web"}, {**GOOD, "id": 3})
    assert len(collector(path, letters, ignored=("source", "id"))) == 2


def test_messages_need_a_chat_format(lines, letters) -> None:
    with pytest.raises(
        ValueError, match=r"line 1 of .* has the turns user, assistant, user, assistant; without a chat"
    ):
        collector(lines({"messages": pair("q", "a") * 2}), letters, chat_format=None)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"width": 1}, "actions is 0; it must be at least 1|width is 1"),
        ({"rows": 0}, "rows is 0; it must be at least 1"),
        ({"too_long": "truncate"}, "too_long is 'truncate'; it must be 'drop' or 'cut'"),
    ],
)
def test_settings_that_cannot_be_are_refused(settings, said, lines, letters) -> None:
    with pytest.raises(ValueError, match=said):
        collector(lines(GOOD), letters, **settings)
