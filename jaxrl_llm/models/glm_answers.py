"""What a GLM-4.5 wrote, taken apart: thinking, content and calls, whole or piece by piece as it is sampled.

    answer   = [white space] ["<think>" thinking "</think>"] content call*
    call     = "<tool_call>" name argument* "</tool_call>"
    argument = "<arg_key>" key "</arg_key>" "<arg_value>" value "</arg_value>"

with white space wherever it is not inside a tag, a key or a value. Rules where an answer is not of this form, so that
nothing that was written is lost:

- Thinking ends at the first "</think>". Where there is none all of the text is thinking, calls in it included, and that
  is a problem. Thinking that was never begun but is ended is content, tag included, and a problem.
- A value ends at the first "</arg_value>": the format has no escapes. White space in it is its own.
- A call that cannot be read, has a parameter twice, or does not end, is a problem that has its text, and is no call.
  A call of a tool that is not there is both.
- Text after a call belongs to the content, on a line of its own, and is a problem of the call.
"""

import re
from collections.abc import Callable
from collections.abc import Sequence

from jaxrl_llm.models.chat_tools import Answer
from jaxrl_llm.models.chat_tools import Problem
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


def render_answer(answer: Answer, *, thinking: bool = True) -> str:
    """The text that `parse_answer` takes apart into this answer: what follows `GlmChat.render`.

    Args:
        answer: without problems.
        thinking: as the prompt was rendered; False leaves out the thinking, which the prompt has closed.

    Raises:
        ValueError: the answer has problems, thinks where it must not, or holds a tag that would be read as one.
    """
    if answer.problems:
        raise ValueError(f"answer has a problem ({answer.problems[0].reason}); only one without can be written.")
    if answer.thinking and not thinking:
        raise ValueError("answer has thinking, and thinking is False; expected none.")
    text = assistant_text(answer.thinking, answer.content, [(call.name, call.arguments) for call in answer.tool_calls])
    text = text if thinking else text.removeprefix("\n" + "".join(THINK))
    found = parse_answer(text)
    if found.problems or (found.thinking, found.content) != (answer.thinking.strip(), answer.content.strip()):
        raise ValueError("answer has a tag in its thinking or content, which would be read as one.")
    return text


