"""Rewards of agents that call tools, of a trace and of a step (GLM-4.5, arXiv 2508.06471, section 3)."""

from collections.abc import Mapping
from collections.abc import Sequence
from typing import Any
from typing import NamedTuple
from typing import Protocol

from jaxrl_llm.checks import require_not_negative


class Call(Protocol):
    """A call of a tool, such as `chat_tools.ToolCall`."""

    @property
    def name(self) -> str:
        """Of the tool."""
        ...

    @property
    def arguments(self) -> Mapping[str, Any]:
        """JSON values by the name of the parameter."""
        ...


class Trace(NamedTuple):
    """What a trace is worth: `reward`, and how many of its `turns` there are until it halts."""

    reward: float
    turns: int


def halting_reward(outcome: float, malformed: Sequence[bool]) -> Trace:
    """The reward of a trace that halts at the first malformed call, with the reward 0.

        r = outcome * [no turn has a malformed call],   turns = that turn and those before it

    An advantage relative to the mean of a group is then negative wherever another trace of the group earned something.

    Args:
        outcome: what the whole trace would earn, at least 0: below it a malformed call would pay.
        malformed: of each turn, in order, whether it has a call that cannot be read or made (`Answer.malformed`).

    Raises:
        ValueError: an outcome that is negative or no finite number.
    """
    require_not_negative("outcome", outcome)
    for turn, halts in enumerate(malformed):
        if halts:
            return Trace(0.0, turn + 1)
    return Trace(float(outcome), len(malformed))


def exact_calls_reward(calls: Sequence[Call], annotated: Sequence[Call], *, well_formed: bool) -> float:
    """The reward of one step: 1 if its calls are those annotated and its form is right, else 0.

        r = [form] * [as many calls] * prod_i [name_i = name*_i] [arguments_i = arguments*_i]

    Calls are compared in order, arguments as JSON: their order does not matter, 1 is 1.0, and neither is true or "1".

    Args:
        calls: what was called.
        annotated: what should have been; none where the right step is to call nothing.
        well_formed: whether the answer had no fault (`not Answer.faults`).
    """
    if not well_formed or len(calls) != len(annotated):
        return 0.0
    pairs = zip(calls, annotated, strict=True)
    return float(all(one.name == other.name and same_json(one.arguments, other.arguments) for one, other in pairs))


def same_json(one: Any, other: Any) -> bool:
    """Whether two JSON values are the same: 1 and 1.0 are, 1 and true are not, nor are lists in another order."""
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        return one.keys() == other.keys() and all(same_json(value, other[key]) for key, value in one.items())
    if isinstance(one, list | tuple) and isinstance(other, list | tuple):
        return len(one) == len(other) and all(map(same_json, one, other))
    # A bool is an int in Python.
    return isinstance(one, bool) == isinstance(other, bool) and one == other
