"""Rows in which something is not finite: targets without a log-prob, bad reference rows, references of probability 0.
By raw sums of statistics, whose cotangents are not zero there."""

import contextlib
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.experimental.pallas import tpu as pltpu

from jaxrl_kernels import ReferenceLogits
from jaxrl_kernels import token_loss
from jaxrl_kernels import token_statistics
from tests.kernels import head_oracle as oracle

BY_LOGITS = ["reference", "xla", "pallas_tpu"]
# token_loss of the other implementations is token_statistics and its gradient.
OPS_BY_LOGITS = [("token_loss", "xla"), *(("token_statistics", name) for name in BY_LOGITS)]
ON_GPU = pytest.param("token_statistics", "pallas_mosaic_gpu", marks=pytest.mark.requires_jax("0.11"))
OPS = [*OPS_BY_LOGITS, ON_GPU]
ROWS, VOCABULARY = 6, 150


def interpreted(implementation):
    if implementation == "pallas_tpu":
        return pltpu.force_tpu_interpret_mode(pltpu.InterpretParams(uninitialized_memory="nan"))
    return plgpu.force_gpu_interpret_mode() if implementation == "pallas_mosaic_gpu" else contextlib.nullcontext()


@partial(jax.jit, static_argnames=("op", "implementation", "names", "summed", "options"))
def program(arrays, targets, z_ref, op, implementation, names, summed, options):
    """(statistics, gradient of the sum of those in `summed`) of all rows."""
    reference = oracle.reference(arrays) if z_ref is None else ReferenceLogits(z_ref)
    common = {"reference": reference, "statistics": names, "implementation": implementation, **dict(options)}
    common["block"] = 64 if implementation in ("reference", "xla") else 128

    def loss(values):
        return sum(getattr(values, name) for name in summed)

    def total(hidden, head):
        values = token_statistics(hidden, head, targets, **common)
        if op == "token_loss":
            return token_loss(hidden, head, targets, loss, **common)[0], values
        return jnp.sum(loss(values)), values

    gradients, values = jax.grad(total, (0, 1), has_aux=True)(*arrays[:2])
    return values, gradients


def run(op, implementation, inputs, names, summed=None, z_ref=None, **options):
    with interpreted(implementation):
        z_ref = None if z_ref is None else jnp.asarray(z_ref, jnp.float32)
        found = program(
            inputs.arrays(), inputs.tokens, z_ref, op, implementation, names, summed or names, tuple(options.items())
        )
        return jax.tree.map(np.asarray, found)


def ones_but(rows):
    weight = np.ones(ROWS)
    weight[list(rows)] = 0
    return weight


@pytest.mark.parametrize(("op", "implementation"), OPS)
def test_a_target_without_a_log_prob_has_no_gradient_and_the_rest_of_the_row_keeps_its_own(op, implementation):
    names = ("log_prob", "entropy", "kl")
    inputs = oracle.make_inputs(rows=ROWS, vocabulary=VOCABULARY, scale=2.0, near=0.5)
    inputs.targets[:] = oracle.most_likely(inputs)
    inputs.targets[1] = (inputs.hidden @ inputs.head)[1].argmin()
    pruned = oracle.expected(inputs, log_min_p=-2.0)
    np.testing.assert_array_equal(pruned.target_kept, np.arange(ROWS) != 1)
    valid, targets = {"log_prob": ones_but([1, 2, 3]), "entropy": np.ones(ROWS), "kl": np.ones(ROWS)}, inputs.targets
    wanted = oracle.expected_gradient(inputs, valid, log_min_p=-2.0)
    outside = targets.copy()
    outside[2], outside[3] = -1, VOCABULARY
    values, gradients = run(op, implementation, inputs._replace(targets=outside), names, log_min_p=-2.0)
    assert np.isneginf(values.log_prob[1])
    assert np.isnan(values.log_prob[2:4]).all()
    assert np.isfinite(values.entropy).all()
    for found, right in zip(gradients, wanted, strict=True):
        assert oracle.error(found, right) < 1e-5
    # What a cotangent of 1 adds by itself where there is no e_a: -p.
    p = np.exp(inputs.hidden @ inputs.head)[1]
    p = np.where(p >= p.max() * np.exp(-2.0), p, 0)
    assert oracle.error(wanted[0][1] - inputs.head @ (p / p.sum()), wanted[0][1]) > 0.1


