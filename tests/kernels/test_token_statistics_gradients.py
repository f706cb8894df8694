"""Cotangents of hidden states and head against float64 autodiff of the definitions, and proof that a wrong sign would
show."""

import inspect
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_kernels import Reference
from jaxrl_kernels import token_statistics
from jaxrl_kernels._token_statistics import closed_form
from jaxrl_kernels._token_statistics import xla
from tests.kernels import head_oracle as oracle

IMPLEMENTATIONS = ("reference", "xla")


@partial(jax.jit, static_argnames=("axis", "implementation", "block"))
def gradient(arrays, targets, cotangents, axis, implementation, block, temperature, log_min_p):
    def total(hidden, head):
        values = token_statistics(
            hidden,
            head,
            targets,
            reference=oracle.reference(arrays),
            vocabulary_axis=axis,
            temperature=temperature,
            log_min_p=log_min_p,
            implementation=implementation,
            block=block,
        )
        return oracle.weighted(values, cotangents)

    return jax.grad(total, (0, 1))(*arrays[:2])


def run(inputs, cotangents, *, implementation="xla", block=64, temperature=1.0, log_min_p=None):
    given = {name: jnp.asarray(value, jnp.float32) for name, value in cotangents.items()}
    return gradient(inputs.arrays(), inputs.tokens, given, inputs.axis, implementation, block, temperature, log_min_p)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("name", oracle.WITH_GRADIENT)
def test_gradient_of_each_statistic(implementation, name):
    for scale in (0.1, 1.0, 30.0):
        inputs = oracle.make_inputs(scale=scale, near=0.3 * scale)
        cotangents = oracle.draw_cotangents(7, (name,))
        wanted = oracle.expected_gradient(inputs, cotangents)
        actual = run(inputs, cotangents, implementation=implementation)
        for value, right in zip(actual, wanted, strict=True):
            assert value.dtype == jnp.float32
            assert oracle.error(value, right) < 1e-5 * max(scale, 1.0), (name, scale)
            assert oracle.error(np.zeros_like(right), right) > 0.5


@pytest.mark.parametrize("axis", [1, 0])
@pytest.mark.parametrize(
    ("shape", "block"),
    [
        pytest.param({"rows": 8, "vocabulary": 256}, 64, id="aligned"),
        pytest.param({"rows": 7, "vocabulary": 301}, 64, id="ragged"),
        pytest.param({"rows": 5, "vocabulary": 37}, 64, id="one-block"),
        pytest.param({"rows": 1, "vocabulary": 65}, 64, id="last-block-of-one"),
    ],
)
def test_gradient_of_all_together(axis, shape, block):
    inputs = oracle.make_inputs(**shape, axis=axis)
    cotangents = oracle.draw_cotangents(shape["rows"])
    wanted = oracle.expected_gradient(inputs, cotangents)
    for value, right in zip(run(inputs, cotangents, block=block), wanted, strict=True):
        assert value.shape == right.shape
        assert oracle.error(value, right) < 1e-5


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_gradient_with_temperature_and_safe_set(implementation):
    inputs = oracle.make_inputs(rows=9, vocabulary=150, scale=2.0)
    names = tuple(name for name in oracle.WITH_GRADIENT if name != "kl_reverse")
    cotangents = oracle.draw_cotangents(9, names)
    for temperature, log_min_p in ((0.5, None), (2.0, -1.5), (1.0, -3.0)):
        wanted = oracle.expected_gradient(inputs, cotangents, temperature, log_min_p)
        actual = run(inputs, cotangents, implementation=implementation, temperature=temperature, log_min_p=log_min_p)
        for value, right in zip(actual, wanted, strict=True):
            assert oracle.error(value, right) < 1e-5


def test_a_target_outside_the_safe_set_has_no_gradient():
    inputs = oracle.make_inputs(rows=6, scale=3.0)
    pruned = ~oracle.expected(inputs, log_min_p=-1.0).target_kept
    assert pruned.sum() > 0
    for implementation in IMPLEMENTATIONS:
        d_hidden, _ = run(inputs, {"log_prob": np.ones(6)}, implementation=implementation, log_min_p=-1.0)
        np.testing.assert_array_equal(np.asarray(d_hidden)[pruned], 0)


@pytest.mark.parametrize("near", [1e-2, 1e-3])
def test_gradient_of_kl_between_close_policies(near):
    """Centred with the mean of the same arithmetic, the gradient keeps its direction although KL itself is ~ near^2 /
    2."""
    inputs = oracle.make_inputs(rows=16, vocabulary=5000, near=near)
    for name in ("kl", "kl_reverse"):
        cotangents = {name: np.ones(16)}
        wanted = oracle.expected_gradient(inputs, cotangents)
        for value, right in zip(run(inputs, cotangents, block=512), wanted, strict=True):
            assert oracle.error(value, right) < 2e-7 / near, name


FLIPS = [
    ("log_prob", 'bracket - g["log_prob"]', 'bracket + g["log_prob"]'),
    ("log_prob", 'out + jnp.where(hit, g["log_prob"]', 'out - jnp.where(hit, g["log_prob"]'),
    ("entropy", 'bracket - g["entropy"]', 'bracket + g["entropy"]'),
    ("entropy", 'centred - column["shift"]', 'centred + column["shift"]'),
    ("collision", 'p - column["collision"]', 'p + column["collision"]'),
    ("collision", '2 * g["collision"]', '-2 * g["collision"]'),
    ("kl", '(z - z_ref) - column["centre"]', '(z - z_ref) + column["centre"]'),
    ("kl", 'bracket + g["kl"]', 'bracket - g["kl"]'),
    ("kl_reverse", 'out + g["kl_reverse"]', 'out - g["kl_reverse"]'),
    ("kl_reverse", 'q, (z - z_ref) - column["gap"]', 'q, (z - z_ref) + column["gap"]'),
    ("total_variation", 'sign((z - z_ref) - column["gap"]', 'sign((z - z_ref) + column["gap"]'),
    ("total_variation", '- column["sign"]', '+ column["sign"]'),
    ("total_variation", '0.5 * g["total_variation"]', '-0.5 * g["total_variation"]'),
]


