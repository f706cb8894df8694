"""Losses of a value function, against their formulas written out in NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_llm.objectives import values as module
from jaxrl_llm.objectives.values import clipped_value_loss
from jaxrl_llm.objectives.values import explained_variance
from jaxrl_llm.objectives.values import explained_variance_sums
from jaxrl_llm.objectives.values import squared_value_loss


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


@pytest.fixture
def arrays():
    """Values, targets, mask and old values; NaN outside the mask."""
    rng = np.random.default_rng(0)
    mask = rng.uniform(size=(4, 5)) < 0.7
    mask[2] = False
    draw = [rng.normal(size=mask.shape) for _ in range(3)]
    values, targets, old = (jnp.asarray(np.where(mask, x, np.nan)) for x in draw)
    return values, targets, jnp.asarray(mask), old


def written_out(values, targets, mask, old, clip, sign=1.0, take=max) -> float:
    total = 0.0
    for v, g, real, o in zip(*(np.asarray(x).ravel() for x in (values, targets, mask, old)), strict=True):
        if real:
            near = o + sign * min(max(v - o, -clip), clip)
            total += take((v - g) ** 2, (near - g) ** 2) / 2
    return total


def test_squared_loss_and_its_gradient(arrays) -> None:
    values, targets, mask, _ = arrays
    real = np.asarray(mask)
    v, g = np.asarray(values)[real], np.asarray(targets)[real]
    total, count = squared_value_loss(values, targets, mask)
    np.testing.assert_allclose([total, count], [((v - g) ** 2).sum() / 2, len(v)], rtol=1e-13)
    slope = jax.grad(lambda x: squared_value_loss(x, targets, mask)[0])(values)
    np.testing.assert_allclose(np.asarray(slope)[real], v - g, rtol=1e-13)
    assert not np.asarray(slope)[~real].any(), "nothing outside the mask, NaN or not"
    wrong = np.asarray(jax.grad(lambda x: squared_value_loss(x, -jnp.nan_to_num(targets), mask)[0])(values))
    assert np.abs(wrong[real] - (v - g)).max() > 0.1
    toward = jax.grad(lambda x: squared_value_loss(values, x, mask)[0])(targets)
    assert not np.asarray(toward).any(), "targets are constants"


@pytest.mark.parametrize("clip", [0.05, 0.3, 10.0])
def test_clipped_loss_is_the_larger_of_the_two(clip, arrays) -> None:
    values, targets, mask, old = arrays
    total, count = clipped_value_loss(values, targets, mask, old, clip=clip)
    assert int(count) == np.asarray(mask).sum()
    assert float(total) == pytest.approx(written_out(values, targets, mask, old, clip), rel=1e-12)
    if clip < 1:
        assert float(total) != pytest.approx(written_out(values, targets, mask, old, clip, sign=-1.0), rel=1e-3)
        assert float(total) != pytest.approx(written_out(values, targets, mask, old, clip, take=min), rel=1e-3)
    else:
        np.testing.assert_allclose(total, squared_value_loss(values, targets, mask)[0], rtol=1e-13)


def test_a_value_that_moved_too_far_towards_its_target_is_left_alone() -> None:
    """From 0 towards 1 by more than 0.2: no gradient. Away from 1, or by less: the gradient of the square."""
    values, old, targets = (jnp.asarray([x]) for x in ([0.5, -0.5, 0.1], [0.0, 0.0, 0.0], [1.0, 1.0, 1.0]))
    mask = jnp.ones((1, 3), bool)

    def slope(array, wrt):
        arguments = {"values": values, "targets": targets, "response_mask": mask, "values_old": old} | {wrt: array}
        return clipped_value_loss(**arguments, clip=0.2)[0]

    np.testing.assert_allclose(jax.grad(slope)(values, "values"), [[0.0, -1.5, -0.9]], atol=1e-13)
    for name, array in (("targets", targets), ("values_old", old)):
        assert not np.asarray(jax.grad(slope)(array, name)).any(), name


def test_explained_variance_is_that_of_all_tokens_however_they_are_added(arrays) -> None:
    values, targets, mask, _ = arrays
    real = np.asarray(mask)
    v, g = np.asarray(values)[real], np.asarray(targets)[real]

    def of(*pieces):
        sums = [explained_variance_sums(values[rows], targets[rows], mask[rows]) for rows in pieces]
        means = {name: sum(s[name][0] for s in sums) / sum(s[name][1] for s in sums) for name in sums[0]}
        return explained_variance({name: float(mean) for name, mean in means.items()})

    expected = 1 - np.var(g - v) / np.var(g)
    assert of(slice(None)) == pytest.approx(expected, rel=1e-10)
    assert of(slice(0, 1), slice(1, 4)) == pytest.approx(expected, rel=1e-10)
    assert expected != pytest.approx(1 - np.var(g + v) / np.var(g), rel=1e-2)


@pytest.mark.parametrize(
    ("values", "targets", "expected"),
    [
        ([1.0, 2.0, 3.0], [1.0, 2.0, 3.0], 1.0),
        ([5.0, 5.0, 5.0], [1.0, 2.0, 3.0], 0.0),
        ([3.0, 2.0, 1.0], [1.0, 2.0, 3.0], -3.0),
        ([0.0, 1.0, 2.0], [1.0, 1.0, 1.0], 0.0),
        ([0.1, 0.1, 0.1], [0.1, 0.1, 0.1], 0.0),
    ],
)
def test_what_explained_variance_means(values, targets, expected) -> None:
    arrays = (jnp.asarray([values]), jnp.asarray([targets]), jnp.ones((1, 3), bool))
    means = {name: float(total / count) for name, (total, count) in explained_variance_sums(*arrays).items()}
    assert explained_variance(means) == pytest.approx(expected, abs=1e-12)


def test_wrong_arrays_are_named() -> None:
    good = jnp.ones((2, 3))
    mask = jnp.ones((2, 3), bool)
    for call in (
        lambda: module.squared_value_loss(good, jnp.ones((2, 4)), mask),
        lambda: module.squared_value_loss(good, good, good),
        lambda: module.clipped_value_loss(good[0], good, mask, good, clip=1.0),
    ):
        with pytest.raises((ValueError, TypeError)):
            call()


def test_an_empty_mask_is_no_loss() -> None:
    arrays = (jnp.full((2, 3), jnp.nan), jnp.full((2, 3), jnp.nan), jnp.zeros((2, 3), bool))
    assert [float(x) for x in squared_value_loss(*arrays)] == [0, 0]
    assert [float(x) for x in clipped_value_loss(*arrays, arrays[0], clip=0.1)] == [0, 0]
