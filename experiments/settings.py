"""Settings of a run: numbers and names only, so that they can be saved, compared and given on the command line."""

import dataclasses
import re
import typing
from collections.abc import Callable
from collections.abc import Mapping
from typing import Any
from typing import Literal

from jax.sharding import Mesh

from experiments import doors
from experiments.fields import NAMED
from experiments.fields import attribute_sentences
from experiments.fields import flat_values
from experiments.ranges import NOT_NEGATIVE
from experiments.ranges import POSITIVE
from experiments.ranges import RATE
from experiments.ranges import SEED
from experiments.ranges import SHARE
from experiments.ranges import SIZE
from experiments.ranges import SPREAD
from experiments.ranges import Range
from experiments.ranges import Ranges
from experiments.ranges import check_number
from experiments.run_folder import UserError
from experiments.sources import SourceSettings
from jaxrl_llm.environments import Task
from jaxrl_llm.models import Transformer
from jaxrl_llm.models import trainable as choices
from jaxrl_llm.models.dtypes import cast_model
from jaxrl_llm.models.dtypes import parse_dtype
from jaxrl_llm.models.sharding import parse_mesh
from jaxrl_llm.models.trainable import Trainable
from jaxrl_llm.objectives import Recipe
from jaxrl_llm.objectives import get_recipe
from jaxrl_llm.objectives.recipes import CHOICES
from jaxrl_llm.redaction import redact_setting
from jaxrl_llm.rollouts.perturb import Perturbation
from jaxrl_llm.rollouts.perturb import perturbation
from jaxrl_llm.training import TrainSettings
from jaxrl_llm.training.run.optimizer import learning_rate_schedule


def _recipe_settings() -> type:
    """A dataclass with every field of a recipe but its name and source, each None by default."""
    kinds, sentences = typing.get_type_hints(Recipe), attribute_sentences(Recipe)
    names = [field.name for field in dataclasses.fields(Recipe) if field.name not in ("name", "source")]
    said = {name: sentences.get(name, "").rstrip(".") for name in names}
    said |= {name: f"{said[name]} (one of {', '.join(CHOICES[name])})" for name in names if name in CHOICES}
    made = dataclasses.make_dataclass(
        "RecipeSettings",
        [(name, kinds[name] | None, dataclasses.field(default=None)) for name in names],
        frozen=True,
    )
    made.__doc__ = "Fields of the recipe that are not the recipe's own.\n\nAttributes:\n" + "".join(
        f"    {name}: {said[name]}; the recipe's own where None.\n" for name in names
    )
    return made


RecipeSettings: Any = _recipe_settings()
"""What a recipe may be changed in, each None for the recipe's own; made of the fields of `Recipe`."""

MESH = re.compile(r"(data|fsdp|tensor)=([1-9]\d{0,5})(,(data|fsdp|tensor)=([1-9]\d{0,5})){0,2}")


