"""Dialogues as rows of tokens: exactly what the policy would have chosen is marked, its end tokens included."""

import dataclasses
from collections.abc import Sequence
from typing import Literal

import numpy as np

from jaxrl_llm.models.chat import ChatFormat
from jaxrl_llm.models.chat import Message
from jaxrl_llm.models.chat import format_chat
from jaxrl_llm.models.chat_pieces import Piece
from jaxrl_llm.models.chat_pieces import control_names
from jaxrl_llm.models.tokenizers import Tokenizer
from jaxrl_llm.rollouts.collect.protocol import BatchShape
from jaxrl_llm.trajectory import OUTSIDE
from jaxrl_llm.trajectory import Trajectories

ROLES = ("system", "user", "assistant")
TooLong = Literal["drop", "cut"]
"""What becomes of a row that does not fit."""


@dataclasses.dataclass(frozen=True)
class Dialog:
    """Turns of which the assistant's, from `first_chosen` on, are the policy's.

    Attributes:
        messages: the turns, oldest first; the last one is the assistant's.
        first_chosen: turns before this one are given, whoever speaks.
    """

    messages: tuple[Message, ...]
    first_chosen: int = 0


@dataclasses.dataclass(frozen=True)
class Row:
    """One row of tokens.

    Attributes:
        tokens: ids.
        steps: which turn of the policy each token belongs to, 0, 1, ..; -1 where it was given.
        ended: whether the row came to its end.
    """

    tokens: np.ndarray
    steps: np.ndarray
    ended: bool = True


def fitted(row: Row, width: int, actions: int, too_long: TooLong) -> Row | None:
    """The row where it has at most `width` tokens, `actions` of them chosen; else what fits of it, or None.

    A row that is cut ends with a chosen token, and has not ended; None where none would be left, or for "drop".
    """
    chosen = np.flatnonzero(row.steps != OUTSIDE)
    kept = chosen[:actions][chosen[:actions] < width]
    if len(kept) == len(chosen):
        return row
    if not len(kept) or too_long == "drop":
        return None
    return Row(row.tokens[: kept[-1] + 1], row.steps[: kept[-1] + 1], ended=False)


def room(shape: BatchShape) -> str:
    """How much fits into a row, as a sentence names it."""
    return f"{shape.width} tokens, {shape.actions} of them chosen"


def require_settings(*, width: int, too_long: str) -> None:
    """Raise a ValueError for settings of a collector of dialogues that cannot be."""
    if width < 2:
        raise ValueError(f"width is {width}; it must be at least 2, as the first token of a row is given.")
    if too_long not in ("drop", "cut"):
        raise ValueError(f"too_long is {too_long!r}; it must be 'drop' or 'cut'.")


def as_messages(value: object, role: str, place: str) -> tuple[Message, ...]:
    """A text as one message of this role, a list of messages as it is.

    Raises:
        ValueError: it is neither.
    """
    if isinstance(value, str):
        return (Message(role=role, content=value),)
    if not isinstance(value, list):
        raise ValueError(f"{place} is a {type(value).__name__}; expected a text or a list of messages.")
    for number, message in enumerate(value, start=1):
        _check_message(message, f"message {number} of {place}")
    return tuple(value)


def check_turns(dialog: Dialog, place: str, *, chat: bool) -> None:
    """Raise a ValueError, naming the place, unless its turns make a dialogue, whatever the tokenizer.

    Args:
        dialog: the turns.
        place: where it stands.
        chat: whether turns are written in a chat format; without one there is one prompt and one response.
    """
    if not dialog.messages:
        raise ValueError(f"{place} has no messages; a demonstration needs a prompt and a response.")
    roles = [message["role"] for message in dialog.messages]
    if roles[-1] != "assistant" or len(roles) <= dialog.first_chosen:
        raise ValueError(f"{place} has no response: it ends with a turn of the {roles[-1]}, not of the assistant.")
    if "assistant" in roles[:1]:
        raise ValueError(f"{place} begins with the assistant's turn; a prompt must stand before it.")
    for number, message in enumerate(dialog.messages):
        if message["role"] == "assistant" and number >= dialog.first_chosen and not message["content"].strip():
            raise ValueError(f"{place} has an empty response in message {number + 1}; every response needs text.")
    if not chat and roles != ["user", "assistant"]:
        raise ValueError(
            f"{place} has the turns {', '.join(roles)}; without a chat format only one prompt and one response fit."
        )


