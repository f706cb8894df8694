"""token_loss equals token_statistics followed by the loss, value and gradient, and its masks, side arrays and
errors."""

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest

from jaxrl_kernels import Reference
from jaxrl_kernels import token_loss
from jaxrl_kernels import token_statistics
from jaxrl_kernels._token_statistics import xla_loss
from tests.kernels import head_oracle as oracle

IMPLEMENTATIONS = ("reference", "xla")


@pytest.fixture
def own_messages():
    """The shape hook of the tests would speak before the function does; users have no hook."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


def clipped(statistics, log_prob_old, advantage):
    """A clipped ratio with every statistic that has a gradient in it, none of them linearly."""
    ratio = jnp.exp(statistics.log_prob - log_prob_old)
    surrogate = jnp.minimum(ratio * advantage, jnp.clip(ratio, 0.8, 1.2) * advantage)
    penalty = 0.1 * statistics.kl**2 + 0.3 * jnp.sqrt(statistics.kl_reverse) + statistics.total_variation**3
    return -surrogate + penalty - 0.01 * statistics.entropy * statistics.collision


def case(rows=21, axis=1, **options):
    inputs = oracle.make_inputs(rows=rows, axis=axis, **options)
    log_prob = oracle.expected(inputs).log_prob
    rng = np.random.default_rng(5)
    sides = (log_prob + 0.3 * rng.standard_normal(rows), rng.standard_normal(rows))
    return inputs, tuple(jnp.asarray(side, jnp.float32) for side in sides)


def by_loss(inputs, sides, *, mask=None, implementation="xla", loss=clipped, block=64, **options):
    arrays = inputs.arrays()

    def total(hidden, head):
        return token_loss(
            hidden,
            head,
            inputs.tokens,
            loss,
            *sides,
            reference=oracle.reference(arrays),
            vocabulary_axis=inputs.axis,
            mask=mask,
            implementation=implementation,
            block=block,
            **options,
        )

    def value(hidden, head):
        both = total(hidden, head)
        return both[0] / both[1], both

    return jax.jit(jax.value_and_grad(value, (0, 1), has_aux=True))(*arrays[:2])


def by_statistics(inputs, sides, *, mask, temperature=1.0):
    """In float64, from the definitions."""
    with jax.enable_x64(True):
        wide = tuple(jnp.asarray(np.asarray(side), jnp.float64) for side in sides)

        def total(hidden, head):
            moved = inputs._replace(hidden=hidden, head=head)
            values = oracle.definitions(*oracle._logits(moved, temperature), jnp.asarray(inputs.targets))
            return jnp.sum(jnp.where(jnp.asarray(mask), clipped(values, *wide), 0.0)) / float(np.sum(mask))

        value, gradients = jax.value_and_grad(total, (0, 1))(*inputs.arrays(jnp.float64)[:2])
        return float(value), jax.tree.map(np.asarray, gradients)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("axis", [1, 0])
def test_value_and_gradient(implementation, axis):
    inputs, sides = case(axis=axis)
    mask = np.arange(21) % 3 != 1
    wanted, wanted_gradients = by_statistics(inputs, sides, mask=mask)
    (actual, (total, count)), gradients = by_loss(inputs, sides, mask=jnp.asarray(mask), implementation=implementation)
    assert float(count) == float(mask.sum())
    assert abs(float(total) / float(mask.sum()) - wanted) < 1e-5 * abs(wanted)
    assert abs(float(actual) - wanted) < 1e-5 * abs(wanted)
    for value, right in zip(gradients, wanted_gradients, strict=True):
        assert oracle.error(value, right) < 2e-5
        assert oracle.error(np.zeros_like(right), right) > 0.5
    np.testing.assert_array_equal(np.asarray(gradients[0])[~mask], 0)


@pytest.mark.parametrize("rows", [1, 4, 5, 21])
def test_tiles_of_rows(monkeypatch, rows):
    """Fewer rows than a tile, whole tiles, and a last tile that is filled up."""
    monkeypatch.setattr(xla_loss, "CPU_TILE_ROWS", 4)
    inputs, sides = case(rows=rows, vocabulary=70)
    mask = np.ones(rows, bool)
    wanted, wanted_gradients = by_statistics(inputs, sides, mask=mask)
    (actual, _), gradients = by_loss(inputs, sides, block=32)
    assert abs(float(actual) - wanted) < 1e-5 * abs(wanted)
    for value, right in zip(gradients, wanted_gradients, strict=True):
        assert oracle.error(value, right) < 2e-5


def test_without_gradient_the_value_is_the_same():
    inputs, sides = case()
    arrays = inputs.arrays()
    plain = token_loss(
        *arrays[:2], inputs.tokens, clipped, *sides, reference=oracle.reference(arrays), implementation="xla", block=64
    )
    (_, (total, count)), _ = by_loss(inputs, sides)
    np.testing.assert_allclose(plain, (total, count), rtol=1e-6)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_temperature(implementation):
    inputs, sides = case()
    wanted, wanted_gradients = by_statistics(inputs, sides, mask=np.ones(21, bool), temperature=0.7)
    (actual, _), gradients = by_loss(inputs, sides, implementation=implementation, temperature=0.7)
    assert abs(float(actual) - wanted) < 1e-5 * abs(wanted)
    for value, right in zip(gradients, wanted_gradients, strict=True):
        assert oracle.error(value, right) < 3e-5


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_masked_rows_may_hold_anything(implementation):
    """NaN and inf in hidden states, reference, side arrays and targets of masked rows leave no trace, nor do losses
    that are NaN there."""
    inputs, sides = case(rows=8, vocabulary=100)
    mask = jnp.asarray([True, False, True, True, False, True, False, True])
    clean = by_loss(inputs, sides, mask=mask, implementation=implementation)
    hidden, hidden_ref = inputs.hidden.copy(), inputs.hidden_ref.copy()
    hidden[1], hidden[4, 0], hidden_ref[1, 2], hidden_ref[6] = np.nan, np.inf, np.inf, np.nan
    targets = inputs.targets.copy()
    targets[4] = -1
    dirty_sides = tuple(side.at[jnp.array([1, 6])].set(jnp.nan) for side in sides)
    broken = inputs._replace(hidden=hidden, hidden_ref=hidden_ref, targets=targets)
    dirty = by_loss(broken, dirty_sides, mask=mask, implementation=implementation)
    for value, right in zip(jax.tree.leaves(dirty), jax.tree.leaves(clean), strict=True):
        assert jnp.isfinite(value).all()
        np.testing.assert_allclose(value, right, rtol=1e-6, atol=1e-7)


def test_an_unmasked_bad_row_is_not_hidden():
    inputs, sides = case(rows=4, vocabulary=60)
    hidden = inputs.hidden.copy()
    hidden[2] = np.nan
    (value, _), _ = by_loss(inputs._replace(hidden=hidden), sides, block=32)
    assert jnp.isnan(value)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_empty_mask_and_no_rows(implementation):
    inputs, sides = case(rows=5, vocabulary=60)
    arrays = inputs.arrays()

    def total(hidden, head, rows, mask):
        return token_loss(
            hidden,
            head,
            inputs.tokens[:rows],
            clipped,
            *(side[:rows] for side in sides),
            reference=Reference(arrays[2][:rows], arrays[3]),
            mask=mask,
            implementation=implementation,
            block=32,
        )

    nothing = jnp.zeros(5, bool)
    np.testing.assert_array_equal(total(*arrays[:2], 5, nothing), 0)
    for gradient in jax.grad(lambda *a: total(*a, 5, nothing)[0], (0, 1))(*arrays[:2]):
        np.testing.assert_array_equal(gradient, 0)
    empty = arrays[0][:0]
    np.testing.assert_array_equal(total(empty, arrays[1], 0, None), 0)
    d_hidden, d_head = jax.grad(lambda *a: total(*a, 0, None)[0], (0, 1))(empty, arrays[1])
    assert d_hidden.shape == (0, 12)
    np.testing.assert_array_equal(d_head, 0)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_side_arrays_are_constants(implementation):
    inputs, sides = case(rows=5, vocabulary=60)
    arrays = inputs.arrays()

    def total(*sides):
        return token_loss(
            *arrays[:2],
            inputs.tokens,
            clipped,
            *sides,
            reference=oracle.reference(arrays),
            implementation=implementation,
            block=32,
        )[0]

    for gradient in jax.grad(total, (0, 1))(*sides):
        np.testing.assert_array_equal(gradient, 0)


def test_side_arrays_of_any_type_and_rank():
    inputs, _ = case(rows=6, vocabulary=60)
    arrays = inputs.arrays()
    weights, chosen = jnp.arange(18.0).reshape(6, 3), jnp.array([0, 1, 2, 0, 1, 2])

    def loss(statistics, weights, chosen):
        return jnp.take_along_axis(weights, chosen[:, None], axis=1)[:, 0] * statistics.log_prob

    def total(implementation):
        return jax.value_and_grad(
            lambda hidden: token_loss(
                hidden, arrays[1], inputs.tokens, loss, weights, chosen, implementation=implementation, block=32
            )[0]
        )(arrays[0])

    for value, right in zip(total("xla"), total("reference"), strict=True):
        np.testing.assert_allclose(value, right, rtol=1e-4, atol=1e-4)


def test_loss_may_use_values_of_an_outer_jit():
    inputs, _ = case(rows=5, vocabulary=60)
    arrays = inputs.arrays()

    @jax.jit
    def total(hidden, coefficient):
        return jax.grad(
            lambda hidden: token_loss(
                hidden, arrays[1], inputs.tokens, lambda s: coefficient * s.entropy, implementation="xla", block=32
            )[0]
        )(hidden)

    np.testing.assert_allclose(total(arrays[0], 3.0), 3 * total(arrays[0], 1.0), rtol=1e-5, atol=1e-7)


def test_selected_statistics_only():
    inputs, (log_prob_old, _) = case(rows=5, vocabulary=60)
    arrays = inputs.arrays()
    seen = []

    def loss(statistics, log_prob_old):
        seen.append([name for name in statistics._fields if getattr(statistics, name) is not None])
        return jnp.exp(statistics.log_prob - log_prob_old)

    token_loss(
        *arrays[:2], inputs.tokens, loss, log_prob_old, reference=oracle.reference(arrays), statistics=("log_prob",)
    )
    assert seen
    assert all(names == ["log_prob"] for names in seen)


def test_micro_batches_add_up():
    inputs, sides = case(rows=10, vocabulary=60)
    arrays = inputs.arrays()

    def part(rows):
        return token_loss(
            arrays[0][rows],
            arrays[1],
            inputs.tokens[rows],
            clipped,
            *(side[rows] for side in sides),
            reference=Reference(arrays[2][rows], arrays[3]),
            block=32,
        )

    whole, first, second = part(slice(0, 10)), part(slice(0, 4)), part(slice(4, 10))
    np.testing.assert_allclose(whole, jax.tree.map(jnp.add, first, second), rtol=1e-5)


def test_equal_to_token_statistics_and_autodiff():
    inputs, sides = case()
    arrays = inputs.arrays()

    def total(hidden, head):
        values = token_statistics(
            hidden, head, inputs.tokens, reference=oracle.reference(arrays), implementation="xla", block=64
        )
        return jnp.sum(clipped(values, *sides)) / 21

    value, wanted = jax.jit(jax.value_and_grad(total, (0, 1)))(*arrays[:2])
    (actual, _), gradients = by_loss(inputs, sides)
    np.testing.assert_allclose(actual, value, rtol=1e-5)
    for one, other in zip(gradients, wanted, strict=True):
        assert oracle.error(one, other) < 1e-5


def test_errors_name_the_argument(own_messages):
    inputs, sides = case(rows=5, vocabulary=60)
    arrays = inputs.arrays()
    given = (*arrays[:2], inputs.tokens)
    with pytest.raises(ValueError, match=r"mask has shape \(4,\); it must be \[N\] = \(5,\)"):
        token_loss(*given, lambda s: s.entropy, mask=jnp.ones(4, bool))
    with pytest.raises(ValueError, match=r"side array 1 has shape \(4,\); its first axis must be N = 5"):
        token_loss(*given, lambda s, a, b: s.entropy, sides[0], sides[1][:4])
    with pytest.raises(ValueError, match=r"per_token_loss returned shape \(\); it must return one loss per row"):
        token_loss(*given, lambda s: jnp.sum(s.entropy))


@pytest.mark.parametrize("axis", [0, 1])
def test_bfloat16_runs_on_any_cpu(axis):
    """A product whose result is wanted transposed fails at run time on CPUs without bfloat16 instructions."""
    inputs = oracle.make_inputs(rows=24, width=32, vocabulary=96, axis=axis)
    low, targets = inputs.arrays(jnp.bfloat16), inputs.tokens

    def total(hidden, head):
        return token_loss(hidden, head, targets, lambda s: s.log_prob, vocabulary_axis=axis, statistics=("log_prob",))[
            0
        ]

    gradients = jax.jit(jax.grad(total, (0, 1)))(*low[:2])
    wanted = oracle.expected_gradient(inputs, {"log_prob": np.ones(24)})
    for value, right in zip(gradients, wanted, strict=True):
        assert oracle.error(value.astype(jnp.float32), right) < 2e-2
