"""Which parts of a conversation its model wrote, the token that ends each of its turns included."""

from collections.abc import Mapping
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from jaxrl_llm.models.chat import Chat
from jaxrl_llm.models.chat_tools import Tool


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

    Returns:
        Texts in the order of their answers; in each of them given and written pieces take turns.

    Raises:
        ValueError: no answer, one that the chat does not write after its prompt, or one with a token that ends one.
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
        # The representation of a message has every text of it, arguments of calls among them.
        if any(stop in repr(message) for stop in chat.stop_tokens):
            raise ValueError(f"messages[{index}] has the name of a token in it that ends an answer.")
        end = chat.end(message)
        answer = whole[len(opened) :].partition(end)[0]
        if not texts or not opened.startswith(done):
            texts.append([])
            done = ""
        texts[-1] += [Piece(opened[len(done) :]), Piece(answer, end)]
        done = opened + answer + end
    if not texts:
        raise ValueError("messages has no turn of the assistant that is to be written; expected one.")
    return [tuple(pieces) for pieces in texts]
