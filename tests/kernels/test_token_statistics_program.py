"""What is compiled: which implementation ran, what it never holds, what it does not compute, and where it lowers and
composes."""

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest

from jaxrl_kernels import Reference
from jaxrl_kernels import _dispatch
from jaxrl_kernels import token_loss
from jaxrl_kernels import token_statistics
from jaxrl_kernels._token_statistics.blocks import Layout
from jaxrl_kernels._token_statistics.blocks import block_size
from tests.kernels import head_oracle as oracle

IMPLEMENTATIONS = ("reference", "xla")
ROWS, WIDTH, VOCABULARY, BLOCK = 24, 12, 301, 64


@pytest.fixture
def own_messages():
    """The shape hook of the tests would speak before the function does; users have no hook."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


def case(axis=1):
    return oracle.make_inputs(rows=ROWS, width=WIDTH, vocabulary=VOCABULARY, axis=axis)


def functions(implementation, axis=1, statistics=None):
    """(value, gradient) of a loss of all statistics through either op, as functions of the four arrays."""
    inputs = case(axis)
    names = statistics or oracle.WITH_GRADIENT

    def score(values):
        return sum(getattr(values, name) ** 2 for name in names)

    def by_statistics(hidden, head, hidden_ref, head_ref):
        values = token_statistics(
            hidden,
            head,
            inputs.tokens,
            reference=Reference(hidden_ref, head_ref),
            vocabulary_axis=axis,
            statistics=statistics,
            implementation=implementation,
            block=BLOCK,
        )
        return jnp.sum(score(values))

    def by_loss(hidden, head, hidden_ref, head_ref):
        return token_loss(
            hidden,
            head,
            inputs.tokens,
            score,
            reference=Reference(hidden_ref, head_ref),
            vocabulary_axis=axis,
            statistics=statistics,
            implementation=implementation,
            block=BLOCK,
        )[0]

    return {"token_statistics": by_statistics, "token_loss": by_loss}


def equations(jaxpr):
    """Every equation, inside scans and other calls too."""
    for equation in jaxpr.eqns:
        yield equation
        for parameter in jax.tree.leaves(
            list(equation.params.values()), is_leaf=lambda x: hasattr(x, "jaxpr") or hasattr(x, "eqns")
        ):
            inner = getattr(parameter, "jaxpr", parameter)
            if hasattr(inner, "eqns"):
                yield from equations(inner)


def shapes(function, *arguments) -> set[tuple[int, ...]]:
    program = jax.make_jaxpr(function)(*arguments)
    return {
        tuple(out.aval.shape) for eqn in equations(program.jaxpr) for out in eqn.outvars if hasattr(out.aval, "shape")
    }


@pytest.mark.parametrize("op", ["token_statistics", "token_loss"])
def test_no_array_of_rows_by_vocabulary(op):
    arrays = case().arrays()
    full = {(ROWS, VOCABULARY), (VOCABULARY, ROWS)}
    for implementation, holds in (("xla", False), ("reference", True)):
        function = functions(implementation)[op]
        for program in (function, jax.grad(function, (0, 1))):
            assert bool(shapes(program, *arrays) & full) is holds


@pytest.mark.parametrize("op", ["token_statistics", "token_loss"])
@pytest.mark.parametrize("axis", [1, 0])
def test_no_second_copy_of_the_head(op, axis):
    """A tied embedding is read and differentiated as it lies: nothing has the transposed shape, whichever way it is
    given."""
    transposed = (VOCABULARY, WIDTH) if axis == 1 else (WIDTH, VOCABULARY)
    program = jax.grad(functions("xla", axis)[op], (0, 1))
    assert transposed not in shapes(program, *case(axis).arrays())


def products(function, *arguments) -> int:
    """Matrix products that a call executes, in units of one product of all rows with the whole head."""
    flops = 0

    def count(jaxpr, times):
        nonlocal flops
        for equation in jaxpr.eqns:
            if equation.primitive.name == "dot_general":
                ((contract, _), _) = equation.params["dimension_numbers"]
                depth = equation.invars[0].aval.shape[contract[0]]
                flops += times * depth * int(np.prod(equation.outvars[0].aval.shape))
            repeats = times * equation.params["length"] if equation.primitive.name == "scan" else times
            for parameter in jax.tree.leaves(
                list(equation.params.values()), is_leaf=lambda x: hasattr(x, "jaxpr") or hasattr(x, "eqns")
            ):
                inner = getattr(parameter, "jaxpr", parameter)
                if hasattr(inner, "eqns"):
                    count(inner, repeats)

    count(jax.make_jaxpr(function)(*arguments).jaxpr, 1)
    assert flops % (ROWS * WIDTH * VOCABULARY) == 0
    return flops // (ROWS * WIDTH * VOCABULARY)


CHEAP = ("log_prob", "entropy", "collision", "kl", "kl_reverse")


@pytest.mark.parametrize(
    ("op", "statistics", "with_head", "only_hidden"),
    [
        ("token_statistics", CHEAP, 6, 5),
        ("token_loss", CHEAP, 4, 3),
        # Total variation: two more products for the second sweep, none where the tile keeps its logits.
        ("token_statistics", (*CHEAP, "total_variation"), 8, 7),
        ("token_loss", (*CHEAP, "total_variation"), 4, 3),
    ],
)
def test_number_of_matrix_products(op, statistics, with_head, only_hidden):
    """A frozen head costs nothing, however it is frozen; nor does a backward pass that nobody asked for."""
    arrays = case().arrays()
    function = functions("xla", statistics=statistics)[op]
    assert products(jax.grad(function, (0, 1)), *arrays) == with_head
    assert products(jax.grad(function, 0), *arrays) == only_hidden

    def stopped(hidden, head, *rest):
        return function(hidden, jax.lax.stop_gradient(head), *rest)

    assert products(jax.grad(stopped, (0, 1)), *arrays) == only_hidden
    assert products(jax.grad(jax.jit(function), 0), *arrays) == only_hidden
    assert products(function, *arrays) == with_head - (4 if op == "token_statistics" else 2)


def test_absent_cotangents_cost_no_reference_product():
    """A loss of the log-probability alone differentiates the policy's logits alone."""
    inputs = case()

    def total(hidden, head, hidden_ref, head_ref):
        values = token_statistics(
            hidden, head, inputs.tokens, reference=Reference(hidden_ref, head_ref), implementation="xla", block=BLOCK,
            statistics=("log_prob", "kl"),
        )  # fmt: skip
        return jnp.sum(values.log_prob), values.kl

    program = jax.grad(total, (0, 1), has_aux=True)
    assert products(program, *inputs.arrays()) == 2 + 3


