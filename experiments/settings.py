"""Settings of a run: numbers and names only, so that they can be saved, compared and given on the command line."""

import dataclasses
from collections.abc import Mapping
from typing import Any
from typing import Literal

from experiments.run_folder import UserError
from jaxrl_llm.environments import Task
from jaxrl_llm.environments import get_task
from jaxrl_llm.models import trainable as choices
from jaxrl_llm.models.trainable import Trainable
from jaxrl_llm.objectives import Recipe
from jaxrl_llm.objectives import get_recipe
from jaxrl_llm.redaction import redact_setting
from jaxrl_llm.rollouts.perturb import Perturbation
from jaxrl_llm.rollouts.perturb import perturbation
from jaxrl_llm.training import TrainSettings


@dataclasses.dataclass(frozen=True)
class RunSettings:
    """What is trained, on what, by which objective.

    Attributes:
        model: "smollm2_135m", or the path of a Hugging Face folder or GGUF file of the Llama family; experiments that
            start from random weights have fields for their model instead.
        task: name of a task of jaxrl_llm.environments.
        recipe: name of an objective of jaxrl_llm.objectives.
        mask_maximum: largest KL of one token that Trust Region Masking accepts; the recipe's own where None. [nats]
        mask_average: largest mean KL per token that Trust Region Masking accepts; the recipe's own where None. [nats]
        log_min_p: threshold of a pruned vocabulary relative to the most likely token, for sampler and trainer; the
            recipe's own where None. [nats]
        learns: which parameters learn: those of the top layers, low-rank adapters on the top layers, or all.
        top_layers: how many layers from the top take part, for "top_layers" and "lora".
        lora_rank: rank of the adapters, for "lora".
        mismatch: what the sampler does differently: a name of jaxrl_llm.rollouts.perturb.PERTURBATIONS. With one of
            its weights, TRM's exact masks and the metrics shift/* and bounds/* compare with the policy that sampled.
            With one of its cache or logits they cannot: exact masks are refused (recipes with a sampled mask are
            not), shift/* compare with the policy before the update, without the perturbation, and there are no
            bounds/*.
        mismatch_strength: scale of the noise, temperature, top_p or top_k; the usual one where None.
        train: sizes, sampling, optimiser and update.
    """

    model: str = "smollm2_135m"
    task: str = "sums_to_30"
    recipe: str = "trm"
    mask_maximum: float | None = None
    mask_average: float | None = None
    log_min_p: float | None = None
    learns: Literal["top_layers", "lora", "full"] = "top_layers"
    top_layers: int = 8
    lora_rank: int = 8
    mismatch: str = "none"
    mismatch_strength: float | None = None
    train: TrainSettings = dataclasses.field(default_factory=TrainSettings)

    def get_task(self) -> Task:
        """The task.

        Raises:
            UserError: there is none of that name.
        """
        try:
            return get_task(self.task)
        except KeyError as error:
            raise UserError(f"Field --task: {error}") from error

    def get_recipe(self) -> Recipe:
        """The objective, with the thresholds that were given.

        Raises:
            UserError: there is none of that name.
        """
        given = {name: getattr(self, name) for name in ("mask_maximum", "mask_average", "log_min_p")}
        try:
            return dataclasses.replace(
                get_recipe(self.recipe), **{name: value for name, value in given.items() if value is not None}
            )
        except ValueError as error:
            raise UserError(f"Field --recipe: {error}") from error

    def get_perturbation(self) -> Perturbation:
        """What the sampler does differently from the model.

        Raises:
            UserError: there is none of that name, or it has no strength.
        """
        try:
            return perturbation(self.mismatch, self.mismatch_strength)
        except ValueError as error:
            raise UserError(f"Field --mismatch: {error}") from error

    def get_trainable(self) -> Trainable:
        """Which parameters learn."""
        if self.learns == "full":
            return choices.full()
        if self.learns == "lora":
            return choices.lora(self.lora_rank, top=self.top_layers)
        return choices.top_layers(self.top_layers)


def flat_settings(settings: Any) -> dict[str, Any]:
    """The settings by the names they have on the command line: those of the nested dataclasses are left out.

    They are written down and compared, so a key or a password among them stands as `***`.
    """
    flat: dict[str, Any] = {}
    for field in dataclasses.fields(settings):
        value = getattr(settings, field.name)
        # Lists, as JSON gives them back: what is saved must equal what was set.
        value = list(value) if isinstance(value, tuple) else value
        flat |= (
            flat_settings(value) if dataclasses.is_dataclass(value) else {field.name: redact_setting(field.name, value)}
        )
    return flat


def changed_settings(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Names of the settings that differ, those that only one side has included."""
    return [
        name for name in {**before, **now} if before.get(name) != now.get(name) or (name in before) != (name in now)
    ]


def difference(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """One indented line for each setting that differs: the value it had and the value it has."""
    absent = "(absent)"
    return "".join(
        f"\n  {name}: {before.get(name, absent)} -> {now.get(name, absent)}" for name in changed_settings(before, now)
    )
