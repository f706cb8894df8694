"""Flat names of nested settings: which they are, and that they go there and back."""

import dataclasses
import json

import pytest

from experiments.arguments import parse_run
from experiments.cli import main
from experiments.fields import NAMED
from experiments.fields import attribute_sentences
from experiments.fields import flat_values
from experiments.fields import leaves
from experiments.fields import restored
from experiments.fields import with_values
from experiments.registry import NAMES
from experiments.registry import get_experiment
from experiments.settings import RecipeSettings
from experiments.settings import RunSettings
from experiments.settings import changed_settings
from experiments.settings import flat_settings
from jaxrl_llm.objectives import Recipe
from jaxrl_llm.objectives.recipes import CHOICES


@dataclasses.dataclass(frozen=True)
class Optimizer:
    """An optimiser.

    Attributes:
        rate: of learning, which goes on
            in a second line: with a colon.
        decay: of weights.
    """

    rate: float = 0.1
    decay: float | None = None


@dataclasses.dataclass(frozen=True)
class Run:
    """A run.

    Attributes:
        rules: of the game.
        actor: who acts.
        critic: who judges.
        decay: of the run, which keeps its short name.
    """

    rules: Optimizer = dataclasses.field(default_factory=Optimizer, metadata=NAMED)
    actor: Optimizer = dataclasses.field(default_factory=Optimizer)
    critic: Optimizer = dataclasses.field(default_factory=Optimizer)
    decay: tuple[int, ...] = (1, 2)


def test_a_group_is_named_where_it_asks_for_it_or_two_fields_would_have_one_name() -> None:
    assert [leaf.name for leaf in leaves(Run())] == [
        "rules.rate",
        "rules.decay",
        "rate",
        "actor.decay",
        "critic.rate",
        "critic.decay",
        "decay",
    ]


def test_values_go_there_and_back() -> None:
    changed = with_values(Run(), {"critic.rate": 3.0, "rate": 2.0, "decay": [4], "rules.decay": 5.0, "other": 6})
    assert changed == Run(Optimizer(decay=5.0), Optimizer(2.0), Optimizer(3.0), (4,))
    assert with_values(Run(), flat_values(changed)) == changed
    # None of a group that is named is not saved: a field that is new changes no run.
    assert "rules.decay" not in flat_values(Run())


def test_a_later_field_is_saved_where_it_is_not_at_its_default() -> None:
    before = flat_values(RunSettings())
    assert "optimizer" not in before
    changed = with_values(RunSettings(), before | {"optimizer": "muon"})
    assert changed.train.optimizer.optimizer == "muon"
    assert {name: value for name, value in flat_values(changed).items() if name not in before} == {"optimizer": "muon"}


def test_what_is_not_saved_is_restored_where_the_experiment_has_another_value() -> None:
    plain, preset = RunSettings(), with_values(RunSettings(), {"optimizer": "muon", "recipe_settings.clip_high": 0.28})
    for one, other in ((plain, preset), (preset, plain), (preset, preset)):
        saved = json.loads(json.dumps(flat_values(other)))
        assert restored(one, saved) == other
    # A change of a few settings leaves the others as they are.
    assert with_values(preset, {"seed": 3}).train.optimizer.optimizer == "muon"


def test_sentences_of_fields() -> None:
    said = attribute_sentences(Optimizer)
    assert said == {"rate": "of learning, which goes on in a second line: with a colon.", "decay": "of weights."}


def test_every_field_of_a_recipe_is_a_field_of_a_run(capsys) -> None:
    names = [field.name for field in dataclasses.fields(Recipe) if field.name not in ("name", "source")]
    assert [field.name for field in dataclasses.fields(RecipeSettings)] == names
    with pytest.raises(SystemExit):
        main(["run", "smollm2_arithmetic", "--help"])
    text = " ".join(capsys.readouterr().out.split())
    for name in names:
        assert f" --recipe-settings.{name.replace('_', '-')} " in text
    assert "the ratio is clipped above at 1 + clip_high; the recipe's own where None." in text
    for choices in CHOICES.values():
        assert f"(one of {', '.join(choices)})" in text


def test_changes_reach_the_recipe_and_the_saved_settings() -> None:
    experiment = get_experiment("smollm2_arithmetic")
    words = ["--recipe-settings.clip-high", "0.28", "--recipe_settings.surrogate=clipped", "--steps", "7"]
    settings = parse_run(experiment, words).settings
    own, changed = experiment.settings.get_recipe(), settings.get_recipe()
    assert changed == dataclasses.replace(own, clip_high=0.28, surrogate="clipped")
    flat = flat_settings(settings)
    assert {name: flat[name] for name in flat if name.startswith("recipe_settings")} == {
        "recipe_settings.clip_high": 0.28,
        "recipe_settings.surrogate": "clipped",
    }
    changes = changed_settings(flat_settings(experiment.settings), flat)
    assert sorted(changes) == ["recipe_settings.clip_high", "recipe_settings.surrogate", "steps"]


def test_a_setting_that_is_new_is_none_in_the_runs_before_it() -> None:
    assert not changed_settings({"steps": 1}, {"steps": 1, "objective": None})
    assert changed_settings({"steps": 1, "mask_maximum": 0.1}, {"steps": 1}) == ["mask_maximum"]


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"clip_high": 0.5, "mask": "both_"}, "Field --recipe-settings: mask of recipe .trm. is .both_."),
        ({"log_min_p": 0.5}, "log_min_p of recipe .trm. is 0.5"),
    ],
)
def test_a_recipe_that_cannot_be_is_refused(changes, sentence) -> None:
    with pytest.raises(Exception, match=sentence):
        RunSettings(recipe_settings=RecipeSettings(**changes)).get_recipe()


def test_nearest_names_are_found_without_their_group(capsys) -> None:
    assert main(["run", "from_scratch", "--mask-maximum", "1"]) == 2
    assert "Did you mean --recipe-settings.mask-maximum?" in capsys.readouterr().err


@pytest.mark.parametrize("name", NAMES)
def test_a_value_of_another_kind_than_its_field_is_refused(name) -> None:
    settings = get_experiment(name).settings
    saved = json.loads(json.dumps(flat_values(settings)))
    assert flat_values(with_values(settings, saved)) == flat_values(settings)
    for key in saved:
        with pytest.raises(ValueError, match=rf"^{key} is .*, which is not what that field holds\.$"):
            with_values(settings, saved | {key: {"a": [1]}})


def test_a_setting_of_a_recipe_that_is_no_field_is_refused() -> None:
    with pytest.raises(ValueError, match=r"by_recipe\['rloo'\] has train.seed, which is no field of the settings\."):
        dataclasses.replace(get_experiment("from_scratch"), by_recipe={"rloo": {"train.seed": 1, "steps": 2}})
