"""Every implementation of attention is the dense one: results, gradients, and not the memory."""

from collections.abc import Callable
from functools import cache
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.extend.core import jaxprs_in_params

from jaxrl_llm.models.attention import Visibility
from jaxrl_llm.models.attention import attend
from jaxrl_llm.models.attention import choose
from jaxrl_llm.models.attention import grouped_query_attention
from jaxrl_llm.models.attention.blocked import block_size
from jaxrl_llm.models.attention.blocked import blocked_attention
from jaxrl_llm.models.attention.fused import masked_attention
from jaxrl_llm.models.attention.fused import splash_attention
from jaxrl_llm.models.attention.fused import splash_block
from jaxrl_llm.models.config import tiny
from jaxrl_llm.models.transformer import Transformer

HIGHEST = jax.lax.Precision.HIGHEST
ROWS = ("causal", "left_padded", "right_padded", "packed", "shared_prompt", "packed_prompts", "all_padding")
SIZE = 8

# masked_attention is what cuDNN is given; here jax's own implementation takes it.
IMPLEMENTATIONS: dict[str, Callable] = {
    "xla": lambda q, k, v, see: attend(q, k, v, see, precision=HIGHEST, implementation="xla"),
    "blocks_of_16": lambda q, k, v, see: blocked_attention(q, k, v, see, HIGHEST, 16),
    "cudnn": lambda q, k, v, see: masked_attention(q, k, v, see, "xla"),
    "splash": partial(splash_attention, interpret=True),
}
LENGTHS = {"xla": 37, "blocks_of_16": 37, "cudnn": 37, "splash": 200}
"""None is a multiple of the block; all but the first take several blocks."""


