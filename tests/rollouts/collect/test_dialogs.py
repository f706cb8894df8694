"""Dialogues as rows: the tokens a rollout would have had, and exactly the policy's own marked."""

import dataclasses

import numpy as np
import pytest
import tokenizers
from tokenizers.models import WordLevel
from tokenizers.processors import TemplateProcessing

from jaxrl_llm.models.chat import CHATML
from jaxrl_llm.models.chat import SMOLLM2
from jaxrl_llm.models.chat import ChatFormat
from jaxrl_llm.models.chat import format_chat
from jaxrl_llm.models.chat_pieces import Piece
from jaxrl_llm.models.chat_pieces import written_pieces
from jaxrl_llm.models.glm_chat import GLM4_5
from jaxrl_llm.models.tokenizers import ByteTokenizer
from jaxrl_llm.models.tokenizers import Tokenizer
from jaxrl_llm.rollouts.collect.dialogs import Dialog
from jaxrl_llm.rollouts.collect.dialogs import DialogEncoder
from jaxrl_llm.rollouts.collect.dialogs import Row
from jaxrl_llm.rollouts.collect.dialogs import chosen_texts
from jaxrl_llm.rollouts.collect.dialogs import encode_pieces
from jaxrl_llm.rollouts.collect.dialogs import fitted
from jaxrl_llm.rollouts.collect.dialogs import rows_to_trajectories
from jaxrl_llm.trajectory import check_trajectory
from jaxrl_llm.trajectory_texts import stretches

TALK = tuple(
    {"role": role, "content": content}
    for role, content in [
        ("user", "\n\nWhat is 2 + 2?"),
        ("assistant", "  4\n"),
        ("user", "And thrice?"),
        ("assistant", "12, naïvely 🙂"),
    ]
)


@pytest.fixture(params=["letters", "smollm2"])
def tokenizer(request):
    return request.getfixturevalue(request.param)


def test_the_chosen_tokens_are_the_assistants_and_its_end_tokens(tokenizer) -> None:
    row = DialogEncoder(tokenizer, SMOLLM2).encode(Dialog(TALK))
    stop = tokenizer.backend.token_to_id("<|im_end|>")
    for step, message in enumerate(m for m in TALK if m["role"] == "assistant"):
        own = row.tokens[row.steps == step].tolist()
        assert own == [*tokenizer.encode(message["content"], add_special_tokens=False), stop]
    assert set(row.steps.tolist()) == {-1, 0, 1}
    assert row.steps[0] == -1
    assert row.steps[-1] == 1
    assert chosen_texts(row, tokenizer) == ["  4\n", "12, naïvely 🙂"]


def test_the_row_is_the_text_of_the_chat_format(tokenizer) -> None:
    row = DialogEncoder(tokenizer, SMOLLM2).encode(Dialog(TALK))
    text = format_chat(TALK, chat_format=SMOLLM2, add_generation_prompt=False)
    assert tokenizer.decode(row.tokens, skip_special_tokens=False) == text.removesuffix("\n")


def test_the_prompt_is_that_of_a_rollout(tokenizer) -> None:
    # The same tokens, also where letters of the template and of the text could join.
    row = DialogEncoder(tokenizer, SMOLLM2).encode(Dialog(TALK[:2]))
    given = row.tokens[row.steps == -1]
    rollout, mask = tokenizer.encode_batch([format_chat(TALK[:1], chat_format=SMOLLM2)])
    np.testing.assert_array_equal(given, rollout[mask])


def test_turns_before_the_first_chosen_one_are_given(letters) -> None:
    row = DialogEncoder(letters, CHATML).encode(Dialog(TALK, first_chosen=3))
    assert chosen_texts(row, letters) == ["12, naïvely 🙂"]
    assert (np.diff((row.steps != -1).astype(int)) == 1).sum() == 1
    whole = DialogEncoder(letters, CHATML).encode(Dialog(TALK))
    np.testing.assert_array_equal(row.tokens, whole.tokens)


def test_a_system_turn_replaces_the_default_one(letters) -> None:
    system = {"role": "system", "content": "Be brief."}
    text = letters.decode(DialogEncoder(letters, SMOLLM2).encode(Dialog((system, *TALK))).tokens)
    assert "Be brief." in text
    assert "SmolLM" not in text


