"""What holds for every recipe: invariances, composition, metrics, and what a user sees after a mistake."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_llm.objectives import RECIPES
from jaxrl_llm.objectives import Recipe
from jaxrl_llm.objectives import get_recipe
from jaxrl_llm.objectives import policy_loss
from jaxrl_llm.objectives import policy_weights
from jaxrl_llm.objectives import sequence_advantages
from jaxrl_llm.objectives import token_losses
from jaxrl_llm.objectives.aggregation import token_weights

B, T = 6, 5
EVERY = sorted(RECIPES)
EXTRA = {
    "everything": dataclasses.replace(
        RECIPES["grpo"],
        name="everything",
        correction="token_truncated",
        correction_high=1.2,
        mask="sampled_both",
        mask_maximum=0.2,
        mask_average=0.05,
        kl_estimator="exact",
        entropy_coefficient=0.01,
        aggregation="token-mean",
    ),
    "accepted": dataclasses.replace(RECIPES["trm_max"], name="accepted", normalise_by="accepted"),
}
ALL = {**RECIPES, **EXTRA}


def make_batch(seed=0):
    keys = jax.random.split(jax.random.key(seed), 7)
    lengths = jnp.array([5, 1, 3, 4, 2, 5])
    old = -jax.random.exponential(keys[0], (B, T))
    return {
        "response_mask": jnp.arange(T)[None, :] < lengths[:, None],
        "log_prob": old + 0.3 * jax.random.normal(keys[1], (B, T)),
        "log_prob_old": old,
        "log_prob_behaviour": old + 0.2 * jax.random.normal(keys[2], (B, T)),
        "log_prob_ref": old + 0.5 * jax.random.normal(keys[3], (B, T)),
        "kl_t": jnp.array([2.0, 0.01, 0.02, 1.0, 0.01, 2.0])[:, None] * 0.06 * jax.random.uniform(keys[4], (B, T)),
        "kl_ref_t": jax.random.uniform(keys[5], (B, T)),
        "entropy": jax.random.uniform(keys[6], (B, T)),
        "advantages": jnp.array([1.0, -0.5, 0.3, -1.2, 0.8, -0.4]),
        "target_kept": jnp.ones((B, T), bool).at[0, 1].set(False).at[3, 0].set(False),
    }


def value(recipe, batch):
    total, count = policy_loss(recipe, **batch).loss
    return total / count


def loss_and_gradient(recipe, batch):
    return jax.value_and_grad(lambda x: value(recipe, {**batch, "log_prob": x}))(batch["log_prob"])


@pytest.mark.parametrize("name", ALL)
def test_padding_permutation_and_left_shift(name):
    batch = make_batch()
    base, gradient = loss_and_gradient(ALL[name], batch)
    order = jnp.array([3, 0, 5, 1, 4, 2])
    moved, moved_gradient = loss_and_gradient(ALL[name], jax.tree.map(lambda x: x[order], batch))
    np.testing.assert_allclose(moved, base, rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(moved_gradient, gradient[order], rtol=1e-4, atol=1e-7)

    def pad(x):
        if x.ndim == 1:
            return jnp.concatenate([x, jnp.ones(1, x.dtype)])
        fill = False if x.dtype == bool else 7.0
        return jnp.pad(x, ((0, 1), (2, 3)), constant_values=fill)

    padded, padded_gradient = loss_and_gradient(ALL[name], jax.tree.map(pad, batch))
    np.testing.assert_allclose(padded, base, rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(padded_gradient[:B, 2 : 2 + T], gradient, rtol=1e-4, atol=1e-7)
    assert np.abs(gradient).max() > 0


@pytest.mark.parametrize("name", ALL)
def test_micro_batches_equal_the_batch(name):
    batch = make_batch()
    whole = policy_loss(ALL[name], **batch)
    parts = [policy_loss(ALL[name], **jax.tree.map(lambda x, r=r: x[r], batch)) for r in (slice(0, 2), slice(2, 6))]
    added = jax.tree.map(lambda a, b: a + b, *parts)
    for one, other in zip(jax.tree.leaves(added), jax.tree.leaves(whole), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ALL)
def test_on_policy_gradient_is_that_of_the_score_function(name):
    # Where all policies are one, every ratio is 1 and every recipe pulls in the same direction, up to its weights.
    recipe = dataclasses.replace(ALL[name], kl_estimator="none", entropy_coefficient=0.0)
    batch = make_batch()
    same = dict.fromkeys(("log_prob_old", "log_prob_behaviour", "log_prob_ref"), batch["log_prob"])
    batch = {**batch, **same, "kl_t": jnp.zeros((B, T)), "target_kept": jnp.ones((B, T), bool)}
    _, gradient = loss_and_gradient(recipe, batch)
    weights, count = token_weights(batch["response_mask"], mode=recipe.aggregation)
    np.testing.assert_allclose(gradient, -weights * batch["advantages"][:, None] / count, rtol=1e-5, atol=1e-8)
    metrics = policy_loss(recipe, **batch).metrics
    np.testing.assert_allclose(metrics["ratio"][0], metrics["ratio"][1])
    for name in ("clip_fraction", "rejected_sequences", "rejected_tokens", "weight_zero", "kl_old_k3"):
        assert float(metrics.get(name, (0.0, 0.0))[0]) == 0


def test_gspo_equals_grpo_at_length_one():
    batch = make_batch()
    batch["response_mask"] = batch["response_mask"] & (jnp.arange(T)[None, :] == 0)
    grpo = dataclasses.replace(RECIPES["grpo"], kl_estimator="none")
    gspo = dataclasses.replace(RECIPES["gspo"], clip_low=grpo.clip_low, clip_high=grpo.clip_high)
    one, other = loss_and_gradient(grpo, batch), loss_and_gradient(gspo, batch)
    np.testing.assert_allclose(one[0], other[0], rtol=1e-6)
    np.testing.assert_allclose(one[1], other[1], rtol=1e-5)


@pytest.mark.parametrize("name", [n for n in ALL if ALL[n].ratio == "token"])
def test_token_by_token_route_gives_the_same_loss_and_gradient(name):
    """The route of the fused kernels: constants from a first pass, then one loss per token, weighted and summed."""
    recipe, batch = ALL[name], make_batch()
    mask = batch["response_mask"]
    keys = ("log_prob", "log_prob_old", "log_prob_behaviour", "kl_t", "target_kept")
    constants, accepted = policy_weights(recipe, response_mask=mask, **{k: batch[k] for k in keys})
    kept = mask & accepted[:, None] if recipe.normalise_by == "accepted" else mask
    weights, count = token_weights(kept, mode=recipe.aggregation)
    below = batch[f"log_prob_{recipe.denominator}"]

    def loss(log_prob):
        flat = {
            "log_prob": log_prob,
            "advantages": jnp.broadcast_to(batch["advantages"][:, None], (B, T)),
            "log_ratio": log_prob - below,
            "weights": constants,
            "log_ratio_ref": log_prob - batch["log_prob_ref"],
            "kl_ref_t": batch["kl_ref_t"],
            "entropy": batch["entropy"],
        }
        each = token_losses(recipe, **jax.tree.map(lambda x: x.reshape(-1), flat))
        return jnp.sum(each * weights.reshape(-1)) / count

    one, other = jax.value_and_grad(loss)(batch["log_prob"]), loss_and_gradient(recipe, batch)
    np.testing.assert_allclose(one[0], other[0], rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(one[1], other[1], rtol=1e-4, atol=1e-7)


def test_everything_at_once_against_numpy():
    batch = make_batch()
    d = {k: np.asarray(v, np.float64) for k, v in batch.items()}
    mask, total = np.asarray(batch["response_mask"]), 0.0
    verdicts = []
    for i in range(B):
        s = np.flatnonzero(mask[i])
        log_ratio = (d["log_prob"] - d["log_prob_behaviour"])[i, s]
        keep = (log_ratio**2 / 2).max() <= 0.2 and (np.exp(log_ratio) - 1 - log_ratio).mean() <= 0.05
        verdicts.append(keep)
        for t in s:
            r, a = np.exp(d["log_prob"][i, t] - d["log_prob_old"][i, t]), d["advantages"][i]
            w = min(np.exp(d["log_prob_old"][i, t] - d["log_prob_behaviour"][i, t]), 1.2) * keep
            total += -w * min(r * a, np.clip(r, 0.8, 1.2) * a) + 0.04 * d["kl_ref_t"][i, t] - 0.01 * d["entropy"][i, t]
    assert 0 < sum(verdicts) < B
    np.testing.assert_allclose(value(ALL["everything"], batch), total / mask.sum(), rtol=1e-5)


def test_metrics_say_what_they_are():
    batch = make_batch()
    metrics = policy_loss(ALL["everything"], **batch).metrics
    mask = np.asarray(batch["response_mask"])
    ratio = np.exp(np.asarray(batch["log_prob"] - batch["log_prob_old"]))[mask]
    a = np.broadcast_to(np.asarray(batch["advantages"])[:, None], (B, T))[mask]
    np.testing.assert_allclose(metrics["ratio"], (ratio.sum(), mask.sum()), rtol=1e-5)
    binds = ((a > 0) & (ratio > 1.2)) | ((a < 0) & (ratio < 0.8))
    assert 0 < binds.sum() < mask.sum()
    np.testing.assert_allclose(metrics["clip_fraction"], (binds.sum(), mask.sum()))
    log_ratio = np.asarray(batch["log_prob"] - batch["log_prob_behaviour"])[mask]
    np.testing.assert_allclose(metrics["kl_behaviour_k3"][0], (np.expm1(log_ratio) - log_ratio).sum(), rtol=1e-4)
    for name, key in (("kl_behaviour", "kl_t"), ("kl_ref", "kl_ref_t"), ("entropy", "entropy")):
        np.testing.assert_allclose(metrics[name], (np.asarray(batch[key])[mask].sum(), mask.sum()), rtol=1e-5)
    # Nothing of a metric reaches the gradient.
    slope = jax.grad(
        lambda x: sum(m[0] for m in policy_loss(ALL["everything"], **{**batch, "log_prob": x}).metrics.values())
    )(batch["log_prob"])
    np.testing.assert_array_equal(slope, np.zeros((B, T)))


def test_a_token_outside_the_safe_set_takes_its_sequence_with_it_only_under_a_sequence_weight():
    batch = make_batch()
    outside = jnp.where(batch["target_kept"], batch["log_prob"], -jnp.inf)
    for correction, rows in (("token_truncated", 0), ("sequence_truncated", 2)):
        recipe = dataclasses.replace(RECIPES["dvp"], correction=correction)
        _, gradient = loss_and_gradient(recipe, {**batch, "log_prob": outside})
        assert np.all(np.isfinite(gradient))
        np.testing.assert_array_equal(np.asarray(gradient)[~np.asarray(batch["target_kept"])], [0.0, 0.0])
        assert (np.abs(gradient).sum(1) == 0).sum() == rows


def test_a_nan_divergence_rejects_its_sequence_only():
    batch = make_batch()
    batch["kl_t"] = jnp.zeros((B, T)).at[2, 1].set(jnp.nan)
    terms = policy_loss(RECIPES["trm_max"], **batch)
    np.testing.assert_array_equal(terms.metrics["rejected_sequences"], (1.0, 6.0))
    assert np.isfinite(terms.loss[0])


def test_works_under_vmap_and_in_float16_inputs():
    stacked = jax.tree.map(lambda *x: jnp.stack(x), make_batch(0), make_batch(1))
    together = jax.vmap(lambda b: value(RECIPES["trm"], b))(stacked)
    np.testing.assert_allclose(together, [value(RECIPES["trm"], make_batch(s)) for s in (0, 1)], rtol=1e-5)
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16) if x.dtype == jnp.float32 else x, make_batch())
    assert np.isfinite(value(RECIPES["dapo"], half))


def test_advantages_per_token():
    batch = make_batch()
    spread = jnp.broadcast_to(batch["advantages"][:, None], (B, T))
    np.testing.assert_allclose(value(RECIPES["dapo"], {**batch, "advantages": spread}), value(RECIPES["dapo"], batch))


@pytest.mark.parametrize("platform", ["tpu", "cuda"])
def test_lowers_for_accelerators(platform):
    traced = jax.jit(lambda b: policy_loss(ALL["everything"], **b)).trace(make_batch())
    assert traced.lower(lowering_platforms=(platform,)).as_text()


def test_a_mistake_is_answered_in_a_sentence(without_type_hook):
    batch = make_batch()
    missing = {k: v for k, v in batch.items() if k != "kl_t"}
    with pytest.raises(ValueError, match="kl_t is None; recipe 'trm_max' needs it for its mask"):
        policy_loss(RECIPES["trm_max"], **missing)
    missing = {k: v for k, v in batch.items() if k != "log_prob_old"}
    with pytest.raises(ValueError, match="log_prob_old is None; recipe 'dapo' needs it for its surrogate"):
        policy_loss(RECIPES["dapo"], **missing)
    missing = {k: v for k, v in batch.items() if k != "log_prob_ref"}
    with pytest.raises(ValueError, match="log_prob_ref is None; recipe 'grpo' needs it for its kl_estimator"):
        policy_loss(RECIPES["grpo"], **missing)
    missing = {k: v for k, v in batch.items() if k != "target_kept"}
    with pytest.raises(ValueError, match="target_kept is None; recipe 'dvp' needs it for its log_min_p"):
        policy_loss(RECIPES["dvp"], **missing)
    with pytest.raises(ValueError, match="advantages has 3 sequences and response_mask 6"):
        policy_loss(RECIPES["dapo"], **{**batch, "advantages": jnp.ones(3)})
    with pytest.raises(ValueError, match=r"log_prob_old is float32\[6\]; it must have 2 axes"):
        policy_loss(RECIPES["dapo"], **{**batch, "log_prob_old": jnp.ones(6)})
    with pytest.raises(ValueError, match=r"recipe is 'gropo'; it must be one of .* Did you mean 'grpo'"):
        get_recipe("gropo")
    with pytest.raises(ValueError, match=r"surrogate of recipe 'mine' is 'clip'; .* Did you mean 'clipped'"):
        Recipe(name="mine", source="", advantage="given", surrogate="clip", aggregation="token-mean")
    given = dataclasses.replace(RECIPES["ppo"], name="mine", advantage="given")
    with pytest.raises(ValueError, match="recipe 'mine' takes advantages as given"):
        sequence_advantages(given, jnp.ones(2), jnp.ones(2, int))
    with pytest.raises(ValueError, match="values of the signal's inputs is None; recipe 'ppo' needs it"):
        sequence_advantages(RECIPES["ppo"], jnp.ones(2), jnp.ones(2, int))
