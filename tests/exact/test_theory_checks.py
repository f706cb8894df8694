"""Every theory check holds on a few instances, every wrong twin is caught, and the command line says so."""

import dataclasses
import functools
import importlib
import json
import re
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from jaxrl_llm.bounds import SHARP
from theory_checks import chain_search
from theory_checks import cli
from theory_checks.check import run_check
from theory_checks.registry import FAMILIES
from theory_checks.registry import all_checks
from theory_checks.registry import select
from theory_checks.report import write_report
from theory_checks.search import Found
from theory_checks.search import search

ROOT = Path(__file__).parents[2]
INSTANCES = 20
NAMES = [check.name for check in all_checks()]


@functools.cache
def measured(world_name):
    world = next(check.world for check in all_checks() if check.world.name == world_name)
    return world.measured(jax.random.key(1), INSTANCES)


@pytest.mark.parametrize("name", NAMES)
def test_holds_and_its_wrong_twin_is_caught(name):
    (check,) = select(name)
    numbers = measured(check.world.name)
    assert all(value.dtype in (np.float64, np.bool_) for value in numbers.values())
    assert np.all(check.margin(numbers) >= 0)
    assert np.any(check.wrong_margin(numbers) < 0)
    assert run_check(check, numbers).passed


WEAKEST = (
    "surrogate_error.average_only_sharp",
    "surrogate_error.sequence_kl_sharp",
    "regret.potential",
    "regret.potential_at",
    "regret.potential_sharp",
    "regret.psrl",
    "regret.psrl_sharp",
)
"""Statements that random instances come nowhere near: their wrong twins were caught by one planted instance."""


@pytest.mark.parametrize("name", WEAKEST)
def test_a_wrong_twin_is_not_caught_by_one_instance_alone(name):
    (check,) = select(name)
    caught = check.wrong_margin(measured(check.world.name)) < 0
    assert np.sum(caught.reshape(len(caught), -1).any(axis=1)) >= 3


def test_there_are_at_least_forty_with_names_of_their_own():
    assert len(set(NAMES)) == len(NAMES) >= 40
    for family, checks in FAMILIES.items():
        assert (ROOT / "theory_checks" / f"{family}.py").exists()
        assert checks
        assert all(check.family == family for check in checks)


def test_every_function_that_a_check_names_exists():
    for check in all_checks():
        assert check.functions
        for name in check.functions:
            module, _, attribute = name.rpartition(".")
            assert hasattr(importlib.import_module(f"jaxrl_llm.{module}"), attribute), (check.name, name)


def test_a_measurement_that_is_not_a_number_is_a_violation():
    (check,) = select("mismatch.kl")
    numbers = dict(measured(check.world.name))
    spoilt = {key: np.where(np.arange(value.shape[0]) == 0, np.nan, value.T).T for key, value in numbers.items()}
    assert not run_check(check, spoilt).passed


def test_a_check_whose_twin_passes_does_not_pass():
    (check,) = select("mismatch.kl")
    toothless = dataclasses.replace(check, wrong=check.sides)
    assert not run_check(toothless, measured(check.world.name)).passed


def test_json_through_the_command_line():
    done = subprocess.run(
        [sys.executable, "-m", "theory_checks", "logit_dynamics", "--json", "--instances", "30", "--seed", "3"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout)
    assert [row["name"] for row in rows] == [check.name for check in FAMILIES["logit_dynamics"]]
    assert all(row["passed"] is True for row in rows)
    assert all(isinstance(row["margin"], float) and row["margin"] >= 0 for row in rows)
    assert all(row["tightness"] >= 0 for row in rows)


def test_a_violation_is_exit_code_1(monkeypatch, capsys):
    (check,) = select("mismatch.kl")
    broken = dataclasses.replace(check, sides=check.wrong)
    monkeypatch.setattr(cli, "select", lambda name: [broken])
    assert cli.main(["mismatch.kl", "--instances", "20"]) == 1
    assert "VIOLATED" in capsys.readouterr().out


def test_the_list_and_a_name_that_does_not_exist(capsys):
    assert cli.main(["list"]) == 0
    assert "surrogate_error.adaptive_sharp" in capsys.readouterr().out
    with pytest.raises(SystemExit) as error:
        cli.main(["no_such_check"])
    assert error.value.code == 2
    assert "no_such_check" in capsys.readouterr().err


def test_the_search_comes_near_the_attained_bounds_and_breaks_none():
    found = search(seed=0, restarts=8, steps=150, shapes=((2, 2),))
    ratios = {one.bound: one.ratio for one in found}
    assert set(ratios) == set(SHARP)
    assert all(0 < ratio <= 1 + 1e-6 for ratio in ratios.values()), ratios
    # Random worlds stay below 0.3; only the ascent comes near.
    assert min(ratios[name] for name in ("classical", "coupling", "adaptive", "adaptive_tv")) > 0.8, ratios


def test_the_worst_error_grows_like_the_horizon():
    grown = chain_search.growth(seed=0, horizons=(16, 64), deltas=(1e-4,), restarts=4, steps=10)
    assert [one.horizon for one in grown] == [16, 64]
    assert all(0.5 < one.ratio <= 1 for one in grown)
    assert all(0.5 * one.independent < one.searched <= one.horizon * 1e-4 for one in grown)
    # T^(3/2) would be the exponent of the printed bound.
    assert 0.98 < chain_search.exponent(grown) < 1.1
    assert all(one.error <= bound for one in grown for bound in (*one.sharp.values(), *one.printed.values()))


def test_a_search_above_one_is_a_violation(monkeypatch, capsys):
    (check,) = select("token_chains.growth")
    worst = chain_search.Worst(delta=1e-4, horizon=16, independent=2e-3, searched=0.0, printed={}, sharp={})
    monkeypatch.setattr(cli, "select", lambda name: [check])
    monkeypatch.setattr(chain_search, "growth", lambda **_: [worst, dataclasses.replace(worst, horizon=64)])
    assert cli.main(["token_chains", "--instances", "20", "--json"]) == 1
    row = json.loads(capsys.readouterr().out)[-1]
    assert row["name"] == "growth.delta_0.0001"
    assert row["passed"] is False


def test_the_report_stands_alone_and_shows_every_check(tmp_path):
    results = [run_check(check, measured(check.world.name)) for check in FAMILIES["token_chains"]]
    broken = dataclasses.replace(results[0], passed=False)
    printed = {"pinsker_marginal_kl": 0.1, "mixed_kl": 0.2}
    worst = chain_search.Worst(
        delta=1e-4, horizon=16, independent=9e-4, searched=1e-3, printed=printed, sharp={"sequence_kl": 1.6e-3}
    )
    found = Found(bound="linear", vocabulary=2, horizon=2, ratio=0.99, median=0.9, eps=0.5)
    grown = [worst, dataclasses.replace(worst, horizon=64)]
    path = tmp_path / "new" / "report.html"
    write_report(path, [broken, *results[1:]], grown=grown, found=[found], seconds=1.0, seed=0)
    page = path.read_text()
    assert page.count("data:image/png;base64,") == 4
    assert "VIOLATED" in page
    assert not re.findall(r'(?:src|href)="(?!data:|#)', page)
    assert all(result.check.name.partition(".")[2] in page for result in results)
