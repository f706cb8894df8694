"""What a GLM-4.5 wrote, taken apart: thinking, content and calls, whole or piece by piece as it is sampled.

    answer   = [white space] ["<think>" thinking "</think>"] content call*
    call     = "<tool_call>" name argument* "</tool_call>"
    argument = "<arg_key>" key "</arg_key>" "<arg_value>" value "</arg_value>"

with white space wherever it is not inside a tag, a key or a value. Rules where an answer is not of this form, so that
nothing that was written is lost:

- Thinking ends at the first "</think>". Where there is none all of the text is thinking, calls in it included, and that
  is a fault. Thinking that was never begun but is ended is content, tag included, and a fault.
- A value ends at the first "</arg_value>": the format has no escapes. White space in it is its own.
- A call that cannot be read, has a parameter twice, or does not end, is a fault that has its text, and is no call.
  A call of a tool that is not there is both. "</tool_call>" without a call is content, and as much a fault as a call
  that does not end.
- Text after a call belongs to the content, on a line of its own, and is a fault, of the text and not of the call.

An answer is read once: the time is proportional to its length, whatever stands in it.
"""

import json
import re
from collections.abc import Callable
from collections.abc import Mapping
from collections.abc import Sequence
from itertools import chain
from typing import Any

from jaxrl_llm.models.chat_tools import Answer
from jaxrl_llm.models.chat_tools import Fault
from jaxrl_llm.models.chat_tools import Schemas
from jaxrl_llm.models.chat_tools import Tool
from jaxrl_llm.models.chat_tools import ToolCall
from jaxrl_llm.models.chat_tools import argument_value
from jaxrl_llm.models.chat_tools import tool_schemas
from jaxrl_llm.models.glm_chat import CALL
from jaxrl_llm.models.glm_chat import KEY
from jaxrl_llm.models.glm_chat import NAME
from jaxrl_llm.models.glm_chat import THINK
from jaxrl_llm.models.glm_chat import VALUE
from jaxrl_llm.models.glm_chat import assistant_text

TAGS = (*THINK, *CALL, *KEY, *VALUE)
IN_CONTENT = re.compile("|".join((CALL[0], CALL[1], THINK[1])))
IN_CALL = re.compile("|".join((CALL[1], VALUE[0])))
IN_VALUE = re.compile(VALUE[1])
BLANK = re.compile(r"\s*")


def parse_answer(text: str, tools: Sequence[Tool] | None = None, *, opened: bool = False) -> Answer:
    """An answer taken apart.

    Args:
        text: what the model wrote after its prompt, without the token that ended it.
        tools: what it may call; None for any tool, with arguments that are JSON where they can be.
        opened: whether the prompt ended inside the thinking.

    Raises:
        ValueError: tools that are none.
    """
    stream = AnswerStream(tools, opened=opened)
    return stream.feed(text) + stream.finish()


def render_answer(answer: Answer, tools: Sequence[Tool] | None = None, *, thinking: bool = True) -> str:
    """The text that `parse_answer(text, tools)` takes apart into this answer: what follows `GlmChat.render`.

    Args:
        answer: without faults.
        tools: what it may call, as for `parse_answer`; without them a text such as "12" cannot be an argument, since it
            would be read as a number.
        thinking: as the prompt was rendered; False leaves out the thinking, which the prompt has closed.

    Raises:
        ValueError: the answer has faults, thinks where it must not, holds a tag that would be read as one, or a call
            that would not be read as it is.
    """
    if answer.faults:
        raise ValueError(f"answer has a fault ({answer.faults[0].reason}); only one without can be written.")
    if answer.thinking and not thinking:
        raise ValueError("answer has thinking, and thinking is False; expected none.")
    text = assistant_text(answer.thinking, answer.content, [(call.name, call.arguments) for call in answer.tool_calls])
    text = text if thinking else text.removeprefix("\n" + "".join(THINK))
    found = parse_answer(text, tools)
    if strays := [fault.reason for fault in found.faults if fault.kind == "tool"]:
        raise ValueError(f"answer has a call that cannot be made: {strays[0]}.")
    if found.faults or (found.thinking, found.content) != (answer.thinking.strip(), answer.content.strip()):
        raise ValueError("answer has a tag in its thinking or content, which would be read as one.")
    for wanted, call in zip(answer.tool_calls, found.tool_calls, strict=True):
        for key, value in wanted.arguments.items():
            if not _is_same(value, call.arguments[key]):
                raise ValueError(
                    f"the argument {key!r} of {wanted.name} is {value!r:.80}, which would be read as "
                    f"{call.arguments[key]!r:.80}."
                )
    return text


