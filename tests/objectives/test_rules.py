"""The tables of the policy loss: their names are choices, each row needs what it says, and what the rows compute."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_llm.objectives import RECIPES
from jaxrl_llm.objectives import Recipe
from jaxrl_llm.objectives import loss_needs
from jaxrl_llm.objectives import policy_loss
from jaxrl_llm.objectives import policy_weights
from jaxrl_llm.objectives import recipe_fields
from jaxrl_llm.objectives import rules
from jaxrl_llm.objectives import token_losses
from tests.objectives.test_policy_loss import ALL
from tests.objectives.test_policy_loss import make_batch

PLAIN = dataclasses.replace(RECIPES["grpo"], name="plain", kl_estimator="none", kl_coefficient=0.0)
OPTIONAL = ("log_prob_old", "log_prob_behaviour", "log_prob_ref", "kl_t", "kl_ref_t", "entropy", "target_kept")
CASES = {
    **ALL,
    **{name: dataclasses.replace(PLAIN, name=name, surrogate=name) for name in rules.SURROGATES},
    **{name: dataclasses.replace(PLAIN, name=name, mask=name) for name in rules.MASKS},
    **{name: dataclasses.replace(PLAIN, name=name, correction=name) for name in rules.CORRECTIONS},
    "no weight": dataclasses.replace(RECIPES["grpo"], name="no weight", kl_coefficient=0.0),
}


@pytest.mark.parametrize("name", CASES)
def test_a_recipe_needs_exactly_what_it_says(name):
    batch, needs = make_batch(), loss_needs(CASES[name])
    assert set(needs) <= set(OPTIONAL)
    least = {key: x for key, x in batch.items() if key not in OPTIONAL or key in needs}
    total, count = policy_loss(CASES[name], **least).loss
    whole, _ = policy_loss(CASES[name], **batch).loss
    assert count > 0
    np.testing.assert_allclose(total, whole, rtol=1e-6)
    for missing in needs:
        with pytest.raises(ValueError, match=f"{missing} is None; recipe '{name}' needs it"):
            policy_loss(CASES[name], **{key: x for key, x in least.items() if key != missing})


def weights_by_hand(horizon, columns, slope):
    return [min(1.0, max(0.0, (horizon - t) * slope)) for t in range(1, columns + 1)]


def test_weights_of_a_fixed_horizon():
    for horizon, columns, slope in ((7, 7, 0.3), (20, 5, 0.1), (3, 6, 1.0)):
        weights = rules.horizon_weights(horizon, columns, slope=slope)
        np.testing.assert_allclose(weights, weights_by_hand(horizon, columns, slope), rtol=1e-6, atol=1e-7)
    # The last token of the horizon weighs nothing, and an earlier one never less than a later one.
    assert rules.horizon_weights(7, 7, slope=0.3)[-1] == 0


def test_masks_by_the_deviation_of_the_ratio():
    batch = make_batch()
    mask = np.asarray(batch["response_mask"])
    ratio = np.exp(np.asarray(batch["log_prob"] - batch["log_prob_behaviour"], np.float64))
    deviations, weighted = [], []
    for row, real in zip(ratio, mask, strict=True):
        own = np.abs(row[real] - 1)
        w = np.array(weights_by_hand(9, len(own), 0.15))
        deviations.append(own.mean())
        weighted.append((own * w).sum() / w.sum())

    def accepted(name, threshold, arrays=batch):
        recipe = dataclasses.replace(PLAIN, mask=name, mask_average=threshold, mask_horizon=9, mask_slope=0.15)
        keys = ("log_prob", "response_mask", "log_prob_behaviour")
        return np.asarray(policy_weights(recipe, **{key: arrays[key] for key in keys})[1])

    for name, expected in (("ratio_deviation", deviations), ("weighted_ratio_deviation", weighted)):
        threshold = float(np.median(expected))
        verdict = accepted(name, threshold)
        np.testing.assert_array_equal(verdict, np.array(expected) <= threshold)
        assert 0 < verdict.sum() < len(verdict)
        # What matters is the position in the response, not the column: shifted rows, and holes, change nothing.
        shifted = jax.tree.map(lambda x: jnp.pad(x, ((0, 0), (2, 1))) if x.ndim == 2 else x, batch)
        np.testing.assert_array_equal(accepted(name, threshold, shifted), verdict)
        apart = jax.tree.map(lambda x: jnp.insert(x, 1, 0, axis=1) if x.ndim == 2 else x, batch)
        np.testing.assert_array_equal(accepted(name, threshold, apart), verdict)
    # Without a horizon it is the columns of the batch.
    columns = dataclasses.replace(PLAIN, mask="weighted_ratio_deviation", mask_average=0.2, mask_slope=0.15)
    given = dataclasses.replace(columns, mask_horizon=mask.shape[1])
    one, other = (
        policy_weights(r, **{k: batch[k] for k in ("log_prob", "response_mask", "log_prob_behaviour")})
        for r in (columns, given)
    )
    np.testing.assert_array_equal(one[1], other[1])


def test_a_divergence_mask_drops_what_is_far_and_moves_outwards():
    batch = make_batch()
    recipe = dataclasses.replace(
        PLAIN, surrogate="divergence_masked", divergence_threshold=0.03, aggregation="token-mean"
    )
    d = {key: np.asarray(x, np.float64) for key, x in batch.items()}
    mask, total, dropped = np.asarray(batch["response_mask"]), 0.0, 0
    for i, t in zip(*np.nonzero(mask), strict=True):
        ratio, a = np.exp(d["log_prob"][i, t] - d["log_prob_old"][i, t]), d["advantages"][i]
        out = d["kl_t"][i, t] > 0.03 and (ratio - 1) * a > 0
        dropped += out
        total += 0.0 if out else -ratio * a
    terms = policy_loss(recipe, **batch)
    assert 0 < dropped < mask.sum()
    np.testing.assert_allclose(terms.loss, (total, mask.sum()), rtol=1e-5)
    np.testing.assert_allclose(terms.metrics["clip_fraction"], (dropped, mask.sum()))


@pytest.mark.parametrize("name", rules.SURROGATES)
def test_surrogates_are_positively_homogeneous_in_the_advantage(name):
    """weight * surrogate(A) = surrogate(weight A) for weight >= 0: what lets a weight be multiplied into advantages."""
    batch, recipe = make_batch(), CASES[name]

    def losses(log_prob, advantages):
        return token_losses(
            recipe,
            log_prob=log_prob,
            advantages=advantages,
            log_ratio=log_prob - batch["log_prob_old"],
            kl_t=batch["kl_t"],
        )

    spread = jnp.broadcast_to(batch["advantages"][:, None], batch["log_prob"].shape)
    for weight in (0.0, 0.25, 3.0):
        value, pull = jax.vjp(lambda x: losses(x, spread), batch["log_prob"])
        scaled, scaled_pull = jax.vjp(lambda x, w=weight: losses(x, w * spread), batch["log_prob"])
        np.testing.assert_allclose(scaled, weight * value, rtol=1e-5, atol=1e-7)
        ones = jnp.ones_like(value)
        np.testing.assert_allclose(scaled_pull(ones)[0], weight * pull(ones)[0], rtol=1e-5, atol=1e-7)
    # A negative weight is another loss for every surrogate that treats gains and losses differently.
    if name not in ("score_function", "importance_weighted", "clipped_weight"):
        assert np.abs(losses(batch["log_prob"], -spread) + losses(batch["log_prob"], spread)).max() > 0.01


def test_every_number_has_a_range_and_every_name_a_table(without_type_hook):
    numbers = {
        field.name
        for field in dataclasses.fields(Recipe)
        if isinstance(field.default, float) or field.name in ("length_normaliser", "log_min_p", "mask_horizon")
    }
    assert numbers == set(recipe_fields.RANGES)
    for field, range_ in recipe_fields.RANGES.items():
        for wrong in (math.nan, math.inf, -math.inf, "0.5", True, *([] if range_.optional else [None])):
            with pytest.raises(
                ValueError, match=f"{field} of recipe 'plain' is .*; it must be a (finite|whole) number"
            ):
                dataclasses.replace(PLAIN, **{field: wrong})
        if range_.low > -math.inf:
            with pytest.raises(ValueError, match=rf"{field} .*; it must be .* (above|of at least) {range_.low:g}"):
                dataclasses.replace(PLAIN, **{field: range_.low - 1})
        if range_.high < math.inf:
            with pytest.raises(ValueError, match=rf"{field} .*; it must be .* at most {range_.high:g}"):
                dataclasses.replace(PLAIN, **{field: range_.high + 1})
    with pytest.raises(ValueError, match=r"mask_horizon of recipe 'plain' is 2\.5; it must be a whole number"):
        dataclasses.replace(PLAIN, mask_horizon=2.5)
    with pytest.raises(ValueError, match=r"correction_low of recipe 'plain' is 3.0, above its correction_high 2.0"):
        dataclasses.replace(PLAIN, correction_low=3.0)
    with pytest.raises(ValueError, match="divergence of recipe 'plain' is 'KL'; it must be one of kl"):
        dataclasses.replace(PLAIN, divergence="KL")
