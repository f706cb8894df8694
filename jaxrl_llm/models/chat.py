"""Chat messages as the text a model was trained on: by the checkpoint's own template, or by a format known here.

Whoever writes messages is a `Chat`. A `ChatFormat` is data: what stands before and after each turn, for the templates
that only join turns. A `TemplateChat` is a checkpoint's Jinja template, which may rewrite messages (tools, dates,
thinking). `glm_chat.GLM4_5` is the format of GLM-4.5, tools and thinking included.
"""

from collections.abc import Mapping
from collections.abc import Sequence
from dataclasses import dataclass
from dataclasses import field
from typing import Any
from typing import Protocol
from typing import TypedDict

from jaxrl_llm.models.chat_template import render_chat
from jaxrl_llm.models.chat_tools import Tool
from jaxrl_llm.models.chat_tools import tool_schemas
from jaxrl_llm.models.tokenizers import Tokenizer


class Message(TypedDict):
    """One turn: `role` is "system", "user" or "assistant"."""

    role: str
    content: str


class Chat(Protocol):
    """Writes messages as a text that a model answers, and knows which tokens end an answer."""

    @property
    def stop_tokens(self) -> tuple[str, ...]:
        """The tokens with which an answer can end; generation stops at them."""
        ...

    def end(self, message: Mapping[str, Any]) -> str:
        """The token that ends this answer of the assistant."""
        ...

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Tool] | None = None,
        thinking: bool = True,
        generation: bool = True,
    ) -> str:
        """The messages as one text.

        Args:
            messages: the turns, oldest first.
            tools: what the model may call.
            thinking: False asks for an answer without thinking.
            generation: end with the opening of an assistant turn, so that the model writes that turn.

        Raises:
            ValueError: what cannot be written.
        """
        ...


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

    @property
    def stop_tokens(self) -> tuple[str, ...]:
        """The one token that ends an answer."""
        return (self.stop_token,)

    def end(self, message: Mapping[str, Any]) -> str:
        """The same for every answer."""
        return self.stop_token

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Tool] | None = None,
        thinking: bool = True,
        generation: bool = True,
    ) -> str:
        """`format_chat`; such a format has no tools and cannot ask for an answer without thinking."""
        if tools or not thinking:
            what = "has no tools" if tools else "cannot ask for thinking=False"
            raise ValueError(f"this chat format {what}; take the checkpoint's own template (TemplateChat).")
        return format_chat(messages, chat_format=self, add_generation_prompt=generation)


@dataclass(frozen=True)
class TemplateChat:
    """A checkpoint's own Jinja template as a `Chat`: it is told `tools`, and `enable_thinking=False` where asked to.

    Attributes:
        template: the Jinja source.
        stop_token: the token that ends an answer.
        special_tokens: names of special tokens (bos_token, ...) that the template may write.
        further_stops: other tokens that can end one; which of them does, the template says.
    """

    template: str
    stop_token: str
    special_tokens: Mapping[str, str] = field(default_factory=dict)
    further_stops: tuple[str, ...] = ()

    @classmethod
    def of(cls, tokenizer: Tokenizer) -> "TemplateChat":
        """The template that came with a tokenizer, whose answers end with any of its end tokens.

        Raises:
            ValueError: none came, or no end token has a text.
        """
        if tokenizer.chat_template is None:
            raise ValueError("tokenizer has no chat template; take a ChatFormat.")
        ids = {"bos_token": tokenizer.bos_id, "eos_token": tokenizer.eos_id, "pad_token": tokenizer.pad_id}
        names = {name: tokenizer.backend.id_to_token(token) for name, token in ids.items() if token is not None}
        special = {name: text for name, text in names.items() if text is not None}
        ends = [text for text in map(tokenizer.backend.id_to_token, tokenizer.eos_ids) if text]
        if not ends:
            raise ValueError(f"the tokenizer has no text for its end tokens {tokenizer.eos_ids}; a chat needs one.")
        return cls(tokenizer.chat_template, ends[0], special, tuple(ends[1:]))

    @property
    def stop_tokens(self) -> tuple[str, ...]:
        """The tokens with which an answer can end."""
        return (self.stop_token, *self.further_stops)

    def end(self, message: Mapping[str, Any]) -> str:
        """The stop token that the template writes first after such an answer, be it that of the next turn.

        Raises:
            ValueError: it writes none of several.
        """
        if not self.further_stops:
            return self.stop_token
        after = self.render(plain_turns(message), generation=False).rpartition(PLAIN)[2]
        found = [stop for stop in self.stop_tokens if stop in after]
        if not found:
            raise ValueError(
                f"the chat template writes none of {', '.join(map(repr, self.stop_tokens))} after an answer; it must "
                "write one of them."
            )
        return min(found, key=after.index)

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Tool] | None = None,
        thinking: bool = True,
        generation: bool = True,
    ) -> str:
        """See `Chat.render` and `chat_template.render_chat`; a template may pass over what it does not know.

        Raises:
            ModelFileError: the template is no template, fails or leaves its bounds.
            ValueError: tools that are none, or messages that the template refuses.
        """
        if tools is not None:
            tool_schemas(tools)
        # Where thinking is wanted a template does as it does by itself: not all of them think by default.
        return render_chat(
            self.template,
            messages,
            add_generation_prompt=generation,
            special_tokens=self.special_tokens,
            tools=None if tools is None else list(tools),
            **({} if thinking else {"enable_thinking": False}),
        )


PLAIN = "answer"
"""What the assistant says in `plain_turns`."""


def plain_turns(message: Mapping[str, Any]) -> list[dict[str, Any]]:
    """A question, a plain answer that calls a tool where this one does, and the turn after it: what a chat writes
    around such an answer, whatever is said.
    """
    calls = [{"type": "function", "id": "call", "function": {"name": "f", "arguments": {}}}]
    answer = {"role": "assistant", "content": PLAIN}
    if not message.get("tool_calls"):
        return [{"role": "user", "content": "a"}, answer, {"role": "user", "content": "b"}]
    return [
        {"role": "user", "content": "a"},
        answer | {"tool_calls": calls},
        {"role": "tool", "content": "b", "tool_call_id": "call", "name": "f"},
    ]


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
    messages: Sequence[Mapping[str, Any]], *, chat_format: ChatFormat = SMOLLM2, add_generation_prompt: bool = True
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
    turns: list[Mapping[str, Any]] = list(messages)
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
    return TemplateChat.of(tokenizer).render(messages, generation=add_generation_prompt)


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


def _turn(message: Mapping[str, Any], chat_format: ChatFormat) -> str:
    content = message["content"].strip() if chat_format.strip else message["content"]
    return chat_format.before.replace("{role}", message["role"]) + content + chat_format.after
