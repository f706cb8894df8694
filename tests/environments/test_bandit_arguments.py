"""Bandits and mixture MDPs refuse sizes and scales that are none, infinity among them, in a sentence."""

import jax
import pytest

from jaxrl_llm.environments import box_bandit
from jaxrl_llm.environments import neural_bandit
from jaxrl_llm.environments import quadratic_bandit
from jaxrl_llm.environments import random_mixture
from jaxrl_llm.environments import risky_mixture
from jaxrl_llm.environments import simplex_atoms
from jaxrl_llm.environments import vector_quadratic_bandit

NOT_POSITIVE = (0.0, -1.0, float("inf"), float("nan"))


@pytest.mark.parametrize("value", NOT_POSITIVE)
@pytest.mark.parametrize(
    ("make", "name", "sizes"),
    [
        (box_bandit, "prior_scale", {"dimension": 2, "actions": 3}),
        (box_bandit, "noise_scale", {"dimension": 2, "actions": 3}),
        (box_bandit, "half_width", {"dimension": 2, "actions": 3}),
        (quadratic_bandit, "noise_scale", {}),
        (vector_quadratic_bandit, "noise_scale", {}),
        (neural_bandit, "temperature", {}),
        (random_mixture, "concentration", {}),
        (simplex_atoms, "concentration", {"horizon": 2, "atoms": 3, "dimension": 2}),
    ],
)
def test_scales_must_be_positive_numbers(make, name, sizes, value):
    with pytest.raises(ValueError, match=f"{name} is {value}; it must be a positive number."):
        make(jax.random.key(0), **sizes, **{name: value})


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (quadratic_bandit, "dimension"),
        (vector_quadratic_bandit, "actions"),
        (neural_bandit, "dimension"),
        (random_mixture, "states"),
        (risky_mixture, "horizon"),
    ],
)
def test_sizes_must_be_at_least_1(make, name):
    with pytest.raises(ValueError, match=f"{name} is 0; it must be at least 1."):
        make(jax.random.key(0), **{name: 0})
