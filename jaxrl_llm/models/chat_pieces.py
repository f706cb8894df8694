"""Which parts of a conversation its model wrote, the token that ends each of its turns included."""

import re
from collections.abc import Collection
from collections.abc import Iterator
from collections.abc import Mapping
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from jaxrl_llm.models.chat import PLAIN
from jaxrl_llm.models.chat import Chat
from jaxrl_llm.models.chat import plain_turns
from jaxrl_llm.models.chat_tools import Tool
from jaxrl_llm.models.tokenizers import Tokenizer


@dataclass(frozen=True)
class Piece:
    """A part of a text.

    Attributes:
        text: without what ends it.
        end: the token that ends an answer that the model wrote; empty where the text was given.
    """

    text: str
    end: str = ""

    @property
    def written(self) -> bool:
        """Whether the model wrote it."""
        return bool(self.end)

    def __str__(self) -> str:
        """The text with its end."""
        return self.text + self.end


def written_pieces(
    messages: Sequence[Mapping[str, Any]],
    chat: Chat,
    *,
    tools: Sequence[Tool] | None = None,
    thinking: bool = True,
    first_written: int = 0,
    tokenizer: Tokenizer | None = None,
) -> list[tuple[Piece, ...]]:
    """The texts to train on, each in pieces: what stands before an answer as its prompt had it, then the answer.

    An answer is what follows its own prompt, `chat.render(messages before it)`, and ends with `chat.end`, which a model
    must learn to write: where a format has no token that ends a turn, that is the marker of who speaks next. A text
    goes on as long as later prompts begin with it. Where a chat rewrites earlier turns, as GLM-4.5 takes away what was
    thought before the last question, another text begins; so every answer is written once, after the very prompt that
    it would be sampled from.

    Args:
        messages: the turns, oldest first.
        chat: how they are written.
        tools, thinking: as for `chat.render`.
        first_written: answers before this message are given.
        tokenizer: where there is one, texts with the name of a control token of it are refused, which could forge a
            turn (`control_names`).

    Returns:
        Texts in the order of their answers; in each of them given and written pieces take turns.

    Raises:
        ValueError: no answer, one that the chat does not write after its prompt, one with a token that ends one or
            with another control token, or a chat that does not write what it says an answer ends with.
    """
    texts: list[list[Piece]] = []
    done = ""
    for index, message in enumerate(messages):
        if message["role"] != "assistant" or index < first_written:
            continue
        if not index:
            raise ValueError("messages begins with the assistant's turn; a prompt must stand before it.")
        opened = chat.render(messages[:index], tools=tools, thinking=thinking)
        whole = chat.render(messages[: index + 1], tools=tools, thinking=thinking, generation=False)
        if not whole.startswith(opened):
            # Without thinking the prompt closes it, and a turn that thinks does not go on from there.
            raise ValueError(f"messages[{index}] is written otherwise than after its prompt, with thinking={thinking}.")
        answer = _answer(whole[len(opened) :], chat, message, f"messages[{index}]")
        if not texts or not opened.startswith(done):
            texts.append([])
            done = ""
        texts[-1] += [Piece(opened[len(done) :]), answer]
        done = opened + str(answer)
    if not texts:
        raise ValueError("messages has no turn of the assistant that is to be written; expected one.")
    if tokenizer is not None:
        _refuse_control(messages, chat, tokenizer)
    return [tuple(pieces) for pieces in texts]


def control_names(tokenizer: Tokenizer, frame: str, ends: Collection[int]) -> re.Pattern[str]:
    """Finds names that would become tokens which say where a turn or a text begins or ends.

    Args:
        tokenizer: whose tokens.
        frame: what a chat writes around turns: the added tokens in it are such.
        ends: ids that are such wherever they stand, beside those that end, start and pad a text.
    """
    named = {*ends, *tokenizer.eos_ids, tokenizer.pad_id, tokenizer.bos_id}
    added = tokenizer.backend.get_added_tokens_decoder()
    names = [token.content for number, token in added.items() if number in named or token.content in frame]
    return re.compile("|".join(re.escape(name) for name in sorted(names, key=len, reverse=True)) or r"(?!)")


def _answer(written: str, chat: Chat, message: Mapping[str, Any], place: str) -> Piece:
    """What a chat writes of a message after its prompt, as a piece."""
    text, end = written, chat.end(message)
    if _writes_end(chat, message, end):
        text, found, _ = written.rpartition(end)
        if not found:
            raise ValueError(f"{place} is written without {end!r} after it, unlike a plain answer.")
    if any(stop in text for stop in chat.stop_tokens):
        raise ValueError(f"{place} has the name of a token in it that ends an answer.")
    return Piece(text, end)


def _writes_end(chat: Chat, message: Mapping[str, Any], end: str) -> bool:
    """Whether the chat itself writes the end of such an answer; else it is the marker with which the next turn begins.

    Seen at a plain answer: this one may have the name of a token in it, and may be written otherwise before a turn.
    """
    turns = plain_turns(message)
    whole = chat.render(turns[:-1], generation=False)
    if end in whole.rpartition(PLAIN)[2]:
        return True
    if chat.render(turns, generation=False).startswith(whole + end):
        return False
    raise ValueError(
        f"the chat does not write {end!r} after an answer, nor before the next turn; expected its end there."
    )


def _refuse_control(messages: Sequence[Mapping[str, Any]], chat: Chat, tokenizer: Tokenizer) -> None:
    question, _, _ = plain_turns({})
    control = control_names(tokenizer, chat.render([question]), ())
    for index, message in enumerate(messages):
        for text in _texts({key: value for key, value in message.items() if key != "role"}):
            if found := control.search(text):
                raise ValueError(
                    f"messages[{index}] has {found.group()!r} in a text, the name of a control token; expected none."
                )


def _texts(value: Any) -> Iterator[str]:
    """All texts in a JSON value, names included."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        yield from _texts([*value.keys(), *value.values()])
    elif isinstance(value, Sequence):
        for part in value:
            yield from _texts(part)
