"""A checkpoint's own chat template, which is a program of a stranger: rendered in a sandbox and within bounds.

Templates are written for Jinja with the settings that transformers gives it: the first newline after a block and the
blanks before it vanish, loops may break, and there are `raise_exception`, `strftime_now`, `tojson` without escapes, and
a `generation` block around what the assistant says. A render may take so many steps and make so many letters; nothing
in it reaches Python's own objects.
"""

import datetime
import json
import threading
import time
from collections.abc import Callable
from collections.abc import Iterable
from collections.abc import Iterator
from collections.abc import Mapping
from collections.abc import Sequence
from functools import lru_cache
from functools import wraps
from typing import Any

from jinja2 import nodes
from jinja2.compiler import CodeGenerator
from jinja2.ext import Extension
from jinja2.ext import loopcontrols
from jinja2.filters import do_indent
from jinja2.sandbox import ImmutableSandboxedEnvironment

from jaxrl_llm.models.files import ModelFileError
from jaxrl_llm.models.files import one_line

LETTER_LIMIT = 2**20
"""Most letters of a text that a template makes."""
ELEMENT_LIMIT = 2**16
"""Most elements of a list that a template makes, with those of the lists in it."""
STEP_LIMIT = 50_000
"""Most rounds of loops and calls of a render."""
SOURCE_LIMIT = 2**18
"""Longest source of a template [letters]; the longest in use have 20,000."""
SECOND_LIMIT = 5.0
"""Most seconds of a render."""

PADDING_METHODS = frozenset(
    {"center", "ljust", "rjust", "zfill", "expandtabs", "format", "format_map", "translate", "encode"}
)
PADDING_FILTERS = ("center", "format", "wordwrap", "batch", "slice", "pprint", "urlize", "xmlattr", "filesizeformat")
"""What makes long texts of short ones by a number; templates in use have no need of it."""


def render_chat(
    template: str,
    messages: Sequence[Mapping[str, Any]],
    *,
    add_generation_prompt: bool = True,
    special_tokens: Mapping[str, str] | None = None,
    **variables: Any,
) -> str:
    """The messages as one text, by a checkpoint's template.

    Args:
        template: the Jinja source.
        messages: the turns, oldest first.
        add_generation_prompt: end with the opening of an assistant turn, where the template knows how.
        special_tokens: names of special tokens (bos_token, ...) that the template may write.
        **variables: further ones that the template knows, such as tools or enable_thinking.

    Raises:
        ModelFileError: the template is no template, fails, or leaves its bounds.
        ValueError: the template itself refuses the messages.
    """
    if not isinstance(template, str):
        raise ModelFileError(f"the chat template is a {type(template).__name__}; expected a text.")
    given = {"tools": None, "documents": None, **(special_tokens or {}), **variables}
    given |= {"messages": [dict(message) for message in messages], "add_generation_prompt": add_generation_prompt}
    return _program(template).render(given)


class _RefusedError(Exception):
    """What `raise_exception` raises."""


class _Budget:
    """How many steps and how much time a render has left."""

    def __init__(self) -> None:
        self.left, self.end = STEP_LIMIT, time.monotonic() + SECOND_LIMIT

    def spend(self, steps: int) -> None:
        self.left -= steps
        if self.left < 0:
            raise ModelFileError(f"the chat template takes more than {STEP_LIMIT} steps.")
        if time.monotonic() > self.end:
            raise ModelFileError(f"the chat template takes more than {SECOND_LIMIT:g} seconds.")


class _Rounds(list[Any]):
    """What a loop goes over, which looks at the clock in every round."""

    budget: _Budget

    def __iter__(self) -> Iterator[Any]:
        for item in super().__iter__():
            self.budget.spend(0)
            yield item


def _bounded(length: int) -> None:
    if length > LETTER_LIMIT:
        raise ModelFileError(
            f"the chat template makes a text or list of {length}; at most {LETTER_LIMIT} are expected."
        )


def _whole(value: Any) -> Any:
    """A value whose texts and elements are few, however often it holds the same list: a list of twice a list of twice
    a list is written out in full when it becomes a text, or is compared.
    """
    length, elements, waiting = 0, 0, [value]
    while waiting:
        part = waiting.pop()
        if isinstance(part, str):
            length += len(part)
            _bounded(length)
        elif isinstance(part, Mapping | list | tuple | set | frozenset):
            elements += len(part)
            if elements > ELEMENT_LIMIT:
                raise ModelFileError(
                    f"the chat template makes a list of {elements} elements; at most {ELEMENT_LIMIT} are expected."
                )
            waiting += [*part.keys(), *part.values()] if isinstance(part, Mapping) else part
    return value


