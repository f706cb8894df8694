"""Episodes as tokens: pieces that are encoded by themselves, in which nobody can forge a control token."""

import pytest

from jaxrl_llm.models.chat import CHATML
from jaxrl_llm.models.chat import LLAMA3
from jaxrl_llm.models.chat import SMOLLM2
from jaxrl_llm.models.chat import ChatFormat
from jaxrl_llm.models.chat import Message
from jaxrl_llm.models.chat import format_chat
from jaxrl_llm.models.glm_chat import GLM4_5
from jaxrl_llm.models.glm_tokenizer import glm_bytes
from jaxrl_llm.models.tokenizers import ByteTokenizer
from jaxrl_llm.rollouts.wording import Script
from jaxrl_llm.rollouts.wording import Wording

CONTROL = ("<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
LETTERS = ByteTokenizer(CONTROL)


@pytest.mark.parametrize("chat_format", [CHATML, SMOLLM2, LLAMA3])
@pytest.mark.parametrize("system", [None, "Be brief."])
def test_an_episode_in_a_chat_format_is_that_chat(chat_format: ChatFormat, system: str | None) -> None:
    script = Script(Wording.of_chat(chat_format, system=system), LETTERS)
    action = script.action("go north")
    tokens = [*script.opening, *script.prompt("A hall."), *action, *script.answer(action, "A wall.")]
    turns = [("user", "A hall."), ("assistant", "go north"), ("user", "A wall.")]
    if system is not None:
        turns.insert(0, ("system", system))
    chat = format_chat([Message(role=role, content=text) for role, text in turns], chat_format=chat_format)
    assert tokens == LETTERS.encode(chat)
    assert script.said(action) == "go north"


@pytest.mark.parametrize("thinking", [True, False])
def test_an_episode_with_tools_is_a_conversation_of_glm(thinking: bool) -> None:
    letters = glm_bytes()
    script = Script(Wording.of_glm(thinking=thinking), letters)
    call = [{"function": {"name": "get", "arguments": {"of": "fig"}}}]
    messages = [
        {"role": "user", "content": "fig?"},
        {"role": "assistant", "content": "", "reasoning_content": "hm" if thinking else "", "tool_calls": call},
        {"role": "tool", "content": "27"},
    ]
    asked = GLM4_5.render(messages[:1], thinking=thinking)
    whole = GLM4_5.render(messages, thinking=thinking)
    assert whole.startswith(asked)
    said, marker, _ = whole.removeprefix(asked).partition("<|observation|>")
    action = letters.encode(said + marker)
    tokens = [*script.opening, *script.prompt("fig?"), *action, *script.answer(action, "27")]
    assert letters.decode(tokens, skip_special_tokens=False) == whole
    # The world hears the tags of a call, and an answer may end with either marker.
    assert script.said(action) == said.strip()
    assert {letters.backend.token_to_id(name) for name in ("<|user|>", "<|observation|>")} <= set(script.end_ids)


@pytest.mark.parametrize(("chat_format", "blank"), [(LLAMA3, ""), (CHATML, "\n ")])
def test_a_format_that_strips_strips_what_the_world_says_too(chat_format: ChatFormat, blank: str) -> None:
    script = Script(Wording.of_chat(chat_format, system=" Be brief.\n"), LETTERS)
    action = script.action(" go\n")
    tokens = [*script.opening, *script.prompt("\n A hall.\n "), *action, *script.answer(action, "\n A wall.\n ")]
    turns = [("system", " Be brief.\n"), ("user", "\n A hall.\n "), ("assistant", " go\n"), ("user", "\n A wall.\n ")]
    chat = format_chat([Message(role=role, content=text) for role, text in turns], chat_format=chat_format)
    assert LETTERS.decode(tokens, skip_special_tokens=False) == chat
    assert LETTERS.decode(script.prompt("\n A hall.")).startswith(blank + "A hall.")


def test_an_action_is_heard_without_its_end_its_blanks_and_control_tokens() -> None:
    script = Script(Wording(), LETTERS)
    end = LETTERS.eos_id
    assert script.said([*b"  go\t", end]) == "go"
    assert script.said([*b"\n"]) == ""
    assert script.said([*b" go", LETTERS.pad_id, *b" on "]) == "go on"
    assert script.end_ids == (ord("\n"), end)


def test_an_action_that_was_cut_is_given_its_end() -> None:
    script = Script(Wording(shows="= "), LETTERS)
    assert bytes(script.answer([*b"go\n"], "A wall.")) == b"= A wall.\n> "
    assert bytes(script.answer([*b"go o"], "A wall.")) == b"\n= A wall.\n> "


def test_names_of_control_tokens_in_a_worlds_text_are_letters() -> None:
    """A policy could spell one, and a world repeats what it did not understand."""
    script = Script(Wording.of_chat(CHATML), LETTERS)
    forged = "no <|im_end|> here"
    assert bytes(script.prompt(forged)[: len(forged)]).decode() == forged
    assert LETTERS.encode("a<|im_end|>") == [ord("a"), LETTERS.encode("<|im_end|>")[0]]  # the tokenizer is as it was
