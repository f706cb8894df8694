"""`--seeds`: an ordinary run for each seed, found again together."""

import json
import shutil
import subprocess
import sys

import pytest

from experiments.arguments import parse_run
from experiments.cli import main
from experiments.groups import find_group
from experiments.groups import find_runs
from experiments.groups import write_group
from experiments.registry import get_experiment
from experiments.run_folder import UserError


def run(runs, *words: str) -> int:
    return main(["run", "from_scratch", "--runs-folder", str(runs), *words])


def test_seeds_are_sibling_runs_that_go_on_together(finished_runs, tmp_path, capsys) -> None:
    runs = tmp_path / "my runs"
    assert run(runs, "--tiny", "--id", "pair", "--seeds", "0", "7") == 0
    text = capsys.readouterr().out
    assert f"Compare the seeds with: python -m experiments compare from_scratch/pair --runs-folder '{runs}'" in text
    folder = runs / "from_scratch"
    settings = [json.loads((folder / f"pair-seed{seed}" / "config.json").read_text())["settings"] for seed in (0, 7)]
    assert settings[1] == settings[0] | {"seed": 7}
    # The run of a seed is the run that --seed makes.
    alone = finished_runs / "from_scratch" / "first" / "metrics.jsonl"
    assert (folder / "pair-seed0" / "metrics.jsonl").read_bytes() == alone.read_bytes()
    assert (folder / "pair-seed7" / "metrics.jsonl").read_bytes() != alone.read_bytes()

    # One of them is lost: the group goes on with it, and leaves the other as it is.
    kept = (folder / "pair-seed0" / "summary.json").stat().st_mtime_ns
    shutil.rmtree(folder / "pair-seed7")
    with pytest.raises(UserError, match=r"There is no run '.*pair-seed7'"):
        find_runs(["pair"], runs)
    assert run(runs, "--resume", "from_scratch/pair") == 0
    assert json.loads((folder / "pair-seed7" / "config.json").read_text())["settings"] == settings[1]
    assert (folder / "pair-seed0" / "summary.json").stat().st_mtime_ns == kept

    assert main(["compare", "pair", "--runs-folder", str(runs)]) == 0
    assert "seed" in capsys.readouterr().out
    assert (folder / "pair-seed7" / "compare.html").exists()
    assert run(runs, "--tiny", "--id", "pair", "--seeds", "0", "8") == 2
    assert "There is a group pair with other seeds or settings" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--seeds", "1", "2", "1"], "Field --seeds has 1 more than once"),
        (["--seeds", "1", "2", "--task", "copy_digit"], "Did you mean 'copy_digits'"),
        (["--seeds", "-1"], "Field --seeds is -1; it must be at least 0 and at most 4,294,967,295."),
        (["--seeds", "4294967296"], "Field --seeds is 4294967296; it must be"),
        (["--seed", "18446744073709551616"], "Field --seed is 18446744073709551616; it must be"),
        (["--resume", "a" * 300], "There is no run 'aaa"),
        (["--seeds", "1", "--id", "a" * 200], "it must be one plain folder name of at most 150 bytes"),
        (["--id", "\ud800"], "it must be one plain folder name"),
        (["--mismatch", "temperature", "--mismatch-strength", "0"], "--mismatch-strength is 0.0; it must be above 0"),
        (["--mismatch", "top_k", "--mismatch-strength", "1.5"], "of top_k it must be whole"),
        (["--layers", "100000"], "Field --layers is 100000"),
        (["--layers", "200", "--width", "4096"], "million parameters; from_scratch takes at most 500"),
        (["--schedule", "linear", "--warmup-steps", "1000000"], "Field --warmup-steps: warmup_steps is 1000000"),
        (["--mesh", "data=2,data=2"], "each axis at most once"),
        (
            ["--mesh", "data=999999"],
            "Field --mesh: mesh is 'data=999999', a product of 999999; it must be",
        ),
        (["--mesh", "data=3", "--dry-run"], "a product of 3; it must be the number of devices"),
        (["--warmup-steps", "1000000", "--dry-run"], "warmup_steps is 1000000, the run has "),
        (["--response-length", "100000", "--dry-run"], "100005 tokens together; the model reads 256"),
        (["--wandb", "", "--dry-run"], "Field --wandb is ''; it must be the name of a project"),
        (["--seeds", "--dry-run"], "Field --seeds has no seeds"),
        (["--seeds", "1", "--seed", "2", "--dry-run"], "Fields --seeds and --seed cannot be given together"),
        (["--seeds", "1", "--seed=2", "--dry-run"], "Fields --seeds and --seed cannot be given together"),
        (["--recipe-settings.mask-maximum", "nan"], "--recipe-settings.mask-maximum is nan; it must be at least"),
        (["--learning-rate", "inf"], "--learning-rate is inf"),
    ],
)
def test_what_cannot_be_is_refused_and_leaves_nothing(tmp_path, capsys, words, sentence) -> None:
    assert run(tmp_path, "--tiny", *words) == 2
    assert sentence in capsys.readouterr().err
    assert not list(tmp_path.glob("*/*"))


