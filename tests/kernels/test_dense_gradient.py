"""dense_kl and dense_gradient against float64: values, gradients, tiny divergences, padding, infinities, and what runs
where."""

import contextlib
import inspect

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.experimental.pallas import tpu as pltpu

from jaxrl_kernels import dense_gradient
from jaxrl_kernels import dense_kl
from jaxrl_kernels._dense_gradient import streaming
from jaxrl_kernels._dense_gradient import xla
from tests.kernels.head_oracle import error

ON_GPU = pytest.param("pallas_mosaic_gpu", marks=pytest.mark.requires_jax("0.11"))
IMPLEMENTATIONS = ["reference", "xla", "pallas_tpu", ON_GPU]
STREAMING = IMPLEMENTATIONS[1:]


def interpreted(implementation):
    """The Pallas implementations run on CPU inside their interpreters only."""
    if implementation == "pallas_tpu":
        return pltpu.force_tpu_interpret_mode(pltpu.InterpretParams(uninitialized_memory="nan"))
    return plgpu.force_gpu_interpret_mode() if implementation == "pallas_mosaic_gpu" else contextlib.nullcontext()


def definition(z, z_ref):
    """(KL, p (l - KL)) in float64 NumPy, KL as a sum of terms that are never negative."""
    z, z_ref = (np.asarray(x, np.float64) for x in (z, z_ref))

    def log_softmax(x):
        x = x - x.max(axis=1, keepdims=True)
        return x - np.log(np.exp(x).sum(axis=1, keepdims=True))

    log_p, log_q = log_softmax(z), log_softmax(z_ref)
    p, seen = np.exp(log_p), log_p > -np.inf
    with np.errstate(invalid="ignore", over="ignore"):
        log_ratio = np.where(seen, log_p - log_q, 0.0)
        direct = (p * log_ratio).sum(axis=1)
        terms = np.where(seen, p * (log_ratio + np.expm1(-log_ratio)), np.exp(log_q))
        kl = np.where(direct > 1, direct, terms.sum(axis=1))
    return kl, p * (log_ratio - direct[:, None])


def draw(rows, vocabulary, scale=1.0, near=None, shift=0.0, dtype=np.float32):
    rng = np.random.default_rng([rows, vocabulary])
    z = (scale * rng.standard_normal((rows, vocabulary))).astype(dtype)
    noise = rng.standard_normal(z.shape)
    z_ref = scale * noise if near is None else z.astype(np.float64) + near * noise + shift
    return z, z_ref.astype(dtype), rng.standard_normal(rows).astype(np.float32)


def both(z, z_ref, weights, implementation, options):
    """(KL, gradient) of dense_gradient, and (KL, gradient) of dense_kl by autodiff."""
    settings = {"implementation": implementation} | dict(options)
    kl, pull = jax.vjp(lambda z: dense_kl(z, z_ref, **settings), z)
    return tuple(dense_gradient(z, z_ref, weights=weights, **settings)), (kl, pull(weights.astype(kl.dtype))[0])


PROGRAM = jax.jit(both, static_argnames=("implementation", "options"))
"""One for all tests: logits of a shape and a type compile once for each implementation."""


def run(implementation, z, z_ref, weights=None, program=PROGRAM, **options):
    """The results of `both` as NumPy arrays."""
    weights = jnp.ones(z.shape[0]) if weights is None else jnp.asarray(weights)
    with interpreted(implementation):
        found = program(jnp.asarray(z), jnp.asarray(z_ref), weights, implementation, tuple(options.items()))
        return jax.tree.map(np.asarray, found)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize(("rows", "vocabulary"), [(64, 256), (20, 1537), (70, 40)])
