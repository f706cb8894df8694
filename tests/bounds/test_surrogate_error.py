"""The T = 4096 table of the paper, what the result says about itself, and how it behaves under jit, vmap and grad."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_llm.bounds import BOUND_NAMES
from jaxrl_llm.bounds import PRINTED
from jaxrl_llm.bounds import SHARP
from jaxrl_llm.bounds import bound_inputs_from_scalars
from jaxrl_llm.bounds import bound_inputs_from_tokens
from jaxrl_llm.bounds import surrogate_error_bounds
from jaxrl_llm.bounds import trivial_error_bound
from jaxrl_llm.bounds import tv_bound_from_kl
from jaxrl_llm.bounds.surrogate_error import average_only_from_kl
from jaxrl_llm.bounds.surrogate_error import pinsker_marginal_kl_closed_form

T = 4096
KL_ONLY = {"max_kl": 1e-4, "sequence_kl": 0.01, "horizon": T}
KL_AND_TV = {**KL_ONLY, "max_tv": 5e-3, "sequence_tv": 0.05}

# Table of section 2.3 of the notes on arXiv 2512.23075; the digits are the printed ones.
TABLE = {
    "classical": ("1677.3", "838.7"),
    "coupling": ("113.84", "79.91"),
    "pinsker_marginal_kl": ("34.946", "34.946"),
    "pinsker_marginal_tv": ("34.946", "24.711"),
    "mixed_kl": ("8.192", "8.192"),
    "mixed_tv": ("8.192", "4.096"),
    "adaptive": ("34.946", "24.711"),
}


def printed_digits(value, like):
    return f"{float(value):.{len(like.split('.')[1])}f}"


@pytest.mark.parametrize("name", TABLE)
def test_the_table_for_4096_tokens_to_all_printed_digits(name):
    for scalars, digits in zip((KL_ONLY, KL_AND_TV), TABLE[name], strict=True):
        inputs = bound_inputs_from_scalars(**scalars)
        assert printed_digits(PRINTED[name](inputs), digits) == digits
        if not name.startswith("mixed"):
            np.testing.assert_allclose(2 * SHARP[name](inputs), PRINTED[name](inputs), rtol=1e-6)


def test_the_numbers_printed_beside_the_table():
    inputs = bound_inputs_from_scalars(**KL_ONLY)
    assert printed_digits(pinsker_marginal_kl_closed_form(inputs), "34.953") == "34.953"
    assert printed_digits(PRINTED["linear"](inputs), "115.9") == "115.9"
    large = bound_inputs_from_scalars(max_kl=1.0, sequence_kl=1.0, horizon=T)
    assert round(float(PRINTED["linear"](large))) == 11585
    assert round(float(PRINTED["pinsker_marginal_kl"](large))) == 11582
    assert round(float(PRINTED["mixed_kl"](large))) == 8192
    np.testing.assert_allclose(PRINTED["classical"](large), 1.68e7, rtol=2e-3)
    np.testing.assert_allclose(pinsker_marginal_kl_closed_form(large), 3.49e5, rtol=2e-3)
    middle = bound_inputs_from_scalars(max_kl=0.01, horizon=T)
    assert int(PRINTED["pinsker_marginal_kl"](middle)) == 1139  # 1139.5, which the paper cut off
    assert round(float(pinsker_marginal_kl_closed_form(middle))) == 3495
    # At the thresholds of the paper's experiments no bound covers them (errata F2.5).
    for delta, value in ((0.05, 2582), (0.1, 3657)):
        inputs = bound_inputs_from_scalars(max_kl=delta, horizon=T)
        assert round(float(PRINTED["pinsker_marginal_kl"](inputs))) == value
        assert bool(surrogate_error_bounds(inputs).vacuous)
    averaged = bound_inputs_from_scalars(max_kl=0.1, sequence_kl=0.001 * T, horizon=T)
    assert round(float(average_only_from_kl(averaged))) == 183


def test_unified_minimum_and_which_bound_it_is():
    kl_only = surrogate_error_bounds(bound_inputs_from_scalars(**KL_ONLY))
    both = surrogate_error_bounds(bound_inputs_from_scalars(**KL_AND_TV))
    np.testing.assert_allclose(kl_only.unified_printed, 8.192, rtol=1e-5)
    np.testing.assert_allclose(both.unified_printed, 4.096, rtol=1e-5)
    # Half of 4095/4096 of the printed value, and far below it the divergence of the whole response itself.
    np.testing.assert_allclose(both.sharp["mixed_tv"], 2 * 4095 * 5e-3 * 0.05, rtol=1e-5)
    np.testing.assert_allclose(kl_only.sharp["mixed_kl"], np.sqrt(4096 * 1e-4 * 0.01), rtol=1e-5)
    np.testing.assert_allclose(both.sharp["linear"], 4096 * 5e-3, rtol=1e-5)
    np.testing.assert_allclose(both.unified_sharp, 0.01, rtol=1e-5)
    assert BOUND_NAMES[int(both.dominating)] == "sequence_kl"
    assert not bool(both.vacuous)
    assert all(bool(both.vacuous_each[name]) for name in PRINTED if name != "mixed_kl")


def test_the_caps_of_the_mixed_bounds():
    far = bound_inputs_from_scalars(max_kl=8.0, horizon=8)
    np.testing.assert_allclose([SHARP[name](far) for name in ("mixed_kl", "mixed_tv", "linear")], 8.0, rtol=1e-6)
    known = far._replace(max_tv=jnp.array(0.5), sequence_tv=jnp.array(0.25), sequence_kl=jnp.array(0.01))
    np.testing.assert_allclose(SHARP["mixed_tv"](known), 0.5 * 2 * 7 * 0.25, rtol=1e-6)
    np.testing.assert_allclose(SHARP["mixed_kl"](known), np.sqrt(8 * 8.0 * 0.01), rtol=1e-6)
    one = bound_inputs_from_scalars(max_kl=0.1, horizon=1)
    assert float(SHARP["mixed_tv"](one)) == 0.0


def test_scales_with_the_reward_range_and_is_vacuous_at_the_span():
    inputs = bound_inputs_from_scalars(max_kl=1e-8, horizon=64)
    unit, wide = surrogate_error_bounds(inputs), surrogate_error_bounds(inputs, reward_range=(-1.0, 3.0))
    np.testing.assert_allclose(wide.unified_sharp, 4 * unit.unified_sharp, rtol=1e-6)
    np.testing.assert_allclose(wide.printed["classical"], 4 * unit.printed["classical"], rtol=1e-6)
    assert not bool(unit.vacuous)
    assert not bool(wide.vacuous)
    assert float(wide.threshold) == 4.0


def test_the_trivial_bound_is_exactly_the_edge_of_saying_nothing():
    low, high = -1.0, 2.0
    for mean, gain in ((0.5, 0.0), (-1.0, 0.4), (1.9, -0.3), (0.0, 5.0)):
        edge = float(trivial_error_bound(reward_range=(low, high), mean_reward=mean, surrogate_gain=gain))

        def excludes(bound, mean=mean, gain=gain):
            return mean + gain - bound > low or mean + gain + bound < high

        assert excludes(edge - 1e-4)
        assert not excludes(edge + 1e-4)
        assert edge >= (high - low) / 2
    inputs = bound_inputs_from_scalars(max_kl=1e-3, horizon=16)
    bound = float(surrogate_error_bounds(inputs).unified_sharp)
    told = surrogate_error_bounds(inputs, mean_reward=0.9 * bound, surrogate_gain=0.0, reward_range=(0.0, 1.5 * bound))
    untold = surrogate_error_bounds(inputs, reward_range=(0.0, 1.5 * bound))
    np.testing.assert_allclose(told.threshold, 0.9 * bound, rtol=1e-5)
    np.testing.assert_allclose(untold.threshold, 1.5 * bound, rtol=1e-5)


def test_the_cap_of_the_adaptive_bound_binds_early():
    # min(1, sqrt((T - t) delta / 2)) is 1 while T - t >= 2 / delta, at the first positions (errata F2.10).
    horizon, delta = 64, 0.1
    base = bound_inputs_from_scalars(max_kl=delta, horizon=horizon)

    def weight(position):
        one = jnp.zeros(horizon).at[position].set(1.0)
        return float(SHARP["adaptive_kl"](base._replace(mean_tv_t=one))) / 2

    weights = [weight(t) for t in range(horizon)]
    assert weights[0] == 1.0
    assert weights == sorted(weights, reverse=True)
    assert sum(w == 1.0 for w in weights) == horizon - 20
    assert weights[-1] == 0.0


def test_identical_policies_give_zero_bounds_with_finite_gradients():
    def smallest(delta):
        return surrogate_error_bounds(bound_inputs_from_scalars(max_kl=delta, horizon=8)).unified_sharp

    value, slope = jax.value_and_grad(smallest)(jnp.array(0.0))
    assert float(value) == 0
    assert np.isfinite(slope)


def test_jit_vmap_and_grad():
    deltas = jnp.array([1e-6, 1e-4, 1e-2, 1.0])

    def bounds(delta):
        return surrogate_error_bounds(bound_inputs_from_scalars(max_kl=delta, horizon=32))

    together = jax.jit(jax.vmap(bounds))(deltas)
    for i, delta in enumerate(deltas):
        alone = bounds(delta)
        for name in BOUND_NAMES:
            np.testing.assert_allclose(together.sharp[name][i], alone.sharp[name], rtol=1e-5)
        smallest = together.sharp[BOUND_NAMES[int(together.dominating[i])]][i]
        np.testing.assert_allclose(smallest, alone.unified_sharp, rtol=1e-5)
    for name in BOUND_NAMES:
        slope = jax.grad(lambda delta, name=name: bounds(delta).sharp[name])(deltas[1])
        step = 1e-6
        numeric = (bounds(deltas[1] + step).sharp[name] - bounds(deltas[1] - step).sharp[name]) / (2 * step)
        np.testing.assert_allclose(slope, numeric, rtol=2e-2)


@pytest.mark.parametrize("platform", ["tpu", "cuda"])
def test_lowers_for_accelerators(platform):
    lowered = jax.jit(lambda d: surrogate_error_bounds(bound_inputs_from_scalars(max_kl=d, horizon=128))).trace(
        jnp.array(1e-3)
    )
    assert lowered.lower(lowering_platforms=(platform,)).as_text()


def test_inputs_from_tokens_place_each_token_at_its_position():
    # Two rows of different prompt length, one padding row; NaN where no response token is.
    nan = np.nan
    kl = jnp.array([[nan, 0.1, 0.3, nan], [nan, nan, 0.2, 0.4], [nan] * 4], jnp.float32)
    tv = jnp.array([[nan, 0.01, 0.03, nan], [nan, nan, 0.02, 0.08], [nan] * 4], jnp.float32)
    inputs = bound_inputs_from_tokens(kl, tv, ~jnp.isnan(kl), horizon=3)
    np.testing.assert_allclose(inputs.max_kl, 0.4)
    np.testing.assert_allclose(inputs.max_tv, 0.08)
    np.testing.assert_allclose(inputs.sequence_kl, (0.4 + 0.6) / 2, rtol=1e-6)
    np.testing.assert_allclose(inputs.mean_tv_t, [0.015, 0.055, 0.0], rtol=1e-6)
    np.testing.assert_allclose(inputs.sequence_tv, 0.07, rtol=1e-6)
    assert inputs.horizon == 3


def test_inputs_from_an_empty_mask_are_zero():
    zeros = jnp.zeros((2, 3))
    inputs = bound_inputs_from_tokens(zeros + jnp.nan, zeros, zeros > 0, horizon=2)
    assert all(np.all(np.asarray(leaf) == 0) for leaf in jax.tree.leaves(inputs))


def test_tv_from_kl_is_the_smaller_of_two_inequalities():
    kl = jnp.array([0.0, 0.1, 1.5, 1.7, 10.0])
    expected = np.minimum(np.sqrt(np.asarray(kl) / 2), np.sqrt(1 - np.exp(-np.asarray(kl))))
    np.testing.assert_allclose(tv_bound_from_kl(kl), expected, rtol=1e-6)


def test_bad_input_is_a_sentence():
    with pytest.raises(ValueError, match="horizon is 0; it must be at least 1"):
        bound_inputs_from_scalars(max_kl=0.1, horizon=0)
    inputs = bound_inputs_from_scalars(max_kl=0.1, horizon=2)
    with pytest.raises(ValueError, match=r"reward_range is \(1.0, 1.0\)"):
        surrogate_error_bounds(inputs, reward_range=(1.0, 1.0))
    with pytest.raises(ValueError, match="must be given together"):
        surrogate_error_bounds(inputs, mean_reward=0.5)
