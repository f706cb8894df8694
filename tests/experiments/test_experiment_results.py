"""Result files, and the tables made from them."""

import json

import pytest
from synthetic_run import write_synthetic_run

from experiments.results import END
from experiments.results import RESULTS
from experiments.results import START
from experiments.results import keep
from experiments.results import write_tables
from experiments.run_folder import ROOT
from experiments.run_folder import RunFolder
from experiments.run_folder import UserError
from experiments.run_folder import read_json


def test_tables_are_made_from_kept_results(tmp_path) -> None:
    run = write_synthetic_run(tmp_path / "runs" / "sums" / "one")
    environment = json.loads(run.environment.read_text()) | {"python": "3.12", "git_commit": "abc", "started": "now"}
    run.environment.write_text(json.dumps(environment))
    results = tmp_path / "results"
    assert keep(run, results) == results / "sums.json"
    (tmp_path / "README.md").write_text(f"before\n{START}\nold\n{END}\nafter\n")
    assert [path.name for path in write_tables(results, tmp_path)] == ["results.md", "README.md"]
    row = (
        "| `sums` | 28.0 % (21.0 to 37.0 %) | 63.0 % (54.0 to 71.0 %) | +35.0 points (+25.0 to +44.0) "
        "| met: at least +25 | 6 min 12 s | a processor, 2 cores, 1 x cpu (cpu), jax 0.11.2 |"
    )
    assert row in (tmp_path / "docs" / "results.md").read_text()
    readme = (tmp_path / "README.md").read_text()
    assert row in readme
    assert "old" not in readme
    assert readme.startswith("before\n")
    assert readme.endswith("after\n")


def test_a_run_with_changed_settings_stands_beside_that_of_the_claim(tmp_path) -> None:
    run = write_synthetic_run(tmp_path / "runs" / "sums" / "one")
    summary, config = (json.loads(path.read_text()) for path in (run.summary, run.config))
    environment = json.loads(run.environment.read_text()) | {"python": "3.12", "git_commit": "abc", "started": "now"}
    run.environment.write_text(json.dumps(environment))
    results = tmp_path / "results"
    keep(run, results)
    run.summary.write_text(json.dumps(summary | {"changed_settings": ["mismatch", "agents"]}))
    run.config.write_text(
        json.dumps(config | {"settings": config["settings"] | {"mismatch": "int8_weights", "agents": ["a", "b"]}})
    )
    assert keep(run, results) == results / "sums.mismatch_int8_weights.agents_a_b.json"
    write_tables(results, tmp_path)
    rows = [line for line in (tmp_path / "docs" / "results.md").read_text().splitlines() if line.startswith("| `sums")]
    assert [row.split("|")[1].strip() for row in rows] == ["`sums`", "`sums --mismatch int8_weights --agents a b`"]


def test_a_tiny_run_is_no_result(finished_runs, tmp_path) -> None:
    with pytest.raises(UserError, match="is a tiny one"):
        keep(RunFolder(finished_runs / "from_scratch" / "first"), tmp_path)


def test_figures_of_the_errata_are_those_of_the_kept_runs() -> None:
    """Errata F2.19 and F3.5, which say what two studies did not reproduce."""
    text = " ".join((ROOT / "docs" / "errata.md").read_text().split())
    trm, pruning = (read_json(RESULTS / f"{name}.json")["summary"] for name in ("trm_training", "pruning_training"))

    def interval(summary: dict, name: str) -> tuple[float, float, float]:
        mean, low = summary[name], summary[f"{name}_low"]
        return mean, low, 2 * mean - low

    gain, lower, upper = interval(trm, "sums_trm_minus_none")
    assert f"above no correction by {gain:.3f} ({lower:.3f} to {upper:.3f})" in text
    loss, lower, upper = interval(trm, "sums_trm_minus_tis")
    assert f"by {-loss:.3f} ({-upper:.3f} to {-lower:.3f})" in text
    assert trm["ladder_trm_minus_none_low"] < 0 < interval(trm, "ladder_trm_minus_none")[2]
    gain, lower, upper = interval(pruning, "pruning_minus_none")
    assert f"by {gain:.3f} ({lower:.3f} to {upper:.3f}) at the largest threshold" in text
    added = [interval(pruning, f"dvp_{threshold}_minus_tis") for threshold in (13, 6, 3)]
    assert "{:+.3f}, {:+.3f} and {:+.3f} at -13, -6 and -3".format(*(mean for mean, _, _ in added)) in text
    assert all(lower < 0 < upper for _, lower, upper in added)
    halves = sorted(upper - mean for mean, _, upper in added)
    assert f"half-intervals {halves[0]:.3f} to {halves[-1]:.3f}" in text


def test_figures_of_the_errata_of_agents_are_those_of_the_kept_runs() -> None:
    """Errata F1.1, F1.2 and F4.5."""
    text = " ".join((ROOT / "docs" / "errata.md").read_text().split())
    hybrid, empg = (read_json(RESULTS / f"{name}.json")["summary"] for name in ("hybrid_imitation_rl", "empg_agents"))
    start, optimum = (hybrid["variance"][place] for place in ("start", "optimum"))
    assert f"is {start['rao_blackwell_step']:.2f} against {start['hybrid_step']:.1f} at the start" in text
    assert f"and {optimum['rao_blackwell_step']:.2f} against {optimum['hybrid_step']:.2f} at the optimum" in text
    resting = {name: row["gap"] for name, row in hybrid["resting"].items()}
    assert f"vanishes {resting['kl_loss']:.3f} nats of J above the optimum" in text
    assert f"discount 0.9 at {resting['hybrid_0.9']:.3f}" in text
    assert resting["hybrid"] < 1e-9
    arm = hybrid["sampled"]["hybrid_0.9"]
    assert arm["minus_hybrid"] + arm["minus_hybrid_half_interval"] < 0
    assert arm["gap"] == min(other["gap"] for other in hybrid["sampled"].values())

    def said(name: str) -> str:
        return f"{empg[name]:.3f} +- {empg[name] - empg[f'{name}_low']:.3f}"

    assert f"plain DAPO by {said('dapo_empg_minus_plain')} of" in text
    assert f"plain GRPO by {said('grpo_empg_minus_plain')};" in text
    assert f"{said('dapo_empg_minus_centred')} and {said('grpo_empg_minus_centred')}." in text
    assert f"all equal, {said('dapo_all_groups_minus_plain')}." in text
