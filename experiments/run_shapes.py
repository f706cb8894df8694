"""What the JSON files of a run must hold, checked before anything is made of them."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from experiments.run_folder import RunFolder
from experiments.run_folder import UserError
from experiments.run_folder import read_json

Check = Callable[[dict[str, Any]], str | None]
"""What is wrong with the object in a file, as the end of a sentence."""

SHARES = ("accuracy_before", "accuracy_after", "accuracy_gain", "strict_before", "strict_after", "strict_gain")
COUNTED = ("held_out_problems", "steps", "seconds_training", "seconds_evaluation", "replaced_problems")
SHOWN_SETTINGS = ("steps", "prompts", "group_size", "recipe", "seed")
"""Of a run that trains, in its report."""


def _is_number(value: Any) -> bool:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:
        return False


def _is_float(value: Any) -> bool:
    """A number, or what a study found to be none."""
    return isinstance(value, float) or _is_number(value)


def _is_interval(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(map(_is_number, value))


def _config(content: dict[str, Any]) -> str | None:
    if not isinstance(content.get("claim"), str) or not isinstance(content.get("experiment"), str):
        return "claim and experiment must be texts"
    settings = content.get("settings")
    if not isinstance(settings, dict):
        return "settings must be an object"
    missing = [name for name in SHOWN_SETTINGS if name not in settings] if content.get("kind") != "study" else []
    return f"settings must have {missing[0]}" if missing else None


def _environment(content: dict[str, Any]) -> str | None:
    missing = [name for name in ("processor", "processor_cores", "device") if name not in content]
    if missing:
        return f"it must have {missing[0]}"
    packages, continued = content.get("packages", {}), content.get("continued", [])
    if not isinstance(packages, dict):
        return "packages must be an object"
    if not isinstance(continued, list) or not all(isinstance(start, dict) for start in continued):
        return "continued must be a list of objects"
    return None


def _samples(content: dict[str, Any]) -> str | None:
    answers = content.get("answers")
    if not isinstance(answers, list):
        return "answers must be a list"
    for number, answer in enumerate(answers):
        if not isinstance(answer, dict) or "before" not in answer:
            return f"answer {number} must be an object that says what was answered before training"
        if not all(isinstance(answer.get(name), str) for name in ("identity", "prompt", "answer")):
            return f"answer {number} must have the texts identity, prompt and answer"
        for when in ("before", "after"):
            given = answer.get(when, {"text": "", "lenient": False, "strict": False})
            whole = isinstance(given, dict) and isinstance(given.get("text"), str)
            if not whole or not all(type(given.get(how)) is bool for how in ("lenient", "strict")):
                return f"answer {number} must have text, lenient and strict {when} training"
    return None


def _summary(content: dict[str, Any]) -> str | None:
    expected = content.get("expected")
    if not isinstance(expected, dict) or not _is_number(expected.get("at_least")):
        return "expected must say what is at least needed"
    quantity = expected.get("quantity")
    if not isinstance(quantity, str) or quantity not in content:
        return "the quantity that is expected must be in it"
    if content[quantity] is not None and not _is_float(content[quantity]):
        return "the quantity that is expected must be a number in it, or null where it could not be measured"
    if "claim_met" not in content or not (content["claim_met"] is None or type(content["claim_met"]) is bool):
        return "claim_met must be true, false or null"
    changed = content.get("changed_settings")
    if not isinstance(changed, list) or not all(isinstance(name, str) for name in changed):
        return "changed_settings must be a list of names"
    trained = "accuracy_before" in content or "seconds_training" in content
    needed = (*SHARES, *COUNTED) if trained else ("seconds",)
    wrong = [name for name in needed if not _is_number(content.get(name))]
    wrong += [f"{name}_interval" for name in SHARES if trained and not _is_interval(content.get(f"{name}_interval"))]
    return f"{wrong[0]} is not what it should be" if wrong else None


CHECKS: dict[str, Check] = {
    "config": _config,
    "environment": _environment,
    "samples": _samples,
    "summary": _summary,
}
"""By the name of the file, without .json."""


def read(path: Path, name: str) -> dict[str, Any]:
    """The object in a file of a run.

    Args:
        path: the file.
        name: which of `CHECKS` it must pass.

    Raises:
        UserError: it cannot be read, or does not hold what it must.
    """
    content = read_json(path)
    problem = CHECKS[name](content) if isinstance(content, dict) else "it must be an object"
    if problem:
        raise UserError(f"{path} is damaged: {problem}.")
    return content


def samples_problem(run: RunFolder) -> str | None:
    """What is wrong with samples.json, as a sentence; None where nothing is."""
    try:
        read(run.samples, "samples")
    except UserError as error:
        return str(error)
    return None


def is_complete(run: RunFolder, *, trained: bool) -> bool:
    """Whether the run has a summary, and answers where it trained, that can be read; what is damaged is said, and is
    then computed again.
    """
    if not run.summary.exists():
        return False
    try:
        read(run.summary, "summary")
        if trained:
            read(run.samples, "samples")
    except UserError as error:
        print(f"{error} It is computed again.", flush=True)
        return False
    return True


def kept_environment(run: RunFolder) -> dict[str, Any]:
    """environment.json of a run that goes on; nothing where it is missing, or damaged, which is said."""
    if not run.environment.exists():
        return {}
    try:
        return read(run.environment, "environment")
    except UserError as error:
        print(f"{error} It is written again, as of now.", flush=True)
        return {}
