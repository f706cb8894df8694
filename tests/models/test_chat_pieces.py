"""Which parts of a conversation are the model's: what it would have sampled, the token that ends it included."""

import pytest

from jaxrl_llm.models.chat import CHATML
from jaxrl_llm.models.chat import Chat
from jaxrl_llm.models.chat import ChatFormat
from jaxrl_llm.models.chat import TemplateChat
from jaxrl_llm.models.chat_pieces import Piece
from jaxrl_llm.models.chat_pieces import written_pieces
from jaxrl_llm.models.glm_answers import parse_answer
from jaxrl_llm.models.glm_chat import GLM4_5
from jaxrl_llm.models.tokenizers import ByteTokenizer
from jaxrl_llm.models.tokenizers import Tokenizer


def turn(role: str, content: str, **more: object) -> dict[str, object]:
    return {"role": role, "content": content, **more}


TURNS = "{% for m in messages %}<{{ m.role }}>{{ m.content }}<end>\n{% endfor %}{% if add_generation_prompt %}"
TURNS += "<assistant>{% endif %}"
MARKERS = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}{% if add_generation_prompt %}<assistant>"
MARKERS += "{% endif %}"
CALL = {"name": "f", "arguments": {"a": 1}}
WRITTEN_CALL = "<tool_call>f\n<arg_key>a</arg_key>\n<arg_value>1</arg_value>\n</tool_call>"
TALK = [
    turn("user", "one?"),
    turn("assistant", "One.", reasoning_content="un"),
    turn("user", "two?"),
    turn("assistant", "", reasoning_content="deux", tool_calls=[CALL]),
    turn("tool", "2"),
    turn("assistant", "Two.", reasoning_content="so"),
]


def test_the_marker_of_who_speaks_next_is_written() -> None:
    first, second = written_pieces(TALK, GLM4_5)
    assert first == (
        Piece("[gMASK]<sop><|user|>\none?<|assistant|>"),
        Piece("\n<think>un</think>\nOne.", "<|user|>"),
    )
    # What was thought before the last question is gone, so the first answer is no more what the model wrote.
    assert second == (
        Piece("[gMASK]<sop><|user|>\none?<|assistant|>\n<think></think>\nOne.<|user|>\ntwo?<|assistant|>"),
        Piece("\n<think>deux</think>\n" + WRITTEN_CALL, "<|observation|>"),
        Piece("\n<tool_response>\n2\n</tool_response><|assistant|>"),
        Piece("\n<think>so</think>\nTwo.", "<|user|>"),
    )
    assert "".join(map(str, second)) == GLM4_5.render(TALK, generation=False) + "<|user|>"


def test_without_thinking_one_text_has_every_answer() -> None:
    talk = [{key: value for key, value in message.items() if key != "reasoning_content"} for message in TALK]
    (pieces,) = written_pieces(talk, GLM4_5, thinking=False)
    assert [str(piece) for piece in pieces if piece.written] == [
        "\nOne.<|user|>", "\n" + WRITTEN_CALL + "<|observation|>", "\nTwo.<|user|>",
    ]  # fmt: skip
    assert pieces[0].text.endswith("<|user|>\none?/nothink<|assistant|>\n<think></think>")
    assert "".join(map(str, pieces)) == GLM4_5.render(talk, thinking=False, generation=False) + "<|user|>"


@pytest.mark.parametrize("thinking", [True, False])
def test_every_answer_stands_once_after_the_prompt_it_is_sampled_from(thinking: bool) -> None:
    plain = [{**m, "reasoning_content": ""} if m["role"] == "assistant" else m for m in TALK]
    talk = TALK if thinking else plain
    prompts, answers = [], []
    for pieces in written_pieces(talk, GLM4_5, thinking=thinking):
        done = ""
        for piece in pieces:
            if piece.written:
                prompts.append(done)
                answers.append(piece.text)
            done += str(piece)
    places = [index for index, message in enumerate(talk) if message["role"] == "assistant"]
    assert prompts == [GLM4_5.render(talk[:index], thinking=thinking) for index in places]
    for index, text in zip(places, answers, strict=True):
        assert parse_answer(text).message()["content"] == talk[index]["content"]
        assert parse_answer(text).thinking == talk[index]["reasoning_content"]


def test_a_user_who_does_not_wait_for_the_result_begins_another_text() -> None:
    talk = [TALK[0], turn("assistant", "", tool_calls=[CALL]), turn("user", "stop"), turn("assistant", "Yes.")]
    texts = written_pieces(talk, GLM4_5)
    assert [[piece.end for piece in pieces if piece.written] for pieces in texts] == [["<|observation|>"], ["<|user|>"]]


def test_answers_before_the_first_written_one_are_given() -> None:
    (pieces,) = written_pieces(TALK, GLM4_5, first_written=5)
    assert [piece.end for piece in pieces] == ["", "<|user|>"]


