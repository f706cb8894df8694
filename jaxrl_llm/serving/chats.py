"""/v1/chat/completions: messages, and the assistant's next turn."""

import dataclasses
import json
import uuid
from collections.abc import Mapping
from collections.abc import Sequence
from typing import Any

from jaxrl_llm.models.chat import Chat
from jaxrl_llm.models.chat import ChatFormat
from jaxrl_llm.models.chat_tools import Answer
from jaxrl_llm.models.chat_tools import ToolCall
from jaxrl_llm.models.glm_chat import GlmChat
from jaxrl_llm.models.tokenizers import Tokenizer
from jaxrl_llm.rollouts.constrained import Grammar
from jaxrl_llm.serving.answers import Reporting
from jaxrl_llm.serving.answers import versions
from jaxrl_llm.serving.errors import bad
from jaxrl_llm.serving.fields import Fields
from jaxrl_llm.serving.fields import shown
from jaxrl_llm.serving.generation import Generation
from jaxrl_llm.serving.generation import Job
from jaxrl_llm.serving.generation import Piece
from jaxrl_llm.serving.generation import Token
from jaxrl_llm.serving.messages import checked_tools
from jaxrl_llm.serving.messages import rendered
from jaxrl_llm.serving.messages import stream_of
from jaxrl_llm.serving.sampling_fields import read_sampling
from jaxrl_llm.serving.structure import call_grammar
from jaxrl_llm.serving.structure import response_schema
from jaxrl_llm.serving.structure import schema_grammar
from jaxrl_llm.serving.tokens import token_bytes
from jaxrl_llm.serving.tokens import token_text

MOST_LISTED = 20
"""Log-probs at a place."""


class ChatForm:
    """A request of chat completions.

    Args:
        body: of the request.
        chat: of the model.
        tokenizer: of the model.
        end_ids: tokens that end an answer.
        vocab_size: of the model.
        context: tokens of prompt and answer.

    Raises:
        APIError: a body that cannot be answered.
    """

    names = ("chatcmpl", "chat.completion", "chat.completion.chunk")

    def __init__(
        self,
        body: Mapping[str, Any],
        chat: Chat,
        tokenizer: Tokenizer,
        *,
        end_ids: tuple[int, ...],
        vocab_size: int,
        context: int,
    ) -> None:
        fields = Fields(body)
        fields.ignore("model")
        self.chat = chat
        self.sampling = read_sampling(fields, end_ids=end_ids, vocab_size=vocab_size)
        self.reporting = Reporting(tokenizer, self.sampling)
        listed = fields.integer("top_logprobs", 0, 0, MOST_LISTED)
        self.listed = listed if fields.flag("logprobs") else None
        if listed and self.listed is None:
            raise bad("top_logprobs is given without logprobs; set logprobs to true.", "top_logprobs")
        self.reporting.require_raw(listed, "top_logprobs")
        self.tools = checked_tools(fields.get("tools"))
        schema, called = response_schema(fields), self._must_call(fields.get("tool_choice"))
        # What a grammar holds must come first, so nothing is thought before it.
        thinks = self._thinks(fields)
        self.thinking = schema is None and not called and thinks
        text = rendered(chat, fields.get("messages"), self.tools, thinking=self.thinking)
        prompt = tuple(tokenizer.encode(text, add_special_tokens=isinstance(chat, ChatFormat)))
        several = True if fields.get("parallel_tool_calls") is None else fields.flag("parallel_tool_calls")
        grammar = self._grammar(schema, called, several=several)
        room = max(context - len(prompt), 1)
        older = fields.integer("max_tokens", room, 1, 2**31 - 1)
        max_tokens = fields.integer("max_completion_tokens", older, 1, 2**31 - 1)
        fields.require_all_read()
        # Where tags have a meaning they must be seen, though a tokenizer may call them special.
        tagged = bool(self.tools) or isinstance(chat, GlmChat)
        self.sampling = dataclasses.replace(
            self.sampling, skip_special_tokens=self.sampling.skip_special_tokens and not tagged
        )
        self.generations: Sequence[Generation] = [
            self.sampling.generation(prompt, index, max_tokens=max_tokens, listed=self.listed or 0, grammar=grammar)
            for index in range(self.sampling.count)
        ]

    def choice(self, index: int) -> "ChatChoice":
        """An empty choice."""
        return ChatChoice(index, self)

    def _thinks(self, fields: Fields) -> bool:
        options = fields.inner("chat_template_kwargs")
        thinks = True if options.get("enable_thinking") is None else options.flag("enable_thinking")
        options.require_all_read()
        return thinks

    def _must_call(self, choice: Any) -> bool:
        """Whether a tool must be called; `self.tools` are then those that may be."""
        if choice in (None, "auto"):
            return False
        if choice == "none":
            self.tools = []
            return False
        if choice == "required":
            named = self.tools
        else:
            function = choice.get("function") if isinstance(choice, dict) else None
            name = function.get("name") if isinstance(function, dict) else None
            named = [tool for tool in self.tools if tool["function"]["name"] == name]
        if not named:
            raise bad(
                f"tool_choice is {shown(choice)}; expected auto, none, required or a tool of tools.", "tool_choice"
            )
        self.tools = named
        return True

    def _grammar(self, schema: Mapping[str, Any] | None, called: bool, *, several: bool) -> Grammar | None:
        if called or (self.tools and schema is not None):
            answer = None if called else schema
            glm = isinstance(self.chat, GlmChat)
            return call_grammar(self.tools, answer, self.reporting.tokenizer, glm=glm, several=several)
        return None if schema is None else schema_grammar(schema, "response_format")


