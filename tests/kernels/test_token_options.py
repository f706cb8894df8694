"""Soft cap, row mask, top-k mass, a reference given as logits, pruning in token_loss, bad rows: by both ops, against
float64."""

import contextlib
import inspect
from functools import partial

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from jaxrl_kernels import ReferenceLogits
from jaxrl_kernels import token_loss
from jaxrl_kernels import token_statistics
from jaxrl_kernels._token_statistics import blocks
from tests.kernels import head_oracle as oracle

IMPLEMENTATIONS = ("reference", "xla", "pallas_tpu")
ROWS, KEEP = 9, np.arange(9) % 4 != 2
NAMES = tuple(name for name in oracle.WITH_GRADIENT if name != "kl_reverse")


def interpreted(implementation):
    if implementation == "pallas_tpu":
        return pltpu.force_tpu_interpret_mode(pltpu.InterpretParams(uninitialized_memory="nan"))
    return contextlib.nullcontext()


@partial(jax.jit, static_argnames=("op", "implementation", "by_logits", "options"))
def both_ops(arrays, targets, weights, mask, op, implementation, by_logits, options):
    """(weighted sum, its gradients in hidden and head) of all statistics that have one."""
    reference = oracle.reference(arrays)
    options = dict(options)
    if by_logits:
        z_ref = arrays[2] @ arrays[3]
        if (cap := options.get("soft_cap")) is not None:
            z_ref = cap * jnp.tanh(z_ref / cap)
        reference = ReferenceLogits(z_ref)
    common = {"reference": reference, "implementation": implementation, "mask": mask, "statistics": NAMES, **options}
    common["block"] = 128 if implementation == "pallas_tpu" else 64

    def total(hidden, head):
        if op == "token_statistics":
            values = token_statistics(hidden, head, targets, **common)
            return oracle.weighted(values, weights)

        def loss(values, weights):
            terms = [weights[name] * getattr(values, name) for name in NAMES]
            return sum(jnp.where(jnp.isfinite(term), term, 0.0) for term in terms)

        matrix = jnp.stack([weights[name] for name in NAMES], axis=1)
        return token_loss(
            hidden, head, targets, lambda s, m: loss(s, dict(zip(NAMES, m.T, strict=True))), matrix, **common
        )[0]

    return jax.value_and_grad(total, (0, 1))(*arrays[:2])


CASES = [
    pytest.param(False, {"soft_cap": 2.0, "temperature": 0.7}, id="soft-cap"),
    pytest.param(True, {"soft_cap": 3.0, "temperature": 0.7}, id="soft-cap-reference-logits"),
    pytest.param(False, {"log_min_p": -2.0}, id="pruned"),
]


@pytest.mark.parametrize("op", ["token_statistics", "token_loss"])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize(("by_logits", "options"), CASES)
def test_values_and_gradients_with_a_mask(op, implementation, by_logits, options):
    """Masked rows hold NaN, inf and targets that do not exist, and leave no trace."""
    inputs = oracle.make_inputs(rows=ROWS, vocabulary=150, scale=2.0, near=0.8)
    inputs.targets[:2] = oracle.most_likely(inputs)[:2]
    cotangents = {name: value * KEEP for name, value in oracle.draw_cotangents(ROWS, NAMES).items()}
    wanted = oracle.expected_gradient(inputs, cotangents, **options)
    values = oracle.expected(inputs, **options)
    finite = {name: np.where(np.isfinite(getattr(values, name)), getattr(values, name), 0.0) for name in NAMES}
    right = sum(np.sum(cotangents[name] * finite[name]) for name in NAMES)
    hidden, hidden_ref, targets = inputs.hidden.copy(), inputs.hidden_ref.copy(), inputs.targets.copy()
    hidden[2], hidden_ref[6], targets[2] = np.nan, np.inf, -5
    broken = inputs._replace(hidden=hidden, hidden_ref=hidden_ref, targets=targets)
    given = {name: jnp.asarray(value, jnp.float32) for name, value in cotangents.items()}
    with interpreted(implementation):
        value, gradients = both_ops(
            broken.arrays(), broken.tokens, given, jnp.asarray(KEEP), op, implementation, by_logits,
            tuple(options.items()),
        )  # fmt: skip
    assert abs(float(value) - right) < 1e-5 * sum(np.sum(np.abs(cotangents[name] * finite[name])) for name in NAMES)
    for found, expected in zip(gradients, wanted, strict=True):
        assert oracle.error(found, expected) < 2e-5
    wrong = oracle.expected_gradient(inputs, cotangents | {"entropy": -cotangents["entropy"]}, **options)
    for found, other in zip(gradients, wrong, strict=True):
        assert oracle.error(found, other) > 1e-2
    np.testing.assert_array_equal(np.asarray(gradients[0])[~KEEP], 0)


