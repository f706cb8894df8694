"""What to look at while a recipe runs. Every metric is a (sum, count) pair and a constant to the gradient."""

import jax
import jax.numpy as jnp
from jaxtyping import Array
from jaxtyping import Bool
from jaxtyping import Float

from jaxrl_llm.checks import checked
from jaxrl_llm.masked import masked_sum_count
from jaxrl_llm.objectives import masks
from jaxrl_llm.objectives import surrogates
from jaxrl_llm.objectives.divergences import ESTIMATORS
from jaxrl_llm.objectives.divergences import k3
from jaxrl_llm.objectives.ratios import LOG_RATIO_LIMIT
from jaxrl_llm.objectives.ratios import ratio_from_log
from jaxrl_llm.objectives.recipe_fields import RecipeFields

Pair = tuple[Float[Array, ""], Float[Array, ""]]


def _of_the_ratio(
    recipe: RecipeFields,
    log_ratio: Float[Array, "B T"],
    advantages: Float[Array, "B T"],
    kl_t: Float[Array, "B T"] | None,
) -> dict[str, Float[Array, "B T"]]:
    ratio = ratio_from_log(log_ratio)
    values = {"ratio": ratio, "ratio_limited": (jnp.abs(log_ratio) > LOG_RATIO_LIMIT).astype(ratio.dtype)}
    low, high = recipe.clip_low, recipe.clip_high
    if recipe.surrogate in ("clipped", "dual_clipped"):
        binds = surrogates.clip_binds(ratio, advantages, clip_low=low, clip_high=high)
        values["clip_fraction"] = binds.astype(ratio.dtype)
    if recipe.surrogate == "clipped_weight":
        values["clip_fraction"] = ((ratio < 1 - low) | (ratio > 1 + high)).astype(ratio.dtype)
    if recipe.surrogate == "divergence_masked" and kl_t is not None:
        outwards = ((advantages > 0) & (ratio > 1)) | ((advantages < 0) & (ratio < 1))
        values["clip_fraction"] = (outwards & ~(kl_t <= recipe.divergence_threshold)).astype(ratio.dtype)
    return values


@checked
def loss_metrics(
    recipe: RecipeFields,
    response_mask: Bool[Array, "B T"],
    *,
    weights: Float[Array, "B T"],
    accepted: Bool[Array, " B"],
    advantages: Float[Array, "B T"],
    log_ratio: Float[Array, "B T"] | None = None,
    log_ratio_old: Float[Array, "B T"] | None = None,
    log_ratio_behaviour: Float[Array, "B T"] | None = None,
    log_ratio_ref: Float[Array, "B T"] | None = None,
    kl_t: Float[Array, "B T"] | None = None,
    kl_ref_t: Float[Array, "B T"] | None = None,
    entropy: Float[Array, "B T"] | None = None,
) -> dict[str, Pair]:
    """Name -> (sum, count), for whatever was given.

    Per response token: ratio; ratio_limited (its clamp binds); clip_fraction (the clip, or the divergence mask, removes
    the gradient; for CISPO it changes the weight); weight, weight_zero (correction and pruning, times acceptance);
    kl_old_k3 (KL(old || pi), sampled); kl_behaviour_k3 (KL(behaviour || pi), sampled) and kl_behaviour (exact); kl_ref
    (KL(pi || ref), exact if given, else by the recipe's estimator, k3 if it has none); entropy; rejected_tokens (they
    lie in rejected sequences). Per sequence: rejected_sequences.

    Args:
        recipe: which parts were used.
        response_mask: true at the tokens that the policy sampled.
        weights: constants of the surrogate.
        accepted: true for accepted sequences.
        advantages: of each token.
        log_ratio: the recipe's own, as its surrogate reads it [nats].
        log_ratio_old: log pi - log pi_old [nats].
        log_ratio_behaviour: log pi - log mu [nats].
        log_ratio_ref: log pi - log pi_ref [nats].
        kl_t: exact KL(behaviour || pi) of each context [nats].
        kl_ref_t: exact KL(pi || ref) of each context [nats].
        entropy: exact entropy of each context [nats].

    Returns:
        the pairs; add those of micro-batches and shards, then divide.
    """
    if kl_ref_t is None and log_ratio_ref is not None:
        kl_ref_t = ESTIMATORS.get(recipe.kl_estimator, k3)(log_ratio_ref)
    values = {
        "kl_old_k3": None if log_ratio_old is None else k3(-log_ratio_old),
        "kl_behaviour_k3": None if log_ratio_behaviour is None else k3(-log_ratio_behaviour),
        "kl_behaviour": kl_t,
        "kl_ref": kl_ref_t,
        "entropy": entropy,
    }
    if log_ratio is not None:
        values |= _of_the_ratio(recipe, log_ratio, advantages, kl_t)
    if recipe.correction != "none" or recipe.log_min_p is not None:
        values |= {"weight": weights, "weight_zero": (weights == 0).astype(weights.dtype)}
    metrics = {name: masked_sum_count(x, response_mask) for name, x in values.items() if x is not None}
    if recipe.mask != "none":
        metrics["rejected_sequences"] = masks.rejected_sequences(accepted, response_mask)
        metrics["rejected_tokens"] = masks.rejected_tokens(accepted, response_mask)
    return jax.tree.map(jax.lax.stop_gradient, metrics)
