"""The command line: what it accepts, and the sentence for what it does not."""

import dataclasses
import io

import pytest

from experiments.arguments import RunArguments
from experiments.arguments import field_names
from experiments.arguments import parse_run
from experiments.cli import main
from experiments.progress import LiveBar
from experiments.progress import PlainLines
from experiments.registry import NAMES
from experiments.registry import get_experiment
from experiments.settings import flat_settings
from experiments.study import Study


def said(capsys: pytest.CaptureFixture[str], *words: str, status: int = 2) -> str:
    """The one sentence that the command says."""
    assert main(list(words)) == status
    return capsys.readouterr().err


def test_the_name_alone_is_enough() -> None:
    experiment = get_experiment("smollm2_arithmetic")
    assert parse_run(experiment, []).settings == experiment.settings


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["rum", "from_scratch"], "There is no command 'rum'. Did you mean run?"),
        (["run", "from_scrach"], "There is no experiment 'from_scrach'. Did you mean from_scratch?"),
        (
            ["run", "from_scratch", "--stepz", "3"],
            "Experiment from_scratch has no field --stepz. Did you mean --steps?",
        ),
        (["run", "from_scratch", "--learning_rat=1"], "has no field --learning-rat. Did you mean --learning-rate?"),
        (["run", "smollm2_arithmetic", "--width", "8"], "Experiment smollm2_arithmetic has no field --width."),
        (["run"], "run needs the name of an experiment first"),
        (["report", "--runs-foldr", "x"], "report has no field --runs-foldr. Did you mean --runs-folder?"),
    ],
)
def test_wrong_words_are_refused_with_the_nearest_right_one(capsys, words, sentence) -> None:
    assert sentence in said(capsys, *words)


def test_unknown_task_recipe_and_sizes_are_refused_and_leave_no_folder(capsys, tmp_path) -> None:
    run = ["run", "from_scratch", "--tiny", "--runs-folder", str(tmp_path)]
    assert "Did you mean 'sort_digits'" in said(capsys, *run, "--task", "sort_digit")
    assert "Did you mean 'trm'" in said(capsys, *run, "--recipe", "trmm")
    assert "--width is 7; it must be a multiple" in said(capsys, *run, "--width", "7")
    assert "held-out prompt does not fit" in said(capsys, *run, "--prompt-length", "3")
    assert "does not exist" in said(
        capsys, "run", "smollm2_arithmetic", "--runs-folder", str(tmp_path), "--model", "/no/such/folder"
    )
    assert not list(tmp_path.glob("*/*"))
    assert "takes advantages as given" in said(capsys, *run, "--recipe-settings.advantage", "given")


def test_impossible_numbers_and_types_name_the_field(capsys) -> None:
    assert "Field --steps is 0; it must be at least 1" in said(capsys, "run", "from_scratch", "--steps", "0")
    with pytest.raises(SystemExit) as stopped:
        main(["run", "from_scratch", "--steps", "many"])
    assert stopped.value.code == 2
    assert "steps" in capsys.readouterr().err


@pytest.mark.parametrize("name", NAMES)
def test_every_field_has_a_sentence(capsys, name) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["run", name, "--help"])
    assert not stopped.value.code
    text = " ".join(capsys.readouterr().out.split())
    for field in field_names(RunArguments(settings=get_experiment(name).settings)):
        start = max(text.find(f" --{field} "), text.find(f" --no-{field} "))
        assert start >= 0, field
        # Between a field and its default there is more than its name and type.
        described = text[start : text.index("(default:", start)]
        assert len(described.split()) >= 5, described


def test_fields_become_settings() -> None:
    experiment = get_experiment("from_scratch")
    settings = parse_run(experiment, ["--steps", "7", "--learning-rate=0.5", "--recipe", "grpo"]).settings
    assert (settings.train.steps, settings.train.optimizer.learning_rate, settings.recipe) == (7, 0.5, "grpo")
    wanted = flat_settings(experiment.settings) | {"steps": 7, "learning_rate": 0.5, "recipe": "grpo"}
    assert flat_settings(settings) == wanted
    assert parse_run(experiment, ["--tiny"]).settings == experiment.tiny


@pytest.mark.parametrize("name", NAMES)
def test_experiments_say_what_they_claim(name) -> None:
    experiment = get_experiment(name)
    header = __import__(f"experiments.{name}", fromlist=["EXPERIMENT"]).__doc__
    assert header.startswith(experiment.claim)
    for word in ("Claim", "Command", "Cost", "Expected"):
        assert f"\n{word} " in header
    assert f"{experiment.expectation.quantity} >= {experiment.expectation.at_least}" in header
    # The flat names of nested settings must not hide each other.
    names = field_names(experiment.settings)
    assert len(set(names)) == len(names)
    assert isinstance(experiment, Study) or experiment.tiny.train.steps <= 5
    assert {field.name for field in dataclasses.fields(experiment.tiny)} <= set(vars(experiment.settings))


def test_list_names_experiments_and_runs(capsys, finished_runs) -> None:
    assert main(["list", "--runs-folder", str(finished_runs)]) == 0
    text = capsys.readouterr().out
    assert all(name in text for name in NAMES)
    assert "from_scratch/first" in text


def test_plain_progress_has_no_control_characters() -> None:
    stream = io.StringIO()
    lines = PlainLines(stream, seconds=0)
    lines.begin(first_step=0, steps=2)
    lines.finish_step(0, {"held_out/accuracy": 0.25, "held_out/strict": 0.2}, {})
    lines.finish_step(1, {"critic/rewards/mean": 0.5, "shift/kl_mean": 2e-5}, {})
    lines.finish_step(2, {"critic/rewards/mean": 0.75}, {})
    text = stream.getvalue()
    assert text.splitlines()[0] == "held-out accuracy after 0 steps: 0.250 (strict 0.200)"
    assert "step 1/2  reward 0.500  KL 2.00e-05  held-out 0.250" in text
    assert "step 2/2  reward 0.750" in text
    assert text.isprintable() or set(text) - {"\n"} == {c for c in text if c.isprintable()}


def test_live_bar_shows_the_newest_numbers() -> None:
    from rich.console import Console

    console = Console(file=io.StringIO(), force_terminal=True, width=140)
    bar = LiveBar(console)
    bar.begin(first_step=0, steps=3)
    bar.phase("rollout")
    bar.finish_step(1, {"critic/rewards/mean": 0.5, "held_out/accuracy": 0.25, "held_out/strict": 0.25}, {})
    bar.say("a sentence")
    bar.stop()
    text = console.file.getvalue()  # pyright: ignore[reportAttributeAccessIssue]
    assert all(part in text for part in ("rollout", "1/3", "reward 0.500", "held-out 0.250", "a sentence"))
