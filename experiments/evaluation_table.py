"""What `evaluate` wrote, as a file name, a title and rows in words."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from rich.table import Table

from experiments import words
from experiments.pass_at_k import pass_at_k

SCORINGS = ("lenient", "strict")
GREEDY = "greedy"


def file_name(result: Mapping[str, Any]) -> str:
    """`evaluation-step3-16-samples-temperature-1-seed-0.json`: another question has another file."""
    if result["sampling"] is None:
        return f"evaluation-step{result['step']}-greedy.json"
    given = {name.replace("_", "-"): value for name, value in result["sampling"].items() if value is not None}
    parts = [f"{name}-{value:g}" for name, value in given.items()]
    return f"evaluation-step{result['step']}-{result['samples']}-samples-{'-'.join(parts)}-seed-{result['seed']}.json"


def title(result: Mapping[str, Any]) -> str:
    """What was asked, in words."""
    after = f"After {result['step']} steps" if result["step"] else "Before training"
    if result["sampling"] is None:
        return f"{after}, greedy"
    given = {name.replace("_", "-"): value for name, value in result["sampling"].items() if value is not None}
    how = ", ".join(f"{name} {value:g}" for name, value in given.items())
    return f"{after}, {result['samples']} answers per problem, {how}, seed {result['seed']}"


def shown_rows(result: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """(what, lenient, strict) with intervals, in words."""
    shown: dict[str, dict[str, str]] = {}
    for found in result["results"]:
        said = f"{words.percent(found['value'])}  [{words.interval(found['interval'])}]"
        shown.setdefault(found["name"], {})[found["scoring"]] = said
    return [(name, said["lenient"], said["strict"]) for name, said in shown.items()]


def problem_scores(result: Mapping[str, Any], name: str, scoring: str) -> list[float]:
    """What one of the results, "greedy" or "pass@4", is for each problem asked."""
    if name == GREEDY:
        return [float(row[GREEDY][scoring]) for row in result["problems"]]
    correct = np.array([row["sampled"][scoring] for row in result["problems"]])
    return pass_at_k(correct, result["samples"], int(name.removeprefix("pass@"))).tolist()


def table(result: Mapping[str, Any]) -> Table:
    """The numbers, for a terminal."""
    made = Table("", *SCORINGS, title=f"{title(result)} (95 % intervals)", title_justify="left")
    for row in shown_rows(result):
        made.add_row(*row)
    return made