def test_masked_rows_have_zeros_for_statistics():
    inputs = oracle.make_inputs(rows=ROWS)
    hidden = inputs.hidden.copy()
    hidden[2] = np.nan
    arrays = inputs._replace(hidden=hidden).arrays()
    for implementation in ("reference", "xla"):
        values = token_statistics(
            *arrays[:2], inputs.tokens, reference=oracle.reference(arrays), mask=jnp.asarray(KEEP), log_min_p=-2.0,
            implementation=implementation, block=64,
        )  # fmt: skip
        for value in jax.tree.leaves(values):
            np.testing.assert_array_equal(value[~KEEP], 0)


@pytest.mark.parametrize("op", ["token_statistics", "token_loss"])
def test_one_flipped_sign_in_the_soft_cap_is_seen(monkeypatch, op):
    source = inspect.getsource(blocks.Logits.pulled)
    assert source.count("1 - jnp.square(") == 1, "the test must follow the code it mutates"
    namespace = dict(vars(blocks))
    exec("if True:\n" + source.replace("1 - jnp.square(", "1 + jnp.square("), namespace)
    monkeypatch.setattr(blocks.Logits, "pulled", namespace["pulled"])
    inputs = oracle.make_inputs(rows=ROWS, vocabulary=80, scale=2.0, near=0.8)
    cotangents = oracle.draw_cotangents(ROWS, NAMES)
    given = {name: jnp.asarray(value, jnp.float32) for name, value in cotangents.items()}
    everything = jnp.ones(ROWS, bool)
    _, gradients = both_ops.__wrapped__(
        inputs.arrays(), inputs.tokens, given, everything, op, "xla", False, (("soft_cap", 2.0),)
    )
    for found, expected in zip(gradients, oracle.expected_gradient(inputs, cotangents, soft_cap=2.0), strict=True):
        assert oracle.error(found, expected) > 1e-2


@pytest.mark.parametrize("implementation", ["reference", "xla"])
@pytest.mark.parametrize("log_min_p", [None, -1.5])
@pytest.mark.parametrize("top_k", [1, 5, 40])
def test_top_k_mass(implementation, log_min_p, top_k):
    """In blocks smaller and larger than top_k; it has no gradient."""
    inputs = oracle.make_inputs(rows=6, vocabulary=101, scale=2.0)
    with jax.enable_x64(True):
        z, _ = oracle._logits(inputs, 0.8)
        p = np.asarray(jax.nn.softmax(z))
    if log_min_p is not None:
        p = np.where(np.log(p) >= np.log(p.max(1, keepdims=True)) + log_min_p, p, 0)
        p /= p.sum(1, keepdims=True)
    wanted = np.sort(p, axis=1)[:, ::-1][:, :top_k].sum(1)
    for block in (16, 64):

        def total(hidden, head, block=block):
            values = token_statistics(
                hidden, head, inputs.tokens, temperature=0.8, log_min_p=log_min_p, top_k=top_k, block=block,
                implementation=implementation,
            )  # fmt: skip
            return jnp.sum(values.top_k_mass), values.top_k_mass

        gradients, mass = jax.grad(total, (0, 1), has_aux=True)(*inputs.arrays()[:2])
        np.testing.assert_allclose(mass, wanted, rtol=2e-6)
        assert not np.allclose(mass, np.sort(p, axis=1)[:, :top_k].sum(1), rtol=0.1)
        for gradient in gradients:
            np.testing.assert_array_equal(gradient, 0)