@dataclasses.dataclass(frozen=True)
class RunSettings:
    """What is trained, on what, by which objective.

    Attributes:
        model: "smollm2_135m", or the path of a Hugging Face folder or GGUF file of the Llama family; experiments that
            start from random weights have fields for their model instead.
        task: name of a task (see `list tasks`), or one of your own, my_module:MyTask.
        recipe: name of a recipe (see `list recipes`).
        recipe_settings: changes to the recipe.
        objective: instead of the recipe's loss, an objective by name (see `list objectives`) or one of your own,
            my_module:my_loss, a function of a jaxrl_llm.testing.Batch to (sum, count) or a scalar.
        signal: instead of the recipe's rule of advantages, a signal by name (see `list signals`) or one of your own,
            my_module:my_signal, a function of SignalInputs to advantages or (advantages, weights).
        learns: which parameters learn: those of the top layers, low-rank adapters on the top layers, or all.
        top_layers: how many layers from the top take part, for "top_layers" and "lora".
        lora_rank: rank of the adapters, for "lora".
        mismatch: what the sampler does differently: a name of jaxrl_llm.rollouts.perturb.PERTURBATIONS. With one of
            its weights, TRM's exact masks and the metrics shift/* and bounds/* compare with the policy that sampled.
            With one of its cache, logits or routers they cannot: exact masks are refused (recipes with a sampled mask
            are not), shift/* compare with the policy before the update, without the perturbation, and there are no
            bounds/*.
        mismatch_strength: scale of the noise, temperature, top_p or top_k; the usual one where None.
        dtype: in which the model computes; that of its file where None.
        mesh: devices that share the work, as data=2,fsdp=1,tensor=1; one device where None.
        sources: where experience comes from.
        train: sizes, sampling, optimiser and update.
    """

    model: str = "smollm2_135m"
    task: str = "sums_to_30"
    recipe: str = "trm"
    recipe_settings: Any = dataclasses.field(default_factory=RecipeSettings, metadata=NAMED)
    objective: str | None = None
    signal: str | None = None
    learns: Literal["top_layers", "lora", "full"] = "top_layers"
    top_layers: int = 8
    lora_rank: int = 8
    mismatch: str = "none"
    mismatch_strength: float | None = None
    dtype: Literal["float32", "bfloat16"] | None = None
    mesh: str | None = None
    sources: SourceSettings = dataclasses.field(default_factory=SourceSettings)
    train: TrainSettings = dataclasses.field(default_factory=TrainSettings)

    def get_task(self) -> Task:
        """The task.

        Raises:
            UserError: there is none of that name, or one's own is none.
        """
        try:
            return doors.find_task(self.task)
        except UserError as error:
            raise UserError(f"Field --task: {error}") from error

    def get_recipe(self) -> Recipe:
        """The recipe, with the changes that were given.

        Raises:
            UserError: there is none of that name, or it cannot be changed so.
        """
        changes = {name: value for name, value in vars(self.recipe_settings).items() if value is not None}
        try:
            return dataclasses.replace(get_recipe(self.recipe), **changes)
        except ValueError as error:
            raise UserError(f"Field --recipe{'-settings' if changes else ''}: {error}") from error

    def get_objective(self) -> Callable[..., Any] | str | None:
        """The objective that is used instead of the recipe's loss, if one is.

        Raises:
            UserError: it is not there.
        """
        return None if self.objective is None else doors.find_objective(self.objective)

    def get_signal(self) -> Callable[..., Any] | None:
        """The signal that is used instead of the recipe's rule, if one is.

        Raises:
            UserError: it is not there.
        """
        return None if self.signal is None else doors.find_signal(self.signal)

    def get_perturbation(self) -> Perturbation:
        """What the sampler does differently from the model.

        Raises:
            UserError: there is none of that name, it has no strength, or not that one; or the built-in sampler, which
                alone is perturbed, does not sample.
        """
        if self.mismatch != "none" and (self.sources.engine != "jax" or self.sources.from_file):
            raise UserError(
                f"Field --mismatch is {self.mismatch!r}, which only the built-in sampler can do, and another "
                "engine or a file brings the experience; leave one of them out."
            )
        if self.mismatch_strength is not None and self.mismatch in STRENGTHS:
            check_number("mismatch-strength", self.mismatch_strength, STRENGTHS[self.mismatch])
        if self.mismatch == "top_k" and self.mismatch_strength is not None and self.mismatch_strength % 1:
            raise UserError(f"Field --mismatch-strength is {self.mismatch_strength}; of top_k it must be whole.")
        try:
            return perturbation(self.mismatch, self.mismatch_strength)
        except ValueError as error:
            raise UserError(f"Field --mismatch: {error}") from error

    def get_trainable(self) -> Trainable:
        """Which parameters learn: what `learns` says, and the layer for further tokens where its loss has a weight."""
        if self.learns == "full":
            choice = choices.full()
        elif self.learns == "lora":
            choice = choices.lora(self.lora_rank, top=self.top_layers)
        else:
            choice = choices.top_layers(self.top_layers)
        return dataclasses.replace(choice, further=self.train.update.mtp_weight > 0)

    def check_mesh(self) -> None:
        """Refuse a mesh that is none, or that this machine has not the devices for, before there is a model.

        Raises:
            UserError: it is not of the form data=2,fsdp=1,tensor=1, names an axis twice, or needs other devices.
        """
        axes = re.findall("[a-z]+", self.mesh or "")
        if self.mesh is not None and (not MESH.fullmatch(self.mesh) or len(set(axes)) < len(axes)):
            raise UserError(
                f"Field --mesh is {self.mesh!r}; it must be of the form data=2,fsdp=1,tensor=1, each axis at most once."
            )
        try:
            if self.mesh is not None:
                parse_mesh(self.mesh)
        except ValueError as error:
            raise UserError(f"Field --mesh: {error}") from error

    def check_positions(self, positions: int | None) -> None:
        """Refuse rows that are longer than what the model reads, where that is known before there is a model.

        Raises:
            UserError: they are.
        """
        width = self.train.prompt_length + self.train.response_length
        if positions is not None and width > positions:
            raise UserError(
                f"Fields --prompt-length and --response-length are {self.train.prompt_length} and "
                f"{self.train.response_length}, {width} tokens together; the model reads {positions}."
            )

    def check_schedule(self) -> None:
        """Refuse a warm-up that is as long as the run, or a decay that is longer than the rest.

        Raises:
            UserError: it is.
        """
        try:
            learning_rate_schedule(self.train.optimizer, self.train.optimizer_steps)
        except ValueError as error:
            name = str(error).partition(" ")[0].replace("_", "-")
            raise UserError(f"Field --{name}: {error}") from error

    def laid_out(self, model: Transformer) -> tuple[Transformer, Mesh | None]:
        """The model in the dtype that was asked for, and the devices that share the work.

        Raises:
            UserError: the mesh does not fit the model or the machine.
        """
        try:
            mesh = None if self.mesh is None else parse_mesh(self.mesh, model.config)
            return (model if self.dtype is None else cast_model(model, parse_dtype(self.dtype))), mesh
        except ValueError as error:
            raise UserError(f"Fields --dtype and --mesh: {error}") from error