@pytest.mark.parametrize("scale", [0.1, 1.0, 30.0])
def test_values_and_gradients(implementation, rows, vocabulary, scale):
    z, z_ref, weights = draw(rows, vocabulary, scale)
    kl, gradient = definition(z, z_ref)
    for found_kl, found in run(implementation, z, z_ref, weights):
        np.testing.assert_allclose(found_kl, kl, rtol=2e-6)
        assert error(found, weights[:, None] * gradient) < 1e-5
        # The same measure is not kind to zeros, p (l + KL), or a gradient that is not centred.
        assert error(0 * found, weights[:, None] * gradient) > 0.5
        p = np.exp(z.astype(np.float64) - np.logaddexp.reduce(z.astype(np.float64), axis=1, keepdims=True))
        assert error(weights[:, None] * (gradient + 2 * p * kl[:, None]), weights[:, None] * gradient) > 1e-3
    assert error(gradient + np.exp(z - z.max()) * kl[:, None], gradient) > 1e-3


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_a_divergence_of_a_millionth(implementation):
    """KL near 5e-7 keeps its leading digits; the textbook sum in the same float32 does not have one."""
    z, z_ref, weights = draw(20, 1537, near=1e-3, shift=0.5)
    kl, gradient = definition(z, z_ref)
    assert 2e-7 < kl.min() < kl.max() < 1e-6
    for found_kl, found in run(implementation, z, z_ref, weights):
        assert np.max(np.abs(found_kl - kl) / kl) < 3e-4
        assert error(found, weights[:, None] * gradient) < 2e-3
        assert np.max(np.abs(found.astype(np.float64).sum(axis=1)) / np.abs(found).sum(axis=1)) < 1e-3
    log_p, log_q = jax.nn.log_softmax(jnp.asarray(z)), jax.nn.log_softmax(jnp.asarray(z_ref))
    textbook = np.asarray(jnp.sum(jnp.exp(log_p) * (log_p - log_q), axis=1))
    assert np.max(np.abs(textbook - kl) / kl) > 0.02


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_equal_policies(implementation):
    z, _, _ = draw(8, 300)
    for found_kl, found in run(implementation, z, z):
        np.testing.assert_array_equal(found_kl, 0)
        np.testing.assert_array_equal(found, 0)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("vocabulary", [256, 1537])
def test_bfloat16_logits(implementation, vocabulary):
    z, z_ref, weights = draw(20, vocabulary, scale=3.0, dtype=jnp.bfloat16)
    kl, gradient = definition(z, z_ref)
    for found_kl, found in run(implementation, z, z_ref, weights):
        assert found_kl.dtype == np.float32
        assert found.dtype == jnp.bfloat16
        np.testing.assert_allclose(found_kl, kl, rtol=2e-6)
        assert error(found, weights[:, None] * gradient) < 4e-3


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_infinities_and_nan_stay_in_their_row(implementation):
    z, z_ref, _ = draw(8, 300, scale=2.0)
    clean = definition(z, z_ref)
    z, z_ref = z.copy(), z_ref.copy()
    z[1, 3] = np.nan
    z[2, 4] = np.inf
    z_ref[3, 5] = np.nan
    z_ref[4, 6] = -np.inf  # q = 0 < p: infinite
    z[5, :130] = -np.inf  # p = 0 on whole blocks
    z[6, 7] = z_ref[6, 7] = -np.inf  # both
    for found_kl, found in run(implementation, z, z_ref):
        assert np.isnan(found_kl[1:4]).all()
        assert np.isposinf(found_kl[4])
        for row in (0, 7):
            np.testing.assert_allclose(found_kl[row], clean[0][row], rtol=2e-6)
            assert error(found[row], clean[1][row]) < 1e-5
        for row in (5, 6):
            kl, gradient = definition(z[row : row + 1], z_ref[row : row + 1])
            np.testing.assert_allclose(found_kl[row], kl[0], rtol=2e-6)
            assert error(found[row], gradient[0]) < 1e-5
        np.testing.assert_array_equal(found[5, :130], 0)


EDGE_ROWS = np.array(
    [
        [[0, 1, np.nan, 2], [0, 1, 0.2, 0.3]],
        [[0, 1, 0.3, 2], [0, 0.5, -np.inf, -1]],  # infinite
        [[-np.inf] * 4, [0, 1, 0.2, 0.3]],  # no distribution
        [[0, 1, 0.2, 0.3], [-np.inf] * 4],
        [[0, 1, np.inf, 2], [0, 1, 0.2, 0.3]],
        [[0, -np.inf, -np.inf, 1], [0, 1, -np.inf, 0.3]],
        [[0, -200, -np.inf, 1], [0, -np.inf, -np.inf, 0.5]],  # exp underflows
    ],
    np.float32,
)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_edge_rows_have_their_value_and_a_gradient_only_where_there_is_one(implementation):
    z, z_ref = jnp.asarray(EDGE_ROWS[:, 0]), jnp.asarray(EDGE_ROWS[:, 1])
    with interpreted(implementation):
        found, pull = jax.vjp(lambda x: dense_kl(x, z_ref, implementation=implementation), z)
        (zero,), (one,) = pull(jnp.zeros(len(z))), pull(jnp.ones(len(z)))
        together = dense_gradient(z, z_ref, implementation=implementation)
    for kl, gradient in ((found, one), together):
        assert np.isnan(kl[jnp.array([0, 2, 3, 4])]).all()
        assert np.isposinf(kl[1])
        assert not gradient[1].any()
        assert np.isnan(gradient[0]).any()
        np.testing.assert_allclose(kl[6], dense_kl(z[6:, ::3], z_ref[6:, ::3])[0], rtol=1e-5)
        assert np.isfinite(gradient[5:]).all()
        assert np.any(gradient[5] != 0)
    np.testing.assert_array_equal(zero, np.zeros(z.shape))


