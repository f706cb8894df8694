"""grouped_matmul against float64: values and gradients for every distribution of rows over groups, and what runs
where."""

import contextlib
from functools import partial

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from jaxrl_kernels import grouped_matmul
from jaxrl_kernels._grouped_matmul import xla_blocks
from jaxrl_kernels._grouped_matmul import xla_loops
from tests.kernels.head_oracle import error

ON_GPU = pytest.param("pallas_mosaic_gpu", marks=pytest.mark.requires_jax("0.11"))
IMPLEMENTATIONS = ["reference", "xla", "pallas_tpu", ON_GPU]

ROWS = 300
SIZES = {
    "ragged": [131, 7, 40, 122],
    "empty": [8, 0, 8, 0],
    "all-in-one": [0, 300, 0, 0],
    "last": [0, 0, 0, 300],
    "behind": [0, 130, 5, 33],
    "none": [0, 0, 0, 0],
    "whole-blocks": [128, 64, 24, 84],
}
ALIGNED, UNEVEN = (128, 64), (40, 72)


def interpreted(implementation):
    """The Pallas implementations run on CPU inside their interpreters only."""
    if implementation == "pallas_tpu":
        return pltpu.force_tpu_interpret_mode(pltpu.InterpretParams(uninitialized_memory="nan"))
    return plgpu.force_gpu_interpret_mode() if implementation == "pallas_mosaic_gpu" else contextlib.nullcontext()


def definition(x, weights, dy, sizes):
    """(y, dx, dw) in float64 NumPy, group by group."""
    x, weights, dy = (np.asarray(z, np.float64) for z in (x, weights, dy))
    y, dx, dw, start = np.zeros(dy.shape), np.zeros(x.shape), np.zeros(weights.shape), 0
    for group, size in enumerate(sizes):
        rows = slice(start, start + size)
        y[rows], dx[rows] = x[rows] @ weights[group], dy[rows] @ weights[group].T
        dw[group] = x[rows].T @ dy[rows]
        start += size
    return y, dx, dw


def draw(widths=UNEVEN, scale=1.0, groups=4, dtype=np.float32):
    rng = np.random.default_rng(widths)
    shapes = ((ROWS, widths[0]), (groups, *widths), (ROWS, widths[1]))
    return tuple((scale * rng.standard_normal(shape)).astype(dtype) for shape in shapes)


@partial(jax.jit, static_argnames="implementation")
def both(x, weights, dy, sizes, implementation):
    """One program for all sizes of the groups: they are traced."""
    y, pull = jax.vjp(lambda x, weights: grouped_matmul(x, weights, sizes, implementation=implementation), x, weights)
    return y, *pull(dy)


def run(implementation, x, weights, dy, sizes):
    with interpreted(implementation):
        arrays = (jnp.asarray(z) for z in (x, weights, dy, np.array(sizes, np.int32)))
        return jax.tree.map(np.asarray, both(*arrays, implementation))


def dtype_of(implementation):
    """The GPU's tensor cores take two bytes; their rounding of the results is then the error."""
    return (jnp.bfloat16, 8e-3) if implementation == "pallas_mosaic_gpu" else (np.float32, 1e-6)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("widths", [UNEVEN, ALIGNED])
def test_values_and_gradients(implementation, widths):
    dtype, tolerance = dtype_of(implementation)
    cases = [(sizes, 1.0) for sizes in SIZES.values()]
    if implementation == "pallas_mosaic_gpu":  # its interpreter plays the 132 multiprocessors of the card
        cases = [(SIZES[name], 1.0) for name in ("ragged", "behind")]
    if widths == ALIGNED:
        cases = [(SIZES["empty"], scale) for scale in (0.1, 30.0)]
    for sizes, scale in cases:
        arrays = draw(widths, scale, dtype=dtype)
        wanted, shifted = (definition(*arrays, n) for n in (sizes, np.roll(sizes, 1)))
        for found, right, wrong in zip(run(implementation, *arrays, sizes), wanted, shifted, strict=True):
            assert found.dtype == dtype
            assert error(found, right) < tolerance, (sizes, scale)
            if sum(sizes):
                # The same measure is not kind to zeros, nor to sizes that are off by one group.
                assert error(0 * right, right) == 1
                assert error(wrong, right) > 0.5


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_nothing_reaches_another_group(implementation):
    """NaN behind the groups, and in one group, stays there: forward, and in both gradients."""
    dtype, tolerance = dtype_of(implementation)
    x, weights, dy = draw(dtype=dtype)
    sizes = SIZES["behind"]
    wanted = definition(x, weights, dy, sizes)
    x, dy = x.copy(), dy.copy()
    x[168:], dy[168:] = np.nan, np.nan
    for found, right in zip(run(implementation, x, weights, dy, sizes), wanted, strict=True):
        assert error(found, right) < tolerance
    x[132], dy[133] = np.nan, np.nan  # the third group: rows 130 to 134
    y, dx, dw = run(implementation, x, weights, dy, sizes)
    others, clean = [0, 1, 3], np.r_[0:130, 135:ROWS]
    assert error(y[clean], wanted[0][clean]) < tolerance
    assert error(dx[clean], wanted[1][clean]) < tolerance
    assert error(dw[others], wanted[2][others]) < tolerance
    assert np.isnan(y[132]).all()
    assert np.isnan(dx[133]).all()
    assert np.isnan(dw[2]).all()


