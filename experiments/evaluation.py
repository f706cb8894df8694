"""Greedy answers to the held-out problems, and what they say before and after training.

One greedy answer per problem, scored leniently (the last number or line counts) and strictly (the whole answer must be
right).
"""

from collections.abc import Mapping
from collections.abc import Sequence
from typing import Any

import numpy as np

from experiments.intervals import Estimate
from experiments.intervals import accuracy
from experiments.intervals import by_problem
from experiments.intervals import paired_difference
from jaxrl_llm.environments import Task

SCORINGS = {"accuracy": "lenient", "strict": "strict"}
"""Names in summary.json, and the kind of scoring that each stands for."""


def score_answers(task: Task, texts: Sequence[str]) -> list[dict[str, Any]]:
    """One row per held-out problem: identity, prompt, right answer, the text given, and whether it is right."""
    rows = []
    for problem, text in zip(task.held_out(), texts, strict=True):
        score = task.score(problem, text)
        about = {"identity": problem.identity, "prompt": problem.prompt, "answer": problem.answer}
        rows.append(about | {"text": text, "lenient": score.lenient, "strict": score.strict})
    return rows


def merge_answers(
    before: Sequence[Mapping[str, Any]], after: Sequence[Mapping[str, Any]] | None
) -> list[dict[str, Any]]:
    """One row per problem with what was said before and, if known, after.

    Raises:
        ValueError: the two are about different problems.
    """
    given = ("text", "lenient", "strict")
    merged = []
    for index, row in enumerate(before):
        entry = {name: row[name] for name in ("identity", "prompt", "answer")} | {
            "before": {name: row[name] for name in given}
        }
        if after is not None:
            if len(after) != len(before) or after[index]["identity"] != row["identity"]:
                raise ValueError(f"The held-out problems changed: row {index} was {row['identity']!r} before training.")
            entry["after"] = {name: after[index][name] for name in given}
        merged.append(entry)
    return merged


def _per_problem(answers: Sequence[Mapping[str, Any]], when: str, scoring: str) -> np.ndarray:
    return by_problem([row[when][scoring] for row in answers], [row["identity"] for row in answers])


def summarise(answers: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Accuracies with their intervals, under both scorings, of merged answers.

    `accuracy_*` is lenient. Intervals are at 95 %: Wilson's over problems for an accuracy, Agresti and Min's for the
    paired difference.
    """
    summary: dict[str, Any] = {}
    finished = all("after" in row for row in answers)
    for name, scoring in SCORINGS.items():
        before = _per_problem(answers, "before", scoring)
        summary |= _entry(f"{name}_before", accuracy(before))
        if finished:
            after = _per_problem(answers, "after", scoring)
            summary |= _entry(f"{name}_after", accuracy(after))
            summary |= _entry(f"{name}_gain", paired_difference(before, after))
        summary["held_out_problems"] = len(before)
    summary["interval_method"] = (
        "95 %, over distinct problems: Wilson for an accuracy, Agresti-Min 2005 (paired) for a gain"
    )
    return summary


def _entry(name: str, estimate: Estimate) -> dict[str, Any]:
    return {name: estimate.value, f"{name}_interval": [estimate.low, estimate.high]}