class _Generator(CodeGenerator):
    """Jinja's compiler, whose `~` and whose lists, tuples and dicts ask the environment."""

    def visit_List(self, node: nodes.List, frame: Any) -> None:
        self._whole(super().visit_List, node, frame)

    def visit_Dict(self, node: nodes.Dict, frame: Any) -> None:
        self._whole(super().visit_Dict, node, frame)

    def visit_Tuple(self, node: nodes.Tuple, frame: Any) -> None:
        if node.ctx == "load":
            self._whole(super().visit_Tuple, node, frame)
        else:
            super().visit_Tuple(node, frame)

    def _whole(self, visit: Callable[[Any, Any], None], node: nodes.Expr, frame: Any) -> None:
        self.write("environment.whole(")
        visit(node, frame)
        self.write(")")

    def visit_Concat(self, node: nodes.Concat, frame: Any) -> None:
        self.write("environment.joined((")
        for part in node.nodes:
            self.visit(part, frame)
            self.write(", ")
        self.write("))")


class _Generation(Extension):
    """The block `{% generation %}`, which marks what the assistant says and changes nothing here."""

    tags = {"generation"}  # noqa: RUF012 - the name and kind that Jinja asks for

    def parse(self, parser: Any) -> list[nodes.Node]:
        """The body of the block."""
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _Sandbox(ImmutableSandboxedEnvironment):
    """The sandbox of Jinja, in which every step counts and every text is bounded before it is made."""

    code_generator_class = _Generator
    intercepted_binops = frozenset({"+", "*", "**", "%"})

    def __init__(self) -> None:
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols])
        self.budget = _Budget()
        self.concat = self.joined
        for name in PADDING_FILTERS:
            self.filters.pop(name, None)
        self.filters |= {"tojson": _tojson, "counted": self.counted, "replace": _replaced, "join": self.glued}
        self.filters |= {"indent": _indented, "sum": _summed}
        self.filters = {name: self.measured(filter_) for name, filter_ in self.filters.items()}
        self.globals |= {"raise_exception": _refuse, "strftime_now": _now, "range": self.counted_range}
        self.globals.pop("lipsum", None)

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        tree = super()._parse(source, name, filename)
        for loop in tree.find_all(nodes.For):
            loop.iter = nodes.Filter(loop.iter, "counted", [], [], None, None, lineno=loop.lineno)
        return tree

    def counted(self, items: Iterable[Any]) -> list[Any]:
        """What a loop goes over; its rounds are spent."""
        found = _Rounds()
        found.budget = self.budget
        for item in items:
            self.budget.spend(1)
            found.append(item)
        return found

    def counted_range(self, *arguments: int) -> range:
        """A range of few numbers."""
        numbers = range(*arguments)
        self.budget.spend(len(numbers))
        return numbers

    def whole(self, value: Any) -> Any:
        """A list, tuple or dict that the template made."""
        self.budget.spend(1)
        return _whole(value)

    def measured(self, filter_: Callable[..., Any]) -> Callable[..., Any]:
        """A filter that looks at the clock, and at the size of what it made."""

        @wraps(filter_)
        def measured(*arguments: Any, **named: Any) -> Any:
            self.budget.spend(0)
            made = filter_(*arguments, **named)
            # What `map` and `select` make bit by bit is made here, so that it can be measured.
            return _whole(list(self.timed(made)) if isinstance(made, Iterator) else made)

        return measured

    def timed(self, parts: Iterator[Any]) -> Iterator[Any]:
        """The parts, of which there are few letters together, each after a look at the clock."""
        length = 0
        for part in parts:
            self.budget.spend(0)
            length += 1 + (len(part) if isinstance(part, str) else 0)
            _bounded(length)
            yield part

    def joined(self, parts: Iterable[Any]) -> str:
        """The texts of the parts as one."""
        texts = [str(part) for part in parts]
        _bounded(sum(map(len, texts)))
        return "".join(texts)

    def glued(self, parts: Iterable[Any], between: str = "", attribute: str | None = None) -> str:
        """The filter `join`."""
        found = list(parts)
        if attribute is not None:
            found = [self.getitem(part, attribute) for part in found]
        _bounded(len(found) * len(str(between)))
        return str(between).join(self.joined([part]) for part in found)

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        """Texts have no methods that pad, and numbers none at all."""
        if isinstance(obj, str) and attr in PADDING_METHODS:
            return False
        return super().is_safe_attribute(obj, attr, value) and not isinstance(obj, int | float | bytes | bytearray)

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        """The operators that make things longer."""
        if isinstance(left, str) and operator == "%":
            raise ModelFileError("the chat template writes numbers by %, which is not supported.")
        for one, other in ((left, right), (right, left)):
            if isinstance(one, str | list | tuple):
                if operator == "+":
                    _bounded(len(one) + (len(other) if isinstance(other, str | list | tuple) else 0))
                elif operator == "*" and isinstance(other, int):
                    _bounded(len(one) * max(other, 0))
        if operator in ("*", "**") and any(isinstance(side, int) and abs(side) > 2**32 for side in (left, right)):
            raise ModelFileError("the chat template multiplies numbers beyond 32 bits.")
        if operator == "**" and isinstance(right, int) and right > 64:
            raise ModelFileError(f"the chat template raises a number to the power {right}.")
        self.budget.spend(1)
        return _whole(super().call_binop(context, operator, left, right))

    def call(self, context: Any, called: Any, *arguments: Any, **named: Any) -> Any:
        """A call, counted; `replace` and `join` of texts bounded."""
        self.budget.spend(1)
        owner, name = getattr(called, "__self__", None), getattr(called, "__name__", "")
        if isinstance(owner, str) and name == "replace":
            return _replaced(owner, *arguments, **named)
        if isinstance(owner, str) and name == "join":
            return self.glued(arguments[0] if arguments else (), owner)
        return _whole(super().call(context, called, *arguments, **named))


