"""Result files, and the tables made from them."""

import json

import pytest
from synthetic_run import write_synthetic_run

from experiments.results import END
from experiments.results import START
from experiments.results import keep
from experiments.results import write_tables
from experiments.run_folder import RunFolder
from experiments.run_folder import UserError


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
