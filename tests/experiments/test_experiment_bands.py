"""Intervals of means over few seeds."""

import jax.numpy as jnp
import numpy as np

from experiments.bands import half_width
from experiments.bands import heat_maps
from experiments.bands import standard_error


def test_a_95_percent_interval_of_four_seeds_covers_95_percent():
    values = np.random.default_rng(0).normal(size=(4, 40_000))
    covered = np.abs(values.mean(0)) <= half_width(4) * standard_error(values)
    np.testing.assert_allclose(covered.mean(), 0.95, atol=0.005)
    # Dividing by n instead of n - 1, with the quantile of many seeds, would cover 81 % only.
    narrow = np.abs(values.mean(0)) <= 1.96 * values.std(0) / 2
    assert narrow.mean() < 0.83


def test_standard_errors_are_along_an_axis_of_any_array():
    rows = np.array([[1.0, 4.0], [3.0, 4.0]])
    np.testing.assert_allclose(standard_error(rows), [1.0, 0.0])
    np.testing.assert_allclose(standard_error(jnp.asarray(rows), axis=1), [1.5, 0.5])


def test_heat_maps_show_every_number_and_whole_names() -> None:
    values, names = np.array([[1.0, 20.0], [300.0, 4000.0]]), ["coordinate", "gaussian"]
    axes = heat_maps([("M = 4", values)], names, rows="reference", columns="perturbation").axes[0]
    assert [text.get_text() for text in axes.texts] == ["1", "20", "300", "4000"]
    assert [label.get_text() for label in axes.get_xticklabels()] == names
    assert [label.get_text() for label in axes.get_yticklabels()] == names