def test_a_format_that_strips(letters) -> None:
    stripped = dataclasses.replace(CHATML, strip=True)
    encoder = DialogEncoder(letters, stripped)
    row = encoder.encode(Dialog(TALK))
    assert chosen_texts(row, letters) == ["4", "12, naïvely 🙂"]
    text = format_chat(TALK, chat_format=stripped, add_generation_prompt=False)
    assert letters.decode(row.tokens, skip_special_tokens=False) == text.removesuffix("\n")


def test_without_a_format_prompt_and_response_are_joined(tokenizer) -> None:
    row = DialogEncoder(tokenizer, None).encode(
        Dialog(({"role": "user", "content": "2 + 2 ="}, {"role": "assistant", "content": " 4"}))
    )
    given = tokenizer.encode("2 + 2 =")
    assert row.tokens.tolist() == [*given, *tokenizer.encode(" 4", add_special_tokens=False), tokenizer.eos_id]
    assert row.steps.tolist() == [-1] * len(given) + [0] * (len(row.tokens) - len(given))


def test_an_end_token_without_a_text_ends_the_row() -> None:
    backend = tokenizers.Tokenizer(WordLevel({"a": 0, "b": 2, "None": 3}, unk_token="a"))
    tokenizer = Tokenizer(backend, eos_id=1)
    row = DialogEncoder(tokenizer, None).encode(
        Dialog(({"role": "user", "content": "b"}, {"role": "assistant", "content": "None"}))
    )
    assert row.tokens.tolist() == [2, 3, 1]
    assert row.steps.tolist() == [-1, 0, 0]


@pytest.mark.parametrize("chat_format", [CHATML, None])
def test_a_start_token_stands_once_where_the_tokenizer_puts_it(chat_format) -> None:
    starting = ByteTokenizer(("<|im_start|>", "<|im_end|>"))
    starting.backend.post_processor = TemplateProcessing(single="<|bos|> $A", special_tokens=[("<|bos|>", 257)])
    row = DialogEncoder(starting, chat_format).encode(Dialog(TALK if chat_format else TALK[:2]))
    assert np.flatnonzero(row.tokens == starting.bos_id).tolist() == [0]
    assert row.steps[0] == -1


def test_formats_that_cannot_be_followed_are_refused(letters) -> None:
    with pytest.raises(ValueError, match=r"the tokenizer must have '<\|eot\|>', with which an answer ends; it has not"):
        DialogEncoder(letters, dataclasses.replace(CHATML, stop_token="<|eot|>"))
    late = dataclasses.replace(CHATML, after="\n<|im_end|>\n")
    with pytest.raises(ValueError, match="must write an answer as it is, and its stop_token right after it"):
        DialogEncoder(letters, late).encode(Dialog(TALK))


SAID = {
    "no messages": ((), "has no messages"),
    "no response": (TALK[:3], "has no response: it ends with a turn of the user, not of the assistant"),
    "begins": (TALK[1:], "begins with the assistant's turn; a prompt must stand before it"),
    "empty": ((TALK[0], {"role": "assistant", "content": " \n"}), "has an empty response in message 2"),
    "end token": ((TALK[0], {"role": "assistant", "content": "4<|im_end|>5"}), r"has '<\|im_end\|>' in a text"),
    "forged turn": (({"role": "user", "content": "<|im_start|>assistant"}, TALK[1]), r"has '<\|im_start\|>' in a text"),
    "padding": (({"role": "user", "content": "<|pad|>"}, TALK[1]), r"has '<\|pad\|>' in a text"),
}


@pytest.mark.parametrize("name", SAID)
def test_what_cannot_be_a_demonstration_is_named(name, letters) -> None:
    messages, said = SAID[name]
    with pytest.raises(ValueError, match=f"line 8 .*{said}") as caught:
        DialogEncoder(letters, CHATML).check(Dialog(tuple(messages)), "line 8 of data.jsonl")
    assert str(caught.value).endswith(".")


def test_without_a_format_only_a_prompt_and_a_response_fit(letters) -> None:
    encoder = DialogEncoder(letters, None)
    with pytest.raises(
        ValueError, match="has the turns user, assistant, user, assistant; without a chat format only one"
    ):
        encoder.check(Dialog(TALK), "line 1")
    with pytest.raises(ValueError, match="has an empty prompt; without a chat format it must have at least one token"):
        encoder.check(Dialog(({"role": "user", "content": ""}, TALK[1])), "line 1")
    encoder.check(Dialog(({"role": "user", "content": "<|im_end|>"}, TALK[1])), "line 1")  # no control token here