@pytest.mark.parametrize(("name", "right_sign", "wrong_sign"), FLIPS)
def test_one_flipped_sign_in_the_closed_form_is_seen(monkeypatch, name, right_sign, wrong_sign):
    source = inspect.getsource(closed_form.logit_gradient)
    assert source.count(right_sign) == 1, "the test must follow the code it mutates"
    namespace = dict(vars(closed_form))
    exec("import jax\n" + source.replace(right_sign, wrong_sign), namespace)
    monkeypatch.setattr(xla, "logit_gradient", namespace["logit_gradient"])
    inputs = oracle.make_inputs(rows=4, vocabulary=50)
    arrays = inputs.arrays()
    cotangents = oracle.draw_cotangents(4, (name,))
    given = {key: jnp.asarray(value, jnp.float32) for key, value in cotangents.items()}

    def total(hidden, head):
        values = token_statistics(
            hidden, head, inputs.tokens, reference=oracle.reference(arrays), implementation="xla", block=32
        )
        return oracle.weighted(values, given)

    wanted = oracle.expected_gradient(inputs, cotangents)
    for value, right in zip(jax.grad(total, (0, 1))(*arrays[:2]), wanted, strict=True):
        assert oracle.error(value, right) > 1e-2


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_statistics_without_a_gradient_have_none(implementation):
    inputs = oracle.make_inputs(rows=3, vocabulary=60)
    arrays = inputs.arrays()
    for name in ("max_log_prob", "chi_square", "kept_mass"):

        def total(hidden, head, name=name):
            values = token_statistics(
                hidden,
                head,
                inputs.tokens,
                reference=oracle.reference(arrays),
                log_min_p=-2.0,
                implementation=implementation,
                block=32,
            )
            return jnp.sum(getattr(values, name))

        for value in jax.grad(total, (0, 1))(*arrays[:2]):
            np.testing.assert_array_equal(value, 0)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_reference_and_temperature_are_constants(implementation):
    inputs = oracle.make_inputs(rows=3, vocabulary=60)
    arrays = inputs.arrays()

    def total(hidden_ref, head_ref, temperature):
        values = token_statistics(
            *arrays[:2],
            inputs.tokens,
            reference=Reference(hidden_ref, head_ref),
            temperature=temperature,
            implementation=implementation,
            block=32,
        )
        return jnp.sum(values.kl + values.kl_reverse + values.total_variation + values.log_prob)

    for value in jax.grad(total, (0, 1, 2))(*arrays[2:], jnp.float32(1.5)):
        np.testing.assert_array_equal(value, 0)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_bfloat16_gradients(implementation):
    inputs = oracle.make_inputs(rows=32, width=64, vocabulary=1000)
    low = [jnp.asarray(x, jnp.bfloat16) for x in (inputs.hidden, inputs.head, inputs.hidden_ref, inputs.head_ref)]
    same = inputs._replace(
        **{
            name: np.asarray(value.astype(jnp.float32), np.float64)
            for name, value in zip(("hidden", "head", "hidden_ref", "head_ref"), low, strict=True)
        }
    )
    cotangents = oracle.draw_cotangents(32)
    given = {name: jnp.asarray(value, jnp.float32) for name, value in cotangents.items()}

    def total(hidden, head):
        values = token_statistics(
            hidden, head, inputs.tokens, reference=Reference(*low[2:]), implementation=implementation, block=256
        )
        return oracle.weighted(values, given)

    wanted = oracle.expected_gradient(same, cotangents)
    for value, right in zip(jax.grad(total, (0, 1))(*low[:2]), wanted, strict=True):
        assert value.dtype == jnp.bfloat16
        assert oracle.error(value.astype(jnp.float32), right) < 1e-2


def test_rows_without_a_cotangent_do_not_reach_the_gradient():
    """A row that a mask removes later may hold NaN or inf: neither its neighbours nor the head notice."""
    inputs = oracle.make_inputs(rows=6)
    hidden = inputs.hidden.copy()
    hidden[1], hidden[4, 0] = np.nan, np.inf
    keep = jnp.array([True, False, True, True, False, True])

    def total(hidden, head, arrays, axis):
        values = token_statistics(
            hidden, head, inputs.tokens, reference=oracle.reference(arrays), implementation="xla", block=64
        )
        return sum(jnp.sum(jnp.where(keep, getattr(values, name), 0.0)) for name in oracle.WITH_GRADIENT)

    arrays = inputs.arrays()
    wanted = jax.grad(total, (0, 1))(*arrays[:2], arrays, 1)
    broken = inputs._replace(hidden=hidden).arrays()
    actual = jax.grad(total, (0, 1))(*broken[:2], arrays, 1)
    for value, right in zip(actual, wanted, strict=True):
        np.testing.assert_array_equal(value, right)


def test_second_use_and_scaling_are_linear():
    """The VJP is linear in the cotangents: twice the loss gives twice the gradient, a sum of losses the sum."""
    inputs = oracle.make_inputs(rows=4, vocabulary=80)
    first, second = oracle.draw_cotangents(4, seed=1), oracle.draw_cotangents(4, seed=2)
    both = {name: 2 * first[name] + second[name] for name in first}
    a, b, c = (run(inputs, cotangents) for cotangents in (first, second, both))
    for x, y, z in zip(a, b, c, strict=True):
        np.testing.assert_allclose(z, 2 * x + y, atol=2e-5)
