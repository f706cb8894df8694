"""Conversations with thinking and tools as rows: what the chat writes; answers and their ends are chosen."""

import json

import numpy as np
import pytest

from jaxrl_llm.models.glm_chat import GLM4_5
from jaxrl_llm.models.glm_tokenizer import glm_bytes
from jaxrl_llm.rollouts.collect import ConversationCollector
from jaxrl_llm.trajectory import check_trajectory

LETTERS = glm_bytes()
CALL = [{"function": {"name": "get", "arguments": {"of": "fig"}}}]
ASKED = {"role": "user", "content": "fig?"}
TOOLS = {
    "messages": [
        ASKED,
        {"role": "assistant", "content": "", "tool_calls": CALL},
        {"role": "tool", "content": "27"},
        {"role": "assistant", "content": "27"},
    ],
    "thinking": False,
}
THOUGHT = {"messages": [ASKED, {"role": "assistant", "reasoning_content": "hm", "content": "27"}]}


def collector(path, **settings) -> ConversationCollector:
    return ConversationCollector(path, LETTERS, GLM4_5, **{"rows": 2, "width": 96, "seed": 1, **settings})


def test_a_row_is_what_the_chat_writes_and_its_answers_are_chosen(lines) -> None:
    path = lines(TOOLS, THOUGHT)
    batch = collector(path, samples=1).collect(None, None, 0, {})
    rows = batch.trajectories
    check_trajectory(rows, vocab_size=LETTERS.vocab_size)
    order = [2 - int(rows.step_ids[row].max()) for row in range(2)]  # two answers, then one
    tools, thought = order.index(1), order.index(2)
    whole = GLM4_5.render(TOOLS["messages"], thinking=False, generation=False) + "<|user|>"
    assert LETTERS.decode(rows.tokens[tools][rows.token_mask[tools]], skip_special_tokens=False) == whole
    said = [
        LETTERS.decode(rows.tokens[tools][rows.step_ids[tools] == step], skip_special_tokens=False) for step in (0, 1)
    ]
    call = "\n<tool_call>get\n<arg_key>of</arg_key>\n<arg_value>fig</arg_value>\n</tool_call>"
    # Without thinking the prompt has closed it; each answer ends with the marker of who speaks next.
    assert said == [f"{call}<|observation|>", "\n27<|user|>"]
    answer = LETTERS.decode(rows.tokens[thought][rows.action_mask[thought]], skip_special_tokens=False)
    assert answer == "\n<think>hm</think>\n27<|user|>"
    assert batch.texts[thought] == "\n<think>hm</think>\n27"
    assert len(batch.samples) == 1
    assert "data.jsonl" in batch.samples[0]["place"]


def test_batches_go_on_after_a_stop_and_rows_that_do_not_fit_are_counted(lines) -> None:
    many = [{"messages": [ASKED, {"role": "assistant", "content": "1" * count}]} for count in (1, 2, 3, 4, 90)]
    path = lines(*many)
    first = collector(path).collect(None, None, 0, {})
    again = collector(path).collect(None, None, 1, json.loads(json.dumps(first.cursor)))
    other = collector(path, rows=4).collect(None, None, 0, {})
    assert first.texts + again.texts == other.texts
    assert other.metrics["demonstrations/dropped"] <= 1
    np.testing.assert_array_equal(other.per_row["demonstrations/tokens"], other.trajectories.action_mask.sum(axis=1))
    cut = collector(path, rows=5, too_long="cut").collect(None, None, 0, {})
    assert cut.metrics["demonstrations/cut"] == 1
    assert sorted(cut.trajectories.ended.tolist()) == [False, True, True, True, True]


TWO_QUESTIONS = {"messages": [*THOUGHT["messages"], *THOUGHT["messages"]]}


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        ({"messages": [ASKED]}, "no turn of the assistant"),
        ({"message": [ASKED]}, "line 1 of .* has the keys .'message'.; expected messages and, at most, tools"),
        (THOUGHT | {"more": 1}, "Further keys can be named to be ignored"),
        (THOUGHT | {"thinking": "no"}, "thinking in line 1 .* is a str; expected true or false"),
        (THOUGHT | {"first_written": True}, "first_written in line 1 .* is a bool; expected a whole number"),
        (TWO_QUESTIONS, "takes back earlier turns, so that its answers stand in 2 texts; give one line for each"),
        ({"messages": [{"role": "user", "content": "<|user|>"}, THOUGHT["messages"][1]]}, "name of a control token"),
    ],
)
def test_a_line_that_cannot_be_used_is_named(line, sentence, lines) -> None:
    with pytest.raises(ValueError, match=sentence):
        collector(lines(line))


def test_answers_of_a_history_can_be_given(lines) -> None:
    path = lines(TWO_QUESTIONS | {"first_written": 3, "more": 1})
    rows = collector(path, rows=1, ignored=("more",)).collect(None, None, 0, {}).trajectories
    text = LETTERS.decode(rows.tokens[0][rows.action_mask[0]], skip_special_tokens=False)
    assert text == "\n<think>hm</think>\n27<|user|>"