class _Program:
    """A compiled template with its sandbox; one render at a time."""

    def __init__(self, source: str) -> None:
        self.sandbox, self.lock = _Sandbox(), threading.Lock()
        if len(source) > SOURCE_LIMIT:
            raise ModelFileError(f"the chat template has {len(source)} letters; at most {SOURCE_LIMIT} are expected.")
        try:
            self.template = self.sandbox.from_string(source)
        except ModelFileError:
            raise
        except Exception as error:
            raise ModelFileError(f"the chat template is no template ({one_line(error)}).") from error

    def render(self, variables: Mapping[str, Any]) -> str:
        with self.lock:
            self.sandbox.budget = _Budget()
            pieces, length = [], 0
            try:
                for piece in self.template.generate(**variables):
                    length += len(piece)
                    _bounded(length)
                    self.sandbox.budget.spend(0)
                    pieces.append(piece)
            except ModelFileError:
                raise
            except _RefusedError as error:
                raise ValueError(f"the chat template refuses these messages: {one_line(error)}") from error
            except Exception as error:
                raise ModelFileError(f"the chat template fails ({type(error).__name__}: {one_line(error)}).") from error
        text = "".join(pieces)
        if any("\ud800" <= letter <= "\udfff" for letter in text):
            raise ModelFileError("the chat template writes half of a surrogate pair, which is no letter.")
        return text


@lru_cache(maxsize=16)
def _program(source: str) -> _Program:
    return _Program(source)


def _refuse(message: Any) -> None:
    raise _RefusedError(message)


def _now(form: str) -> str:
    if len(form) > 100:
        raise ModelFileError("the chat template asks for the date in a form of more than 100 letters.")
    return datetime.datetime.now().strftime(form)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """The filter `tojson`, which leaves letters as they are."""
    if indent is not None and not 0 <= indent <= 16:
        raise ModelFileError(f"the chat template indents by {indent}.")
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _summed(numbers: Iterable[Any], attribute: str | int | None = None, start: float = 0) -> Any:
    """The filter `sum`, of numbers only: a sum of lists is a list of all that they hold."""
    found = [number if attribute is None else number[attribute] for number in numbers]
    if not all(isinstance(number, int | float) for number in [start, *found]):
        raise ModelFileError("the chat template sums what is no number, which is not supported.")
    return sum(found, start)


def _indented(text: str, width: int | str = 4, first: bool = False, blank: bool = False) -> str:
    """The filter `indent`."""
    if not isinstance(width, int) or not 0 <= width <= 64:
        raise ModelFileError(f"the chat template indents by {width!r:.40}.")
    _bounded(len(text) + (width + 1) * (text.count("\n") + 1))
    return do_indent(text, width, first, blank)


def _replaced(text: Any, old: str, new: str, count: int | None = None) -> str:
    """`replace`, as a filter and as a method."""
    text, old, new = str(text), str(old), str(new)
    _bounded(len(text) + (text.count(old) if old else len(text) + 1) * len(new))
    return text.replace(old, new, -1 if count is None else count)