class AnswerStream:
    """Takes an answer apart while it comes.

    What `feed` and `finish` give is what is new; joined by `+` it is the answer of the whole text, wherever the text
    was cut. Nothing new ends within a tag or with white space, as both may go on, and a call is given once it is
    whole, since a part of it has no type.
    """

    def __init__(self, tools: Sequence[Tool] | None = None, *, opened: bool = False) -> None:
        self._schemas = None if tools is None else tool_schemas(tools)
        # What came and is not read yet begins at a place in the text, which is not cut anew for each tag.
        self._text, self._place, self._done = "", 0, False
        self._step: Callable[[bool], Answer | None] = self._think if opened else self._start
        self._began = opened
        # Of the thinking or content: white space at its end, which may be inside it, and whether it has begun.
        self._blank, self._empty = "", True
        self._call: list[str] = []
        self._after_call = False

    def feed(self, piece: str) -> Answer:
        """What a further piece of the text brings."""
        if self._done:
            raise ValueError("the answer is finished; expected no further piece.")
        self._text, self._place = self._text[self._place :] + piece, 0
        return self._run(last=False)

    def finish(self) -> Answer:
        """What was held back, at the end of the text."""
        new = self._run(last=True)
        self._done = True
        return new

    def _run(self, *, last: bool) -> Answer:
        parts = []
        while (found := self._step(last)) is not None:
            parts.append(found)
        return Answer(
            "".join(part.thinking for part in parts),
            "".join(part.content for part in parts),
            tuple(chain.from_iterable(part.tool_calls for part in parts)),
            tuple(chain.from_iterable(part.faults for part in parts)),
        )

    def _start(self, last: bool) -> Answer | None:
        self._place = _after_blank(self._text, self._place)
        if self._text.startswith(THINK[0], self._place):
            self._place, self._began, self._step = self._place + len(THINK[0]), True, self._think
        elif last or not THINK[0].startswith(self._text[self._place : self._place + len(THINK[0])]):
            self._step = self._content
        else:
            return None
        return Answer()

    def _think(self, last: bool) -> Answer | None:
        end = self._text.find(THINK[1], self._place)
        if end >= 0:
            new = Answer(thinking=self._visible(self._up_to(end, after=len(THINK[1]))))
            self._step = self._content
            self._blank, self._empty = "", True
            return new
        new = Answer(thinking=self._visible(self._take(last)))
        if last:
            self._step = self._content
            return new + Answer(faults=(Fault("thinking", "the thinking does not end"),))
        return _some(new)

    def _content(self, last: bool) -> Answer | None:
        found = IN_CONTENT.search(self._text, self._place)
        if found is None:
            return _some(self._said(self._take(last)))
        tag = found.group()
        text = self._up_to(found.start(), after=len(tag))
        if tag == CALL[0]:
            self._step = self._in_call
            return self._said(text)
        # A tag that ends what was never begun; `</think>` in the content of one who has thought is a word.
        new = self._said(text + tag)
        if tag == CALL[1]:
            return new + Answer(faults=(Fault("call", "a call ends that never began"),))
        return new if self._began else new + Answer(faults=(Fault("thinking", "thinking ends that never began"),))

    def _in_call(self, last: bool) -> Answer | None:
        return self._until(IN_CALL, last)

    def _in_value(self, last: bool) -> Answer | None:
        return self._until(IN_VALUE, last)

    def _until(self, tags: re.Pattern[str], last: bool) -> Answer | None:
        found = tags.search(self._text, self._place)
        if found is None:
            self._call.append(self._take(last))
            if not last:
                return None
            self._step = self._content
            return self._broken("a call does not end", "")
        if found.group() == CALL[1]:
            self._call.append(self._up_to(found.start(), after=len(CALL[1])))
            self._step = self._content
            return self._read()
        self._call.append(self._up_to(found.end()))
        self._step = self._in_value if found.group() == VALUE[0] else self._in_call
        return Answer()

    def _read(self) -> Answer:
        call, reason = read_call("".join(self._call), self._schemas)
        if call is None:
            return self._broken(reason, CALL[1])
        self._close()
        if self._schemas is not None and call.name not in self._schemas:
            fault = Fault("tool", f"{call.name!r} is none of the tools")
            return Answer(tool_calls=(call,), faults=(fault,))
        return Answer(tool_calls=(call,))

    def _broken(self, reason: str, end: str) -> Answer:
        text = CALL[0] + "".join(self._call) + end
        self._close()
        return Answer(faults=(Fault("call", reason, text),))

    def _close(self) -> None:
        """The end of a call, read or not; white space before it was between content and call."""
        self._call.clear()
        self._blank, self._after_call = "", True

    def _said(self, text: str) -> Answer:
        """A piece of content; after a call it begins a line."""
        line = "" if self._empty else "\n"
        new = self._visible(text)
        if not new or not self._after_call:
            return Answer(content=new)
        self._after_call = False
        return Answer(content=line + new.lstrip(), faults=(Fault("text", "a call is followed by text"),))

    def _visible(self, text: str) -> str:
        """The text, with the white space before it if there is something before that; the one behind it waits."""
        text = self._blank + text
        kept = text.rstrip()
        self._blank = text[len(kept) :]
        if kept and self._empty:
            self._empty, kept = False, kept.lstrip()
        return kept

    def _take(self, last: bool) -> str:
        """What stands waiting, but for the beginning of a tag."""
        count = 0 if last else _begun(self._text, self._place)
        return self._up_to(len(self._text) - count)

    def _up_to(self, end: int, *, after: int = 0) -> str:
        """What stands before a place in the text; what comes next begins so many letters after that place."""
        text, self._place = self._text[self._place : end], end + after
        return text


