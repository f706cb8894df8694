"""Chat messages as the text a model was trained on: by the checkpoint's own template, or by a format known here.

A format is data: what stands before and after each turn. It covers the templates that only join turns; templates that
rewrite messages (tools, dates, reasoning blocks) are out of its reach, and `checkpoint_chat` renders them.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypedDict

from jaxrl_llm.models.chat_template import render_chat
from jaxrl_llm.models.tokenizers import Tokenizer


class Message(TypedDict):
    """One turn: `role` is "system", "user" or "assistant"."""

    role: str
    content: str


@dataclass(frozen=True)
class ChatFormat:
    """How turns are written.

    Attributes:
        before: text before a turn's content; `{role}` stands for the role.
        after: text after it.
        stop_token: the special token that ends the assistant's turn; generation stops at it.
        default_system: system message put in front when the first message is not one; None for none.
        strip: whether white space around each content is removed.
    """

    before: str
    after: str
    stop_token: str
    default_system: str | None = None
    strip: bool = False


CHATML = ChatFormat(before="<|im_start|>{role}\n", after="<|im_end|>\n", stop_token="<|im_end|>")
"""ChatML by itself: Qwen3 and many fine-tunes. Other models put a system line of their own in front: see below."""

QWEN2 = ChatFormat(
    before=CHATML.before,
    after=CHATML.after,
    stop_token=CHATML.stop_token,
    default_system="You are a helpful assistant.",
)
"""ChatML with the system line of Qwen2's own template."""

QWEN2_5 = ChatFormat(
    before=CHATML.before,
    after=CHATML.after,
    stop_token=CHATML.stop_token,
    default_system="You are Qwen, created by Alibaba Cloud. You are a helpful assistant.",
)
"""ChatML with the system line of Qwen2.5's own template."""

SMOLLM2 = ChatFormat(
    before=CHATML.before,
    after=CHATML.after,
    stop_token=CHATML.stop_token,
    default_system="You are a helpful AI assistant named SmolLM, trained by Hugging Face",
)
"""ChatML with the system line of SmolLM2's own template."""

LLAMA3 = ChatFormat(
    before="<|start_header_id|>{role}<|end_header_id|>\n\n", after="<|eot_id|>", stop_token="<|eot_id|>", strip=True
)
"""Llama 3; its start token is not part of the text, since the tokenizer puts it in front."""


def format_chat(
    messages: Sequence[Message], *, chat_format: ChatFormat = SMOLLM2, add_generation_prompt: bool = True
) -> str:
    """The messages as one text.

    Args:
        messages: the turns, oldest first.
        chat_format: how turns are written.
        add_generation_prompt: end with the opening of an assistant turn, so that the model writes that turn.

    Raises:
        ValueError: no messages, or a message with keys other than `role` and `content`.
    """
    if not messages:
        raise ValueError("messages is empty; format_chat needs at least one.")
    for index, message in enumerate(messages):
        if set(message) != {"role", "content"}:
            raise ValueError(f"messages[{index}] has the keys {sorted(message)}; expected exactly content and role.")
    turns = list(messages)
    if chat_format.default_system is not None and turns[0]["role"] != "system":
        turns.insert(0, Message(role="system", content=chat_format.default_system))
    text = "".join(_turn(message, chat_format) for message in turns)
    return text + chat_format.before.replace("{role}", "assistant") if add_generation_prompt else text


def chat_prompt(question: str, *, chat_format: ChatFormat = SMOLLM2) -> str:
    """One question of a user as a text that the model answers."""
    return format_chat([Message(role="user", content=question)], chat_format=chat_format)


def checkpoint_chat(
    messages: Sequence[Message],
    tokenizer: Tokenizer,
    *,
    chat_format: ChatFormat = SMOLLM2,
    add_generation_prompt: bool = True,
) -> str:
    """The messages as one text: by the template that came with the tokenizer, else by `chat_format`.

    Templates write the start token themselves where there is one, as a text: encode what they give with
    `add_special_tokens=False` (`chat_ids` does).

    Raises:
        ModelFileError: the template fails or leaves its bounds.
        ValueError: messages that `format_chat` or the template refuses.
    """
    # The format's own checks hold for templates too.
    plain = format_chat(messages, chat_format=chat_format, add_generation_prompt=add_generation_prompt)
    if tokenizer.chat_template is None:
        return plain
    ids = {"bos_token": tokenizer.bos_id, "eos_token": tokenizer.eos_id, "pad_token": tokenizer.pad_id}
    names = {name: tokenizer.backend.id_to_token(token) for name, token in ids.items() if token is not None}
    return render_chat(
        tokenizer.chat_template,
        messages,
        add_generation_prompt=add_generation_prompt,
        special_tokens={name: text for name, text in names.items() if text is not None},
    )


def chat_ids(
    messages: Sequence[Message],
    tokenizer: Tokenizer,
    *,
    chat_format: ChatFormat = SMOLLM2,
    add_generation_prompt: bool = True,
) -> list[int]:
    """Token ids of `checkpoint_chat`; what a template wrote gets no second start token."""
    text = checkpoint_chat(messages, tokenizer, chat_format=chat_format, add_generation_prompt=add_generation_prompt)
    return tokenizer.encode(text, add_special_tokens=tokenizer.chat_template is None)


def _turn(message: Message, chat_format: ChatFormat) -> str:
    content = message["content"].strip() if chat_format.strip else message["content"]
    return chat_format.before.replace("{role}", message["role"]) + content + chat_format.after