@pytest.mark.parametrize("implementation", ["reference", "xla", "pallas_tpu"])
def test_bfloat16(implementation):
    """Products of bfloat16 are summed in float32: only the results are rounded. Weights may be wider than the rows."""
    arrays = draw(dtype=jnp.bfloat16)
    wanted = definition(*arrays, SIZES["ragged"])
    for found, right in zip(run(implementation, *arrays, SIZES["ragged"]), wanted, strict=True):
        assert found.dtype == jnp.bfloat16
        assert np.max(np.abs(found.astype(np.float64) - right) / (np.abs(right) + 1e-2)) < 5e-3
    wide = arrays[1].astype(np.float32)
    if implementation == "xla":
        y, dx, dw = run(implementation, arrays[0], wide, arrays[2], SIZES["ragged"])
        assert (y.dtype, dx.dtype, dw.dtype) == (jnp.bfloat16, jnp.bfloat16, np.float32)
        assert error(dw, wanted[2]) < 1e-6


@pytest.mark.parametrize("rows", [1, 40])
def test_fewer_rows_than_a_block(rows):
    x, weights, dy = draw()
    for sizes in ([rows, 0, 0, 0], [0, rows // 2, 0, rows - rows // 2]):
        wanted = definition(x[:rows], weights, dy[:rows], sizes)
        for found, right in zip(run("xla", x[:rows], weights, dy[:rows], sizes), wanted, strict=True):
            assert error(found, right) < 1e-6


def test_one_group_and_no_rows():
    x, weights, dy = draw(groups=1)
    for sizes in ([ROWS], [77]):
        for found, right in zip(run("xla", x, weights, dy, sizes), definition(x, weights, dy, sizes), strict=True):
            assert error(found, right) < 1e-6
    assert grouped_matmul(jnp.zeros((0, 40)), jnp.asarray(weights), jnp.zeros(1, jnp.int32)).shape == (0, 72)


def test_sizes_beyond_the_rows_are_cut():
    x, weights, dy = draw()
    wanted = definition(x, weights, dy, [200, 100, 0, 0])
    for found, right in zip(run("xla", x, weights, dy, [200, 250, 9, 9]), wanted, strict=True):
        assert error(found, right) < 1e-6


def test_blocks_that_a_gpu_takes():
    """What "xla" does where neither `ragged_dot` nor loops are good, run here by its name."""

    @jax.jit
    def all_three(x, weights, dy, sizes):
        y, dx = (xla_blocks.products(z, weights, sizes, transposed=z is dy) for z in (x, dy))
        return y, dx, xla_blocks.weight_gradient(x, dy, sizes)

    arrays = draw()
    for sizes in SIZES.values():
        found = all_three(*(jnp.asarray(z) for z in (*arrays, np.array(sizes, np.int32))))
        for one, right in zip(found, definition(*arrays, sizes), strict=True):
            assert error(one, right) < 1e-6, sizes


def total(x, weights, dy, sizes):
    return jnp.sum(dy * grouped_matmul(x, weights, sizes))


def test_composes():
    """Under vmap over rows, weights and sizes, and checkpoint, the gradient is what it is alone."""
    x, weights, dy = (jnp.asarray(z) for z in draw())
    sizes = jnp.asarray([SIZES["ragged"], SIZES["behind"]], jnp.int32)
    gradient = jax.grad(jax.checkpoint(total), (0, 1))
    found = jax.jit(jax.vmap(gradient, (None, 0, None, 0)))(x, jnp.stack([weights, 2 * weights]), dy, sizes)
    for index, name in enumerate(("ragged", "behind")):
        _, dx, dw = definition(x, (1 + index) * weights, dy, SIZES[name])
        assert error(found[0][index], dx) < 1e-6
        assert error(found[1][index], dw) < 1e-6


def test_inside_a_shard_map():
    """Rows and sizes that differ between devices, weights that do not: their cotangent is summed over the devices."""
    x, weights, dy = (jnp.asarray(z) for z in draw())
    mesh = jax.make_mesh((1,), ("data",), axis_types=(AxisType.Auto,))
    gradient = jax.grad(total, (0, 1))
    specs = (P("data"), P(), P("data"), P("data"))
    spread = jax.jit(jax.shard_map(gradient, mesh=mesh, in_specs=specs, out_specs=(P("data"), P())))
    found = spread(x, weights, dy, jnp.asarray(SIZES["ragged"], jnp.int32))
    for one, right in zip(found, definition(x, weights, dy, SIZES["ragged"])[1:], strict=True):
        assert error(one, right) < 1e-6


def lowered(implementation, platform, dtype=jnp.bfloat16):
    x, weights, dy = (jax.ShapeDtypeStruct(z.shape, dtype) for z in draw())
    sizes = jax.ShapeDtypeStruct((4,), jnp.int32)
    return both.trace(x, weights, dy, sizes, implementation).lower(lowering_platforms=(platform,))


@pytest.mark.parametrize(
    ("implementation", "platform", "there", "absent"),
    [
        ("xla", "cpu", "stablehlo.while", "ragged_dot"),
        ("xla", "tpu", "ragged_dot", "stablehlo.while"),
        ("xla", "cuda", "batching_dims = [0] x [0]", "ragged_dot"),
        ("pallas_tpu", "tpu", "tpu_custom_call", "ragged_dot"),
        pytest.param(
            "pallas_mosaic_gpu", "cuda", "mosaic_gpu", "stablehlo.while", marks=pytest.mark.requires_jax("0.11")
        ),
    ],
)
def test_lowers_to_what_the_platform_does_well(implementation, platform, there, absent):
    x, weights, dy = (jax.ShapeDtypeStruct(z.shape, jnp.bfloat16) for z in draw())
    sizes = jax.ShapeDtypeStruct((4,), jnp.int32)
    traced = both.trace(x, weights, dy, sizes, implementation)
    text = traced.lower(lowering_platforms=(platform,)).as_text()
    assert there in text
    assert absent not in text
    if implementation.startswith("pallas"):
        assert text.count("custom_call @") == 3


def test_float32_is_multiplied_in_full_on_a_tpu():
    x, weights, dy = (jnp.asarray(z) for z in draw())
    with interpreted("pallas_tpu"):
        text = str(jax.make_jaxpr(partial(both, implementation="pallas_tpu"))(x, weights, dy, jnp.zeros(4, jnp.int32)))
    assert text.count("HIGHEST") >= 3


@pytest.mark.parametrize("implementation", ["reference", "xla", None])
def test_what_ran_is_named(implementation):
    x, weights, _ = (jnp.asarray(z) for z in draw())
    function = partial(grouped_matmul, implementation=implementation)
    text = jax.jit(function).lower(x, weights, jnp.zeros(4, jnp.int32)).as_text(debug_info=True)
    assert f"grouped_matmul.{implementation or 'xla'}" in text


@pytest.fixture
def own_messages():
    """The shape hook of the tests would speak before the function does; users have no hook."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


X, W, N = np.zeros((8, 5), np.float32), np.zeros((3, 5, 6), np.float32), np.zeros(3, np.int32)
ERRORS = [
    ((X[0], W, N, None), ValueError, r"x has shape \(5,\); it must be \[N, D\]"),
    ((X, W[0], N, None), ValueError, r"weights has shape \(5, 6\); it must be \[E, D, F\] with D = 5"),
    ((X, W[:, 1:], N, None), ValueError, r"weights has shape \(3, 4, 6\); it must be \[E, D, F\] with D = 5"),
    ((X, W, N[1:], None), ValueError, r"group_sizes has shape \(2,\); it must be \[E\] = \(3,\)"),
    ((X.astype(int), W, N, None), TypeError, "x must be floating, not int"),
    ((X, W.astype(int), N, None), TypeError, "weights must be floating, not int"),
    ((X, W, N.astype(np.float32), None), TypeError, "group_sizes must be integers, not float32"),
    ((X, W, N, "fast"), ValueError, "implementation must be None or one of 'reference', 'xla', 'pallas_tpu'"),
    (
        (X.astype(np.float16), W.astype(np.float16), N, "pallas_tpu"),
        ValueError,
        "takes bfloat16 and float32, not float16",
    ),
    ((X, W, N, "pallas_mosaic_gpu"), ValueError, "implementation 'pallas_mosaic_gpu' (takes bfloat16|needs jax)"),
]


@pytest.mark.parametrize(("arguments", "kind", "message"), ERRORS)
def test_errors_name_the_argument(own_messages, arguments, kind, message):
    *arrays, implementation = arguments
    with pytest.raises(kind, match=f"^grouped_matmul: .*{message}"):
        grouped_matmul(*(jnp.asarray(z) for z in arrays), implementation=implementation)


@pytest.mark.parametrize("implementation", ["pallas_tpu", ON_GPU])
def test_a_named_implementation_is_never_replaced(implementation):
    """On a CPU, not interpreted, the kernels of other platforms say so."""
    x, weights, _ = (jnp.asarray(z, jnp.bfloat16) for z in draw())
    with pytest.raises(Exception, match=r"(?i)interpret|cpu"):
        jax.block_until_ready(grouped_matmul(x, weights, jnp.zeros(4, jnp.int32), implementation=implementation))


def test_loops_have_whole_blocks_and_rests():
    """The cases above reach every branch of the loops: whole blocks, each lower height, and nothing left."""
    rests = {size % xla_loops.HEIGHTS[-1] for sizes in SIZES.values() for size in sizes if size}
    reached = {next(h for h in (0, *xla_loops.HEIGHTS) if rest <= h) for rest in rests}
    assert {0, *xla_loops.HEIGHTS} == reached
    assert any(size >= 2 * xla_loops.HEIGHTS[-1] for sizes in SIZES.values() for size in sizes)
