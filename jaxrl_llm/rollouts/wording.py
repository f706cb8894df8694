"""An episode of a text world as one text: how tasks, actions and what the world says are written as tokens.

    opening | the task and what is seen at first | asks | action end | shows | what is seen next | again | action end ..

What the policy chooses are its actions, each with the token that ends it. Every piece is encoded by itself, so what
was read once is never encoded otherwise later; in what a world says, the names of control tokens are plain letters.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import tokenizers

from jaxrl_llm.models.chat import ChatFormat
from jaxrl_llm.models.chat import Message
from jaxrl_llm.models.chat import format_chat
from jaxrl_llm.models.glm_chat import NO_THINKING
from jaxrl_llm.models.glm_chat import THINK
from jaxrl_llm.models.tokenizers import Tokenizer


@dataclass(frozen=True)
class Wording:
    """What stands between the texts of a world and the actions of a policy.

    Attributes:
        opening: in front of every episode; read once for a whole batch.
        asks: after each text of the world: now the policy acts.
        end: ends an action; exactly one token.
        shows: between the end of an action and what the world says of it.
        strip: whether white space around what the world says and around actions is removed.
        again: as `asks`, after what was seen next; `asks` itself where None.
    """

    opening: str = ""
    asks: str = "\n> "
    end: str = "\n"
    shows: str = ""
    strip: bool = False
    again: str | None = None

    @classmethod
    def of_chat(cls, chat_format: ChatFormat, *, system: str | None = None) -> Self:
        """The world speaks as the user, the policy answers as the assistant.

        Args:
            chat_format: how turns are written.
            system: a message in front; None for the format's own.
        """
        messages = [Message(role="user", content="")]
        if system is not None:
            messages.insert(0, Message(role="system", content=system))
        before, after = chat_format.before, chat_format.after
        whole = format_chat(messages, chat_format=chat_format, add_generation_prompt=False)
        return cls(
            opening=whole.removesuffix(after),
            asks=after + before.replace("{role}", "assistant"),
            end=chat_format.stop_token,
            shows=after.removeprefix(chat_format.stop_token) + before.replace("{role}", "user"),
            strip=chat_format.strip,
        )

    @classmethod
    def of_glm(cls, *, thinking: bool = True) -> Self:
        """A world that answers calls of tools, as `glm_chat.GLM4_5` writes it: the task is the user's, what is seen
        next are results of tools, and an action ends with <|observation|> or, the last one, with <|user|>.

        Args:
            thinking: False asks for actions without thinking, and closes it before each.
        """
        speaks = "<|assistant|>" + ("" if thinking else "\n" + "".join(THINK))
        return cls(
            opening="[gMASK]<sop><|user|>\n",
            asks=("" if thinking else NO_THINKING) + speaks,
            end="<|observation|>",
            shows="\n<tool_response>\n",
            again="\n</tool_response>" + speaks,
        )


class Script:
    """Turns the texts of an episode into tokens and the policy's tokens into the text of an action.

    Attributes:
        opening: tokens in front of every episode.
        end_ids: tokens that end an action: `Wording.end`, and the tokenizer's end tokens.
    """

    def __init__(self, wording: Wording, tokenizer: Tokenizer) -> None:
        """Raises:
        ValueError: the end of an action is not exactly one token, or no token asks the policy to act.
        """
        self._tokenizer, self._strip = tokenizer, wording.strip
        # Every added token is taken for a special one, so that none of them is found in a world's text.
        described = json.loads(tokenizer.backend.to_str())
        for added in described["added_tokens"]:
            added["special"] = True
        self._plain = tokenizers.Tokenizer.from_str(json.dumps(described))
        self._plain.encode_special_tokens = True
        end = tokenizer.encode(wording.end, add_special_tokens=False)
        if len(end) != 1:
            raise ValueError(
                f"the tokenizer writes {wording.end!r}, which ends an action, as {len(end)} tokens; it must be one."
            )
        self.opening = tokenizer.encode(wording.opening)
        self._asks = tokenizer.encode(wording.asks, add_special_tokens=False)
        self._shows = tokenizer.encode(wording.shows, add_special_tokens=False)
        self._again = self._asks
        if wording.again is not None:
            self._again = tokenizer.encode(wording.again, add_special_tokens=False)
        for name, ids, text in (("asks", self._asks, wording.asks), ("again", self._again, wording.again)):
            if not ids:
                raise ValueError(f"{name} is {text!r}; it must have a token, as something must precede an action.")
        self._end = end[0]
        self.end_ids = tuple(dict.fromkeys((self._end, *tokenizer.eos_ids)))

    def prompt(self, text: str) -> list[int]:
        """The tokens between the opening and the first action."""
        return [*self._content(text), *self._asks]

    def answer(self, action: Sequence[int], text: str) -> list[int]:
        """The tokens between an action and the next one; one that was cut before its end is given it."""
        end = [] if action[-1] in self.end_ids else [self._end]
        return [*end, *self._shows, *self._content(text), *self._again]

    def action(self, text: str) -> list[int]:
        """The tokens of an action, its end among them.

        Raises:
            ValueError: a policy that writes these tokens would have said something else.
        """
        ids = [*self._content(text), self._end]
        if self.said(ids) != text.strip() or set(ids[:-1]) & set(self.end_ids):
            raise ValueError(
                f"the action {text!r} becomes tokens that say {self.said(ids)!r}; it must be one that can be said "
                "without the end of an action in it."
            )
        return ids

    def said(self, action: Sequence[int]) -> str:
        """What the world hears of an action: its text without control tokens and its end, stripped of white space."""
        ids = action[:-1] if action[-1] in self.end_ids else action
        return self._tokenizer.decode(ids).strip()

    def _content(self, text: str) -> list[int]:
        return self._plain.encode(text.strip() if self._strip else text, add_special_tokens=False).ids
