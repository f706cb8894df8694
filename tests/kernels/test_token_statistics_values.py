"""Values of every statistic against float64 definitions."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_kernels import Reference
from jaxrl_kernels import token_statistics
from jaxrl_kernels._token_statistics import checks
from tests.kernels import head_oracle as oracle

IMPLEMENTATIONS = ("reference", "xla")
SHAPES = [
    pytest.param({"rows": 8, "vocabulary": 256}, 64, id="aligned"),
    pytest.param({"rows": 7, "vocabulary": 301}, 64, id="ragged"),
    pytest.param({"rows": 5, "vocabulary": 37}, 64, id="one-block"),
    pytest.param({"rows": 6, "vocabulary": 65}, 64, id="last-block-of-one"),
    pytest.param({"rows": 3, "vocabulary": 33}, 1, id="blocks-of-one"),
]


@partial(jax.jit, static_argnames=("axis", "implementation", "block", "statistics"))
def compiled(arrays, targets, axis, implementation, block, statistics, temperature, log_min_p):
    return token_statistics(
        arrays[0],
        arrays[1],
        targets,
        reference=oracle.reference(arrays),
        vocabulary_axis=axis,
        implementation=implementation,
        block=block,
        statistics=statistics,
        temperature=temperature,
        log_min_p=log_min_p,
    )


def run(inputs, *, implementation="xla", block=64, statistics=None, temperature=1.0, log_min_p=None):
    return compiled(
        inputs.arrays(), inputs.tokens, inputs.axis, implementation, block, statistics, temperature, log_min_p
    )


def tolerance(name: str, scale: float) -> float:
    # Chi-square is e to the power of differences of logits, so their rounding enters multiplied by their size.
    return 3e-6 * (max(scale, 1.0) ** 2 if name == "chi_square" else max(scale, 1.0) ** 0.5)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("axis", [1, 0])
@pytest.mark.parametrize(("shape", "block"), SHAPES)
def test_values(implementation, axis, shape, block):
    for scale in (0.1, 1.0, 30.0):
        inputs = oracle.make_inputs(**shape, scale=scale, axis=axis)
        wanted, wrong = oracle.expected(inputs), oracle.flipped(inputs)
        actual = run(inputs, implementation=implementation, block=block)
        assert actual.kept_mass is None
        assert actual.target_kept is None
        for name in oracle.NUMBERS:
            value, right, other = (getattr(x, name) for x in (actual, wanted, wrong))
            assert value.dtype == jnp.float32
            assert value.shape == inputs.targets.shape
            if name == "chi_square":
                value, right, other = (np.asarray(x)[right < 1e36] for x in (value, right, other))
            assert oracle.error(value, right) < tolerance(name, scale), (name, scale)
            # The measure tells right from wrong: zeros, and the definition with one sign flipped, are far outside.
            assert right.size == 0 or oracle.error(np.zeros_like(right), right) > 0.5
            assert right.size == 0 or oracle.error(other, right) > 10 * tolerance(name, scale), (name, scale)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("near", [1e-1, 1e-2, 1e-3])
def test_divergences_of_close_policies(implementation, near):
    """At KL ~ 5e-7 differences of float32 log-normalisers are useless; the centred sums keep their relative
    accuracy."""
    inputs = oracle.make_inputs(rows=16, vocabulary=5000, near=near)
    # A constant shift of the reference's logits changes nothing, and must not cost accuracy: one more hidden unit,
    # always on.
    shift = np.full((1, 5000), 3.0)
    inputs = inputs._replace(
        hidden=np.hstack([inputs.hidden, np.ones((16, 1))]),
        head=np.vstack([inputs.head, 0 * shift]),
        hidden_ref=np.hstack([inputs.hidden_ref, np.ones((16, 1))]),
        head_ref=np.vstack([inputs.head_ref, shift]),
    )
    wanted = oracle.expected(inputs)
    assert 0.1 * near**2 < wanted.kl.mean() < 2 * near**2
    actual = run(inputs, implementation=implementation, block=512)
    for name in ("kl", "kl_reverse", "total_variation", "chi_square"):
        right, value = getattr(wanted, name), np.asarray(getattr(actual, name), np.float64)
        assert np.all(value >= 0)
        assert np.max(np.abs(value - right) / right) < 2e-6 / near, name
    # What is avoided: the textbook sum in float32.
    arrays = inputs.arrays()
    log_p, log_q = jax.nn.log_softmax(arrays[0] @ arrays[1]), jax.nn.log_softmax(arrays[2] @ arrays[3])
    textbook = np.asarray(jnp.sum(jnp.exp(log_p) * (log_p - log_q), axis=-1), np.float64)
    if near == 1e-3:
        assert 0.3e-6 < wanted.kl.mean() < 1e-6
        assert np.max(np.abs(textbook - wanted.kl) / wanted.kl) > 0.05


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_divergences_of_peaked_close_policies(implementation):
    """Nearly all mass on one token, differences in the tail only."""
    rows, vocabulary = 4, 2000
    inputs = oracle.make_inputs(rows=rows, vocabulary=vocabulary, near=0.5, seed=3)
    peak = np.zeros((1, vocabulary))
    peak[0, 1234] = 20.0
    ones = np.ones((rows, 1))
    inputs = inputs._replace(
        hidden=np.hstack([inputs.hidden, ones]),
        head=np.vstack([inputs.head, peak]),
        hidden_ref=np.hstack([inputs.hidden_ref, ones]),
        head_ref=np.vstack([inputs.head_ref, peak]),
    )
    wanted = oracle.expected(inputs)
    assert wanted.kl.max() < 1e-2
    assert wanted.entropy.max() < 1e-2
    actual = run(inputs, implementation=implementation, block=256)
    for name in ("entropy", "total_variation"):
        assert np.max(np.abs(np.asarray(getattr(actual, name), np.float64) - getattr(wanted, name))) < 3e-7
    for name in ("kl", "kl_reverse"):
        right, value = getattr(wanted, name), np.asarray(getattr(actual, name), np.float64)
        assert np.max(np.abs(value - right) / right) < 1e-3, name


def test_divergence_where_the_reference_misses_the_mass_of_a_block():
    """A block that the policy gives no representable mass, but the reference half of its own: KL is log 2, and the
    centred sum cannot see it."""
    rows, vocabulary = 2, 128
    head, head_ref = np.zeros((1, vocabulary)), np.zeros((1, vocabulary))
    head[0, :64] = 200.0
    inputs = oracle.Inputs(np.ones((rows, 1)), head, np.zeros(rows, np.int32), np.ones((rows, 1)), head_ref, 1)
    wanted = oracle.expected(inputs)
    np.testing.assert_allclose(wanted.kl, np.log(2), rtol=1e-12)
    actual = run(inputs, implementation="xla", block=64)
    for name in ("kl", "kl_reverse", "total_variation"):
        np.testing.assert_allclose(getattr(actual, name), getattr(wanted, name), rtol=1e-5)


def test_chi_square_overflows_to_infinity():
    inputs = oracle.make_inputs(rows=3, vocabulary=40, scale=120.0)
    assert oracle.expected(inputs).chi_square.max() > 1e40
    for implementation in IMPLEMENTATIONS:
        value = run(inputs, implementation=implementation, block=16).chi_square
        assert jnp.isposinf(value).any()
        assert not jnp.isnan(value).any()


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("log_min_p", [0.0, -1.0, -4.0])
@pytest.mark.parametrize("axis", [1, 0])
def test_safe_set(implementation, log_min_p, axis):
    inputs = oracle.make_inputs(rows=9, vocabulary=150, scale=2.0, axis=axis)
    inputs.targets[:3] = oracle.most_likely(inputs)[:3]
    wanted = oracle.expected(inputs, log_min_p=log_min_p)
    actual = run(inputs, implementation=implementation, block=64, log_min_p=log_min_p)
    assert actual.kl_reverse is None
    assert actual.target_kept.dtype == jnp.bool_
    np.testing.assert_array_equal(actual.target_kept, wanted.target_kept)
    assert wanted.target_kept.any()
    assert not wanted.target_kept.all()
    np.testing.assert_array_equal(np.isneginf(actual.log_prob), ~wanted.target_kept)
    for name in (*(n for n in oracle.NUMBERS if n != "kl_reverse"), "kept_mass"):
        value, right = np.asarray(getattr(actual, name)), getattr(wanted, name)
        if log_min_p == 0.0 and name in ("entropy", "log_prob", "max_log_prob"):
            # One token is left: certainty.
            np.testing.assert_array_equal(value[wanted.target_kept], 0)
            continue
        assert oracle.error(value, right) < 1e-5, name


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_safe_set_that_keeps_everything_changes_nothing(implementation):
    inputs = oracle.make_inputs(rows=5)
    free = run(inputs, implementation=implementation, block=64)
    kept = run(inputs, implementation=implementation, block=64, log_min_p=-1000.0)
    np.testing.assert_array_equal(kept.kept_mass, 1)
    assert kept.target_kept.all()
    for name in oracle.NUMBERS:
        if name != "kl_reverse":
            np.testing.assert_allclose(getattr(kept, name), getattr(free, name), rtol=1e-6)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_temperature_divides_the_logits_of_both(implementation):
    inputs = oracle.make_inputs(rows=6)
    for temperature in (2.0, 0.7, np.linspace(0.5, 1.5, 6)):
        wanted = oracle.expected(inputs, temperature=temperature)
        given = temperature if isinstance(temperature, float) else jnp.asarray(temperature, jnp.float32)
        actual = run(inputs, implementation=implementation, block=64, temperature=given)
        for name in oracle.NUMBERS:
            assert oracle.error(getattr(actual, name), getattr(wanted, name)) < 1e-5, name
    assert oracle.error(run(inputs).kl, oracle.expected(inputs, temperature=2.0).kl) > 0.1


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("scale", [0.1, 1.0, 30.0])
def test_bfloat16_inputs_lose_nothing_but_their_own_rounding(implementation, scale):
    rng = np.random.default_rng(0)
    hidden, head = rng.standard_normal((64, 96)), rng.standard_normal((96, 3000)) * scale / 96**0.5
    low = [jnp.asarray(x, jnp.bfloat16) for x in (hidden, head)]
    same = [np.asarray(x.astype(jnp.float32), np.float64) for x in low]
    inputs = oracle.Inputs(*same, rng.integers(0, 3000, 64).astype(np.int32), *same, 1)
    wanted = oracle.expected(inputs)
    actual = token_statistics(*low, inputs.tokens, implementation=implementation, block=512)
    assert actual.log_prob.dtype == jnp.float32
    assert np.max(np.abs(np.asarray(actual.log_prob, np.float64) - wanted.log_prob)) < 2e-5
    assert np.max(np.abs(np.asarray(actual.entropy, np.float64) - wanted.entropy)) < 2e-5


def test_head_of_another_dtype_and_reference_of_another_width():
    inputs = oracle.make_inputs(rows=4, vocabulary=90)
    hidden, head, hidden_ref, head_ref = inputs.arrays()
    narrow = Reference(hidden_ref[:, :5], head_ref[:5])
    cut = inputs._replace(hidden_ref=inputs.hidden_ref[:, :5], head_ref=inputs.head_ref[:5])
    wanted = oracle.expected(cut)
    for implementation in IMPLEMENTATIONS:
        actual = token_statistics(
            hidden.astype(jnp.bfloat16), head, inputs.tokens, reference=narrow, implementation=implementation, block=32
        )
        assert actual.kl.dtype == jnp.float32
        assert oracle.error(actual.kl, wanted.kl) < 1e-5


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_no_rows(implementation):
    inputs = oracle.make_inputs(rows=0, vocabulary=50)
    actual = run(inputs, implementation=implementation, block=16)
    for name in oracle.NUMBERS:
        assert getattr(actual, name).shape == (0,)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_selected_statistics_only(implementation):
    inputs = oracle.make_inputs()
    full = run(inputs, implementation=implementation, block=64)
    for name in oracle.NUMBERS:
        alone = run(inputs, implementation=implementation, block=64, statistics=(name,))
        assert [other for other in alone._fields if getattr(alone, other) is not None] == [name]
        np.testing.assert_allclose(getattr(alone, name), getattr(full, name), rtol=1e-6)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_bad_rows_stay_alone(implementation):
    inputs = oracle.make_inputs(rows=6)
    clean = run(inputs, implementation=implementation, block=64)
    hidden = inputs.hidden.copy()
    hidden[1], hidden[4, 0] = np.nan, np.inf
    broken = run(inputs._replace(hidden=hidden), implementation=implementation, block=64)
    good = np.array([0, 2, 3, 5])
    for name in oracle.NUMBERS:
        value = np.asarray(getattr(broken, name))
        np.testing.assert_array_equal(value[good], np.asarray(getattr(clean, name))[good])
        assert np.isnan(value[1])
        assert not np.isfinite(value[4])


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_targets_outside_the_vocabulary(implementation):
    inputs = oracle.make_inputs(rows=4)
    inputs.targets[0], inputs.targets[2] = -1, 301
    actual = run(inputs, implementation=implementation, block=64)
    np.testing.assert_array_equal(np.isnan(actual.log_prob), [True, False, True, False])
    assert jnp.isfinite(actual.entropy).all()
    message = r"targets lie in \[-1, 301\]; they must lie in \[0, 300\]"
    arrays = inputs.arrays()
    with jax.enable_checks(True), pytest.raises(ValueError, match=message):
        token_statistics(arrays[0], arrays[1], inputs.tokens, implementation=implementation)


@pytest.mark.parametrize("dtype", [np.int64, np.uint64])
def test_wide_targets_are_not_the_token_of_their_lower_half(dtype):
    made = checks.tokens(np.array([1, 2**32 + 1, 2**31, 300], dtype), None)
    assert made[0] == 1
    assert made[3] == 300
    assert (made[1:3] >= 2**31 - 1).all()  # of no vocabulary
    if dtype == np.int64:
        assert (checks.tokens(np.array([-100, 1 - 2**32]), None) < 0).all()
