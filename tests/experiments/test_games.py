"""Experiments in games: numbers by hand, arms of `--full`, the pages of made-up results, refusals; tiny runs whole."""

import dataclasses
import json

import numpy as np
import pytest

from experiments import divergence_atari
from experiments import divergence_minatar
from experiments.cli import main
from experiments.games import atari
from experiments.games.numbers import PUBLISHED
from experiments.games.numbers import curve
from experiments.games.numbers import drift
from experiments.games.numbers import relative
from experiments.games.numbers import summarise
from experiments.games.page import COLOURS
from experiments.games.page import DASHED
from experiments.games.page import minatar_page
from experiments.games.settings import FRESH
from experiments.games.settings import LABELS
from experiments.games.settings import all_arms
from experiments.games.settings import control_settings
from experiments.games.settings import named
from experiments.games.settings import parts
from jaxrl_llm.training.control import METHODS

SETTINGS = dataclasses.replace(divergence_minatar.SETTINGS, iterations=20, seeds=3)
MEASURES = (
    *("returns", "ended", "occupancy_divergence", "occupancy_tv", "surprise", "surprise_before", "scale"),
    *("effective_share", "entropy", "skipped", "divergence"),
)


def made_up(seeds, iterations, seed=0, level=1.0):
    """Metrics of an arm, with `level` as the return of every game; each seed is 0.1 above the one before."""
    rng = np.random.default_rng(seed)
    part = {name: rng.uniform(0.1, 1, (seeds, iterations)).astype(np.float32) for name in MEASURES}
    returns = level + 0.1 * np.arange(seeds)[:, None]
    part["ended"] = np.full((seeds, iterations), 4.0, np.float32)
    part["returns"] = (part["ended"] * returns).astype(np.float32)
    return part | {"seconds": np.asarray(2.0), "whole": np.broadcast_to(returns, (seeds, 8))}


def results_of(settings):
    whole = settings.whole
    results = {f"{game}.chance": made_up(1, 10, level=0.5) for game in whole.games}
    for number, arm in enumerate(all_arms(settings)):
        results[arm.name] = made_up(whole.seeds, whole.iterations, number, level=1.0 + number)
    return results


def test_a_point_without_games_is_not_known():
    part = {"returns": np.array([[0.0, 6.0, 0.0, 8.0]]), "ended": np.array([[0.0, 2.0, 0.0, 1.0]])}
    np.testing.assert_allclose(curve(part, points=4), [[np.nan, 3, np.nan, 8]])
    np.testing.assert_allclose(curve(part, points=2), [[3, 8]])


def test_a_game_that_never_ends_has_no_mean_return():
    results = results_of(SETTINGS)
    arm = named(SETTINGS, "breakout", "kl")
    results[arm.name]["ended"][:] = results[arm.name]["returns"][:] = 0
    summary = summarise(SETTINGS, results)
    assert summary["arms"][arm.name]["over_the_run"] is None
    assert "NaN" not in json.dumps(summary)
    minatar_page(SETTINGS, results, summary)


def test_the_relative_score_is_that_of_the_paper():
    results = results_of(SETTINGS)
    ours, theirs = named(SETTINGS, "breakout", "kl"), named(SETTINGS, "breakout", "ppo")
    # Arms are numbered in their order: ppo is the second, kl the fourth.
    expected = (4.0 - 2.0) / (PUBLISHED["breakout"]["pgx"] - 0.5)
    np.testing.assert_allclose(relative(results, ours, theirs), [expected] * 3, rtol=1e-5)
    best = results | {theirs.name: made_up(3, 20, level=60.0)}
    np.testing.assert_allclose(relative(best, ours, theirs), [(4 - 60) / (60.1 - 0.5)] * 3, rtol=1e-5)


def test_the_gain_is_the_difference_of_two_policies_under_the_same_values():
    part = made_up(3, 20)
    moved = drift(part)
    expected = [
        np.mean(
            [
                (part["surprise_before"][s, k] - part["surprise"][s, k - 1]) / part["scale"][s, k - 1]
                for k in range(1, 20)
            ]
        )
        for s in range(3)
    ]
    assert moved.gain.mean == pytest.approx(np.mean(expected), rel=1e-4)
    assert moved.divergence.mean == pytest.approx(part["occupancy_divergence"][:, 1:].mean(), rel=1e-5)


