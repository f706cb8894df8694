"""A batch that grows against its recurrence, and switches at their corners."""

import dataclasses
import math
import time

import jax.numpy as jnp
import pytest

from jaxrl_llm.training.run.schedules import GLM_4_5_SWITCHES
from jaxrl_llm.training.run.schedules import BatchRamp
from jaxrl_llm.training.run.schedules import switched

RAMPS = (
    BatchRamp(4, 16, 100, 2),
    BatchRamp(3, 3, 50, 3),  # never grows
    BatchRamp(2, 40, 7, 2),  # sizes are skipped
    BatchRamp(8, 32, 0, 8),  # at its end from the start
    BatchRamp(5, 20, 1000, 5),
)


@pytest.mark.parametrize("ramp", RAMPS)
def test_sizes_steps_and_tokens_are_those_of_the_recurrence(ramp):
    seen, sums = 0, [0]
    for step in range(300):
        share = min(1.0, seen / ramp.over) if ramp.over else 1.0
        size = ramp.first + ramp.unit * math.floor(round((ramp.last - ramp.first) / ramp.unit * share, 9))
        assert ramp.batch(step) == size
        assert ramp.tokens(step) == seen
        seen += size
        sums.append(seen)
    for budget in range(2 * ramp.over + 50):
        assert ramp.steps(budget) == next(step for step, total in enumerate(sums) if total >= budget)
    assert ramp.batch(10**9) == ramp.last
    assert ramp.steps(10.5) == next(step for step, total in enumerate(sums) if total >= 10.5)


def test_the_ramp_of_the_report_takes_the_steps_of_its_integral():
    row = 4096
    ramp = BatchRamp(3906 * row, 15625 * row, 500 * 10**9, row)
    grown = ramp.last - ramp.first
    # dt = dn / (first + (last - first) n / over), from 0 to over.
    assert ramp.steps(ramp.over) == pytest.approx(ramp.over / grown * math.log(ramp.last / ramp.first), rel=1e-3)
    (_, (tokens,)) = GLM_4_5_SWITCHES["mtp_weight"]
    rest = (tokens - ramp.tokens(ramp.steps(ramp.over))) / ramp.last
    assert ramp.steps(tokens) == math.ceil(ramp.steps(ramp.over) + rest)


def test_whole_floats_are_whole_and_a_small_unit_costs_nothing():
    ramp = BatchRamp(16e6, 64e6, 500e9, 4e6)  # pyright: ignore[reportArgumentType]
    assert ramp == BatchRamp(16 * 10**6, 64 * 10**6, 500 * 10**9, 4 * 10**6)
    assert [type(number) for number in (ramp.first, ramp.batch(3), ramp.tokens(9), ramp.steps(1e12))] == [int] * 4
    start = time.process_time()
    fine = dataclasses.replace(ramp, unit=1)
    assert fine.batch(10**9) == ramp.last
    grown = ramp.last - ramp.first
    assert fine.steps(ramp.over) == pytest.approx(ramp.over / grown * math.log(ramp.last / ramp.first), rel=1e-3)
    # Here 0.02 s for the 14,000 steps; the 48 million sizes would take a minute.
    assert time.process_time() - start < 5


@pytest.mark.parametrize("name", GLM_4_5_SWITCHES)
def test_numbers_switch_at_their_step_and_are_exact(name):
    values, _ = GLM_4_5_SWITCHES[name]
    schedule = switched(values, [7])
    found = [float(schedule(step)) for step in (0, 6, 7, 8, 10**6)]
    wanted = [float(jnp.float32(value)) for value in values]
    assert found == [wanted[0]] * 2 + [wanted[1]] * 3


def test_a_value_may_come_back_from_zero():
    schedule = switched((0.0, 2.0, 0.0, 3.0), (1, 2, 4))
    assert [float(schedule(step)) for step in range(6)] == [0, 2, 0, 0, 3, 3]
    assert float(switched((5.0,), ())(3)) == 5


def test_what_cannot_be_is_refused():
    with pytest.raises(ValueError, match="values has 2 entries and steps 2; it must have one more"):
        switched((1.0, 2.0), (3, 4))
    for steps in ((4, 3), (3, 3), (0, 3)):
        with pytest.raises(ValueError, match=r"steps is \(\d, \d\); they must rise, from 1 or more"):
            switched((1.0, 2.0, 3.0), steps)
    sound = RAMPS[0]
    for changes in ({"first": 0}, {"last": 2}, {"over": -1}, {"unit": 0}, {"first": 3}, {"over": 2.5}):
        with pytest.raises(ValueError, match=f"^{next(iter(changes))} is "):
            dataclasses.replace(sound, **changes)
    with pytest.raises(ValueError, match="step is -1"):
        sound.batch(-1)
    for budget in (-1, math.nan, math.inf):
        with pytest.raises(ValueError, match=f"budget is {budget}"):
            sound.steps(budget)