class AnswerStream:
    """Takes an answer apart while it comes.

    What `feed` and `finish` give is what is new; joined by `+` it is the answer of the whole text, wherever the text
    was cut. Nothing new ends within a tag or with white space, as both may go on, and a call is given once it is
    whole, since a part of it has no type.
    """

    def __init__(self, tools: Sequence[Tool] | None = None, *, opened: bool = False) -> None:
        self._schemas = None if tools is None else tool_schemas(tools)
        self._rest, self._done = "", False
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
        self._rest += piece
        return self._run(last=False)

    def finish(self) -> Answer:
        """What was held back, at the end of the text."""
        new = self._run(last=True)
        self._done = True
        return new

    def _run(self, *, last: bool) -> Answer:
        new = Answer()
        while (found := self._step(last)) is not None:
            new += found
        return new

    def _start(self, last: bool) -> Answer | None:
        text = self._rest.lstrip()
        if text.startswith(THINK[0]):
            self._rest, self._began, self._step = text.removeprefix(THINK[0]), True, self._think
        elif last or not THINK[0].startswith(text):
            self._step = self._content
        else:
            return None
        return Answer()

    def _think(self, last: bool) -> Answer | None:
        text, found, after = self._rest.partition(THINK[1])
        if found:
            self._rest, self._step = after, self._content
            new = Answer(thinking=self._visible(text))
            self._blank, self._empty = "", True
            return new
        new = Answer(thinking=self._visible(self._take(last)))
        if last:
            self._step = self._content
            return new + Answer(problems=(Problem("thinking", "the thinking does not end"),))
        return _some(new)

    def _content(self, last: bool) -> Answer | None:
        found = IN_CONTENT.search(self._rest)
        if found is None:
            return _some(self._said(self._take(last)))
        text, tag, self._rest = self._rest[: found.start()], found.group(), self._rest[found.end() :]
        if tag == CALL[0]:
            self._step = self._in_call
            return self._said(text)
        # A tag that ends what was never begun; `</think>` in the content of one who has thought is a word.
        new = self._said(text + tag)
        if tag == CALL[1]:
            return new + Answer(problems=(Problem("call", "a call ends that never began"),))
        return new if self._began else new + Answer(problems=(Problem("thinking", "thinking ends that never began"),))

    def _in_call(self, last: bool) -> Answer | None:
        return self._until(IN_CALL, last)

    def _in_value(self, last: bool) -> Answer | None:
        return self._until(IN_VALUE, last)

    def _until(self, tags: re.Pattern[str], last: bool) -> Answer | None:
        found = tags.search(self._rest)
        if found is None:
            self._call.append(self._take(last))
            if not last:
                return None
            self._step = self._content
            return self._broken("a call does not end", "")
        if found.group() == CALL[1]:
            self._call.append(self._rest[: found.start()])
            self._rest, self._step = self._rest[found.end() :], self._content
            return self._read()
        self._call.append(self._rest[: found.end()])
        self._rest = self._rest[found.end() :]
        self._step = self._in_value if found.group() == VALUE[0] else self._in_call
        return Answer()

    def _read(self) -> Answer:
        call, reason = read_call("".join(self._call), self._schemas)
        if call is None:
            return self._broken(reason, CALL[1])
        self._close()
        if self._schemas is not None and call.name not in self._schemas:
            problem = Problem("tool", f"{call.name!r} is none of the tools")
            return Answer(tool_calls=(call,), problems=(problem,))
        return Answer(tool_calls=(call,))

    def _broken(self, reason: str, end: str) -> Answer:
        text = CALL[0] + "".join(self._call) + end
        self._close()
        return Answer(problems=(Problem("call", reason, text),))

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
        return Answer(content=line + new.lstrip(), problems=(Problem("call", "a call is followed by text"),))

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
        count = 0 if last else _begun(self._rest)
        place = len(self._rest) - count
        text, self._rest = self._rest[:place], self._rest[place:]
        return text


def read_call(text: str, schemas: Schemas | None = None) -> tuple[ToolCall | None, str]:
    """The call that stands between the tags of one, or None and why it cannot be read.

    Args:
        text: between `<tool_call>` and `</tool_call>`.
        schemas: of the tools (`tool_schemas`); arguments of tools and parameters that are not there are JSON where
            they can be.
    """
    rest = text.lstrip()
    name = NAME.match(rest)
    if name is None:
        return None, "a call has no name"
    parameters = (schemas or {}).get(name.group(), {})
    rest, arguments = rest[name.end() :].lstrip(), {}
    while rest:
        key, rest = _between(rest, KEY)
        value, rest = _between((rest or "").lstrip(), VALUE) if key is not None else (None, rest)
        if key is None or value is None:
            return None, f"a call of {name.group()!r} has what is no argument"
        if key in arguments:
            return None, f"a call of {name.group()!r} has the argument {key!r} twice"
        arguments[key] = argument_value(value, parameters.get(key))
        rest = rest.lstrip()
    return ToolCall(name.group(), arguments), ""


def _between(text: str, tags: tuple[str, str]) -> tuple[str | None, str]:
    """What stands between the tags that a text begins with, and what follows; None where there are none."""
    if not text.startswith(tags[0]):
        return None, text
    inner, found, rest = text[len(tags[0]) :].partition(tags[1])
    return (inner, rest) if found else (None, text)


def _begun(text: str) -> int:
    """How many letters at the end of a text may be the beginning of a tag."""
    place = text.rfind("<", max(0, len(text) - max(map(len, TAGS)) + 1))
    return len(text) - place if place >= 0 and any(tag.startswith(text[place:]) for tag in TAGS) else 0


def _some(new: Answer) -> Answer | None:
    return new if new != Answer() else None