@pytest.mark.parametrize("implementation", STREAMING)
def test_a_row_without_weight_adds_nothing(implementation):
    z, z_ref, weights = draw(8, 300)
    z[1, 3], z_ref[2, 4], weights[1:3] = np.nan, np.inf, 0
    for _, found in run(implementation, z, z_ref, weights):
        np.testing.assert_array_equal(found[1:3], 0)
        assert np.isfinite(found).all()
        assert (np.abs(found[[0, 3]]).max(axis=1) > 0).all()


@pytest.mark.parametrize("implementation", STREAMING)
def test_far_apart_policies(implementation):
    """Confident policy, unrelated reference: e^KL is beyond float32, and KL is not."""
    z, z_ref, _ = draw(8, 300)
    z[:, 5] += 200.0
    z_ref[:, 250] += 300.0
    kl, gradient = definition(z, z_ref)
    assert kl.min() > 250
    for found_kl, found in run(implementation, z, z_ref):
        np.testing.assert_allclose(found_kl, kl, rtol=1e-6)
        assert np.max(np.abs(found - gradient)) < 1e-4


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_top_k_is_the_renormalised_divergence(implementation):
    z, z_ref, weights = draw(8, 300, scale=2.0)
    index = np.argsort(-z, axis=1)[:, :5]
    kl, part = definition(np.take_along_axis(z, index, 1), np.take_along_axis(z_ref, index, 1))
    gradient = np.zeros(z.shape)
    np.put_along_axis(gradient, index, weights[:, None] * part, 1)
    for found_kl, found in run(implementation, z, z_ref, weights, top_k=5):
        np.testing.assert_allclose(found_kl, kl, rtol=2e-6)
        assert error(found, gradient) < 1e-5
        assert (found != 0).sum() <= 40
    assert error(definition(z, z_ref)[0], kl) > 0.1


@pytest.mark.parametrize("rows", [1, 2, 5, 13])
@pytest.mark.parametrize("chunk", [1, 4 * 40 * 4, 6 * 40 * 4])
def test_chunks_cover_every_row(monkeypatch, rows, chunk):
    monkeypatch.setattr(xla, "CHUNK_BYTES", chunk)
    z, z_ref, weights = draw(rows, 40)
    kl, gradient = definition(z, z_ref)
    for found_kl, found in run("xla", z, z_ref, weights, program=both):  # jit would keep the first size of a chunk
        np.testing.assert_allclose(found_kl, kl, rtol=2e-6)
        assert error(found, weights[:, None] * gradient) < 1e-5


@pytest.mark.parametrize("x", [0.0, 1e-7, 1e-3, 0.4, 0.499, 0.501, 0.999, 1.001, 5.0])
def test_excess_keeps_its_digits(x):
    for value in (x, -x):
        wide = np.float64(np.float32(value))
        phi = wide**2 / 2 + wide**3 / 6 if abs(wide) < 1e-2 else np.expm1(wide) - wide
        weight, argument = jnp.float32(0.5), jnp.float32(value)
        found = float(streaming.excess(weight, argument, weight * jnp.exp(argument)))
        assert abs(found - 0.5 * phi) <= 1e-6 * phi


@pytest.mark.parametrize("op", [dense_kl, dense_gradient])
@pytest.mark.parametrize("implementation", ["reference", "xla"])
def test_the_named_implementation_runs(op, implementation):
    z = jnp.zeros((4, 8))
    text = jax.jit(lambda z: op(z, z, implementation=implementation)).lower(z).as_text(debug_info=True)
    assert f"{op.__name__}.{implementation}" in text
    default = jax.jit(lambda z: op(z, z)).lower(z).as_text(debug_info=True)
    assert f"{op.__name__}.xla" in default


