"""The experiments there are. To add one: write a file with an `EXPERIMENT`, and its name below."""

import dataclasses
import difflib
import importlib
from collections.abc import Callable
from collections.abc import Mapping
from typing import TYPE_CHECKING
from typing import Any

from experiments.fields import leaves
from experiments.ranges import Ranges
from experiments.run_folder import UserError
from experiments.settings import RUN_RANGES
from experiments.settings import RunSettings
from jaxrl_llm.models import Transformer
from jaxrl_llm.models.tokenizers import Tokenizer

if TYPE_CHECKING:
    from experiments.study import Study

NAMES = (
    "smollm2_arithmetic",
    "from_scratch",
    "linear_bandit",
    "mismatch_anatomy",
    "neural_bandits",
    "content_moderation",
    "psrl",
    "deep_sea",
    "trm_training",
    "pruning_training",
    "hybrid_imitation_rl",
    "logit_dynamics_training",
    "empg_agents",
    "divergence_chain",
    "divergence_minatar",
    "divergence_atari",
    "glm_hybrid_reasoner",
    "glm_claims",
)


@dataclasses.dataclass(frozen=True)
class Expectation:
    """What must hold for the claim to be met: a number of the summary is at least a value.

    Attributes:
        quantity: name in summary.json.
        at_least: the smallest value that meets the claim.
    """

    quantity: str
    at_least: float

    def check(self, summary: Mapping[str, Any]) -> bool:
        """Whether the summary meets the claim; what could not be measured does not."""
        value = summary[self.quantity]
        return value is not None and value >= self.at_least


@dataclasses.dataclass(frozen=True)
class Experiment:
    """One claim and the settings that show it, by training a model; what only computes is a `Study`.

    Attributes:
        name: name of its file.
        claim: the claim, one sentence.
        cost: what it costs on a machine that is named.
        settings: as the claim is made.
        tiny: a twin that runs in seconds, to see that everything works; it claims nothing.
        expectation: when the claim counts as met.
        build: settings -> the model before training and its tokenizer.
        by_recipe: settings that go with a recipe, by its name: flat names, as on the command line; what is said there
            counts more.
        ranges: what the fields of the settings may be.
        check: refuses settings that do not fit each other, before `build`; raises a UserError.
        positions: the longest row that the model of these settings reads [tokens]; None where it is not known before.
    """

    name: str
    claim: str
    cost: str
    settings: RunSettings
    tiny: RunSettings
    expectation: Expectation
    build: Callable[[RunSettings], tuple[Transformer, Tokenizer]]
    by_recipe: Mapping[str, Mapping[str, Any]] = dataclasses.field(default_factory=dict)
    ranges: Ranges = dataclasses.field(default_factory=lambda: RUN_RANGES)
    check: Callable[[RunSettings], None] = lambda settings: None
    positions: Callable[[RunSettings], int | None] = lambda settings: None

    def __post_init__(self) -> None:
        """Refuse settings of a recipe that are no fields."""
        names = {leaf.name for leaf in leaves(self.settings)}
        for recipe, values in self.by_recipe.items():
            if unknown := sorted(set(values) - names):
                raise ValueError(f"by_recipe[{recipe!r}] has {', '.join(unknown)}, which is no field of the settings.")


def get_experiment(name: str) -> "Experiment | Study":
    """The experiment of that name.

    Raises:
        UserError: there is none, naming the nearest one.
    """
    if name not in NAMES:
        near = difflib.get_close_matches(name, NAMES, n=1, cutoff=0.4)
        hint = f"Did you mean {near[0]}?" if near else f"There are {', '.join(NAMES)}."
        raise UserError(f"There is no experiment {name!r}. {hint}")
    return importlib.import_module(f"experiments.{name}").EXPERIMENT
