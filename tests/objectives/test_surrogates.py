import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_llm.objectives import surrogates

RATIO = jnp.array([0.5, 0.79, 0.81, 1.0, 1.19, 1.21, 1.27, 1.29, 5.0])


def grid(sign):
    return jnp.full(RATIO.shape, sign * 2.0)


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("sides", [(0.2, 0.2), (0.2, 0.28)])
def test_clip_by_the_four_cases(sign, sides):
    low, high = sides
    losses, slopes = jax.vmap(
        jax.value_and_grad(lambda r, a: surrogates.clipped(r, a, clip_low=low, clip_high=high)),
    )(RATIO, grid(sign))
    r = np.asarray(RATIO)
    held = np.minimum(r, 1 + high) if sign > 0 else np.maximum(r, 1 - low)
    np.testing.assert_allclose(losses, -sign * 2 * held, rtol=1e-6)
    binds = r > 1 + high if sign > 0 else r < 1 - low
    np.testing.assert_allclose(slopes, np.where(binds, 0.0, -sign * 2.0))
    reported = surrogates.clip_binds(RATIO, grid(sign), clip_low=low, clip_high=high)
    np.testing.assert_array_equal(reported, binds)


def test_dual_clip_bounds_the_loss_for_negative_advantages_only():
    losses = surrogates.dual_clipped(RATIO, grid(-1), dual_clip=3.0)
    np.testing.assert_allclose(losses, np.minimum(2 * np.maximum(np.asarray(RATIO), 0.8), 6.0), rtol=1e-6)
    np.testing.assert_allclose(
        surrogates.dual_clipped(RATIO, grid(1), dual_clip=3.0), surrogates.clipped(RATIO, grid(1))
    )
    slope = jax.grad(lambda r: surrogates.dual_clipped(r, jnp.array(-2.0), dual_clip=3.0))(jnp.array(5.0))
    assert slope == 0
    assert jax.grad(lambda r: surrogates.clipped(r, jnp.array(-2.0)))(jnp.array(5.0)) == 2.0


def test_score_function_and_importance_weighting_agree_on_policy():
    log_prob, a = jnp.array([-0.3, -2.0]), jnp.array([1.5, -0.5])
    score = jax.grad(lambda x: surrogates.score_function(x, a).sum())(log_prob)
    weighted = jax.grad(lambda x: surrogates.importance_weighted(jnp.exp(x - log_prob), a).sum())(log_prob)
    np.testing.assert_allclose(score, -a)
    np.testing.assert_allclose(weighted, -a)


def test_clipped_weight_never_loses_a_gradient():
    log_prob, a = jnp.log(RATIO) - 1.0, grid(1)
    slopes = jax.grad(lambda x: surrogates.clipped_weight(x, jnp.exp(x + 1.0), a, clip_high=1.0).sum())(log_prob)
    np.testing.assert_allclose(slopes, -2 * np.minimum(np.asarray(RATIO), 2.0), rtol=1e-5)


def test_divergence_mask_drops_only_what_moves_outwards():
    ratio = jnp.array([1.1, 1.1, 0.9, 0.9, 1.1, 0.9])
    a = jnp.array([1.0, -1.0, 1.0, -1.0, 1.0, -1.0])
    far = jnp.array([0.3, 0.3, 0.3, 0.3, 0.1, jnp.nan])
    losses, slopes = jax.vmap(jax.value_and_grad(lambda r, a, d: surrogates.divergence_masked(r, a, d, threshold=0.2)))(
        ratio, a, far
    )
    kept = np.array([0, 1, 1, 0, 1, 0])  # NaN counts as far
    np.testing.assert_allclose(losses, -kept * np.asarray(a) * np.asarray(ratio), rtol=1e-6)
    np.testing.assert_allclose(slopes, -kept * np.asarray(a))


@pytest.mark.parametrize(
    "loss",
    [
        lambda r, a: surrogates.score_function(jnp.log(r), a),
        surrogates.importance_weighted,
        surrogates.clipped,
        surrogates.dual_clipped,
        lambda r, a: surrogates.clipped_weight(jnp.log(r), r, a),
        lambda r, a: surrogates.divergence_masked(r, a, r, threshold=1.0),
    ],
)
def test_advantages_are_constants(loss):
    slope = jax.grad(lambda a: loss(RATIO, a).sum())(grid(1))
    np.testing.assert_array_equal(slope, np.zeros(RATIO.shape))


def test_bad_input_is_a_sentence(without_type_hook):
    with pytest.raises(ValueError, match=r"advantages is float32\[2\] and ratio is float32\[9\]"):
        surrogates.clipped(RATIO, jnp.ones(2))