@pytest.mark.parametrize(
    ("implementation", "platform", "kernels"),
    [("xla", "tpu", ()), ("xla", "cuda", ()), ("pallas_tpu", "tpu", ("tpu_custom_call",)),
     ("pallas_mosaic_gpu", "cuda", ("mosaic_gpu",))],
)  # fmt: skip
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize(("rows", "vocabulary"), [(128, 2048), (100, 1537)])
def test_lowers_for_accelerators(implementation, platform, kernels, dtype, rows, vocabulary):
    z = jax.ShapeDtypeStruct((rows, vocabulary), dtype)

    def both(z, z_ref):
        return dense_gradient(z, z_ref, implementation=implementation)

    def pulled(z, z_ref):
        return jax.grad(lambda z: jnp.sum(dense_kl(z, z_ref, implementation=implementation)))(z)

    for function in (both, pulled):
        text = jax.jit(function).trace(z, z).lower(lowering_platforms=(platform,)).as_text()
        assert all(name in text for name in kernels)
        assert ("custom_call" in text and "gpu" in text) or "tpu_custom_call" in text or not kernels


def test_the_tpu_kernels_state_their_cost():
    z = jnp.zeros((128, 2048))
    with interpreted("pallas_tpu"):
        text = str(jax.make_jaxpr(lambda z: dense_gradient(z, z, implementation="pallas_tpu"))(z))
    assert text.count("CostEstimate(flops=") == 2


@pytest.mark.parametrize("implementation", ["reference", "xla"])
def test_composes(implementation):
    """Under jit, vmap, checkpoint and shard-free scan the gradient is what it is alone; the reference has none."""
    z, z_ref, weights = (jnp.asarray(x) for x in draw(6, 50))

    def total(z, z_ref):
        return jnp.sum(weights * dense_kl(z, z_ref, implementation=implementation))

    wanted = dense_gradient(z, z_ref, weights=weights).gradient
    for function in (jax.grad(total), jax.jit(jax.grad(total)), jax.grad(jax.checkpoint(total))):
        np.testing.assert_allclose(function(z, z_ref), wanted, atol=1e-6)
    batched = jax.vmap(jax.grad(total))(jnp.stack([2 * z, z]), jnp.stack([z_ref, z_ref]))
    np.testing.assert_allclose(batched[1], wanted, atol=1e-6)
    np.testing.assert_array_equal(jax.grad(total, 1)(z, z_ref), 0)


def test_no_rows():
    z = jnp.zeros((0, 7), jnp.bfloat16)
    kl, gradient = dense_gradient(z, z)
    assert kl.shape == (0,)
    assert kl.dtype == jnp.float32
    assert gradient.shape == (0, 7)
    assert dense_kl(z, z).shape == (0,)


@pytest.fixture
def own_messages():
    """The shape hook of the tests would speak before the function does; users have no hook."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


ERRORS = [
    (lambda op, z: op(z[0], z[0]), ValueError, r"logits has shape \(8,\); it must be \[N, V\]"),
    (lambda op, z: op(z[:, :0], z[:, :0]), ValueError, r"logits has shape \(4, 0\); .* V >= 1"),
    (lambda op, z: op(z, z[:, 1:]), ValueError, r"logits_ref has shape \(4, 7\); it must be \(4, 8\)"),
    (lambda op, z: op(z, z.astype(int)), TypeError, "logits_ref must be floating, not int"),
    (lambda op, z: op(z, z, top_k=9), ValueError, "top_k is 9; it must lie between 1 and the vocabulary size 8"),
    (lambda op, z: op(z, z, implementation="fast"), ValueError, "implementation must be None or one of 'reference'"),
]


@pytest.mark.parametrize("op", [dense_kl, dense_gradient])
@pytest.mark.parametrize(("call", "kind", "message"), ERRORS)
def test_errors_name_the_argument(own_messages, op, call, kind, message):
    with pytest.raises(kind, match=f"^{inspect.unwrap(op).__name__}: .*{message}"):
        call(op, jnp.zeros((4, 8)))


def test_weights_must_be_one_per_row(own_messages):
    z = jnp.zeros((4, 8))
    with pytest.raises(ValueError, match=r"^dense_gradient: weights has shape \(3,\); it must be \[N\] = \(4,\)"):
        dense_gradient(z, z, weights=jnp.ones(3))