def rows(length: int) -> Visibility:
    """A row of every kind."""
    third = length // 3
    places = np.arange(length)
    answers = np.minimum(places // third, 2)
    real = np.ones((len(ROWS), length), bool)
    segments = np.zeros((len(ROWS), length), np.int32)
    prefixes = np.zeros_like(segments)
    real[1, :third] = False
    real[2, -third:] = False
    segments[3] = prefixes[3] = answers
    segments[4] = answers  # segment 0 is the prompt of 1 and of 2
    real[4, 2 * third - 2 : 2 * third] = False  # the first answer is padded
    real[5, -3:] = False
    segments[5] = places // (third // 2)  # 0 and 3 are prompts, of 1 and 2, of 4 and more
    prefixes[5] = np.where(segments[5] < 3, 0, 3)
    real[6] = False
    segments[5, ~real[5]] = prefixes[5, ~real[5]] = segments[6] = prefixes[6] = -1  # as rows are laid out
    return Visibility(jnp.asarray(real), jnp.asarray(segments), jnp.asarray(prefixes))


def parts(visibility: Visibility, kind: str) -> Visibility:
    """Without prefixes, or without segments."""
    if kind == "real":
        return Visibility(visibility.real)
    return Visibility(visibility.real, visibility.segments) if kind == "segments" else visibility


def arrays(length: int, heads: int, shared: int, dtype) -> tuple[jax.Array, ...]:
    rng = np.random.default_rng(0)
    shapes = [(len(ROWS), length, heads, SIZE), *[(len(ROWS), shared, length, SIZE)] * 2]
    drawn = (2 * rng.normal(size=shape) for shape in shapes)
    if dtype == "rounded":  # what bfloat16 is the rounding of, in float32
        return tuple(jnp.asarray(x, jnp.bfloat16).astype(jnp.float32) for x in drawn)
    return tuple(jnp.asarray(x, dtype) for x in drawn)


def dense(query, keys, values, see: Visibility | jax.Array):
    mask = see.dense() if isinstance(see, Visibility) else see
    return grouped_query_attention(query, keys, values, mask, HIGHEST)


def with_gradients(function: Callable, operands, see, real) -> list[np.ndarray]:
    """Results at real tokens, and the gradient of a random sum of them, for queries, keys and values."""

    def total(query, keys, values):
        mixed = function(query, keys, values, see).astype(jnp.float32) * real[:, :, None, None]
        weights = jax.random.normal(jax.random.key(1), mixed.shape)
        return jnp.sum(weights * mixed), mixed

    gradients, mixed = jax.jit(jax.grad(total, (0, 1, 2), has_aux=True))(*operands)
    return [np.asarray(x, np.float32) for x in (mixed, *gradients)]


@cache
def found(name: str, length: int, kind: str, heads: int, shared: int, dtype: str) -> list[np.ndarray]:
    see = parts(rows(length), kind)
    function = IMPLEMENTATIONS.get(name, dense)
    return with_gradients(function, arrays(length, heads, shared, dtype), see, see.real)


CASES = [
    *[(name, kind, 6, 2, "float32") for name in ("xla", "blocks_of_16") for kind in ("real", "segments", "prefixes")],
    *[(name, kind, 6, 2, "float32") for name in ("cudnn", "splash") for kind in ("real", "prefixes")],
    ("blocks_of_16", "prefixes", 2, 2, "float32"),
    ("splash", "segments", 2, 2, "float32"),
    *[(name, "prefixes", 6, 2, "bfloat16") for name in ("blocks_of_16", "cudnn", "splash")],
]


@pytest.mark.parametrize("row", range(len(ROWS)), ids=ROWS)
@pytest.mark.parametrize(("name", "kind", "heads", "shared", "dtype"), CASES)
def test_results_and_gradients_are_those_of_the_dense_one(name, kind, heads, shared, dtype, row):
    length = LENGTHS[name]
    got = found(name, length, kind, heads, shared, dtype)
    expected = found("dense", length, kind, heads, shared, dtype)
    if dtype == "float32":
        tolerances = [1e-5 * max(1.0, float(np.abs(x).max())) for x in expected]
    else:  # as far from the truth as rounding makes it: the dense one in bfloat16 rounds at fewer places
        truth = found("dense", length, kind, heads, shared, "rounded")
        for ours, theirs, true in zip(got, expected, truth, strict=True):
            assert np.std(ours - true) < 4 * np.std(theirs - true) < 0.02 * np.std(true)
        tolerances = [6 * float(np.abs(x - y).max()) for x, y in zip(expected, truth, strict=True)]
        expected = truth
    for ours, theirs, tolerance in zip(got, expected, tolerances, strict=True):
        np.testing.assert_allclose(ours[row], theirs[row], rtol=0, atol=tolerance)
    if ROWS[row] != "all_padding":
        assert np.abs(got[0][row]).max() > 0.1


@pytest.mark.parametrize("wrong", ["prefix_ignored", "segment_ignored", "prefix_of_another", "too_late", "too_early"])
def test_a_wrong_mask_is_far_from_right(wrong):
    see = rows(37)
    mask = see.dense()
    mistakes = {
        "prefix_ignored": Visibility(see.real, see.segments),
        "segment_ignored": Visibility(see.real),
        "prefix_of_another": Visibility(see.real, see.segments, jnp.maximum(see.segments - 1, 0)),
        "too_late": mask & ~jnp.eye(37, dtype=bool),
        "too_early": mask | (jnp.eye(37, k=1, dtype=bool) & see.real[:, None, :]),
    }
    operands = arrays(37, 6, 2, "float32")
    expected = with_gradients(dense, operands, mistakes[wrong], see.real)
    got = found("blocks_of_16", 37, "prefixes", 6, 2, "float32")
    for ours, theirs in zip(got, expected, strict=True):
        assert np.abs(ours - theirs).max() > 1e-2 * np.abs(theirs).max()


def test_who_sees_whom_is_what_the_sentence_says():
    see = rows(12)
    real, segments, prefixes = (np.asarray(x) for x in (see.real, see.segments, see.prefixes))
    expected = np.zeros((len(ROWS), 12, 12), bool)
    for b, q, k in np.ndindex(expected.shape):
        related = segments[b, k] in (segments[b, q], prefixes[b, q])
        expected[b, q, k] = real[b, k] and k <= q and related
    np.testing.assert_array_equal(see.dense(), expected)
    with pytest.raises(ValueError, match="segments is None"):
        Visibility(see.real, None, see.prefixes)


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_padding_gives_something_finite_and_passes_nothing_on(name):
    """Also where somebody reads what comes out of it: left padding, and rows of nothing else."""
    see = parts(rows(37), "real")
    operands = arrays(37, 2, 2, "float32")
    blind = ~jnp.any(see.dense(), axis=-1)

    def total(query, keys, values):
        mixed = IMPLEMENTATIONS[name](query, keys, values, see)
        return jnp.sum(jnp.sin(mixed) * blind[:, :, None, None]), mixed

    gradients, mixed = jax.jit(jax.grad(total, (0, 1, 2), has_aux=True))(*operands)
    assert np.isfinite(mixed).all()
    np.testing.assert_array_equal(np.asarray(mixed)[np.asarray(blind)], 0)
    assert all((np.asarray(x) == 0).all() for x in gradients)


def shapes_of(function: Callable, *operands) -> tuple[set[str], int]:
    """Names of the operations of a program, and the most elements of one of its floating-point arrays."""
    names, largest = set(), 0
    pending = [jax.make_jaxpr(function)(*operands).jaxpr]
    while pending:
        jaxpr = pending.pop()
        for equation in jaxpr.eqns:
            names.add(equation.primitive.name)
            sizes = [x.aval.size for x in equation.outvars if jnp.issubdtype(x.aval.dtype, jnp.floating)]
            largest = max(largest, *sizes, 0)
            pending += list(jaxprs_in_params(equation.params))
    return names, largest


def test_memory_is_a_fraction_of_the_scores():
    heads, length = 4, 2048
    query = jax.ShapeDtypeStruct((1, length, heads, 64), jnp.float32)
    keys = jax.ShapeDtypeStruct((1, heads, length, 64), jnp.float32)
    see = Visibility(jax.ShapeDtypeStruct((1, length), bool))

    def held(implementation: str) -> int:
        def total(query, keys, values, see):
            return jnp.sum(jnp.sin(attend(query, keys, values, see, implementation=implementation)))

        program = jax.jit(jax.grad(total, (0, 1, 2))).lower(query, keys, keys, see).compile()
        return program.memory_analysis().temp_size_in_bytes

    blocked, all_at_once = held("xla"), held("reference")
    assert all_at_once > 2 * 4 * heads * length**2
    assert blocked < 0.25 * all_at_once


@pytest.mark.parametrize(
    ("shape", "dtype", "platform", "sharded", "expected"),
    [
        ((64, 170, 9, 64), "float32", "cpu", False, "reference"),
        ((64, 171, 9, 64), "float32", "cpu", False, "xla"),
        ((1, 724, 32, 128), "bfloat16", "tpu", False, "reference"),
        ((1, 725, 32, 128), "bfloat16", "tpu", False, "splash"),
        ((64, 4096, 32, 128), "bfloat16", "tpu", True, "xla"),
        ((64, 4096, 32, 128), "float32", "tpu", False, "xla"),
        ((64, 4096, 32, 128), "bfloat16", "cuda", True, "cudnn"),
        ((64, 4096, 32, 128), "float16", "cuda", False, "cudnn"),
        ((64, 4096, 32, 128), "float32", "cuda", False, "xla"),
        ((64, 4096, 32, 256), "bfloat16", "cuda", False, "xla"),
        ((64, 4096, 32, 36), "bfloat16", "cuda", False, "xla"),
        ((64, 4096, 32, 128), "bfloat16", "rocm", False, "xla"),
        ((64, 4096, 32, 128), "bfloat16", "cpu", False, "xla"),
    ],
)
def test_the_choice(shape, dtype, platform, sharded, expected):
    assert choose(shape, dtype, platform=platform, sharded=sharded) == expected


def test_blocks_fit_their_budget():
    assert block_size(1, 4, 4096) == 512
    assert block_size(1, 4, 100) == 100
    assert block_size(64, 32, 4096) == 64
    assert 4 * 16 * 8 * block_size(16, 8, 4096) ** 2 <= 32 * 2**20
    assert [splash_block(length) for length in (37, 200, 500, 4097, 600)] == [128, 128, 512, 512, 128]


def test_what_is_named_runs_or_raises():
    query, keys, values = arrays(37, 2, 2, "float32")
    see = parts(rows(37), "real")
    run = partial(attend, query, keys, values, see)
    np.testing.assert_array_equal(run(), dense(query, keys, values, see))
    np.testing.assert_array_equal(run(implementation="reference"), dense(query, keys, values, see))
    with pytest.raises(ValueError, match="must be one of reference, xla, cudnn, splash"):
        run(implementation="flash")
    with pytest.raises(ValueError, match="takes bfloat16 or float16, and the queries are float32"):
        run(implementation="cudnn")
    with pytest.raises(ValueError, match="multiple of 8"):
        attend(*(x[..., :6].astype(jnp.bfloat16) for x in (query, keys, values)), see, implementation="cudnn")
    with pytest.raises(RuntimeError, match="cuDNN"):
        attend(*(x.astype(jnp.bfloat16) for x in (query, keys, values)), see, implementation="cudnn")
    with pytest.raises(ValueError, match="interpret mode"):
        run(implementation="splash")
    with pytest.raises(ValueError, match="visibility is of rows"):
        attend(query[:1], keys[:1], values[:1], see)


def test_a_model_runs_what_it_names_and_long_rows_choose_blocks():
    config = tiny(max_positions=4096, num_layers=1)
    tokens = jax.ShapeDtypeStruct((1, 2100), jnp.int32)
    operations, largest = {}, {}
    for name, length in ((None, 2100), (None, 64), ("reference", 2100), ("xla", 64)):
        model = nnx.eval_shape(lambda name=name: Transformer(config, rngs=nnx.Rngs(0), attention=name))
        graphdef, state = nnx.split(model)
        cut = jax.ShapeDtypeStruct((1, length), tokens.dtype)
        key = (name, length)
        operations[key], largest[key] = shapes_of(lambda state, x, g=graphdef: nnx.merge(g, state)(x), state, cut)
    assert {key for key, names in operations.items() if "scan" in names} == {(None, 2100), ("xla", 64)}
    assert largest["reference", 2100] >= 4 * 2100**2
    assert largest[None, 2100] < 0.1 * 4 * 2100**2 + 4 * 512**2


def test_a_model_in_blocks_is_the_model(random_transformer):
    tokens = jax.random.randint(jax.random.key(0), (3, 40), 0, 64)
    real = jnp.arange(40) >= jnp.array([[0], [7], [20]])

    def loss(state, graphdef, remat):
        hidden = nnx.merge(graphdef, state)(tokens, real, remat=remat)
        return jnp.sum(jnp.sin(hidden) * real[..., None])

    expected = None
    for name, remat in (("reference", False), ("xla", True)):
        graphdef, state = nnx.split(random_transformer(tiny(num_layers=1), attention=name))
        got = jax.jit(jax.value_and_grad(loss), static_argnums=(1, 2))(state, graphdef, remat)
        expected = got if expected is None else expected
        for ours, theirs in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=0, atol=2e-5 * max(1.0, float(jnp.abs(theirs).max())))
