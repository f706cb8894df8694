"""The Mosaic GPU kernel, interpreted: values, gradients, what runs, where it lowers."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

from jaxrl_kernels import Reference
from jaxrl_kernels import ReferenceLogits
from jaxrl_kernels import dense_kl
from jaxrl_kernels import token_loss
from jaxrl_kernels import token_statistics
from jaxrl_kernels._token_statistics import mosaic_gpu_tiles as tiles
from jaxrl_kernels._token_statistics import pallas_mosaic_gpu
from tests.kernels import head_oracle as oracle

pytestmark = pytest.mark.requires_jax("0.11")

SMALL = {1: (64, 2), 2: (64, 3)}
"""Tiles for most tests: interpretation costs by the size of the program."""

CASES = [
    pytest.param({"rows": 20, "vocabulary": 150, "axis": 1}, {}, (0.1, 1.0, 30.0), id="ragged"),
    pytest.param(
        {"rows": 9, "vocabulary": 100, "axis": 0},
        {"temperature": 2.0, "log_min_p": -1.5, "soft_cap": 2.0},
        (1.0,),
        id="pruned-capped-tied",
    ),
]


@pytest.fixture(autouse=True)
def interpreted(monkeypatch):
    monkeypatch.setattr(tiles, "TILES", SMALL)
    with plgpu.force_gpu_interpret_mode():
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
            implementation="pallas_mosaic_gpu",
            **({"block": 128} | dict(options)),
        )
        return oracle.weighted(values, cotangents), values

    gradients, values = jax.grad(total, (0, 1), has_aux=True)(*arrays[:2])
    return values, gradients


def run(inputs, cotangents, options=(), dtype=jnp.float32):
    given = {name: jnp.asarray(value, jnp.float32) for name, value in cotangents.items()}
    return both(inputs.arrays(dtype), inputs.tokens, given, inputs.axis, tuple(dict(options).items()))


@pytest.mark.parametrize(("shape", "options", "scales"), CASES)
def test_values_and_gradients(shape, options, scales):
    names = [name for name in oracle.NUMBERS if not (name == "kl_reverse" and "log_min_p" in options)]
    sloped = [name for name in oracle.WITH_GRADIENT if name in names]
    for scale in scales:
        inputs = oracle.make_inputs(**shape, scale=scale, near=0.3 * scale)
        wanted, wrong = oracle.expected(inputs, **options), oracle.flipped(inputs)
        cotangents = oracle.draw_cotangents(shape["rows"], sloped)
        values, gradients = run(inputs, cotangents, options)
        for value, right in zip(gradients, oracle.expected_gradient(inputs, cotangents, **options), strict=True):
            assert value.dtype == jnp.float32
            assert oracle.error(value, right) < 1e-5 * max(scale, 1.0), scale
            assert oracle.error(np.zeros_like(right), right) > 0.5
        for name in names:
            value, right = np.asarray(getattr(values, name)), getattr(wanted, name)
            assert value.shape == (shape["rows"],)
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


def test_close_policies_and_bad_rows():
    """KL ~ 5e-7 with its relative accuracy; NaN, inf and a target outside stay in their rows."""
    inputs = oracle.make_inputs(rows=20, vocabulary=150, near=1e-3)
    wanted = oracle.expected(inputs)
    assert wanted.kl.mean() < 1e-6
    keep = np.ones(20)
    keep[[1, 4, 6]] = 0
    cotangents = {name: value * keep for name, value in oracle.draw_cotangents(20).items()}
    inputs.targets[6] = 150
    clean, right = run(inputs, cotangents)
    for name in ("kl", "kl_reverse", "total_variation", "chi_square"):
        expected, value = getattr(wanted, name), np.asarray(getattr(clean, name), np.float64)
        assert np.max(np.abs(value - expected) / expected) < 2e-3, name
    hidden = inputs.hidden.copy()
    hidden[1], hidden[4, 0] = np.nan, np.inf
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


@pytest.mark.parametrize(
    ("rows", "width", "vocabulary", "axis", "names", "scales"),
    [
        pytest.param(20, 104, 320, 1, ("log_prob", "entropy"), (0.1, 10.0, 30.0), id="ragged-rows-width-columns"),
        pytest.param(300, 64, 520, 0, ("log_prob", "kl"), (30.0,), id="two-clusters-two-segments"),
        pytest.param(3, 20, 75, 1, ("log_prob", "entropy"), (30.0,), id="not-in-place"),
    ],
)
def test_bfloat16_inputs_lose_nothing_but_their_own_rounding(monkeypatch, rows, width, vocabulary, axis, names, scales):
    rng = np.random.default_rng(0)
    monkeypatch.setattr(tiles, "TILES", {1: (256, 4), 2: (64, 3)})  # that of the GPU for one head
    monkeypatch.setattr(tiles, "SHORTEST", 4)

    @jax.jit
    def values_of(arrays, targets):
        return token_statistics(
            *arrays[:2], targets, vocabulary_axis=axis, implementation="pallas_mosaic_gpu", statistics=names,
            reference=oracle.reference(arrays) if "kl" in names else None,
        )  # fmt: skip

    # Scale 30 has logits beyond 100, where float32 itself is 8e-6 coarse.
    for scale in scales:
        bound = 3e-5 if scale == 30.0 else 2e-5
        hidden = rng.standard_normal((rows, width))
        heads = rng.standard_normal((2, width, vocabulary)) * scale / width**0.5
        heads = heads if axis == 1 else heads.swapaxes(1, 2)
        low = [jnp.asarray(x, jnp.bfloat16) for x in (hidden, heads[0], hidden, heads[0] + 0.1 * heads[1])]
        same = [np.asarray(x.astype(jnp.float32), np.float64) for x in low]
        targets = rng.integers(0, vocabulary, rows).astype(np.int32)
        inputs = oracle.Inputs(*same[:2], targets, *same[2:], axis)
        values, wanted = values_of(low, inputs.tokens), oracle.expected(inputs)
        for name in names:
            value, right = np.asarray(getattr(values, name)), getattr(wanted, name)
            assert value.dtype == np.float32
            assert np.max(np.abs(value - right)) < bound


def test_float32_blocks_and_a_reference_of_another_width(monkeypatch):
    """Float32 heads go through in blocks of the vocabulary, each in three parts; bfloat16 ones would be 1e-3 off."""
    monkeypatch.setattr(pallas_mosaic_gpu, "COPIED", 64)
    inputs = oracle.make_inputs(rows=5, vocabulary=100, width=70)
    rng = np.random.default_rng(1)
    inputs = inputs._replace(hidden=rng.standard_normal(inputs.hidden.shape).astype(np.float32).astype(np.float64))
    inputs = inputs._replace(hidden_ref=inputs.hidden_ref[:, :9], head_ref=inputs.head_ref[:9])
    arrays = inputs.arrays()
    values = jax.jit(
        lambda hidden, head: token_statistics(
            hidden, head, inputs.tokens, reference=oracle.reference(arrays), statistics=("log_prob", "kl"),
            implementation="pallas_mosaic_gpu",
        )
    )(*arrays[:2])  # fmt: skip
    wanted = oracle.expected(inputs)
    for name in ("log_prob", "kl"):
        assert oracle.error(getattr(values, name), getattr(wanted, name)) < 1e-6
    rounded = inputs._replace(hidden=np.asarray(arrays[0].astype(jnp.bfloat16), np.float64))
    assert oracle.error(oracle.expected(rounded).log_prob, wanted.log_prob) > 1e-4


@pytest.mark.parametrize(
    ("shape", "options", "block"),
    [
        pytest.param({"rows": 20, "vocabulary": 320, "width": 16, "axis": 1}, {}, 128, id="ragged-rows"),
        pytest.param(
            {"rows": 257, "vocabulary": 152, "width": 64, "axis": 0},
            {"temperature": 2.0, "log_min_p": -1.5, "soft_cap": 2.0},
            None,
            id="pruned-capped-tied",
        ),
    ],
)
def test_gradients_of_bfloat16_heads_in_place(shape, options, block):
    """The kernel's own gradient, as near to float64 as rounding the gradient of the logits to bfloat16 lets it."""
    inputs = oracle.make_inputs(**shape)
    low = inputs.arrays(jnp.bfloat16)
    inputs = inputs._replace(**dict(zip(("hidden", "head", "hidden_ref", "head_ref"), _exact(low), strict=True)))
    cotangents = oracle.draw_cotangents(shape["rows"], ["log_prob", "entropy", "collision"])
    right = oracle.expected_gradient(
        inputs, {k: x * (np.arange(len(x)) != 1) for k, x in cotangents.items()}, **options
    )
    used = {name: jnp.asarray(value, jnp.float32) for name, value in cotangents.items()}

    @jax.jit
    def gradients_of(hidden, head):
        def total(hidden, head):
            values = token_statistics(
                hidden, head, inputs.tokens, vocabulary_axis=shape["axis"], statistics=tuple(used), block=block,
                implementation="pallas_mosaic_gpu", **options,
            )  # fmt: skip
            return oracle.weighted(values, used)

        return jax.grad(total, (0, 1))(hidden, head)

    # A row that is not finite has no gradient, and does not reach that of the head.
    for value, wanted in zip(gradients_of(low[0].at[1].set(jnp.nan), low[1]), right, strict=True):
        assert value.dtype == jnp.bfloat16
        value = np.asarray(value.astype(jnp.float32))
        assert oracle.error(value, wanted) < 8e-3
        assert oracle.error(-value, wanted) > 0.5


