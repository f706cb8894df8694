"""The Mosaic TPU kernels, interpreted with undefined memory as NaN: values, gradients, what runs, where it lowers."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from jaxrl_kernels import Reference
from jaxrl_kernels import token_loss
from jaxrl_kernels import token_statistics
from tests.kernels import head_oracle as oracle

CASES = [
    # Two tiles of rows and three of columns, the last of each sticking out.
    pytest.param({"rows": 300, "vocabulary": 301, "axis": 1}, {}, id="ragged"),
    pytest.param({"rows": 16, "vocabulary": 256, "axis": 0}, {}, id="aligned-tied"),
    pytest.param({"rows": 9, "vocabulary": 150, "axis": 0}, {"temperature": 2.0, "log_min_p": -1.5}, id="pruned-tied"),
    pytest.param({"rows": 5, "vocabulary": 37, "axis": 1}, {"temperature": 0.5}, id="one-tile"),
]


@pytest.fixture(autouse=True)
def interpreted():
    with pltpu.force_tpu_interpret_mode(pltpu.InterpretParams(uninitialized_memory="nan")):
        yield


@partial(jax.jit, static_argnames=("axis", "options"))
def both(arrays, targets, cotangents, axis, options):
    """(statistics, gradient of their weighted sum)."""

    def total(hidden, head):
        values = token_statistics(
            hidden,
            head,
            targets,
            reference=oracle.reference(arrays),
            vocabulary_axis=axis,
            implementation="pallas_tpu",
            block=128,
            **dict(options),
        )
        return oracle.weighted(values, cotangents), values

    gradients, values = jax.grad(total, (0, 1), has_aux=True)(*arrays[:2])
    return values, gradients


def run(inputs, cotangents, options=(), dtype=jnp.float32):
    given = {name: jnp.asarray(value, jnp.float32) for name, value in cotangents.items()}
    return both(inputs.arrays(dtype), inputs.tokens, given, inputs.axis, tuple(dict(options).items()))


@pytest.mark.parametrize(("shape", "options"), CASES)
def test_values_and_gradients(shape, options):
    names = [name for name in oracle.NUMBERS if not (name == "kl_reverse" and "log_min_p" in options)]
    sloped = [name for name in oracle.WITH_GRADIENT if name in names]
    rows = shape["rows"]
    for scale in (0.1, 1.0, 30.0):
        inputs = oracle.make_inputs(**shape, scale=scale, near=0.3 * scale)
        wanted, wrong = oracle.expected(inputs, **options), oracle.flipped(inputs)
        together = oracle.draw_cotangents(rows, sloped)
        # One program for all of these: a statistic alone has zeros for the others.
        alone = [{name: value * (name == one) for name, value in together.items()} for one in sloped]
        for cotangents in (together, *(alone if scale == 1.0 else ())):
            values, gradients = run(inputs, cotangents, options)
            for value, right in zip(gradients, oracle.expected_gradient(inputs, cotangents, **options), strict=True):
                assert value.dtype == jnp.float32
                assert oracle.error(value, right) < 1e-5 * max(scale, 1.0), scale
                assert oracle.error(np.zeros_like(right), right) > 0.5
        for name in names:
            value, right = np.asarray(getattr(values, name)), getattr(wanted, name)
            assert value.shape == (rows,)
            bound = 3e-6 * (max(scale, 1.0) ** 2 if name == "chi_square" else max(scale, 1.0) ** 0.5)
            if name == "chi_square":
                value, right = value[right < 1e36], right[right < 1e36]
            assert oracle.error(value, right) < bound, (name, scale)
            other = getattr(wrong, name)[getattr(wanted, name) < 1e36] if name == "chi_square" else getattr(wrong, name)
            assert right.size == 0 or oracle.error(other, right) > 10 * bound, (name, scale)
            assert right.size == 0 or oracle.error(np.zeros_like(right), right) > 0.5
        for name in ("kept_mass", "target_kept"):
            value, right = getattr(values, name), getattr(wanted, name)
            assert (value is None) is (right is None)
            assert value is None or oracle.error(value, right) < 1e-6


def test_close_policies():
    """KL ~ 5e-7 with its relative accuracy, and its gradient with its direction."""
    inputs = oracle.make_inputs(rows=16, vocabulary=700, near=1e-3)
    wanted = oracle.expected(inputs)
    assert wanted.kl.mean() < 1e-6
    cotangents = oracle.draw_cotangents(16)
    values, _ = run(inputs, cotangents)
    for name in ("kl", "kl_reverse", "total_variation", "chi_square"):
        right, value = getattr(wanted, name), np.asarray(getattr(values, name), np.float64)
        assert np.max(np.abs(value - right) / right) < 2e-3, name
    alone = {name: np.ones(16) * (name == "kl") for name in cotangents}
    for value, right in zip(run(inputs, alone)[1], oracle.expected_gradient(inputs, {"kl": np.ones(16)}), strict=True):
        assert oracle.error(value, right) < 2e-4


def test_bfloat16_inputs_lose_nothing_but_their_own_rounding():
    rng = np.random.default_rng(0)
    names = ("log_prob", "entropy")
    cotangents = oracle.draw_cotangents(64, names)
    given = {name: jnp.asarray(value, jnp.float32) for name, value in cotangents.items()}

    @jax.jit
    def gradient(low, targets):
        def total(hidden, head):
            values = token_statistics(hidden, head, targets, implementation="pallas_tpu", statistics=names)
            return oracle.weighted(values, given), values

        return jax.grad(total, (0, 1), has_aux=True)(*low)

    # The last has logits beyond 100, where float32 itself is 8e-6 coarse.
    for scale, bound in ((0.1, 2e-5), (1.0, 2e-5), (10.0, 2e-5), (30.0, 3e-5)):
        hidden, head = rng.standard_normal((64, 96)), rng.standard_normal((96, 1000)) * scale / 96**0.5
        low = [jnp.asarray(x, jnp.bfloat16) for x in (hidden, head)]
        same = [np.asarray(x.astype(jnp.float32), np.float64) for x in low]
        inputs = oracle.Inputs(*same, rng.integers(0, 1000, 64).astype(np.int32), *same, 1)
        gradients, values = gradient(low, inputs.tokens)
        wanted = oracle.expected(inputs)
        for name in names:
            value, right = np.asarray(getattr(values, name)), getattr(wanted, name)
            assert value.dtype == np.float32
            assert np.max(np.abs(value - right)) < bound
        for value, right in zip(gradients, oracle.expected_gradient(inputs, cotangents), strict=True):
            assert value.dtype == jnp.bfloat16
            assert oracle.error(value.astype(jnp.float32), right) < 1e-2


def test_bad_rows_and_targets_stay_alone():
    """Rows with NaN or inf, without a cotangent, reach neither their neighbours nor the gradient."""
    inputs = oracle.make_inputs(rows=20)
    inputs.targets[6] = 301
    hidden = inputs.hidden.copy()
    hidden[1], hidden[4, 0] = np.nan, np.inf
    keep = np.ones(20)
    keep[[1, 4, 6]] = 0
    cotangents = {name: value * keep for name, value in oracle.draw_cotangents(20).items()}
    clean, right = run(inputs, cotangents)
    broken, gradients = run(inputs._replace(hidden=hidden), cotangents)
    for name in oracle.NUMBERS:
        value = np.asarray(getattr(broken, name))
        np.testing.assert_array_equal(value[keep > 0], np.asarray(getattr(clean, name))[keep > 0])
        assert np.isnan(value[1])
        assert not np.isfinite(value[4])
    assert np.isnan(clean.log_prob[6])
    assert np.isfinite(clean.entropy[6])
    for value, expected in zip(gradients, right, strict=True):
        np.testing.assert_array_equal(value, expected)


def test_token_loss_and_a_mask():
    """The other op through the same kernels: masked rows may hold anything."""
    inputs = oracle.make_inputs(rows=11, near=0.3)
    keep = jnp.asarray(np.arange(11) % 3 > 0)
    weight = jnp.asarray(np.random.default_rng(0).standard_normal(11), jnp.float32)
    hidden = np.where(np.asarray(keep)[:, None], inputs.hidden, np.nan)

    @partial(jax.jit, static_argnames="implementation")
    def gradient(arrays, implementation):
        def total(hidden, head, weight):
            return token_loss(
                hidden, head, inputs.tokens, lambda s, w: w * (s.log_prob + s.kl**2), weight, mask=keep,
                reference=oracle.reference(arrays), statistics=("log_prob", "kl"), implementation=implementation,
            )  # fmt: skip

        return jax.value_and_grad(total, (0, 1, 2), has_aux=True)(*arrays[:2], weight)

    wanted = gradient(inputs.arrays(), "reference")
    for arrays in (inputs.arrays(), inputs._replace(hidden=hidden).arrays()):
        actual = gradient(arrays, "pallas_tpu")
        assert float(actual[0][1]) == 7
        for value, right in zip(jax.tree.leaves(actual), jax.tree.leaves(wanted), strict=True):
            assert oracle.error(value, right) < 1e-5
        np.testing.assert_array_equal(actual[1][2], 0)


def test_no_rows_and_a_frozen_head():
    inputs = oracle.make_inputs(rows=0, vocabulary=50)
    values, gradients = run(inputs, oracle.draw_cotangents(0))
    assert values.entropy.shape == (0,)
    np.testing.assert_array_equal(gradients[1], np.zeros((12, 50)))
    inputs = oracle.make_inputs(rows=4, vocabulary=50)

    def names(argument):
        def total(*both):
            return jnp.sum(token_statistics(*both, inputs.tokens, implementation="pallas_tpu").entropy)

        return str(jax.make_jaxpr(jax.grad(total, argument))(*inputs.arrays()[:2]))

    assert "token_statistics_head_cotangent" in names((0, 1))
    assert "token_statistics_head_cotangent" not in names(0)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("axis", [1, 0])
def test_lowers_for_tpu_and_runs_nothing_else(dtype, axis):
    """All four kernels are in the program, and no other implementation, nor a product outside the kernels."""
    inputs = oracle.make_inputs(rows=40, width=72, vocabulary=301, axis=axis)

    def total(hidden, head, hidden_ref, head_ref):
        values = token_statistics(
            hidden,
            head,
            inputs.tokens,
            reference=Reference(hidden_ref, head_ref),
            vocabulary_axis=axis,
            implementation="pallas_tpu",
        )
        return oracle.weighted(values, {name: jnp.ones(40) for name in oracle.WITH_GRADIENT})

    device = jax.sharding.AbstractDevice(device_kind="TPU v5 lite", num_cores=1, platform="tpu")
    automatic = (jax.sharding.AxisType.Auto,)
    mesh = jax.sharding.AbstractMesh((1,), ("x",), automatic, abstract_device=device)
    arrays = inputs.arrays(dtype)
    with pltpu.force_tpu_interpret_mode(None), jax.sharding.use_abstract_mesh(mesh):
        traced = jax.jit(jax.grad(total, (0, 1))).trace(*arrays)
        text = traced.lower(lowering_platforms=("tpu",)).as_text(debug_info=True)
    for kernel in ("summary", "total_variation", "hidden_cotangent", "head_cotangent"):
        assert f"token_statistics_{kernel}" in text
    assert text.count("@tpu_custom_call") >= 4
    assert "token_statistics.pallas_tpu" in text
    assert "token_statistics.xla" not in text
    assert "dot_general" not in text


def test_where_it_cannot_run_it_says_so():
    inputs = oracle.make_inputs(rows=4, vocabulary=50)
    hidden, head = inputs.arrays()[:2]

    def call(hidden=hidden, **options):
        return token_statistics(hidden, head, inputs.tokens, implementation="pallas_tpu", **options).entropy

    with (
        pltpu.force_tpu_interpret_mode(None),
        pytest.raises(ValueError, match="Only interpret mode is supported on CPU"),
    ):
        call()
    with pytest.raises(NotImplementedError, match="'pallas_tpu' takes bfloat16 and float32 arrays, not float16"):
        call(hidden.astype(jnp.float16))
    for block in (0, 100):
        with pytest.raises(ValueError, match=f"block must be a multiple of 128 columns .*, not {block}"):
            call(block=block)