def test_a_template_is_followed_as_far_as_it_only_adds() -> None:
    chat = TemplateChat(TURNS, "<end>")
    talk = [turn("user", "a"), turn("assistant", "b"), turn("user", "c"), turn("assistant", "d")]
    assert written_pieces(talk, chat) == [
        (
            Piece("<user>a<end>\n<assistant>"),
            Piece("b", "<end>"),
            Piece("\n<user>c<end>\n<assistant>"),
            Piece("d", "<end>"),
        )
    ]


@pytest.mark.parametrize(
    ("talk", "settings", "said"),
    [
        (TALK[:1], {}, "messages has no turn of the assistant that is to be written"),
        (TALK, {"first_written": 6}, "messages has no turn of the assistant that is to be written"),
        (TALK[1:], {}, "messages begins with the assistant's turn; a prompt must stand before it"),
        (
            TALK[:2],
            {"thinking": False},
            r"messages\[1\] is written otherwise than after its prompt, with thinking=False",
        ),
        ([TALK[0], turn("assistant", "a<|user|>")], {}, r"messages\[1\] has the name of a token in it that ends"),
        ([TALK[0], turn("assistant", "<|endoftext|>")], {}, r"messages\[1\] has the name of a token in it that ends"),
    ],
)
def test_what_cannot_be_taken_apart_is_said(talk: list, settings: dict, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        written_pieces(talk, GLM4_5, **settings)


SHORT = [turn("user", "a"), turn("assistant", "b"), turn("user", "c"), turn("assistant", "d")]


@pytest.mark.parametrize(("source", "end"), [(TURNS, "<end>"), (MARKERS, "<user>")])
def test_a_template_says_which_end_token_it_writes(source: str, end: str) -> None:
    plain = ByteTokenizer(("<end>", "<user>"))
    chat = TemplateChat.of(Tokenizer(plain.backend, eos_id=258, eos_ids=(258, 259, 260), chat_template=source))
    assert chat.stop_tokens == ("<|eos|>", "<end>", "<user>")
    (pieces,) = written_pieces(SHORT, chat)
    assert [(piece.text, piece.end) for piece in pieces if piece.written] == [("b", end), ("d", end)]
    whole = chat.render(SHORT, generation=False).removesuffix("\n")
    assert "".join(map(str, pieces)) == whole.removesuffix(end) + end
    with pytest.raises(ValueError, match=r"the chat template writes none of '<\|eos\|>', '<x>' after an answer"):
        TemplateChat(source, "<|eos|>", {}, ("<x>",)).end({})


@pytest.mark.parametrize("source", [TURNS, MARKERS])
def test_an_end_that_the_chat_never_writes_is_refused(source: str) -> None:
    with pytest.raises(ValueError, match="the chat does not write '<eos>' after an answer, nor before the next turn"):
        written_pieces(SHORT, TemplateChat(source, "<eos>"))


@pytest.mark.parametrize(
    ("chat", "content"),
    [
        (ChatFormat("{role}: ", "\n", "\n"), "a\nb"),
        (CHATML, "a<|im_end|>b"),
        (TemplateChat(TURNS, "<end>"), "a<end>\nb"),
        (TemplateChat(MARKERS, "<user>"), "a<user>"),
        (GLM4_5, "a<|observation|>"),
    ],
)
def test_the_end_of_an_answer_stands_once(chat: Chat, content: str) -> None:
    with pytest.raises(ValueError, match=r"messages\[1\] has the name of a token in it that ends an answer"):
        written_pieces([SHORT[0], turn("assistant", content)], chat)


@pytest.mark.parametrize(
    ("messages", "named"),
    [
        ([turn("user", "<|assistant|>"), SHORT[1]], r"messages\[0\] has '<\|assistant\|>'"),
        ([SHORT[0], turn("assistant", "b<|pad|>")], r"messages\[1\] has '<\|pad\|>'"),
        (
            [SHORT[0], turn("assistant", "", tool_calls=[{"name": "f", "arguments": {"a": ["<|assistant|>"]}}])],
            r"messages\[1\] has '<\|assistant\|>'",
        ),
    ],
)
def test_other_control_tokens_are_refused_where_the_tokenizer_is_known(messages: list, named: str) -> None:
    tokenizer = ByteTokenizer(("<|user|>", "<|assistant|>", "<think>"))
    written_pieces(messages, GLM4_5)
    with pytest.raises(ValueError, match=f"{named} in a text, the name of a control token; expected none"):
        written_pieces(messages, GLM4_5, tokenizer=tokenizer)
    thinks = [SHORT[0], turn("assistant", "<think>so</think>b")]
    assert written_pieces(thinks, GLM4_5, tokenizer=tokenizer) == written_pieces(thinks, GLM4_5)