class ChatChoice:
    """One turn of the assistant, as it gathers."""

    def __init__(self, index: int, form: ChatForm) -> None:
        self._index, self._form = index, form
        self.tokens: list[Token] = []
        self._stream = stream_of(form.chat, form.tools)
        self._answer, self._finish, self._begun = Answer(), None, False
        # One name for each call of each answer, so that results can be told apart.
        self._call = f"call_{uuid.uuid4().hex}"

    def add(self, piece: Piece, job: Job) -> list[dict[str, Any]]:
        """See `answers.Choice`."""
        new = self._stream.feed(piece.text)
        if piece.finish is not None:
            new += self._stream.finish()
        calls = len(self._answer.tool_calls)
        self.tokens += piece.tokens
        self._answer += new
        if piece.finish is not None:
            self._finish = "tool_calls" if self._answer.tool_calls and piece.finish == "stop" else piece.finish
        if not self._form.sampling.stream:
            return []
        first, self._begun = not self._begun, True
        delta: dict[str, Any] = {"role": "assistant", "content": ""} if first else {}
        if new.content:
            delta["content"] = new.content
        if new.thinking:
            delta["reasoning_content"] = new.thinking
        if new.tool_calls:
            written = [self._written_call(call, calls + place) for place, call in enumerate(new.tool_calls)]
            delta["tool_calls"] = [{"index": calls + place, **call} for place, call in enumerate(written)]
        return [self._written("delta", delta, piece.tokens, job, first=first)]

    def whole(self, job: Job) -> dict[str, Any]:
        """See `answers.Choice`."""
        answer = self._answer
        message: dict[str, Any] = {"role": "assistant", "content": answer.content, "refusal": None}
        if answer.thinking:
            message["reasoning_content"] = answer.thinking
        if answer.tool_calls:
            message["content"] = answer.content or None
            message["tool_calls"] = [self._written_call(call, place) for place, call in enumerate(answer.tool_calls)]
        return self._written("message", message, self.tokens, job, first=True)

    def _written(
        self, name: str, content: Mapping[str, Any], tokens: Sequence[Token], job: Job, *, first: bool
    ) -> dict[str, Any]:
        written: dict[str, Any] = {"index": self._index, name: content, "finish_reason": self._finish, "logprobs": None}
        if self._form.listed is not None:
            written["logprobs"] = {"content": [self._log_prob(token) for token in tokens], "refusal": None}
        if self._form.sampling.return_ids:
            written["token_ids"] = [token.id for token in tokens]
            if first:
                written["prompt_token_ids"] = list(job.asked.prompt)
        if self._finish is not None:
            written["weights_versions"] = versions(self.tokens)
        return written

    def _log_prob(self, token: Token) -> dict[str, Any]:
        top = [self._entry(one, value) for one, value in token.top]
        return {**self._entry(token.id, self._form.reporting.log_prob(token)), "top_logprobs": top}

    def _entry(self, token: int, log_prob: float) -> dict[str, Any]:
        tokenizer, as_id = self._form.reporting.tokenizer, self._form.sampling.ids_as_tokens
        text = token_text(tokenizer, token, as_id=as_id)
        return {"token": text, "logprob": log_prob, "bytes": list(token_bytes(tokenizer, token))}

    def _written_call(self, call: ToolCall, place: int) -> dict[str, Any]:
        arguments = json.dumps(dict(call.arguments), ensure_ascii=False)
        called = {"name": call.name, "arguments": arguments}
        return {"id": f"{self._call}_{place}", "type": "function", "function": called}
