"""Experiments that compute: what a run leaves, how it goes on, and what it refuses."""

import json

import jax.numpy as jnp
import numpy as np
import pytest

from experiments import words
from experiments.bandit_page import needed_size
from experiments.cli import main
from experiments.results import keep
from experiments.results import write_tables
from experiments.run_folder import RunFolder
from experiments.run_folder import UserError
from experiments.study import Resumable
from experiments.study import read_results
from experiments.study import run_parts
from jaxrl_llm.exploration import Gaussian
from jaxrl_llm.exploration import thompson_sampling
from jaxrl_llm.training import StorageError


@pytest.fixture(scope="module")
def studied(tmp_path_factory):
    runs = tmp_path_factory.mktemp("studies")
    assert main(["run", "linear_bandit", "--tiny", "--id", "first", "--runs-folder", str(runs)]) == 0
    return runs


def test_a_study_leaves_parts_numbers_and_a_page(studied):
    run = RunFolder(studied / "linear_bandit" / "first")
    summary, results = json.loads(run.summary.read_text()), read_results(run)
    assert summary["claim_met"] is None
    regret = results["pairs_4"]["final"][1, 1].mean() - results["thompson"]["final"].mean()
    np.testing.assert_allclose(summary["gap_per_round_at_claimed_size"], regret / 40, rtol=1e-5)
    page = run.report.read_text()
    for text in ("Regret over time", "Reference by perturbation", "How large must the index be?", "no claim"):
        assert text in page
    assert len(list(run.figures.glob("*.svg"))) == 3


def test_a_study_goes_on_after_its_last_part(studied, capsys):
    run = RunFolder(studied / "linear_bandit" / "first")
    before, kept = json.loads(run.summary.read_text()), read_results(run)
    run.summary.unlink()
    (run.path / "parts" / "greedy.npz").unlink()
    assert main(["run", "linear_bandit", "--resume", "first", "--runs-folder", str(studied)]) == 0
    after, again = json.loads(run.summary.read_text()), read_results(run)
    assert {**after, "seconds": 0} == {**before, "seconds": 0}
    np.testing.assert_array_equal(again["greedy"]["final"], kept["greedy"]["final"])
    assert again["thompson"]["seconds"] == kept["thompson"]["seconds"]  # not computed a second time
    assert main(["report", "first", "--runs-folder", str(studied)]) == 0


def test_settings_that_cannot_be_are_refused_and_leave_no_folder(capsys, tmp_path):
    run = ["run", "linear_bandit", "--tiny", "--runs-folder", str(tmp_path)]
    assert main([*run, "--claimed-size", "3"]) == 2
    assert "--claimed-size is 3; it must be one of --index-dimensions" in capsys.readouterr().err
    assert main([*run, "--seeds", "0"]) == 2
    assert "--seeds is 0; it must be at least 1" in capsys.readouterr().err
    assert not list(tmp_path.glob("*/*"))


def test_a_kept_study_has_a_row_of_its_own(studied, tmp_path):
    run = RunFolder(studied / "linear_bandit" / "first")
    summary = json.loads(run.summary.read_text())
    run.summary.write_text(json.dumps({**summary, "claim_met": False}))
    keep(run, tmp_path / "results")
    run.summary.write_text(json.dumps(summary))
    (page,) = write_tables(tmp_path / "results", tmp_path)
    (row,) = [line for line in page.read_text().splitlines() if line.startswith("| `linear_bandit` |")]
    cells = [cell.strip() for cell in row.split("|")[1:-1]]
    measured = words.number(summary["margin_at_claimed_size"])
    assert cells[1:5] == [summary["claim"], "margin at claimed size", measured, "at least 0: missed"]


def test_the_needed_size_is_where_all_larger_ones_match_too():
    assert needed_size([2, 4, 8], np.array([0.5, 0.01, -0.015]), 0.02) == 4
    assert needed_size([2, 4, 8], np.array([0.01, 0.03, 0.0]), 0.02) == 8
    assert needed_size([2, 4], np.array([0.0, -0.03]), 0.02) is None


def test_a_posterior_that_breaks_ends_the_run_with_a_sentence(capsys, tmp_path, monkeypatch):
    def broken(dimension, **scales):
        agent = thompson_sampling(dimension, **scales)
        return agent._replace(init=lambda key: Gaussian(jnp.zeros(dimension), -jnp.eye(dimension)))

    monkeypatch.setattr("experiments.linear_bandit.thompson_sampling", broken)
    assert main(["run", "linear_bandit", "--tiny", "--runs-folder", str(tmp_path)]) == 2
    assert "The posterior of an agent broke: covariance 0 of 6 has smallest eigenvalue" in capsys.readouterr().err


def test_a_part_goes_on_where_it_was_stopped_and_its_seconds_add_up(tmp_path):
    run = RunFolder(tmp_path / "study" / "one")
    run.path.mkdir(parents=True)

    def compute(folder, say):
        half = folder / "half"
        if half.exists():
            return {"value": np.arange(3)}
        half.touch()
        say("50%")
        raise StorageError("the disk is full")

    with pytest.raises(UserError, match="the disk is full"):
        run_parts(run, {"long": Resumable(compute)})
    (spent,) = run.path.glob("parts/*/seconds.txt")
    assert float(spent.read_text()) > 0
    spent.write_text("100.0")
    assert run_parts(run, {"long": Resumable(compute)}) is None
    part = read_results(run)["long"]
    assert part["value"].tolist() == [0, 1, 2]
    assert 100 < part["seconds"] < 110
    assert not spent.parent.exists()
