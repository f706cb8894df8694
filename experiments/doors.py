"""Tasks, objectives and signals by name or as `module:name`, and tables of all that is known by name."""

import inspect
from collections.abc import Callable
from collections.abc import Mapping
from typing import Any

from experiments.named import is_own
from experiments.named import load_function
from experiments.named import load_object
from experiments.named import own_words
from experiments.named import unknown_name
from experiments.run_folder import UserError
from jaxrl_llm.environments import Task
from jaxrl_llm.environments import check_task
from jaxrl_llm.environments import get_task
from jaxrl_llm.environments import task_names
from jaxrl_llm.objectives import RECIPES
from jaxrl_llm.objectives.recipes import CHOICES
from jaxrl_llm.rollouts import engines
from jaxrl_llm.rollouts.perturb.perturbation import WITH_STRENGTH
from jaxrl_llm.rollouts.perturb.perturbation import WITHOUT_STRENGTH
from jaxrl_llm.training import OBJECTIVES

Function = Callable[..., Any]
MEMBERS = ("name", "stop", "train", "held_out", "score")
"""What a task has."""

SIGNALS: Mapping[str, Function] = {}
"""Signals besides the rules of recipes (their field `advantage`) by name; the one place where they are put."""


def find_objective(text: str) -> Function | str:
    """The name of an objective of `jaxrl_llm.training`, or the user's own: a function of a `jaxrl_llm.testing.Batch`.

    Raises:
        UserError: there is none.
    """
    if text in OBJECTIVES:
        return text
    if text in RECIPES:
        raise UserError(f"Field --objective is {text!r}, which is a recipe; use --recipe {text}.")
    return load_function(text, "objective", OBJECTIVES)


def find_signal(text: str) -> Function:
    """The signal of that name, or the user's own: a function of `SignalInputs`.

    Raises:
        UserError: there is none.
    """
    if text in SIGNALS:
        return SIGNALS[text]
    if text in CHOICES["advantage"]:
        raise UserError(
            f"Field --signal is {text!r}, which is a rule of recipes; use --recipe-settings.advantage {text}."
        )
    return load_function(text, "signal", SIGNALS)


def find_task(text: str) -> Task:
    """The task of that name, or the user's own, which is held to the rules of `check_task` first.

    Raises:
        UserError: there is none, it is no task, or it breaks a rule.
    """
    if not is_own(text):
        if text not in task_names():
            raise unknown_name(text, "task", task_names())
        return get_task(text)
    task = _own_task(text)
    try:
        check_task(task)
    except ValueError as error:
        raise UserError(f"The task {text!r} breaks a rule: {str(error).rstrip('.')}.") from error
    except Exception as error:
        raise UserError(f"The task {text!r} fails when it is tried: {own_words(error)}.") from error
    return task


def _own_task(text: str) -> Task:
    """A task, the one that a class or another function without arguments makes, or an error."""
    found = load_object(text, "task", task_names())
    made: Any = found
    if isinstance(found, type) or (not isinstance(found, Task) and callable(found)):
        try:
            made = found()
        except Exception as error:
            raise UserError(f"The task {text!r} cannot be made without arguments: {own_words(error)}.") from error
    missing = [member for member in MEMBERS if not hasattr(made, member)]
    if missing:
        seen = type(made).__name__
        raise UserError(
            f"The task {text!r} is of type {seen}, without {', '.join(missing)}; it needs {', '.join(MEMBERS)}."
        )
    return made


def recipe_table() -> list[tuple[str, str]]:
    """(name, paper) of each recipe."""
    return [(name, recipe.source) for name, recipe in RECIPES.items()]


def signal_table() -> list[tuple[str, str]]:
    """(name, what it is) of each rule of a recipe, and of each signal besides."""
    rules = [(name, "a rule of recipes (--recipe-settings.advantage)") for name in CHOICES["advantage"]]
    return rules + [(name, _sentence(signal)) for name, signal in SIGNALS.items()]


def objective_table() -> list[tuple[str, str]]:
    """(name, what it is) of each objective besides the recipes."""
    own = ("my_module:my_loss", "your own: a function of a jaxrl_llm.testing.Batch to (sum, count) or a scalar")
    return [*((name, objective.about) for name, objective in OBJECTIVES.items()), own]


def task_table() -> list[tuple[str, str]]:
    """(name, first prompt) of each task; those of packages that are not installed say so."""
    rows = []
    for name in task_names():
        try:
            rows.append((name, repr(get_task(name).train(0, 0, 1)[0].prompt)))
        except (ImportError, OSError, RuntimeError) as error:
            rows.append((name, f"not here: {error}"))
    return rows


def mismatch_table() -> list[tuple[str, str]]:
    """(name, usual strength) of each perturbation of the sampler."""
    rows = [(name, "") for name in WITHOUT_STRENGTH]
    return rows + [(name, f"strength {usual:g}") for name, (usual, _) in WITH_STRENGTH.items()]


def engine_table() -> list[tuple[str, str]]:
    """(name, what it is) of each engine that can sample."""
    kinds = {"jax": engines.JaxEngine, "llama_cpp": engines.LlamaCppEngine, "openai": engines.OpenAIEngine}
    return [(name, _sentence(kind)) for name, kind in kinds.items()]


def _sentence(thing: Any) -> str:
    return next(iter((inspect.getdoc(thing) or "").splitlines()), "")