def read_call(text: str, schemas: Schemas | None = None) -> tuple[ToolCall | None, str]:
    """The call that stands between the tags of one, or None and why it cannot be read.

    Args:
        text: between `<tool_call>` and `</tool_call>`.
        schemas: of the tools (`tool_schemas`); arguments of tools and parameters that are not there are JSON where
            they can be.
    """
    name = NAME.match(text, _after_blank(text, 0))
    if name is None:
        return None, "a call has no name"
    parameters = (schemas or {}).get(name.group(), {})
    place, arguments = _after_blank(text, name.end()), {}
    while place < len(text):
        key, end = _between(text, place, KEY)
        value, end = _between(text, _after_blank(text, end), VALUE)
        if key is None or value is None:
            return None, f"a call of {name.group()!r} has what is no argument"
        if key in arguments:
            return None, f"a call of {name.group()!r} has the argument {key!r} twice"
        arguments[key] = argument_value(value, parameters.get(key))
        place = _after_blank(text, end)
    return ToolCall(name.group(), arguments), ""


def _between(text: str, place: int, tags: tuple[str, str]) -> tuple[str | None, int]:
    """What stands between the tags that begin at a place, and where they end; None where there are none."""
    start = place + len(tags[0])
    end = text.find(tags[1], start) if text.startswith(tags[0], place) else -1
    return (None, place) if end < 0 else (text[start:end], end + len(tags[1]))


def _after_blank(text: str, place: int) -> int:
    found = BLANK.match(text, place)
    return place if found is None else found.end()


def _begun(text: str, start: int) -> int:
    """How many letters at the end of a text, from a place on, may be the beginning of a tag."""
    place = text.rfind("<", max(start, len(text) - max(map(len, TAGS)) + 1))
    return len(text) - place if place >= 0 and any(tag.startswith(text[place:]) for tag in TAGS) else 0


def _is_same(one: Any, other: Any) -> bool:
    """Whether two arguments are the same JSON value, numbers and true told apart, as the order of names is."""
    one, other = (json.dumps(dict(x) if isinstance(x, Mapping) else x) for x in (one, other))
    return one == other


def _some(new: Answer) -> Answer | None:
    return new if new != Answer() else None