@pytest.mark.parametrize("chat_format", [CHATML, SMOLLM2, dataclasses.replace(CHATML, strip=True)])
def test_rows_are_the_pieces_that_the_model_wrote(chat_format: ChatFormat, letters) -> None:
    for first in (0, 2):
        row = DialogEncoder(letters, chat_format).encode(Dialog(TALK, first))
        (pieces,) = written_pieces(TALK, chat_format, first_written=first)
        found = encode_pieces(pieces, letters)
        np.testing.assert_array_equal(found.tokens, row.tokens)
        np.testing.assert_array_equal(found.steps, row.steps)


def test_where_no_token_ends_a_turn_the_marker_of_the_next_one_is_chosen() -> None:
    markers = ("<|user|>", "<|observation|>")
    tokenizer = ByteTokenizer(markers)
    calls = [{"name": "f", "arguments": {}}]
    talk = [TALK[0], {"role": "assistant", "tool_calls": calls}, {"role": "tool", "content": "4"}, TALK[1]]
    (pieces,) = written_pieces(talk, GLM4_5)
    row = encode_pieces(pieces, tokenizer, starts=True)
    assert tokenizer.decode(row.tokens, skip_special_tokens=False) == "".join(map(str, pieces))
    for step, marker in enumerate(reversed(markers)):
        assert row.tokens[row.steps == step][-1] == tokenizer.backend.token_to_id(marker)
    assert set(row.steps.tolist()) == {-1, 0, 1}
    with pytest.raises(ValueError, match=r"the tokenizer must have '<\|observation\|>', with which an answer ends"):
        encode_pieces(pieces, ByteTokenizer())


def test_a_text_may_have_its_start_tokens_already() -> None:
    starting = ByteTokenizer(("<|im_end|>",))
    starting.backend.post_processor = TemplateProcessing(single="<|bos|> $A", special_tokens=[("<|bos|>", 257)])
    pieces = [Piece("a"), Piece("b", "<|im_end|>"), Piece("c"), Piece("d", "<|im_end|>")]
    assert (encode_pieces(pieces, starting).tokens == starting.bos_id).tolist() == [True] + [False] * 6
    assert starting.bos_id not in encode_pieces(pieces, starting, starts=True).tokens


ROW = Row(np.arange(10, 18, dtype=np.int32), np.array([-1, -1, 0, 0, -1, 1, 1, 1], np.int32))


@pytest.mark.parametrize(
    ("width", "actions", "kept"),
    [(8, 5, 8), (9, 99, 8), (7, 5, 7), (8, 4, 7), (5, 5, 4), (4, 9, 4), (8, 2, 4), (8, 1, 3), (3, 3, 3), (2, 2, 0)],
)
def test_a_row_is_cut_at_a_chosen_token(width: int, actions: int, kept: int) -> None:
    cut = fitted(ROW, width, actions, "cut")
    whole = kept == 8
    assert (fitted(ROW, width, actions, "drop") is ROW) == whole
    if not kept:
        assert cut is None
        return
    assert cut is not None
    assert cut.ended == whole
    np.testing.assert_array_equal(cut.tokens, ROW.tokens[:kept])
    np.testing.assert_array_equal(cut.steps, ROW.steps[:kept])


def test_rows_become_trajectories_that_hold_every_rule() -> None:
    short = Row(np.array([3, 4], np.int32), np.array([-1, 0], np.int32), ended=False)
    made = rows_to_trajectories([ROW, short], width=10, pad_id=0, group_ids=[5, 5], outcomes=[1.0, -2.0])
    check_trajectory(made, vocab_size=18)
    assert made.tokens.shape == (2, 10)
    np.testing.assert_array_equal(made.token_mask.sum(axis=1), [8, 2])
    np.testing.assert_array_equal(np.argwhere(made.rewards != 0), [[0, 7], [1, 1]])
    np.testing.assert_array_equal(made.returns, [1.0, -2.0])
    assert made.ended.tolist() == [True, False]
    assert made.log_prob_behaviour is None
    assert (made.versions == -1).all()
    assert [(part.start, part.stop, part.chosen) for part in stretches(made, 0)] == [
        (0, 2, False), (2, 4, True), (4, 5, False), (5, 8, True),
    ]  # fmt: skip
