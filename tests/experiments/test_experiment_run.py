"""A run of the tiny twin: what it leaves, how it goes on, and what it refuses."""

import json
import os
import shutil
import signal
from pathlib import Path

import pytest

from experiments.cli import main
from experiments.run_folder import RunFolder
from experiments.run_folder import UserError
from experiments.run_folder import find_run
from experiments.run_folder import open_folder
from experiments.run_folder import read_rows
from experiments.run_folder import unfinished_twin
from jaxrl_llm.training.text import loop


def run_tiny(runs: Path, *words: str) -> int:
    return main(["run", "from_scratch", "--tiny", "--runs-folder", str(runs), *words])


def read(path: Path) -> dict:
    return json.loads(path.read_text())


def test_a_run_leaves_its_files(finished_runs) -> None:
    run = RunFolder(finished_runs / "from_scratch" / "first")
    names = {path.name for path in run.path.iterdir()}
    assert names >= {
        "checkpoints",
        "config.json",
        "environment.json",
        "figures",
        "metrics.jsonl",
        "report.html",
        "samples.json",
        "samples.jsonl",
        "summary.json",
        "tensorboard",
        "timings.jsonl",
    }
    assert read(run.config)["settings"]["steps"] == 3
    environment = read(run.environment)
    assert environment["packages"]["jax"]
    assert environment["processor_cores"] >= 1
    answers = read(run.samples)["answers"]
    assert len(answers) == 128
    assert set(answers[0]) == {"identity", "prompt", "answer", "before", "after"}
    assert len(list(run.figures.glob("*.png"))) == len(list(run.figures.glob("*.svg"))) >= 6
    assert next((run.path / "tensorboard").iterdir()).stat().st_size > 1000


def test_the_summary_follows_from_the_answers(finished_runs) -> None:
    folder = finished_runs / "from_scratch" / "first"
    summary, answers = read(folder / "summary.json"), read(folder / "samples.json")["answers"]
    assert summary["held_out_problems"] == len({row["identity"] for row in answers}) == 128
    for when in ("before", "after"):
        assert summary[f"accuracy_{when}"] == sum(row[when]["lenient"] for row in answers) / 128
        low, high = summary[f"accuracy_{when}_interval"]
        assert low <= summary[f"accuracy_{when}"] <= high
        assert summary[f"strict_{when}"] == sum(row[when]["strict"] for row in answers) / 128
    assert summary["steps"] == 3
    assert summary["claim_met"] is None
    timings = read_rows(folder / "timings.jsonl")
    assert summary["seconds_training"] == pytest.approx(sum(row["total"] - row.get("evaluate", 0) for row in timings))


def test_a_complete_run_is_only_reported_again(runs, capsys) -> None:
    report = runs / "from_scratch" / "first" / "report.html"
    report.unlink()
    assert run_tiny(runs, "--id", "first") == 0
    assert "is complete" in capsys.readouterr().out
    assert report.exists()


def test_other_settings_are_refused_with_the_difference(runs, capsys) -> None:
    assert run_tiny(runs, "--id", "first", "--learning-rate", "0.5", "--steps", "4") == 2
    text = capsys.readouterr().err
    assert "steps: 3 -> 4" in text
    assert "learning_rate: 0.001 -> 0.5" in text
    assert "--allow-changed-config" in text
    assert read(runs / "from_scratch" / "first" / "config.json")["settings"]["steps"] == 3


def test_resume_keeps_the_settings_and_may_be_told_to_change_them(runs, capsys) -> None:
    # The newest run is the tiny twin; --resume takes its settings without being told so.
    words = ["run", "from_scratch", "--resume", "--runs-folder", str(runs), "--samples", "1"]
    assert main(words) == 2
    assert capsys.readouterr().err.count("->") == 1
    assert main([*words, "--allow-changed-config"]) == 0
    folder = runs / "from_scratch" / "first"
    assert read(folder / "config.json")["settings"]["samples"] == 1
    assert read(folder / "summary.json")["changed_settings"] == ["samples"]
    assert len(read(folder / "environment.json")["continued"]) == 1


def test_ctrl_c_saves_and_says_how_to_go_on(finished_runs, tmp_path, capsys, monkeypatch) -> None:
    take_step = loop._Run.step

    def interrupted_step(self, index, stop):
        if index == 1:
            os.kill(os.getpid(), signal.SIGINT)
        return take_step(self, index, stop)

    monkeypatch.setattr(loop._Run, "step", interrupted_step)
    assert run_tiny(tmp_path, "--id", "cut") == 130
    text = capsys.readouterr().out
    assert "Stopped by Ctrl-C" in text
    assert "Go on with: python -m experiments run from_scratch --resume from_scratch/cut" in text
    assert not (tmp_path / "from_scratch" / "cut" / "summary.json").exists()
    monkeypatch.undo()
    words = text.split("Go on with: python -m experiments ")[1].splitlines()[0].split()
    assert main(words) == 0
    for name in ("metrics.jsonl", "samples.jsonl", "samples.json"):
        cut, whole = (folder / name for folder in (tmp_path / "from_scratch/cut", finished_runs / "from_scratch/first"))
        assert cut.read_bytes() == whole.read_bytes(), name


def test_an_unfinished_run_with_the_same_settings_is_found(runs) -> None:
    run = RunFolder(runs / "from_scratch" / "first")
    settings = read(run.config)["settings"]
    assert unfinished_twin(runs, "from_scratch", settings) is None
    run.summary.unlink()
    assert unfinished_twin(runs, "from_scratch", settings) == run
    assert unfinished_twin(runs, "from_scratch", settings | {"seed": 1}) is None
    assert unfinished_twin(runs, "smollm2_arithmetic", settings) is None


def test_a_folder_that_cannot_be_written_is_refused_before_anything_is_computed(tmp_path, capsys) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("")
    assert run_tiny(blocked) == 2
    text = capsys.readouterr().err
    assert f"Cannot write the run folder {blocked}" in text
    assert "Nothing has been computed yet." in text
    with pytest.raises(UserError, match="one plain folder name"):
        open_folder(tmp_path, "from_scratch", "../elsewhere")


def test_a_full_disk_is_refused_before_anything_is_computed(tmp_path, capsys, monkeypatch) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=3_000_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    assert run_tiny(tmp_path) == 2
    assert "has 3 MB free and a run needs at least 50 MB" in capsys.readouterr().err


def test_runs_are_found_by_path_label_id_and_experiment(finished_runs) -> None:
    folder = finished_runs / "from_scratch" / "first"
    for text in (str(folder), "from_scratch/first", "first", "from_scratch"):
        assert find_run(text, finished_runs).path == folder
    with pytest.raises(UserError, match=r"There is no run 'frist'\. Did you mean first\?"):
        find_run("frist", finished_runs)


def test_a_line_cut_off_by_a_kill_is_left_out(tmp_path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n{"st')
    assert read_rows(path) == [{"step": 1}, {"step": 2}]
    path.write_text('{"step": 1}\n{"st\n{"step": 2}\n')
    with pytest.raises(UserError, match="Line 2 of"):
        read_rows(path)