def test_a_dry_run_says_the_settings_and_writes_nothing(tmp_path, capsys) -> None:
    assert run(tmp_path, "--tiny", "--dry-run", "--steps", "9", "--recipe-settings.clip-high", "0.3") == 0
    lines = capsys.readouterr().out.splitlines()
    assert {"steps = 9", "recipe_settings.clip_high = 0.3"} <= set(lines)
    assert lines[-1].endswith("9 steps would be taken. Nothing was computed or written.")
    assert not list(tmp_path.iterdir())


def test_a_group_is_found_as_runs_are_and_goes_on_with_its_settings(tmp_path) -> None:
    experiment = get_experiment("from_scratch")
    config = {"experiment": "from_scratch", "tiny": True, "settings": {"steps": 11, "seed": 3}, "seeds": [3, 4]}
    (tmp_path / "from_scratch").mkdir()
    group = write_group(tmp_path, "many", config)
    for text in ("many", "from_scratch/many", str(tmp_path / "from_scratch" / "many")):
        assert find_group(text, tmp_path) == group
    assert find_group("other", tmp_path) is None
    assert [group.run(seed).label for seed in group.seeds] == ["from_scratch/many-seed3", "from_scratch/many-seed4"]
    arguments = parse_run(experiment, ["--resume", "many", "--runs-folder", str(tmp_path)])
    assert (arguments.settings.train.steps, arguments.settings.width, arguments.tiny) == (11, 16, True)
    (tmp_path / "from_scratch" / "many.group.json").write_text("[]")
    with pytest.raises(UserError, match="is damaged"):
        find_group("many", tmp_path)


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--model", ""], "Field --model is ''; it must be 'smollm2_135m', a Hugging Face folder"),
        (["--model", "/dev/null"], "Field --model: /dev/null is a device; expected"),
        (["--model", "/"], "Field --model: the folder / has no config.json"),
        (["--model", "nowhere"], "Field --model: nowhere does not exist"),
        (["--response-length", "100000"], "100052 tokens together; the model reads 8192"),
    ],
)
def test_a_dry_run_of_a_pretrained_model_sees_what_is_none(capsys, words, sentence) -> None:
    assert main(["run", "smollm2_arithmetic", "--tiny", "--dry-run", *words]) == 2
    assert sentence in capsys.readouterr().err


def test_runs_that_are_not_there_are_said_before_what_draws_is_imported(tmp_path) -> None:
    code = (
        "import sys\n"
        "from experiments.cli import main\n"
        "for command in ('compare a b', 'report a', 'show a', 'evaluate a', 'results a'):\n"
        "    print(command[0], main([*command.split(), '--runs-folder', sys.argv[1]]), 'matplotlib' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True)
    assert done.stdout.split("\n")[:-1] == [f"{letter} 2 False" for letter in "crser"]
    assert done.stderr.count("There is no run") == 5