@pytest.mark.parametrize(("op", "implementation"), OPS)
def test_a_bad_reference_row_is_bad_for_every_statistic(op, implementation):
    """A loss of log_prob alone is NaN too, not finite with a gradient that is missing; without a statistic that
    compares, the reference is not read."""
    inputs = oracle.make_inputs(rows=ROWS, vocabulary=VOCABULARY, near=0.5)
    hidden_ref = inputs.hidden_ref.copy()
    hidden_ref[1], hidden_ref[4, 0] = np.nan, np.inf
    broken, bad = inputs._replace(hidden_ref=hidden_ref), np.isin(np.arange(ROWS), [1, 4])
    values, gradients = run(op, implementation, broken, ("log_prob", "kl"), ("log_prob",))
    for value in (values.log_prob, values.kl):
        np.testing.assert_array_equal(np.isnan(value), bad)
    for found, right in zip(gradients, oracle.expected_gradient(inputs, {"log_prob": 1.0 - bad}), strict=True):
        assert oracle.error(found, right) < 1e-5
    values, gradients = run(op, implementation, broken, ("log_prob",))
    assert np.isfinite(values.log_prob).all()
    for found, right in zip(gradients, oracle.expected_gradient(inputs, {"log_prob": np.ones(ROWS)}), strict=True):
        assert oracle.error(found, right) < 1e-5


def with_zeros(inputs):
    """Reference logits that leave out: nothing, an unlikely token, the likeliest, all but two, a block; the last row's
    are the policy's own on half the vocabulary."""
    z = inputs.hidden @ inputs.head
    z_ref = inputs.hidden_ref @ inputs.head_ref
    z_ref[1, z[1].argmin()] = -np.inf
    z_ref[2, z[2].argmax()] = -3e38
    z_ref[3, np.argsort(z[3])[:-2]] = -np.inf
    z_ref[4, :70] = -np.inf
    z_ref[5] = np.where(np.arange(VOCABULARY) % 2, z[5], -np.inf)
    return z_ref


def definitions_with_zeros(z, z_ref, targets, log_min_p):
    """The divergences by their definitions where q may be 0."""
    seen = z_ref > -1e30
    values = oracle.definitions(z, jnp.where(seen, z_ref, z), targets, log_min_p)
    kept = jnp.full(z.shape, True) if log_min_p is None else z >= jnp.max(z, axis=-1, keepdims=True) + log_min_p
    p = jax.nn.softmax(jnp.where(kept, z, -jnp.inf), axis=-1)
    q = jax.nn.softmax(jnp.where(seen, z_ref, -jnp.inf), axis=-1)
    log_q = jnp.log(jnp.where(seen, q, 1.0))
    log_p = jnp.log(jnp.where(kept, p, 1.0))
    infinite = jnp.any(kept & ~seen, axis=-1)
    kl, chi = jnp.sum(p * (log_p - log_q), axis=-1), jnp.sum(p * p / jnp.where(seen, q, 1.0), axis=-1) - 1
    reverse = jnp.sum(q * (log_q - log_p), axis=-1)
    return values._replace(
        kl=jnp.where(infinite, jnp.inf, kl), chi_square=jnp.where(infinite, jnp.inf, chi),
        kl_reverse=None if values.kl_reverse is None else reverse, total_variation=jnp.sum(jnp.abs(p - q), axis=-1) / 2,
    )  # fmt: skip


@pytest.mark.parametrize("log_min_p", [None, -3.0])
@pytest.mark.parametrize(("op", "implementation"), OPS_BY_LOGITS)
def test_reference_logits_of_probability_zero(op, implementation, log_min_p):
    inputs = oracle.make_inputs(rows=ROWS, vocabulary=VOCABULARY, scale=2.0, near=0.5)
    inputs.targets[:] = oracle.most_likely(inputs)
    z_ref = with_zeros(inputs)
    names = ("log_prob", "entropy", "kl", "total_variation", "chi_square")
    names = names if log_min_p is not None else (*names, "kl_reverse")
    with jax.enable_x64(True):
        targets, logits = jnp.asarray(inputs.targets), jnp.asarray(z_ref)

        def total(hidden, head):
            values = definitions_with_zeros(hidden @ head, logits, targets, log_min_p)
            sloped = [getattr(values, name) for name in names if name != "chi_square"]
            return sum(jnp.sum(jnp.where(jnp.isfinite(value), value, 0.0)) for value in sloped), values

        slopes, right = jax.grad(total, (0, 1), has_aux=True)(*inputs.arrays(jnp.float64)[:2])
        wanted, slopes = jax.tree.map(np.asarray, (right, slopes))
    sloped = tuple(name for name in names if name != "chi_square")
    values, gradients = run(op, implementation, inputs, names, sloped, z_ref, log_min_p=log_min_p)
    infinite = [2, 3, 4, 5] if log_min_p is not None else [1, 2, 3, 4, 5]
    np.testing.assert_array_equal(np.isposinf(values.kl), np.isin(np.arange(ROWS), infinite))
    for name in names:
        assert oracle.error(getattr(values, name), getattr(wanted, name)) < 5e-6, name
    for found, expected in zip(gradients, slopes, strict=True):
        assert oracle.error(found, expected) < 2e-5


