"""Rewards of agents that call tools: one wrong letter anywhere is worth nothing."""

import pytest

from jaxrl_llm.environments.tool_rewards import exact_calls_reward
from jaxrl_llm.environments.tool_rewards import halting_reward
from jaxrl_llm.environments.tool_rewards import same_json
from jaxrl_llm.models.chat_tools import ToolCall
from jaxrl_llm.models.glm_answers import parse_answer

RIGHT = (ToolCall("weather", {"city": "Köln", "days": 2, "hours": [6, {"all": True}]}), ToolCall("now"))


def test_a_malformed_call_halts_the_trace_with_nothing() -> None:
    assert halting_reward(0.5, [False, False]) == (0.5, 2)
    assert halting_reward(0.5, [False, True, False, True]) == (0.0, 2)
    assert halting_reward(0.0, [True]) == (0.0, 1)
    for outcome in (-1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match=f"outcome is {outcome}; it must be a number that is not negative"):
            halting_reward(outcome, [True])
    assert halting_reward(1.0, []) == (1.0, 0)


def test_of_a_group_the_malformed_one_is_below_the_mean() -> None:
    texts = ["<tool_call>now\n</tool_call>", "<tool_call>now\n<arg_key>a</tool_call>", "\n<think>I stop here"]
    rewards = [halting_reward(1.0, [parse_answer(text).malformed]).reward for text in texts]
    assert rewards == [1.0, 0.0, 1.0]
    assert rewards[1] < sum(rewards) / len(rewards)


def test_the_annotated_calls_are_worth_one() -> None:
    other_order = ToolCall("weather", dict(reversed(list(RIGHT[0].arguments.items()))))
    assert exact_calls_reward(RIGHT, RIGHT, well_formed=True) == 1.0
    assert exact_calls_reward((other_order, RIGHT[1]), RIGHT, well_formed=True) == 1.0
    assert exact_calls_reward((), (), well_formed=True) == 1.0
    assert exact_calls_reward(RIGHT, RIGHT, well_formed=False) == 0.0


@pytest.mark.parametrize(
    "calls",
    [
        RIGHT[::-1],
        RIGHT[:1],
        (*RIGHT, RIGHT[1]),
        (),
        (RIGHT[0], ToolCall("Now")),
        (RIGHT[0], ToolCall("now", {"zone": None})),
        *(
            (ToolCall("weather", dict(RIGHT[0].arguments) | change), RIGHT[1])
            for change in (
                {"city": "Koln"},
                {"days": "2"},
                {"days": 3},
                {"hours": [{"all": True}, 6]},
                {"hours": [6, {"all": 1}]},
                {"hours": [6, {}]},
                {"more": 1},
            )
        ),
        (ToolCall("weather", {"city": "Köln", "days": 2}), RIGHT[1]),
    ],
)
def test_any_other_calls_are_worth_nothing(calls: tuple[ToolCall, ...]) -> None:
    assert exact_calls_reward(calls, RIGHT, well_formed=True) == 0.0


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        (1, 1.0, True),
        (1, True, False),
        (0, False, False),
        (None, None, True),
        (None, 0, False),
        ("1", 1, False),
        ([], {}, False),
        ([], "", False),
        ([1], (1,), True),
        ({"a": [1]}, {"a": [1.0]}, True),
        ({"a": 1}, {"b": 1}, False),
    ],
)
def test_values_are_compared_as_json(one: object, other: object, same: bool) -> None:
    assert same_json(one, other) is same
    assert same_json(other, one) is same
