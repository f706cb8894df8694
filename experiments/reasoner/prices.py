"""A table of prices that nobody knows by heart, and a calculator: what is asked takes one call of a tool or two.

    fig       what does it cost?            the table
    27*34     what is it?                   the calculator
    fig*34    what do so many cost?         the table, then the calculator

Prices differ from task to task. A call that cannot be read, or of a tool that is not there, ends the episode with the
reward 0 (GLM-4.5, arXiv 2508.06471, section 3); one whose argument means nothing is answered with a question mark.
Whatever has no call in it is an answer to the question, so there is nothing that this world refuses before its end.
"""

import random
import re
from typing import Any

from jaxrl_llm.environments import stable_key
from jaxrl_llm.environments.tool_rewards import halting_reward
from jaxrl_llm.environments.worlds import Reply
from jaxrl_llm.models.chat_tools import ToolCall
from jaxrl_llm.models.glm_answers import parse_answer

ITEMS = ("egg", "fig", "ham", "ice", "nut", "oat", "pea", "rye", "tea", "yam")
EXPRESSION = re.compile(r"(\d{1,4})\*(\d{1,4})")
UNKNOWN = "?"
OVER = "over"
TURNS = 3


def _tool(name: str, parameter: str, about: str) -> dict[str, Any]:
    schema = {"type": "object", "properties": {parameter: {"type": "string"}}, "required": [parameter]}
    return {"type": "function", "function": {"name": name, "description": about, "parameters": schema}}


TOOLS = (_tool("get", "of", "Price of an item."), _tool("calc", "x", "Product of two numbers."))


class Prices:
    """A `TextWorld`: the task is a question, actions are answers of a GLM, what the world says are results of tools.

    The seed of a task says what is asked and what everything costs.
    """

    name, tasks, turns = "prices", 6000, TURNS

    def reset(self, seed: int) -> "PricesEpisode":
        """See `TextWorld.reset`."""
        if not 0 <= seed < self.tasks:
            raise ValueError(f"seed is {seed}; {self.name} has the tasks 0 to {self.tasks - 1}.")
        return PricesEpisode(seed)


class PricesEpisode:
    """One question, its table, and how far it was answered."""

    admissible: tuple[str, ...] = ()

    def __init__(self, seed: int) -> None:
        rng = random.Random(stable_key("prices", seed))
        self.table = {item: rng.randrange(11, 100) for item in ITEMS}
        item, one, other = rng.choice(ITEMS), rng.randrange(11, 100), rng.randrange(11, 100)
        kind = rng.randrange(3)
        product = f"{self.table[item] if kind else one}*{other}"
        self.question = (f"{one}*{other}", item, f"{item}*{other}")[kind]
        self.plan = [ToolCall("get", {"of": item})] * (kind > 0) + [ToolCall("calc", {"x": product})] * (kind != 1)
        self.answer = self.result(self.plan[-1])
        self.prompt, self.turn, self.over = self.question, 0, False

    def result(self, call: ToolCall) -> str:
        """What a tool answers."""
        if call.name == "get":
            return str(self.table.get(str(call.arguments.get("of")), UNKNOWN))
        found = EXPRESSION.fullmatch(str(call.arguments.get("x")))
        return str(int(found[1]) * int(found[2])) if found else UNKNOWN

    def step(self, action: str) -> Reply:
        """See `TextEpisode.step`; calls are answered, anything else is the answer to the question."""
        if self.over:
            return Reply(OVER, 0.0, True, False)
        said = parse_answer(action, TOOLS)
        right = float(said.content == self.answer and not said.faults and not said.thinking)
        trace = halting_reward(right, [said.malformed])
        self.over = said.malformed or not said.tool_calls or self.turn + 1 == TURNS
        if self.over:
            return Reply(OVER, 0.0 if said.tool_calls else trace.reward, True, True)
        self.turn += 1
        return Reply("\n".join(self.result(call) for call in said.tool_calls), 0.0, False, True)

    def expert(self) -> str | None:
        """The next call of the plan, or the answer."""
        return None if self.over else self.said(self.turn)

    def said(self, turn: int) -> str:
        """What an expert says in that turn."""
        if turn >= len(self.plan):
            return self.answer
        (key, value), name = next(iter(self.plan[turn].arguments.items())), self.plan[turn].name
        return f"<tool_call>{name}\n<arg_key>{key}</arg_key>\n<arg_value>{value}</arg_value>\n</tool_call>"

    def close(self) -> None:
        """See `TextEpisode.close`; there is nothing to let go of."""


def conversation(seed: int, *, slips: float = 0.0, rng: random.Random | None = None) -> list[dict[str, Any]]:
    """The messages of an episode of the expert; with slips, of one who now and then answers too early, by guessing.

    Args:
        seed: the task.
        slips: probability, in each turn, of a guess in the place of the call.
        rng: draws the slips.
    """
    episode = PricesEpisode(seed)
    messages: list[dict[str, Any]] = [{"role": "user", "content": episode.question}]
    for call in episode.plan:
        if rng is not None and rng.random() < slips:
            return [*messages, {"role": "assistant", "content": str(rng.randrange(11, 10_000))}]
        messages.append({"role": "assistant", "content": "", "tool_calls": [_as_call(call)]})
        messages.append({"role": "tool", "content": episode.result(call)})
    return [*messages, {"role": "assistant", "content": episode.answer}]


def _as_call(call: ToolCall) -> dict[str, Any]:
    return {"type": "function", "function": {"name": call.name, "arguments": dict(call.arguments)}}