@pytest.mark.parametrize("op", ["token_statistics", "token_loss"])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_the_named_implementation_runs(op, implementation):
    arrays = case().arrays()
    text = jax.jit(functions(implementation)[op]).lower(*arrays).as_text(debug_info=True)
    other = next(name for name in IMPLEMENTATIONS if name != implementation)
    assert f"{op}.{implementation}" in text
    assert f"{op}.{other}" not in text


def test_default_implementation():
    assert _dispatch.resolve("op", None, IMPLEMENTATIONS) == "xla"
    for name in IMPLEMENTATIONS:
        assert _dispatch.resolve("op", name, IMPLEMENTATIONS) == name


@pytest.mark.parametrize("op", ["token_statistics", "token_loss"])
def test_unknown_implementations(op):
    names = "'reference', 'xla', 'pallas_tpu', 'pallas_mosaic_gpu'"
    with pytest.raises(ValueError, match=f"{op}: implementation must be None or one of {names}, not 'fast'"):
        functions("fast")[op](*case().arrays())


@pytest.mark.parametrize("op", ["token_statistics", "token_loss"])
@pytest.mark.parametrize("platform", ["tpu", "cuda"])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_lowers_for_accelerators(op, platform, dtype):
    arrays = case().arrays(dtype)
    for function in (functions("xla")[op], jax.grad(functions("xla")[op], (0, 1))):
        lowered = jax.jit(function).trace(*arrays).lower(lowering_platforms=(platform,))
        text = lowered.as_text()
        assert "dot_general" in text
        # float32 products are asked for by name, bfloat16 ones need no help.
        assert ("HIGHEST" in text) is (dtype == jnp.float32)