@pytest.mark.parametrize("op", ["token_statistics", "token_loss"])
@pytest.mark.parametrize("implementation", ["reference", "xla"])
def test_a_bad_row_that_counts_does_not_poison_the_gradient(op, implementation):
    """The sum shows it; the other rows' gradient, and the head's, are as if it were masked."""
    inputs = oracle.make_inputs(rows=ROWS, vocabulary=150, near=0.5)
    given = {name: jnp.asarray(value, jnp.float32) for name, value in oracle.draw_cotangents(ROWS, NAMES).items()}
    hidden = inputs.hidden.copy()
    hidden[2], hidden[6, 0] = np.nan, np.inf
    arrays = inputs._replace(hidden=hidden).arrays()
    everything, options = jnp.ones(ROWS, bool), (("statistics", NAMES),)
    _, clean = both_ops(inputs.arrays(), inputs.tokens, given, jnp.asarray(KEEP), op, implementation, False, options)
    _, broken = both_ops(arrays, inputs.tokens, given, everything, op, implementation, False, options)
    for found, expected in zip(broken, clean, strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)
    value = token_loss(*arrays[:2], inputs.tokens, lambda s: s.entropy, implementation=implementation)[0]
    assert not jnp.isfinite(value)


def _finish(function, argument):
    jax.block_until_ready(function(argument))
    jax.effects_barrier()


def test_targets_are_checked_at_run_time_too():
    inputs = oracle.make_inputs(rows=3, vocabulary=50)
    hidden, head = inputs.arrays()[:2]
    with jax.enable_checks(True):
        score = jax.jit(lambda targets: token_statistics(hidden, head, targets, implementation="xla").log_prob)
        with pytest.raises(jax.errors.JaxRuntimeError, match=r"targets lie in \[0, 50\]; they must lie in \[0, 49\]"):
            _finish(score, jnp.array([0, 50, 3]))
        mask = jnp.array([True, False, True])
        token_statistics(hidden, head, jnp.array([0, 50, 3]), mask=mask, implementation="xla")


@pytest.fixture
def own_messages():
    """The shape hook of the tests would speak before the function does; users have no hook."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


def _entropy_loss(*given, **options):
    return token_loss(*given, lambda s: s.entropy, **options)


ERRORS = [
    ({"soft_cap": -1.0}, ValueError, r"soft_cap must be a positive number \(or None\), not -1.0"),
    ({"top_k": 0}, ValueError, "top_k is 0; it must lie between 1 and the vocabulary size 60"),
    ({"statistics": ("top_k_mass",)}, ValueError, "statistics names 'top_k_mass', which needs top_k"),
    ({"mask": np.ones(4, bool)}, ValueError, r"mask has shape \(4,\); it must be \[N\] = \(5,\)"),
    ({"mask": np.ones(5)}, TypeError, "mask must be boolean, not float64"),
    (
        {"reference": ReferenceLogits(np.zeros((5, 61), np.float32))},
        ValueError,
        r"reference.logits has shape \(5, 61\); it must be \[N, V\] = \(5, 60\)",
    ),
    ({"top_k": 2, "implementation": "pallas_tpu"}, NotImplementedError, "'pallas_tpu' does not do top_k"),
]


@pytest.mark.parametrize("op", ["token_statistics", "token_loss"])
@pytest.mark.parametrize(("options", "kind", "message"), ERRORS)
def test_errors_name_the_argument(own_messages, op, options, kind, message):
    inputs = oracle.make_inputs(rows=5, vocabulary=60)
    given = (*inputs.arrays()[:2], inputs.tokens)
    call = token_statistics if op == "token_statistics" else _entropy_loss
    with pytest.raises(kind, match=f"^{op}: .*{message}"):
        call(*given, **options)
