"""All that the settings of a training run name, found and checked before there is a model."""

import dataclasses
from collections.abc import Callable
from typing import Any

from experiments.named import is_own
from experiments.objective_check import examine
from experiments.registry import Experiment
from experiments.run_folder import UserError
from experiments.settings import RunSettings
from jaxrl_llm.environments import Task
from jaxrl_llm.models.trainable import Trainable
from jaxrl_llm.objectives import Recipe
from jaxrl_llm.rollouts.perturb import Perturbation
from jaxrl_llm.training.text.fitting import require_fitting
from jaxrl_llm.training.text.fitting import stale_sentence
from jaxrl_llm.training.text.objective import get_objective
from jaxrl_llm.training.text.signals import choose_signal


@dataclasses.dataclass(frozen=True)
class Doors:
    """What settings name, found and checked; no model was needed for it.

    Attributes:
        task: where problems come from.
        recipe: the recipe.
        trainable: which parameters learn.
        perturbation: of the sampler.
        objective: instead of the recipe's loss, or None.
        signal: instead of the recipe's rule, or None.
        check: what was found about an objective of the user's own, or None.
        stale: what is to be said where old batches are learned as if they were new, or None.
    """

    task: Task
    recipe: Recipe
    trainable: Trainable
    perturbation: Perturbation
    objective: Callable[..., Any] | str | None
    signal: Callable[..., Any] | None
    check: dict[str, Any] | None
    stale: str | None


def open_doors(experiment: Experiment, settings: RunSettings) -> Doors:
    """Find and check all that the settings name.

    Raises:
        UserError: something is not there, is broken, or does not fit.
    """
    experiment.check(settings)
    settings.check_mesh()
    settings.check_schedule()
    settings.check_positions(experiment.positions(settings))
    objective, signal = settings.get_objective(), settings.get_signal()
    settings.sources.check()
    if (
        settings.sources.preferences
        and settings.objective not in ("dpo", "ipo")
        and not is_own(settings.objective or "")
    ):
        raise UserError("Field --preferences: pairs are learned by --objective dpo or ipo, or one of your own.")
    if settings.train.ahead and settings.sources.engine == "jax":
        raise UserError(
            f"Field --ahead is {settings.train.ahead}; the built-in sampler works on the devices that train, and a "
            "file is sampled by nobody, so there is nothing to gain. Use another engine (--engine), or --ahead 0."
        )
    if settings.mismatch != "none" and (settings.sources.from_file or settings.sources.engine != "jax"):
        raise UserError("Field --mismatch: it is the built-in sampler that is perturbed, which does not sample here.")
    check, recipe = None, settings.get_recipe()
    if callable(objective) and settings.objective is not None:
        check = examine(settings.objective, objective)
    try:
        minimised = get_objective(objective, recipe)
        chosen = choose_signal(signal, recipe, minimised)
        require_fitting(settings.sources.brings, minimised, chosen, settings.train)
    except (TypeError, ValueError) as error:
        raise UserError(str(error)) from error
    return Doors(
        task=settings.get_task(),
        recipe=recipe,
        trainable=settings.get_trainable(),
        perturbation=settings.get_perturbation(),
        objective=objective,
        signal=signal,
        check=check,
        stale=stale_sentence(minimised, chosen, settings.train, recipe=recipe if objective is None else None),
    )
