"""What stands at masked places cannot matter: for every argument of every recipe, and of every masked function."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_llm import bounds
from jaxrl_llm.bounds import pruning as pruning_bounds
from jaxrl_llm.objectives import RECIPES
from jaxrl_llm.objectives import advantages
from jaxrl_llm.objectives import aggregation
from jaxrl_llm.objectives import corrections
from jaxrl_llm.objectives import divergence_augmented
from jaxrl_llm.objectives import hybrid
from jaxrl_llm.objectives import masks
from jaxrl_llm.objectives import policy_loss
from jaxrl_llm.objectives import pruning
from jaxrl_llm.objectives import ratios
from jaxrl_llm.objectives import token_baseline

B, T = 5, 4
MASK = np.array([[1, 1, 1, 0], [0, 1, 0, 1], [1, 0, 0, 0], [0, 0, 0, 0], [1, 1, 1, 1]], bool)
"""Right padding, gaps, a row that is all padding, and one without any."""

JUNK = (np.nan, np.inf, -np.inf, 1e30, -1e30)
FLOATS = (
    "log_prob",
    "log_prob_old",
    "log_prob_behaviour",
    "log_prob_ref",
    "kl_t",
    "kl_ref_t",
    "entropy",
    "advantages",
)
EXTRA = {
    "everything": dataclasses.replace(
        RECIPES["grpo"],
        name="everything",
        correction="sequence_masked",
        mask="sampled_both",
        mask_maximum=0.5,
        mask_average=0.2,
        kl_estimator="exact",
        entropy_coefficient=0.01,
        normalise_by="accepted",
    ),
    "token_sum": dataclasses.replace(RECIPES["ppo"], name="token_sum", aggregation="token-sum"),
    "dual": dataclasses.replace(
        RECIPES["ppo"], name="dual", surrogate="dual_clipped", entropy_coefficient=0.1, correction="geometric_masked"
    ),
}
ALL = {**RECIPES, **EXTRA}


def batch(token_advantages=True):
    rng = np.random.default_rng(0)
    old = -rng.exponential(size=(B, T)) - 0.1
    made = {name: old + 0.1 * rng.normal(size=(B, T)) for name in FLOATS[:4]}
    made |= {name: 0.001 * rng.exponential(size=(B, T)) for name in FLOATS[4:7]}
    made["advantages"] = rng.normal(size=(B, T) if token_advantages else B)
    return {name: jnp.asarray(np.where(MASK if x.ndim == 2 else MASK.any(axis=1), x, 0.0), jnp.float32)
            for name, x in made.items()}  # fmt: skip


def with_junk(clean):
    """Stacked on a new first axis: the clean batch, and one for each argument and each kind of junk."""
    cases, names = [clean], ["clean"]
    for name, x in clean.items():
        outside = jnp.asarray(~MASK if x.ndim == 2 else ~MASK.any(axis=1))
        for junk in JUNK:
            cases.append({**clean, name: jnp.where(outside, jnp.float32(junk), x)})
            names.append(f"{name} = {junk}")
    return jax.tree.map(lambda *x: jnp.stack(x), *cases), names


@pytest.mark.parametrize("recipe", ALL.values(), ids=ALL)
def test_masked_places_of_every_argument_are_zero_whatever_stands_there(recipe):
    for token_advantages in (True, False) if recipe.name in ("rloo", "gspo") else (True,):
        stacked, names = with_junk(batch(token_advantages))
        kept = jnp.asarray(np.arange(B * T).reshape(B, T) % 7 != 0)

        def evaluate(arrays, recipe=recipe, kept=kept):
            terms = policy_loss(recipe, response_mask=jnp.asarray(MASK), target_kept=kept, **arrays)
            return terms.loss[0] / terms.loss[1], terms

        (values, terms), gradients = jax.jit(jax.vmap(jax.value_and_grad(evaluate, has_aux=True)))(stacked)
        assert np.any(np.asarray(gradients["log_prob"][0]) != 0)
        for i, name in enumerate(names):
            found = jax.tree.map(lambda x, i=i: np.asarray(x[i]), (values, terms, gradients))
            base = jax.tree.map(lambda x: np.asarray(x[0]), (values, terms, gradients))
            jax.tree.map(lambda a, b, name=name: np.testing.assert_array_equal(a, b, err_msg=name), found, base)


IDS = jnp.array([0, 0, 1, 1, 0])
REWARDS = jnp.arange(5.0, dtype=jnp.float32)
MASKED = {
    "token_ratio": (lambda m, x, y: ratios.token_ratio(ratios.token_log_ratio(x, y, m), m), 2),
    "sequence_ratio": (lambda m, x: ratios.sequence_ratio(x, m), 1),
    "geometric_ratio": (lambda m, x: ratios.geometric_ratio(x, m), 1),
    "geometric_token_ratio": (lambda m, x: ratios.geometric_token_ratio(x, m), 1),
    "token_truncated": (lambda m, x: corrections.token_truncated(x, m), 1),
    "token_masked": (lambda m, x: corrections.token_masked(x, m), 1),
    "sequence_masked": (lambda m, x: corrections.sequence_masked(x, m), 1),
    "accept_by_both": (lambda m, x: masks.accept_by_both(x, m, maximum=1.0, average=0.5), 1),
    "accept_by_sampled_both": (lambda m, x: masks.accept_by_sampled_both(x, m, maximum=1.0, average=0.5), 1),
    "accept_by_ratio_deviation": (lambda m, x: masks.accept_by_ratio_deviation(x, m, threshold=0.5), 1),
    "accept_by_weighted": (
        lambda m, x: masks.accept_by_weighted_ratio_deviation(x, m, jnp.ones(T, x.dtype), threshold=0.5),
        1,
    ),
    "aggregate": (lambda m, x: [aggregation.aggregate(x, m, mode=k, length_normaliser=4.0)
                                for k in aggregation.AGGREGATIONS], 1),
    "gae": (lambda m, x, y: advantages.generalised_advantage_estimation(x, y, m, discount=0.9, trace=0.8), 2),
    "pruned_token_weights": (lambda m, x, y: pruning.pruned_token_weights(x, y, m, m), 2),
    "pruned_sequence_weights": (lambda m, x, y: pruning.pruned_sequence_weights(x, y, m, m), 2),
    "multi_step": (lambda m, x, y: divergence_augmented.multi_step_divergence(x, y, m), 2),
    "v_trace": (lambda m, x, y: divergence_augmented.v_trace(x, y, jnp.ones_like(x), m), 2),
    "root_mean_square": (lambda m, x: divergence_augmented.scaled_by_root_mean_square(x, m), 1),
    "sparse": (lambda m, x, y: hybrid.sparse_coefficient(x, y, m, discount=0.9), 2),
    "optimal_baseline": (lambda m, x, y: token_baseline.optimal_token_baseline(REWARDS, x, y, m,
                                                                               IDS), 2),
    "own_baseline": (lambda m, x, y: token_baseline.own_token_baseline(REWARDS, x, y, m, IDS), 2),
    "inputs": (lambda m, x, y: bounds.bound_inputs_from_tokens(x, y, m, horizon=T), 2),
    "surrogate_error": (lambda m, x: bounds.sampled_surrogate_error(x, m, REWARDS), 1),
    "worst_error": (lambda m, x: bounds.sampled_worst_surrogate_error(x, m), 1),
    "gain": (lambda m, x: bounds.sampled_gain(x, m, REWARDS), 1),
    "sequence_tv": (lambda m, x: bounds.sampled_sequence_tv(x, m), 1),
    "deviation": (lambda m, x: bounds.sampled_weighted_deviation(x, m, jnp.ones(T, x.dtype)), 1),
    "hit": (lambda m, x: bounds.sampled_hit_probability(x, m, threshold=0.3), 1),
    "context_gain": (
        lambda m, x, y: bounds.sampled_context_masked_gain(x, y, m, REWARDS, threshold=0.3),
        2,
    ),
    "total_variation": (lambda m, x: pruning_bounds.sampled_total_variation(x, m), 1),
    "bias_bound": (lambda m, x: pruning_bounds.sampled_bias_bound(x, m), 1),
    "noise": (lambda m, x, y: bounds.mismatch.sequence_log_prob_change(x, y, m, max_noise=0.1), 2),
}  # fmt: skip


@pytest.mark.parametrize("name", MASKED)
def test_masked_places_of_every_function_are_zero_whatever_stands_there(name):
    function, number = MASKED[name]
    rng = np.random.default_rng(1)
    clean = [jnp.asarray(np.where(MASK, rng.uniform(0.1, 0.9, (B, T)), 0.0), jnp.float32) for _ in range(number)]
    mask = jnp.asarray(MASK)

    cases = [tuple(clean)] + [
        tuple(jnp.where(mask, x, jnp.float32(junk)) if i == place else x for i, x in enumerate(clean))
        for place in range(number)
        for junk in JUNK
    ]

    def evaluate(arrays):
        result = jax.tree.map(lambda x: x.astype(jnp.float32), function(mask, *arrays))
        return sum(jnp.sum(jnp.where(jnp.isfinite(x), x, 0)) for x in jax.tree.leaves(result)), result

    stacked = jax.tree.map(lambda *x: jnp.stack(x), *cases)
    found = jax.jit(jax.vmap(jax.value_and_grad(evaluate, has_aux=True)))(stacked)
    for leaf in jax.tree.leaves(found):
        np.testing.assert_array_equal(leaf, np.broadcast_to(leaf[:1], leaf.shape))


@pytest.mark.parametrize("junk", JUNK)
def test_rewards_and_advantages_of_rows_without_a_token_are_not_read(junk):
    empty = jnp.asarray(~MASK.any(axis=1))
    log_ratio = jnp.asarray(np.random.default_rng(2).normal(size=(B, T)), jnp.float32)
    for estimate in (bounds.sampled_surrogate_error, bounds.sampled_surrogate_gain, bounds.sampled_gain):

        def value(x, rewards, estimate=estimate):
            return estimate(x, jnp.asarray(MASK), rewards).value

        clean = jnp.where(empty, 0, jnp.arange(5.0))
        base = jax.value_and_grad(value)(log_ratio, clean)
        found = jax.value_and_grad(value)(log_ratio, jnp.where(empty, jnp.float32(junk), clean))
        jax.tree.map(np.testing.assert_array_equal, found, base)
