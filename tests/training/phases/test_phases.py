"""Plateaus, temperatures and phases on curves that are known."""

import dataclasses
import json
import math

import numpy as np
import pytest

from jaxrl_llm.training.phases import IteratedDistillation
from jaxrl_llm.training.phases import Phase
from jaxrl_llm.training.phases import Plateau
from jaxrl_llm.training.phases import TemperatureControl
from jaxrl_llm.training.phases import TemperatureState
from jaxrl_llm.training.phases import largest_near_best

GRID = tuple(round(0.1 * n, 1) for n in range(4, 17))


def steps_until(rule: Plateau, rewards) -> int | None:
    seen = ()
    for step, reward in enumerate(rewards, start=1):
        seen = rule.seen(seen, reward)
        assert len(seen) <= 2 * rule.window
        if rule.reached(seen):
            return step
    return None


def test_a_plateau_is_the_first_place_where_two_windows_differ_by_no_more_than_the_margin():
    rule = Plateau(window=4, margin=0.02)
    curve = [1 - math.exp(-step / 20) for step in range(200)]
    means = [np.mean(curve[n - 4 : n]) - np.mean(curve[n - 8 : n - 4]) for n in range(8, 200)]
    assert steps_until(rule, curve) == 8 + next(n for n, gain in enumerate(means) if gain <= 0.02)
    rising = [0.006 * step for step in range(200)]  # 0.024 between the means
    assert steps_until(rule, rising) is None
    assert steps_until(dataclasses.replace(rule, margin=0.025), rising) == 8
    assert steps_until(rule, rising[::-1]) == 8  # a fall is no gain
    assert steps_until(rule, [1.0] * 7) is None
    assert steps_until(Plateau(window=1, margin=0.0), [0.0, 1.0, 1.0]) == 3


def test_the_largest_temperature_within_one_percent_of_the_best():
    curve = {t: 0.8 - 0.19 * (t - 0.8) ** 2 for t in GRID}  # 1 % lower at 0.8 + 0.205
    assert largest_near_best(curve) == 1.0
    assert largest_near_best(curve, tolerance=0.0) == 0.8
    assert largest_near_best(curve, tolerance=0.05) == 1.2
    assert largest_near_best({t: -x for t, x in curve.items()}, tolerance=0.0) == 1.6
    # It is the best of the grid that counts, also where a larger one comes back after a dip; ties go to the larger one.
    assert largest_near_best({0.6: 1.0, 0.9: 0.2, 1.2: 0.995, 1.4: 0.98}) == 1.2
    assert largest_near_best({0.6: 0.5, 1.2: 0.5, 0.9: 0.5}) == 1.2
    assert largest_near_best({0.7: -3.0}) == 0.7
    # Relative to the size of the score: below 0 too the bound lies under the best.
    assert largest_near_best({0.6: -1.0, 1.0: -1.009, 1.4: -1.02}) == 1.0
    assert largest_near_best({0.6: 0.0, 1.0: -1e-9}) == 0.6


def test_noise_moves_the_choice_no_further_than_said():
    rng, off, moved = np.random.default_rng(0), 0.01, set()
    for sign in (1, -1):
        true = {t: sign * 0.8 - 0.2 * (t - 0.8) ** 2 for t in GRID}
        best = max(true.values())
        for _ in range(300):
            chosen = largest_near_best({t: score + off * rng.choice([-1, 1]) for t, score in true.items()})
            assert true[chosen] >= best - 0.01 * abs(best) - 2.01 * off
            moved.add(chosen)
    assert min(moved) < 1.0 < max(moved)


def test_the_controller_waits_chooses_and_begins_again():
    control = TemperatureControl(GRID, Plateau(window=2, margin=0.01))
    state = TemperatureState(0.6)
    for reward in (0.1, 0.2, 0.3, 0.4):
        state = control.observe(state, reward)
        assert not control.due(state)
    with pytest.raises(ValueError, match="no plateau yet"):
        control.choose(state, dict.fromkeys(GRID, 1.0))
    for reward in (0.4, 0.4):
        state = control.observe(state, reward)
    state = control.observe(state, 0.4)
    assert control.due(state)
    assert TemperatureState(**json.loads(json.dumps(dataclasses.asdict(state)))) == state
    with pytest.raises(ValueError, match="it must have those of grid"):
        control.choose(state, {0.6: 1.0})
    chosen = control.choose(state, {t: 0.8 - 0.2 * (t - 0.8) ** 2 for t in GRID})
    assert chosen == TemperatureState(1.0)
    assert not control.due(chosen)
    alone = TemperatureControl((0.9,), control.plateau)
    assert alone.choose(state, {0.9: 0.0}) == TemperatureState(0.9)


def test_distillation_goes_round_and_ends_with_the_last_plateau():
    plan, phase, kinds = IteratedDistillation(3, Plateau(window=1, margin=0.0)), Phase(), []
    while phase.kind != "done":
        kinds.append((phase.kind, phase.level))
        if phase.kind == "reinforce":
            for reward in (0.1, 0.5, 0.5):
                assert phase.kind == "reinforce"
                phase = plan.observe(phase, reward)
                assert Phase(**json.loads(json.dumps(dataclasses.asdict(phase)))) == phase
        else:
            phase = plan.finished(phase)
        assert not phase.rewards
    round_ = ("reinforce", "collect", "imitate")
    assert kinds == [(kind, level) for level in range(3) for kind in round_][:-2]
    assert phase == Phase("done", 2)
    for wrong in (phase, Phase("collect", 1), Phase("reinforce", 3)):
        with pytest.raises(ValueError, match=f"phase is '{wrong.kind}' of level {wrong.level}; it must be 'reinforce'"):
            plan.observe(wrong, 0.5)
    with pytest.raises(ValueError, match="it must be 'collect' or 'imitate'"):
        plan.finished(Phase())


def test_what_cannot_be_is_refused():
    for name, value in (("window", 0), ("window", 2.5), ("window", 2.0), ("margin", -0.1), ("margin", math.nan)):
        with pytest.raises(ValueError, match=f"^{name} is {value}"):
            Plateau(**{name: value})
    for reward in (math.nan, math.inf):
        with pytest.raises(ValueError, match=f"reward is {reward}"):
            Plateau().seen((), reward)
    for grid in ((), (0.0, 1.0), (1.0, 0.5), (0.5, 0.5), (1.0, math.inf)):
        with pytest.raises(ValueError, match=r"^grid is "):
            TemperatureControl(grid)
    for tolerance in (-0.1, 1.0, math.nan):
        with pytest.raises(ValueError, match=f"tolerance is {tolerance}"):
            largest_near_best({1.0: 0.5}, tolerance=tolerance)
        with pytest.raises(ValueError, match=f"tolerance is {tolerance}"):
            TemperatureControl(GRID, tolerance=tolerance)
    with pytest.raises(ValueError, match="scores is empty"):
        largest_near_best({})
    with pytest.raises(ValueError, match=r"the score of temperature 0\.5 is nan"):
        largest_near_best({0.5: math.nan, 1.0: 1.0})
    with pytest.raises(ValueError, match="levels is 0"):
        IteratedDistillation(0)
