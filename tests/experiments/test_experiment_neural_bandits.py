"""The neural bandit experiment: its parts, numbers and page at tiny size, and what it refuses."""

import json

import numpy as np

from experiments.cli import main
from experiments.run_folder import RunFolder
from experiments.study import read_results


def test_a_tiny_run_leaves_numbers_and_a_page(tmp_path):
    assert main(["run", "neural_bandits", "--tiny", "--id", "first", "--runs-folder", str(tmp_path)]) == 0
    run = RunFolder(tmp_path / "neural_bandits" / "first")
    summary, results = json.loads(run.summary.read_text()), read_results(run)
    ours, greedy = (results[f"vector_quadratic_{name}"] for name in ("hyperagent", "greedy"))
    assert summary["claim_met"] is None
    np.testing.assert_allclose(summary["saved_against_greedy"], 1 - ours["final"].mean() / greedy["final"].mean())
    # Two layers of 8 units over 4 features, then 8 (M + 1) weights against 8.
    assert ours["parameters"] == 4 * 8 + 8 + 8 * 8 + 8 + 8 * 4
    assert greedy["parameters"] == 4 * 8 + 8 + 8 * 8 + 8 + 8
    assert np.all(np.diff(ours["mean"]) >= 0)
    page = run.report.read_text()
    assert all(text in page for text in ("Regret over time", "Regret against parameters", "no claim"))


def test_settings_that_cannot_be_are_refused(capsys, tmp_path):
    run = ["run", "neural_bandits", "--tiny", "--runs-folder", str(tmp_path)]
    for words, sentence in (
        (["--shown", "99"], "--shown is 99; it must be at most --actions, 12"),
        (["--agents", "greedy"], "hyperagent"),
        (["--bandits", "neural"], "vector_quadratic among them"),
        (["--prior-scale", "0"], "prior_scale is 0.0; it must be a positive number"),
        (["--noise-scale", "-1"], "--noise-scale is -1.0; it must be at least 0"),
    ):
        assert main([*run, *words]) == 2
        assert sentence in capsys.readouterr().err
    assert not list(tmp_path.glob("*/*"))