@pytest.mark.parametrize("op", ["token_statistics", "token_loss"])
def test_composes(op):
    """Under jit, vmap, checkpoint and scan the gradient is what it is alone."""
    arrays = case().arrays()
    function = functions("xla")[op]
    gradient = jax.grad(function, (0, 1))
    wanted = jax.jit(gradient)(*arrays)
    results = [
        jax.jit(jax.grad(jax.checkpoint(function), (0, 1)))(*arrays),
        jax.tree.map(lambda x: x[1], jax.jit(jax.vmap(gradient, (0, None, 0, None)))(
            jnp.stack([arrays[0] * 2, arrays[0]]), arrays[1], jnp.stack([arrays[2]] * 2), arrays[3]
        )),
        jax.tree.map(lambda x: x[0], jax.jit(jax.vmap(gradient))(*(x[None] for x in arrays))),
    ]  # fmt: skip

    def looped(hidden, head):
        total, _ = jax.lax.scan(lambda c, _: (c + function(hidden, head, *arrays[2:]), None), 0.0, None, length=2)
        return total / 2

    results.append(jax.jit(jax.grad(looped, (0, 1)))(*arrays[:2]))
    for result in results:
        for value, right in zip(result, wanted, strict=True):
            assert oracle.error(value, right) < 1e-5


def test_one_trace_for_new_values():
    inputs = case()
    traces = []

    @jax.jit
    def run(hidden, temperature, log_min_p):
        traces.append(1)
        arrays = inputs.arrays()
        return token_statistics(
            hidden, arrays[1], inputs.tokens, temperature=temperature, log_min_p=log_min_p, block=BLOCK
        ).entropy

    hidden = inputs.arrays()[0]
    first, second = run(hidden, 1.0, -1.0), run(hidden * 2, 0.5, -9.0)
    assert len(traces) == 1
    assert not jnp.allclose(first, second)


@pytest.mark.parametrize("rows", [0, 1, 100, 2048, 10**6])
@pytest.mark.parametrize("vocabulary", [1, 7, 301, 49152, 50257, 151552])
@pytest.mark.parametrize("platform", ["cpu", "gpu"])
def test_blocks_cover_the_vocabulary(rows, vocabulary, platform):
    size = block_size(rows, vocabulary, 4, platform)
    layout = Layout(1, vocabulary, size)
    start, last = layout.last
    assert 1 <= last <= size
    assert start == layout.full * size
    assert start + last == vocabulary
    assert size <= vocabulary or layout.full == 0


def logit_blocks(op: str, rows: int, width: int, vocabulary: int) -> set[tuple[int, ...]]:
    """Shapes of the blocks of logits (products that sum over the width) in the gradient of either op."""
    hidden, head = (jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in ((rows, width), (width, vocabulary)))
    tokens = jax.ShapeDtypeStruct((rows,), jnp.int32)

    def total(hidden, head, tokens):
        names = ("log_prob", "entropy")
        if op == "token_loss":
            return token_loss(
                hidden, head, tokens, lambda s: s.log_prob + s.entropy, statistics=names, implementation="xla"
            )[0]
        values = token_statistics(hidden, head, tokens, statistics=names, implementation="xla")
        return jnp.sum(values.log_prob + values.entropy)

    program = jax.make_jaxpr(jax.grad(total, (0, 1)))(hidden, head, tokens)
    products = [e for e in equations(program.jaxpr) if e.primitive.name == "dot_general"]
    made = {tuple(e.outvars[0].aval.shape) for e in products}
    return {shape for shape in made if width not in shape}


