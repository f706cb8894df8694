"""group_rows, gather_rows and combine_rows against float64 sums over tokens and their experts."""

from functools import partial

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest

from jaxrl_kernels import combine_rows
from jaxrl_kernels import gather_rows
from jaxrl_kernels import group_rows
from jaxrl_kernels import grouped_matmul
from tests.kernels.head_oracle import error

TOKENS, CHOSEN, EXPERTS, WIDTH = 13, 3, 6, 5


@pytest.fixture
def ids():
    """Experts of each token; nobody has chosen expert 2, and the last token is nobody's."""
    rng = np.random.default_rng(0)
    chosen = np.stack([rng.permutation([0, 1, 3, 4, 5])[:CHOSEN] for _ in range(TOKENS)])
    chosen[-1] = EXPERTS
    return chosen.astype(np.int32)


def test_rows_are_sorted_by_expert_and_by_token_within(ids):
    order, places, sizes = (np.asarray(x) for x in group_rows(jnp.asarray(ids), EXPERTS))
    np.testing.assert_array_equal(order, sorted(range(ids.size), key=lambda pair: (ids.flat[pair], pair)))
    np.testing.assert_array_equal(order[places].reshape(-1), np.arange(ids.size))
    np.testing.assert_array_equal(sizes, [(ids == expert).sum() for expert in range(EXPERTS)])
    assert sizes[2] == 0
    assert sizes.sum() == ids.size - CHOSEN


def layer(x, matrices, weights, ids):
    groups = group_rows(ids, EXPERTS)
    return combine_rows(grouped_matmul(gather_rows(x, groups), matrices, groups.group_sizes), groups, weights)


def plain(x, matrices, weights, ids):
    """sum_j weight_tj x_t w_{e(t, j)}; nothing from ids that are nobody's."""
    y = jnp.einsum("td,tjdf->tjf", x, matrices[jnp.minimum(ids, EXPERTS - 1)], precision="highest")
    return jnp.sum(jnp.where(ids < EXPERTS, weights, 0.0)[:, :, None] * y, axis=1)


def test_a_layer_of_experts_and_its_gradients(ids):
    rng = np.random.default_rng(1)
    shapes = ((TOKENS, WIDTH), (EXPERTS, WIDTH, 4), (TOKENS, CHOSEN), (TOKENS, 4))
    x, matrices, weights, dy = (jnp.asarray(rng.standard_normal(shape), jnp.float32) for shape in shapes)

    @partial(jax.jit, static_argnums=0)
    def both(function, x, matrices, weights, dy):
        out, pull = jax.vjp(lambda *a: function(*a, jnp.asarray(ids)), x, matrices, weights)
        return out, pull(dy)

    found, gradients = both(layer, x, matrices, weights, dy)
    wanted, right_gradients = both(plain, x, matrices, weights, dy)
    assert error(found, wanted) < 1e-6
    for one, right in zip(gradients, right_gradients, strict=True):
        assert error(one, right) < 1e-6
        assert error(0 * right, right) == 1
    # Weights that go to another expert of the token would be found out.
    assert error(both(layer, x, matrices, weights[:, ::-1], dy)[0], wanted) > 0.1


def test_gradients_scatter_nothing(ids):
    groups = group_rows(jnp.asarray(ids), EXPERTS)
    x, y, weights = (jnp.ones(shape) for shape in ((TOKENS, WIDTH), (ids.size, WIDTH), ids.shape))
    text = jax.jit(jax.grad(lambda x: jnp.sum(gather_rows(x, groups) ** 2))).lower(x).as_text()
    text += (
        jax.jit(jax.grad(lambda *a: jnp.sum(combine_rows(a[0], groups, a[1]) ** 2), (0, 1))).lower(y, weights).as_text()
    )
    assert "gather" in text
    assert "scatter" not in text


def test_sums_of_bfloat16_are_kept_in_float32():
    """256 + 1 + 1 is 258; bfloat16 would lose each 1."""
    groups = group_rows(jnp.zeros((1, 3), jnp.int32), 1)
    y = jnp.array([[256.0], [1.0], [1.0]], jnp.bfloat16)
    found = combine_rows(y, groups, jnp.ones((1, 3)))
    assert found.dtype == jnp.bfloat16
    assert found.item() == 258.0
    (gradient,) = jax.vjp(lambda x: gather_rows(x, groups), jnp.ones((1, 1), jnp.bfloat16))[1](y)
    assert gradient.item() == 258.0


@pytest.fixture
def own_messages():
    """The shape hook of the tests would speak before the function does; users have no hook."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


IDS = np.zeros((4, 2), np.int32)
ERRORS = [
    (lambda _: group_rows(jnp.asarray(IDS[0]), 3), ValueError, r"group_rows: expert_ids has shape \(2,\)"),
    (lambda _: group_rows(jnp.asarray(IDS, jnp.float32), 3), TypeError, "group_rows: expert_ids must be integers"),
    (lambda _: group_rows(jnp.asarray(IDS), 0), ValueError, "group_rows: experts is 0; it must be 1 or more"),
    (lambda g: gather_rows(jnp.zeros((5, 2)), g), ValueError, r"gather_rows: x has shape \(5, 2\); .* T = 4"),
    (lambda g: combine_rows(jnp.zeros((4, 2)), g, jnp.zeros((4, 2))), ValueError, r"y has shape \(4, 2\); .* = 8"),
    (lambda g: combine_rows(jnp.zeros((8, 2)), g, jnp.zeros((4, 3))), ValueError, r"weights has shape \(4, 3\)"),
]


@pytest.mark.parametrize(("call", "kind", "message"), ERRORS)
def test_errors_name_the_argument(own_messages, call, kind, message):
    with pytest.raises(kind, match=message):
        call(group_rows(jnp.asarray(IDS), 3))