class DialogEncoder:
    """Turns dialogues into rows as the sampler would have made them.

    A prompt is encoded in one piece and the answer on its own, so the tokens before an answer are those that a rollout
    of the same prompt starts from, and the answer ends in the token that ends a rollout.

    Args:
        tokenizer: text to ids.
        chat_format: how turns are written; None joins one prompt and one answer as they are.

    Raises:
        ValueError: the tokenizer lacks the format's end token.
    """

    def __init__(self, tokenizer: Tokenizer, chat_format: ChatFormat | None) -> None:
        self.tokenizer = tokenizer
        self.chat_format = chat_format
        self.stop_id = tokenizer.eos_id
        if chat_format is not None:
            stop_id = tokenizer.backend.token_to_id(chat_format.stop_token)
            if stop_id is None:
                raise ValueError(
                    f"the tokenizer must have {chat_format.stop_token!r}, with which an answer ends; it has not."
                )
            self.stop_id = int(stop_id)
        frame = "" if chat_format is None else chat_format.before + chat_format.after
        self._control = control_names(tokenizer, frame, {self.stop_id})

    def check(self, dialog: Dialog, place: str) -> None:
        """Raise a ValueError, naming the place, unless the dialogue can be encoded."""
        check_turns(dialog, place, chat=self.chat_format is not None)
        for message in dialog.messages:
            if found := self._control.search(message["content"]):
                raise ValueError(
                    f"{place} has {found.group()!r} in a text; the name of a control token cannot stand there."
                )
        if self.chat_format is None and not self.tokenizer.encode(dialog.messages[0]["content"]):
            raise ValueError(f"{place} has an empty prompt; without a chat format it must have at least one token.")

    def encode(self, dialog: Dialog) -> Row:
        """The row of a dialogue that `check` lets through; a row ends with the last response."""
        pieces: list[Piece] = []
        # Without a format the end token may have no text: its id says it.
        done, end = "", "end" if self.chat_format is None else self.chat_format.stop_token
        for number, message in enumerate(dialog.messages):
            if message["role"] != "assistant" or number < dialog.first_chosen:
                continue
            opened, content, done_after = self._around(dialog.messages[: number + 1])
            if not opened.startswith(done):
                raise ValueError("chat_format rewrites earlier turns; it must only add to them.")
            pieces += [Piece(opened[len(done) :]), Piece(content, end)]
            done = done_after
        return encode_pieces(pieces, self.tokenizer, stop_id=self.stop_id)

    def _around(self, messages: Sequence[Message]) -> tuple[str, str, str]:
        """Of the last turn: the text before it, its own, and both with the end token."""
        content = messages[-1]["content"]
        if self.chat_format is None:
            opened, stop = messages[0]["content"], ""
        else:
            opened, stop = format_chat(messages[:-1], chat_format=self.chat_format), self.chat_format.stop_token
            content = content.strip() if self.chat_format.strip else content
            whole = format_chat(messages, chat_format=self.chat_format, add_generation_prompt=False)
            if not whole.startswith(opened + content + stop):
                raise ValueError("chat_format must write an answer as it is, and its stop_token right after it.")
        return opened, content, opened + content + stop


def encode_pieces(
    pieces: Sequence[Piece], tokenizer: Tokenizer, *, starts: bool = False, stop_id: int | None = None
) -> Row:
    """The row of a text in pieces (`chat_pieces.written_pieces`): the model's tokens are chosen, their ends included.

    Args:
        pieces: given and written ones; each is encoded by itself, as a prompt and an answer to it are.
        tokenizer: text to ids.
        starts: whether the text has its start tokens, as those of Jinja templates and of GLM-4.5 have.
        stop_id: the token that ends every answer; by default the one that the end of its piece names.

    Raises:
        ValueError: the tokenizer lacks the token that ends a piece.
    """
    tokens: list[int] = []
    steps: list[int] = []
    step = 0
    for piece in pieces:
        ids = tokenizer.encode(piece.text, add_special_tokens=not tokens and not starts)
        if piece.written:
            end = tokenizer.backend.token_to_id(piece.end) if stop_id is None else stop_id
            if end is None:
                raise ValueError(f"the tokenizer must have {piece.end!r}, with which an answer ends; it has not.")
            ids.append(int(end))
        tokens += ids
        steps += [step if piece.written else OUTSIDE] * len(ids)
        step += piece.written
    return Row(np.array(tokens, np.int32), np.array(steps, np.int32))


def rows_to_trajectories(
    rows: Sequence[Row], *, width: int, pad_id: int, group_ids: Sequence[int], outcomes: Sequence[float]
) -> Trajectories:
    """Rows from the first column on, padding after them; nobody's log-probs, and versions unknown.

    Args:
        rows: B rows of at most `width` tokens, each with a chosen one.
        width: T.
        pad_id: token of the padding.
        group_ids, outcomes: of each row; the outcome stands at the last chosen token.
    """
    shape = (len(rows), width)
    tokens, steps = np.full(shape, pad_id, np.int32), np.full(shape, OUTSIDE, np.int32)
    mask, rewards = np.zeros(shape, bool), np.zeros(shape, np.float32)
    for number, (row, outcome) in enumerate(zip(rows, outcomes, strict=True)):
        count = len(row.tokens)
        tokens[number, :count], steps[number, :count], mask[number, :count] = row.tokens, row.steps, True
        rewards[number, np.flatnonzero(row.steps != OUTSIDE)[-1]] = outcome
    chosen = steps != OUTSIDE
    return Trajectories(
        tokens=tokens,
        token_mask=mask,
        action_mask=chosen,
        group_ids=np.asarray(group_ids, np.int32),
        rewards=rewards,
        log_prob_behaviour=None,
        step_ids=steps,
        actor_ids=np.where(chosen, np.int32(0), np.int32(OUTSIDE)),
        versions=np.full(shape, OUTSIDE, np.int32),
        ended=np.array([row.ended for row in rows], bool),
    )


def chosen_texts(row: Row, tokenizer: Tokenizer) -> list[str]:
    """What the policy chose in each of its turns, decoded."""
    return [tokenizer.decode(row.tokens[row.steps == step]) for step in range(int(row.steps.max(initial=-1)) + 1)]


def _check_message(message: object, place: str) -> None:
    if not isinstance(message, dict) or set(message) != {"role", "content"}:
        keys = sorted(map(str, message)) if isinstance(message, dict) else type(message).__name__
        raise ValueError(f"{place} has the keys {keys}; expected exactly content and role.")
    if message["role"] not in ROLES:
        raise ValueError(f"{place} has the role {message['role']!r}; expected one of {', '.join(ROLES)}.")
    if not isinstance(message["content"], str):
        raise ValueError(f"{place} has a content of type {type(message['content']).__name__}; expected a text.")
