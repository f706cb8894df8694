"""AdamW against Adam written out by hand, its schedules at their corners, and impossible numbers refused."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxrl_llm.rollouts import SamplingSettings
from jaxrl_llm.training import TrainSettings
from jaxrl_llm.training import UpdateSettings
from jaxrl_llm.training.run.optimizer import OptimizerSettings
from jaxrl_llm.training.run.optimizer import learning_rate_schedule
from jaxrl_llm.training.run.optimizer import make_optimizer

PARAMS = {"matrix": jnp.array([[1.0, -2.0], [3.0, 0.5]]), "scale": jnp.array([1.0, 2.0])}
GRADIENTS = [
    {"matrix": jnp.array([[0.3, -0.1], [0.0, 2.0]]), "scale": jnp.array([0.5, -0.2])},
    {"matrix": jnp.array([[-0.2, 0.4], [0.1, 1.0]]), "scale": jnp.array([0.1, 0.3])},
]


def by_hand(settings: OptimizerSettings) -> dict[str, np.ndarray]:
    """AdamW in numpy: clipping, moments, bias correction, decay of matrices only."""
    params = {name: np.asarray(value, np.float64) for name, value in PARAMS.items()}
    mean = {name: np.zeros_like(value) for name, value in params.items()}
    square = {name: np.zeros_like(value) for name, value in params.items()}
    for count, gradient in enumerate(GRADIENTS, start=1):
        norm = np.sqrt(sum(float(jnp.sum(value**2)) for value in gradient.values()))
        factor = min(1.0, settings.max_grad_norm / norm)
        for name in params:
            g = factor * np.asarray(gradient[name], np.float64)
            mean[name] = settings.beta1 * mean[name] + (1 - settings.beta1) * g
            square[name] = settings.beta2 * square[name] + (1 - settings.beta2) * g**2
            step = (
                mean[name]
                / (1 - settings.beta1**count)
                / (np.sqrt(square[name] / (1 - settings.beta2**count)) + settings.epsilon)
            )
            decay = settings.weight_decay * params[name] if params[name].ndim >= 2 else 0.0
            params[name] = params[name] - settings.learning_rate * (step + decay)
    return params


def test_two_steps_equal_adam_written_out():
    settings = OptimizerSettings(learning_rate=0.1, beta2=0.95, weight_decay=0.2, max_grad_norm=0.7)
    optimizer = make_optimizer(settings, 10)
    params, state = PARAMS, optimizer.init(PARAMS)
    for gradient in GRADIENTS:
        updates, state = optimizer.update(gradient, state, params)
        params = optax.apply_updates(params, updates)
    expected = by_hand(settings)
    jax.tree.map(lambda got, want: np.testing.assert_allclose(got, want, rtol=2e-6), params, expected)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        (OptimizerSettings(learning_rate=1.0), {0: 1.0, 5: 1.0, 99: 1.0}),
        (OptimizerSettings(learning_rate=1.0, warmup_steps=4), {0: 0.25, 1: 0.5, 3: 1.0, 4: 1.0, 50: 1.0}),
        (OptimizerSettings(learning_rate=1.0, schedule="linear", final_fraction=0.2), {0: 1.0, 5: 0.6, 10: 0.2}),
        (
            OptimizerSettings(learning_rate=2.0, schedule="cosine", warmup_steps=2),
            {0: 1.0, 1: 2.0, 2: 2.0, 6: 1.0, 10: 0.0},
        ),
        (OptimizerSettings(learning_rate=1.0, warmup_steps=1), {0: 1.0, 1: 1.0}),
        (
            OptimizerSettings(learning_rate=2.0, schedule="wsd", warmup_steps=2, decay_steps=4, final_fraction=0.5),
            {0: 1.0, 1: 2.0, 2: 2.0, 6: 2.0, 7: 1.75, 8: 1.5, 9: 1.25, 10: 1.0},
        ),
        (OptimizerSettings(learning_rate=1.0, schedule="wsd", decay_steps=10), {0: 1.0, 5: 0.5, 10: 0.0}),
    ],
)
def test_schedule_at_its_corners(settings, expected):
    schedule = learning_rate_schedule(settings, 10)
    for count, rate in expected.items():
        np.testing.assert_allclose(schedule(count), rate, atol=1e-6)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("learning_rate", -1.0),
        ("beta1", 1.0),
        ("momentum", 1.0),
        ("schedule", "cosin"),
        ("optimizer", "Muon"),
        ("max_grad_norm", float("nan")),
        ("decay_steps", -1),
        ("decay_steps", 5),
    ],
)
def test_impossible_numbers_are_refused_by_name(field, value):
    with pytest.raises(ValueError, match=field):
        OptimizerSettings(**{field: value})


@pytest.mark.parametrize("name", ["warmup_steps", "decay_steps"])
def test_steps_are_whole(name):
    with pytest.raises(ValueError, match=rf"{name} is 2\.5; it must be a whole number"):
        OptimizerSettings(schedule="wsd", **{name: 2.5})


def test_a_decay_fits_into_what_follows_the_warm_up():
    with pytest.raises(ValueError, match="decay_steps is 0 and schedule 'wsd'"):
        OptimizerSettings(schedule="wsd")
    settings = OptimizerSettings(schedule="wsd", warmup_steps=3, decay_steps=8)
    with pytest.raises(ValueError, match="decay_steps is 8, the run has 7 optimiser steps after its warm-up"):
        make_optimizer(settings, 10)
    make_optimizer(settings, 11)


def test_a_warmup_as_long_as_the_run_is_refused():
    with pytest.raises(ValueError, match="warmup_steps is 10"):
        make_optimizer(OptimizerSettings(schedule="linear", warmup_steps=10), 10)


@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan"), 10**400])
def test_numbers_that_are_not_finite_are_refused_everywhere(value):
    for settings, name in (
        (OptimizerSettings, "learning_rate"),
        (OptimizerSettings, "max_grad_norm"),
        (OptimizerSettings, "weight_decay"),
        (OptimizerSettings, "epsilon"),
        (UpdateSettings, "minibatches"),
        (UpdateSettings, "stop_after_skipped"),
        (TrainSettings, "reward_low"),
        (TrainSettings, "reward_high"),
        (TrainSettings, "steps"),
        (SamplingSettings, "temperature"),
        (SamplingSettings, "top_p"),
        (SamplingSettings, "min_p"),
    ):
        with pytest.raises(ValueError, match=rf"^{name} "):
            settings(**{name: value})


def test_a_warm_up_ends_within_the_run():
    for schedule, steps in (("constant", 9), ("linear", 10), ("cosine", 10)):
        with pytest.raises(ValueError, match=f"warmup_steps is 10, the run has {steps} optimiser steps; it must be "):
            learning_rate_schedule(OptimizerSettings(schedule=schedule, warmup_steps=10), steps)
    reached = learning_rate_schedule(OptimizerSettings(learning_rate=0.5, warmup_steps=10), 10)
    np.testing.assert_allclose(reached(9), 0.5)