def test_arms():
    plain = all_arms(SETTINGS)
    assert len(plain) == 8
    assert {arm.reuse for arm in plain if arm.method == FRESH} == {1}
    some = dataclasses.replace(SETTINGS, games=("asterix",), reuses=(1, 4), also_not_sticky=True)
    # Four, uses 1 (the first of them is there already) and 4, and three that are not sticky.
    assert len(all_arms(some)) == 4 + 2 + 3 + 3
    full = all_arms(dataclasses.replace(SETTINGS, full=True))
    assert len(full) == len(set(full)) == 4 * (len(LABELS) + 2 + 3 + 3 + 3)
    assert {(arm.reuse, arm.sticky) for arm in full} == {(1, 0.1), (4, 0.1), (8, 0.1), (16, 0.1), (8, 0.0)}
    for arm in full:
        numbers = control_settings(SETTINGS, arm)
        assert numbers.reuse == arm.reuse
        assert numbers.replay == min(arm.reuse, SETTINGS.replay)
    assert {*LABELS} == {FRESH, *METHODS}
    assert {*COLOURS} == {*LABELS}
    looks = [(colour, name in DASHED) for name, colour in COLOURS.items() if name != FRESH]
    assert len(looks) == len(set(looks))


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"full": True, "seeds": 2, "iterations": 20},
        {"arms": ("kl_one_step",), "games": ("freeway",)},
        {"reuses": (1, 4, 16), "games": ("breakout",)},
    ],
)
def test_pages_of_any_arms(changes):
    settings = dataclasses.replace(SETTINGS, **changes)
    results = results_of(settings)
    summary = summarise(settings, results)
    page = minatar_page(settings, results, summary)
    words = json.dumps(summary)
    assert "NaN" not in words
    assert "Infinity" not in words
    names = [picture.name for section in page.sections for picture in section.pictures]
    assert len(names) == len(set(names))
    assert all(picture.svg.startswith("<?xml") for section in page.sections for picture in section.pictures)
    compared = {"kl", "ppo"} <= {*settings.whole.arms}
    assert (page.value == "not compared") == (not compared)
    assert (summary["kl_over_ppo_low"] is None) == (not compared)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"games": ("breakot",)}, "Field --games is 'breakot'"),
        ({"games": ()}, "Field --games is empty"),
        ({"arms": ("klm",)}, "Field --arms is 'klm'"),
        ({"reuse": 0}, "Field --reuse is 0"),
        ({"seeds": 1}, "Field --seeds is 1"),
        ({"sticky": 1.0}, "Field --sticky is 1"),
        ({"parallel": 6}, "games is 6 and minibatches 4"),
    ],
)
def test_settings_that_cannot_be(changes, sentence):
    with pytest.raises(ValueError, match=sentence):
        parts(dataclasses.replace(SETTINGS, **changes))


def test_atari_without_a_finished_game_and_settings_that_cannot_be():
    settings = dataclasses.replace(divergence_atari.TINY, iterations=20)
    part = made_up(1, 20) | {"screenshots": np.zeros((2, 210, 160, 3), np.uint8)}
    assert atari.summarise(settings, {"kl": part})["score_at_the_end"] == pytest.approx(1.0)
    part["ended"][:] = part["returns"][:] = 0
    part["occupancy_divergence"][:] = np.nan
    summary = atari.summarise(settings, {"kl": part})
    assert summary["score_at_the_end"] is None
    assert not divergence_atari.EXPERIMENT.expectation.check(summary)
    page = atari.atari_page(settings, {"kl": part}, summary)
    assert page.value == "no game ended"
    assert all(picture.svg for section in page.sections for picture in section.pictures)
    for changes, sentence in (
        ({"arms": ("dqn",)}, "Field --arms is 'dqn'"),
        ({"arms": ()}, "Field --arms is empty"),
        ({"size": 20}, "Field --size is 20"),
        ({"game": "pongg"}, "pong"),
    ):
        with pytest.raises(ValueError, match=sentence):
            atari.parts(dataclasses.replace(settings, **changes))


@pytest.mark.parametrize("name", ["divergence_minatar", "divergence_atari"])
def test_tiny_runs_whole(name, tmp_path, capsys):
    words = ["run", name, "--tiny", "--id", "one", "--runs-folder", str(tmp_path)]
    assert main(words) == 0
    run = tmp_path / name / "one"
    assert json.loads((run / "summary.json").read_text())["claim_met"] is None
    assert (run / "report.html").stat().st_size > 10_000
    # Their checkpoints are needed no more.
    assert not list((run / "parts").glob("*.checkpoints"))
    assert main(words) == 0
    assert "complete" in capsys.readouterr().out