@pytest.mark.parametrize(
    ("op", "platform", "blocks"),
    [
        ("token_statistics", "cpu", {(8192, 256)}),
        ("token_statistics", "gpu", {(8192, 8192)}),
        ("token_statistics", "tpu", {(8192, 8192)}),
        ("token_loss", "cpu", {(512, 1024)}),
        ("token_loss", "gpu", {(2048, 131072)}),
        ("token_loss", "tpu", {(2048, 131072)}),
    ],
)
def test_blocks_suit_the_platform(monkeypatch, op, platform, blocks):
    """2 MiB of logits on CPU; on accelerators 256 MiB, or 1 GiB of the rows of a tile of token_loss."""
    monkeypatch.setattr(jax, "default_backend", lambda: platform)
    assert logit_blocks(op, 8192, 4096, 131072) == blocks


ERRORS = [
    (
        lambda h, w, t: token_statistics(h[0], w, t),
        "hidden must be \\[N, D\\] and head a matrix, not of shapes \\(12,\\)",
    ),
    (lambda h, w, t: token_statistics(h[:, :5], w, t), "head has shape \\(12, 301\\), read as \\[D, V\\]"),
    (lambda h, w, t: token_statistics(h, w, t, vocabulary_axis=0), "read as \\[V, D\\] \\(vocabulary_axis=0\\)"),
    (lambda h, w, t: token_statistics(h, w, t, vocabulary_axis=2), "vocabulary_axis must be 1 .* or 0 .*, not 2"),
    (lambda h, w, t: token_statistics(h, w, t[:3]), "targets has shape \\(3,\\); it must be \\[N\\] = \\(24,\\)"),
    (lambda h, w, t: token_statistics(h, w[:, :0], t), "the vocabulary must not be empty"),
    (
        lambda h, w, t: token_statistics(h, w, t, reference=Reference(h[:3], w)),
        "reference.hidden has shape \\(3, 12\\)",
    ),
    (lambda h, w, t: token_statistics(h, w, t, reference=Reference(h, w[:4])), "reference.head has shape \\(4, 301\\)"),
    (
        lambda h, w, t: token_statistics(h, w, t, reference=Reference(h, w[:, 1:])),
        "reference.head has 300 tokens, head has 301",
    ),
    (lambda h, w, t: token_statistics(h, w, t, statistics=("kl",)), "statistics names 'kl', which needs a reference"),
    (
        lambda h, w, t: token_statistics(h, w, t, statistics=("perplexity",)),
        "statistics names 'perplexity'; it must be among",
    ),
    (lambda h, w, t: token_statistics(h, w, t, statistics="kl"), "statistics must be a non-empty sequence of names"),
    (
        lambda h, w, t: token_statistics(
            h, w, t, reference=Reference(h, w), log_min_p=-1.0, statistics=("kl_reverse",)
        ),
        "kl_reverse is infinite once log_min_p removes a token",
    ),
    (lambda h, w, t: token_statistics(h, w, t, temperature=0.0), "temperature must be positive and finite, not 0.0"),
    (lambda h, w, t: token_statistics(h, w, t, temperature=jnp.ones(3)), "temperature has shape \\(3,\\)"),
    (lambda h, w, t: token_statistics(h, w, t, log_min_p=0.5), "log_min_p .* must be <= 0, not 0.5"),
    (
        lambda h, w, t: token_statistics(h, w, t, log_min_p=-jnp.ones(2)),
        "log_min_p has shape \\(2,\\); it must be a scalar",
    ),
    (lambda h, w, t: token_statistics(h, w, t, block=0), "block must be at least 1 column, not 0"),
]


@pytest.mark.parametrize(("call", "message"), ERRORS)
def test_errors_name_the_argument(own_messages, call, message):
    inputs = case()
    with pytest.raises(ValueError, match=f"^token_statistics: .*{message}"):
        call(*inputs.arrays()[:2], inputs.tokens)


def test_targets_must_be_integers(own_messages):
    inputs = case()
    with pytest.raises(TypeError, match="targets must be integers, not float32"):
        token_statistics(*inputs.arrays()[:2], jnp.asarray(inputs.targets, jnp.float32))