RUN_RANGES: Ranges = {
    "top_layers": Range(1, 1000),
    "lora_rank": Range(1, 10_000),
    "steps": SIZE,
    "prompts": Range(1, 100_000),
    "group_size": Range(1, 10_000),
    "prompt_length": Range(1, 100_000),
    "response_length": Range(1, 100_000),
    "seed": SEED,
    "checkpoint_every": SIZE,
    "keep_checkpoints": Range(1, 10_000),
    "evaluate_every": Range(0, 1_000_000),
    "samples": Range(0, 100_000),
    "temperature": Range(1e-6, 100),
    "top_p": Range(0, 1, above=True),
    "min_p": SHARE,
    "learning_rate": Range(0, 1000),
    "warmup_steps": Range(0, 1_000_000),
    "final_fraction": SHARE,
    "beta1": Range(0, 0.999999),  # nearer to 1 the correction of the bias is 0 / 0 in float32
    "beta2": Range(0, 0.999999),
    "epsilon": SHARE,
    "weight_decay": Range(0, 1000),
    "max_grad_norm": NOT_NEGATIVE,
    "momentum": Range(0, 0.999999),
    "decay_steps": Range(0, 1_000_000),
    "minibatches": Range(1, 100_000),
    "epochs": Range(1, 10_000),
    "micro_batch": Range(0, 100_000),
    "stop_after_skipped": SIZE,
    "bounds_every": Range(0, 1_000_000),
    "score_rows": Range(0, 1_000_000),
    "critic_learning_rate": RATE,
    "value_clip": POSITIVE,
    "ahead": Range(0, 64),
    "replay": Range(1, 64),
    "episodes_every": Range(0, 1_000_000),
    "engine_slots": Range(1, 256),
    "engine_threads": Range(1, 1024),
}
"""What the fields of `RunSettings` may be, by name. Those of a recipe must be finite here; the rest says the recipe."""

STRENGTHS: Ranges = {
    "gaussian_noise": SPREAD,
    "bounded_noise": SPREAD,
    "relative_noise": SPREAD,
    "temperature": RATE,
    "top_p": Range(0, 1, above=True),
    "top_k": SIZE,
}
"""What --mismatch-strength may be, by mismatch."""


def flat_settings(settings: Any) -> dict[str, Any]:
    """The settings by the names they have on the command line.

    They are written down and compared, so a key or a password among them stands as `***`.
    """
    return {name: redact_setting(name, value) for name, value in flat_values(settings).items()}


def changed_settings(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Names of the settings that differ; one that only a side has is None on the other, which is "as without it"."""
    return [name for name in {**before, **now} if before.get(name) != now.get(name)]


def difference(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """One indented line for each setting that differs: the value it had and the value it has."""
    absent = "(absent)"
    return "".join(
        f"\n  {name}: {before.get(name, absent)} -> {now.get(name, absent)}" for name in changed_settings(before, now)
    )
