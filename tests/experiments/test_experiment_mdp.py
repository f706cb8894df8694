"""The experiments on MDPs: statements that can fail, pages from numbers, and a small sea crossed end to end."""

import dataclasses
import json

import numpy as np
import pytest

from experiments import deep_sea
from experiments import psrl
from experiments.cli import main
from experiments.deep_sea_page import power
from experiments.deep_sea_page import ratios
from experiments.psrl_page import AGENTS
from experiments.psrl_page import EASY_AGENTS
from experiments.psrl_page import linearity
from experiments.psrl_page import psrl_page
from experiments.psrl_page import slope
from experiments.psrl_page import statements
from experiments.run_folder import RunFolder

SETTINGS = dataclasses.replace(psrl.SETTINGS, episodes=64, varied_episodes=64, seeds=50, horizons=(3,), dimensions=(2,))
EPISODES = np.arange(1, 65)


def part(curve, *, rng, scale=1.0):
    final = curve[-1] + 0.1 * rng.normal(size=50)
    points = np.array([1, 8, 64])
    chain = {
        name: scale * factor * np.sqrt(points)
        for name, factor in (("decoupled", 5.0), ("sharp", 9.0), ("printed", 20.0), ("prior_free", 30.0))
    }
    proof = {"matched": final.copy(), "along": final.copy(), "true_part": 0.01 * rng.normal(size=50)}
    variance = scale * np.ones((3, 5)) * points[:, None] / 64
    return {
        "final": final,
        "mean": curve,
        "error": 0.01 * curve,
        "optimistic": np.ones(50, bool),
        "bound_episodes": points,
        "variance": variance,
        **chain,
        **proof,
    }


@pytest.fixture
def results():
    rng = np.random.default_rng(0)
    curves = {"psrl": np.sqrt(EPISODES), "greedy": 0.3 * EPISODES, "vtr_1": 2.0 * EPISODES}
    made = {name: part(curves.get(name, 3 * np.sqrt(EPISODES)), rng=rng) for name in AGENTS}
    made |= {f"easy_{name}": part(np.sqrt(EPISODES), rng=rng) for name in EASY_AGENTS}
    for name in ("horizon_3", "dimension_2"):
        made[name] = part(np.sqrt(EPISODES), rng=rng)
    for width in SETTINGS.widths:
        made[f"width_{width:g}"] = part(width * np.sqrt(EPISODES), rng=rng, scale=width)
    made["rank_one"] = part(0.2 * np.sqrt(EPISODES), rng=rng)
    return made


def failing(results):
    return {one.name for one in statements(SETTINGS, results) if not one.holds}


def test_every_statement_can_fail(results):
    assert failing(results) == set()
    rng = np.random.default_rng(1)
    linear, small = part(0.5 * EPISODES, rng=rng), part(0.2 * np.sqrt(EPISODES), rng=rng)
    for name, replaced, expected in (
        ("psrl", part(0.9 * EPISODES, rng=rng), {"slope", "bound", "tuned", "rlsvi", "greedy"}),
        ("greedy", small, {"greedy", "linear"}),
        ("vtr_0.1", small, {"tuned"}),
        ("vtr_1", small, {"theory"}),
        ("rlsvi_0.1", small, {"rlsvi"}),
        ("rank_one", linear, {"rank"}),
        ("width_0.1", linear, {"width"}),
    ):
        assert failing(results | {name: replaced}) == expected, name
    for term in ("matched", "along", "true_part"):
        moved = results["psrl"][term] + 1 + 0.01 * rng.normal(size=50)
        assert failing(results | {"psrl": results["psrl"] | {term: moved}}) == {"identities"}


def test_exponents_of_curves():
    np.testing.assert_allclose(slope(3 * EPISODES**0.4), 0.4, rtol=1e-9)
    np.testing.assert_allclose(linearity(2.0 * EPISODES), 1.0, rtol=1e-9)
    assert linearity(np.sqrt(EPISODES)) < 0.75


def test_the_page_says_what_holds(results):
    summary = psrl.summarise(SETTINGS, results)
    assert summary["share_of_statements_that_hold"] == 1.0
    page = psrl_page(SETTINGS, results, summary)
    assert "10 of 10 statements hold" in page.sentence
    assert page.sections[0].title == "Statements"
    assert all(
        len(row) == len(section.table.head) for section in page.sections if section.table for row in section.table.rows
    )


def test_a_small_sea_is_crossed(tmp_path):
    run = ["run", "deep_sea", "--tiny", "--sizes", "4", "--baseline-sizes", "2", "--id", "one"]
    assert main([*run, "--runs-folder", str(tmp_path)]) == 0
    folder = RunFolder(tmp_path / "deep_sea" / "one")
    summary = json.loads(folder.summary.read_text())
    assert summary["hyperagent_solved"] == {"4": 1.0}
    assert summary["epsilon_greedy_solved"] == {"2": 1.0}
    assert "Episodes until DeepSea is solved" in folder.report.read_text()


def test_a_size_that_was_not_solved_misses_the_claim():
    solved = {"episodes": np.array([40, 60]), "solved": np.ones(2, bool)}
    found = {"hyperagent_10": solved, "hyperagent_20": {"episodes": np.array([160, 240]), "solved": np.ones(2, bool)}}
    np.testing.assert_allclose(ratios((10, 20), found), 1.0)
    np.testing.assert_allclose(power((10, 20), found), 2.0)
    found["hyperagent_20"]["solved"][1] = False
    assert ratios((10, 20), found)[1] == np.inf


@pytest.mark.parametrize(
    ("module", "changed", "sentence"),
    [
        (psrl, {"horizon": 1}, "--horizon is 1; it must be at least 2"),
        (psrl, {"varied_episodes": 3}, "--varied-episodes is 3; it must be at least 8"),
        (psrl, {"widths": (0.5,)}, "--widths is .0.5,.; 1 must be among them"),
        (deep_sea, {"sizes": (1,)}, "--sizes is 1; it must be at least 2"),
        (deep_sea, {"baseline_sizes": ()}, "--baseline-sizes is empty; it needs sizes"),
        (deep_sea, {"seeds": 1}, "--seeds is 1; it must be at least 2"),
    ],
)
def test_settings_that_cannot_be(module, changed, sentence):
    with pytest.raises(ValueError, match=sentence):
        module.parts(dataclasses.replace(module.SETTINGS, **changed))