def _exact(arrays):
    return [np.asarray(x.astype(jnp.float32), np.float64) for x in arrays]


def test_token_loss_and_a_mask():
    """The other op through the same kernel: masked rows may hold anything."""
    inputs = oracle.make_inputs(rows=11, vocabulary=60, near=0.3)
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
        actual = gradient(arrays, "pallas_mosaic_gpu")
        assert float(actual[0][1]) == 7
        for value, right in zip(jax.tree.leaves(actual), jax.tree.leaves(wanted), strict=True):
            assert oracle.error(value, right) < 1e-5
        np.testing.assert_array_equal(actual[1][2], 0)


def test_no_rows():
    inputs = oracle.make_inputs(rows=0, vocabulary=50)
    values, gradients = run(inputs, oracle.draw_cotangents(0))
    assert values.entropy.shape == (0,)
    np.testing.assert_array_equal(gradients[1], np.zeros((12, 50)))


@pytest.mark.parametrize(("clusters", "vocabulary"), [(1, 40), (1, 4000), (3, 131072), (11, 3000), (32, 131072)])
def test_every_tile_of_every_row_is_swept_once(clusters, vocabulary):
    """The kernel's own arithmetic of blocks and segments, on integers."""
    case = tiles.Case(1, vocabulary, clusters * 256, (64,), ((0, 0),), None)
    items, segments = case.clusters * case.segments, case.segments
    seen = np.zeros((clusters, case.tiles), int)
    places = jax.jit(jax.vmap(lambda item: tiles.place(case, item)))(jnp.arange(items, dtype=jnp.int32))
    for block, segment in zip(*(x.tolist() for x in places), strict=True):
        seen[block, segment * case.tiles // segments : (segment + 1) * case.tiles // segments] += 1
    np.testing.assert_array_equal(seen, 1)
    if clusters == 32:
        waves = -(-items // 66)
        assert waves * -(-case.tiles // segments) < 1.05 * clusters * case.tiles / 66


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("axis", [1, 0])
def test_lowers_for_cuda_and_runs_no_other_forward(monkeypatch, dtype, axis):
    monkeypatch.undo()
    inputs = oracle.make_inputs(rows=40, width=64, vocabulary=320, axis=axis)

    def forward(hidden, head, hidden_ref, head_ref):
        return token_statistics(
            hidden,
            head,
            inputs.tokens,
            reference=Reference(hidden_ref, head_ref),
            vocabulary_axis=axis,
            implementation="pallas_mosaic_gpu",
            statistics=("log_prob", "entropy", "kl", "total_variation"),
        )

    with plgpu.force_gpu_interpret_mode(None):
        traced = jax.jit(forward).trace(*inputs.arrays(dtype))
        text = traced.lower(lowering_platforms=("cuda",)).as_text(debug_info=True)
    assert text.count("mosaic_gpu_v2") == 2
    assert "token_statistics.pallas_mosaic_gpu" in text
    assert "token_statistics.xla" not in text
    assert "dot_general" not in text
    assert ("reduce_precision" in text) is (dtype == jnp.float32)


def test_where_it_cannot_run_it_says_so():
    inputs = oracle.make_inputs(rows=4, vocabulary=50)
    hidden, head = inputs.arrays()[:2]

    def call(hidden=hidden, **options):
        return token_statistics(hidden, head, inputs.tokens, implementation="pallas_mosaic_gpu", **options)

    with plgpu.force_gpu_interpret_mode(None), pytest.raises(ValueError, match="Only interpret mode is supported"):
        call()
    with pytest.raises(NotImplementedError, match="takes bfloat16 and float32 arrays, not float16"):
        call(hidden.astype(jnp.float16))
    with pytest.raises(NotImplementedError, match="does not do top_k; choose 'xla'"):
        call(top_k=2)
    with pytest.raises(NotImplementedError, match=r"compares with a reference's hidden states and head"):
        call(reference=ReferenceLogits(jnp.zeros((4, 50))))
    for block in (0, 100):
        with pytest.raises(ValueError, match=f"block must be a multiple of 64 columns .*, not {block}"):
            call(block=block)


def test_one_hopper_runs_it_by_default(monkeypatch):
    """bfloat16 that needs no copy, nothing that the kernels cannot do; a name is never replaced."""

    class Device:
        platform, compute_capability = "cpu", "9.0"

    def kernels(function, *arrays) -> int:
        return str(jax.make_jaxpr(function)(*arrays)).count("mpmd_map")

    def of(shape, dtype=jnp.bfloat16, axis=1, **options):
        hidden, targets = jnp.ones((8, shape[1 - axis]), dtype), jnp.zeros(8, jnp.int32)
        options = {"statistics": ("log_prob",), "vocabulary_axis": axis} | options
        return kernels(lambda head: token_statistics(hidden, head, targets, **options), jnp.ones(shape, dtype))

    def dense(shape, dtype=jnp.bfloat16, **options):
        logits = jnp.ones(shape, dtype)
        return kernels(lambda z: dense_kl(z, logits, **options), logits)

    for devices, runs in (([Device()], 1), ([Device()] * 2, 0), (jax.devices(), 0)):
        monkeypatch.setattr(jax, "devices", lambda platform=None, devices=devices: devices)
        assert of((16, 128)) == of((128, 64), axis=0) == runs
        assert dense((16, 128)) == runs
    hopper, host = Device(), jax.local_devices(backend="cpu")[0]
    monkeypatch.setattr(jax, "devices", lambda platform="cuda": [host] if platform == "cpu" else [hopper])
    assert of((16, 128))
    for default in ("cpu", host):
        with jax.default_device(default):
            assert not of((16, 128))
            assert not dense((16, 128))
    assert of((16, 128))
    assert not of((16, 100))
    assert not of((16, 128), jnp.float32)
    assert not of((16, 128), statistics=("top_k_mass",), top_k=2)
    assert not of((16, 128), implementation="xla")
    reference = ReferenceLogits(jnp.zeros((8, 128), jnp.bfloat16))
    assert not of((16, 128), reference=reference, statistics=("kl",))
    assert not dense((16, 100))
    assert not dense((10, 128))
    assert not dense((16, 128), jnp.float32)
    assert not dense((16, 128), top_k=3)
    assert not dense((16, 128), implementation="xla")