@pytest.mark.parametrize("implementation", BY_LOGITS)
def test_no_divergence_where_neither_has_mass(implementation):
    """A token that the policy's float32 weights do not hold, and the reference leaves out, is as good as none."""
    inputs = oracle.make_inputs(rows=ROWS, vocabulary=VOCABULARY, near=0.5)
    z_ref = inputs.hidden_ref @ inputs.head_ref + 3.0
    unit, column = np.ones((ROWS, 1)), np.zeros((1, VOCABULARY))
    column[0, 7] = -300.0
    wider = inputs._replace(hidden=np.hstack([inputs.hidden, unit]), head=np.vstack([inputs.head, column]))
    inputs.targets[inputs.targets == 7] = 8
    cut = {name: np.delete(getattr(inputs, name), 7, axis=1) for name in ("head", "head_ref")}
    without = inputs._replace(targets=inputs.targets - (inputs.targets > 7), **cut)
    z_ref[:, 7] = -np.inf
    names = ("log_prob", "kl", "kl_reverse", "total_variation", "chi_square")
    values, (d_hidden, d_head) = run("token_statistics", implementation, wider, names, names[:-1], z_ref)
    wanted = oracle.expected(without)
    for name in names:
        assert oracle.error(getattr(values, name), getattr(wanted, name)) < 5e-6, name
    slopes = oracle.expected_gradient(without, {name: np.ones(ROWS) for name in names[:-1]})
    assert oracle.error(d_hidden[:, :-1], slopes[0]) < 1e-5
    assert oracle.error(np.delete(d_head[:-1], 7, axis=1), slopes[1]) < 1e-5
    np.testing.assert_array_equal(d_head[:, 7], 0)


@pytest.mark.parametrize("implementation", BY_LOGITS)
def test_bad_rows_of_reference_logits(implementation):
    """NaN, +inf and a row without any mass are NaN for every statistic; other rows do not notice."""
    inputs = oracle.make_inputs(rows=ROWS, vocabulary=VOCABULARY, near=0.5)
    z_ref = inputs.hidden_ref @ inputs.head_ref
    z_ref[1, 3], z_ref[2, 4], z_ref[4] = np.nan, np.inf, -np.inf
    bad = np.isin(np.arange(ROWS), [1, 2, 4])
    for names in (("log_prob", "kl_reverse"), ("log_prob", "kl", "total_variation", "chi_square")):
        values, gradients = run("token_statistics", implementation, inputs, names, ("log_prob",), z_ref)
        for name in names:
            np.testing.assert_array_equal(np.isnan(getattr(values, name)), bad)
        for found, right in zip(gradients, oracle.expected_gradient(inputs, {"log_prob": 1.0 - bad}), strict=True):
            assert oracle.error(found, right) < 1e-5


@pytest.mark.parametrize(("op", "implementation"), OPS_BY_LOGITS[:3])
def test_narrow_targets_in_a_wide_vocabulary(op, implementation):
    """Numbers of blocks beyond what the targets' integers hold."""
    rng = np.random.default_rng(0)
    hidden, head = (jnp.asarray(rng.standard_normal(shape), jnp.float32) for shape in ((3, 4), (4, 40000)))

    def total(hidden, head, targets):
        options = {"statistics": ("log_prob",), "implementation": implementation, "block": 4096}
        if op == "token_loss":
            return token_loss(hidden, head, targets, lambda s: s.log_prob, **options)[0]
        return jnp.sum(token_statistics(hidden, head, targets, **options).log_prob)

    gradient = jax.jit(jax.value_and_grad(total, (0, 1)))
    wanted = gradient(hidden, head, jnp.array([0, 100, 30000], jnp.int32))
    found = gradient(hidden, head, jnp.array([0, 100, 30000], jnp.int16))
    for value, right in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_array_equal(value, right)
