"""Evaluate a recipe on plain arrays: its loss as (sum, count), and what to look at while it runs."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array
from jaxtyping import Bool
from jaxtyping import Float
from jaxtyping import ScalarLike

from jaxrl_llm.checks import require_dtype
from jaxrl_llm.checks import require_rank
from jaxrl_llm.checks import require_same_shape
from jaxrl_llm.masked import masked_mean
from jaxrl_llm.masked import masked_sum_count
from jaxrl_llm.objectives import corrections
from jaxrl_llm.objectives import masks
from jaxrl_llm.objectives import surrogates
from jaxrl_llm.objectives.aggregation import aggregate
from jaxrl_llm.objectives.aggregation import aggregate_accepted
from jaxrl_llm.objectives.divergences import ESTIMATORS
from jaxrl_llm.objectives.divergences import k3
from jaxrl_llm.objectives.ratios import LOG_RATIO_LIMIT
from jaxrl_llm.objectives.ratios import ratio_from_log
from jaxrl_llm.objectives.ratios import token_log_ratio
from jaxrl_llm.objectives.recipes import Recipe

Pair = tuple[Float[Array, ""], Float[Array, ""]]


class LossTerms(NamedTuple):
    """The loss of a batch and its metrics; add the pairs of micro-batches or shards componentwise, then divide once.

    Attributes:
        loss: (sum, count); the number to minimise is their quotient, its gradient that of the sum divided by the count.
        metrics: name -> (sum, count), constants to the gradient. Names and normalisations are listed in `policy_loss`.
    """

    loss: Pair
    metrics: dict[str, Pair]


def _needed(recipe: Recipe, field: str, **arrays: Float[Array, "B T"] | None) -> None:
    for name, array in arrays.items():
        if array is None:
            raise ValueError(
                f"{name} is None; recipe {recipe.name!r} needs it for its {field} ({getattr(recipe, field)!r})."
            )


def _denominator(recipe: Recipe, log_prob_old, log_prob_behaviour) -> Float[Array, "B T"] | None:
    if recipe.denominator == "old":
        return log_prob_old
    return log_prob_behaviour


def policy_weights(
    recipe: Recipe,
    *,
    log_prob: Float[Array, "B T"],
    response_mask: Bool[Array, "B T"],
    log_prob_old: Float[Array, "B T"] | None = None,
    log_prob_behaviour: Float[Array, "B T"] | None = None,
    kl_t: Float[Array, "B T"] | None = None,
) -> tuple[Float[Array, "B T"], Bool[Array, " B"]]:
    """The constants of the surrogate: correction weight of each token times the acceptance of its sequence.

    Args:
        recipe: whose fields `correction` and `mask` name the parts.
        log_prob: under the trained policy; read by the sampled masks only.
        response_mask: true at the tokens that the policy sampled.
        log_prob_old: needed by a correction.
        log_prob_behaviour: needed by a correction and by the sampled masks.
        kl_t: exact KL(mu || pi) of each context [nats], needed by the exact masks.

    Returns:
        (weight of each token, 0 in rejected sequences; true for accepted sequences), both constants to the gradient.

    Raises:
        ValueError: if an array that the recipe needs is missing.
    """
    weight = jnp.ones(log_prob.shape, log_prob.dtype)
    if recipe.correction != "none":
        _needed(recipe, "correction", log_prob_old=log_prob_old, log_prob_behaviour=log_prob_behaviour)
        log_weight = token_log_ratio(log_prob_old, log_prob_behaviour, response_mask)
        correct = getattr(corrections, recipe.correction)
        if recipe.correction.endswith("truncated"):
            weight = correct(log_weight, response_mask, cap=recipe.correction_high)
        else:
            weight = correct(log_weight, response_mask, low=recipe.correction_low, high=recipe.correction_high)
    if recipe.mask == "none":
        return weight, jnp.ones(log_prob.shape[0], bool)
    if recipe.mask.startswith("sampled"):
        _needed(recipe, "mask", log_prob_behaviour=log_prob_behaviour)
        statistic = jax.lax.stop_gradient(token_log_ratio(log_prob, log_prob_behaviour, response_mask))
    else:
        _needed(recipe, "mask", kl_t=kl_t)
        statistic = kl_t
    test = getattr(masks, f"accept_by_{recipe.mask}")
    if recipe.mask.endswith("both"):
        accepted = test(statistic, response_mask, maximum=recipe.mask_maximum, average=recipe.mask_average)
    else:
        threshold = recipe.mask_maximum if recipe.mask.endswith("maximum") else recipe.mask_average
        accepted = test(statistic, response_mask, threshold=threshold)
    return jnp.where(accepted[:, None], weight, jnp.zeros((), weight.dtype)), accepted


def token_losses(
    recipe: Recipe,
    *,
    log_prob: Float[Array, "*shape"],
    advantages: Float[Array, "*shape"],
    log_ratio: Float[Array, "*shape"] | None = None,
    weights: Float[Array, "*shape"] | None = None,
    log_ratio_ref: Float[Array, "*shape"] | None = None,
    kl_ref_t: Float[Array, "*shape"] | None = None,
    entropy: Float[Array, "*shape"] | None = None,
) -> Float[Array, "*shape"]:
    """The loss of each token, elementwise, from its own statistics and constants: the form that
    `jaxrl_kernels.token_loss` takes.

    Args:
        recipe: which parts to use; its `ratio` is read by the caller, who passes the log-ratio (per token, or the
            sequence's at each of its tokens).
        log_prob: under the trained policy [nats].
        advantages: of each token.
        log_ratio: log pi - log of the recipe's denominator [nats]; not needed by the score function.
        weights: constants from `policy_weights`; 1 if None.
        log_ratio_ref: log pi - log pi_ref [nats], for a sampled KL estimator.
        kl_ref_t: exact KL(pi || ref) [nats], for the estimator "exact".
        entropy: exact entropy of each context [nats], for an entropy bonus.

    Returns:
        weights * surrogate + kl_coefficient * KL - entropy_coefficient * entropy. A weight of 0 removes the surrogate
        whatever its value.

    Raises:
        ValueError: if an array that the recipe needs is missing.
    """
    if recipe.surrogate == "score_function":
        loss = surrogates.score_function(log_prob, advantages)
    else:
        _needed(recipe, "surrogate", log_ratio=log_ratio)
        ratio = ratio_from_log(log_ratio)
        clip = {"clip_low": recipe.clip_low, "clip_high": recipe.clip_high}
        if recipe.surrogate == "importance_weighted":
            loss = surrogates.importance_weighted(ratio, advantages)
        elif recipe.surrogate == "clipped":
            loss = surrogates.clipped(ratio, advantages, **clip)
        elif recipe.surrogate == "dual_clipped":
            loss = surrogates.dual_clipped(ratio, advantages, **clip, dual_clip=recipe.dual_clip)
        else:
            loss = surrogates.clipped_weight(log_prob, ratio, advantages, **clip)
    if weights is not None:
        weights = jax.lax.stop_gradient(weights)
        loss = jnp.where(weights == 0, jnp.zeros((), loss.dtype), weights * loss)
    if recipe.kl_estimator == "exact":
        _needed(recipe, "kl_estimator", kl_ref_t=kl_ref_t)
        loss = loss + recipe.kl_coefficient * kl_ref_t
    elif recipe.kl_estimator != "none":
        _needed(recipe, "kl_estimator", log_prob_ref=log_ratio_ref)
        loss = loss + recipe.kl_coefficient * ESTIMATORS[recipe.kl_estimator](log_ratio_ref)
    if recipe.entropy_coefficient != 0:
        _needed(recipe, "entropy_coefficient", entropy=entropy)
        loss = loss - recipe.entropy_coefficient * entropy
    return loss


def _check(advantages, response_mask, **arrays) -> Float[Array, "B T"]:
    require_rank(2, "B T", response_mask=response_mask, **arrays)
    require_same_shape(response_mask=response_mask, **arrays)
    require_dtype("floating", advantages=advantages, **arrays)
    require_dtype("boolean", response_mask=response_mask)
    if advantages.ndim == 1:
        if advantages.shape[0] != response_mask.shape[0]:
            raise ValueError(
                f"advantages has {advantages.shape[0]} sequences and response_mask {response_mask.shape[0]}; "
                "they must be equal."
            )
        return jnp.broadcast_to(advantages[:, None], response_mask.shape)
    require_rank(2, "B T", advantages=advantages)
    require_same_shape(response_mask=response_mask, advantages=advantages)
    return advantages


def _metrics(recipe, *, log_ratio, weights, accepted, advantages, response_mask, kl_terms, others) -> dict[str, Pair]:
    metrics = {name: masked_sum_count(x, response_mask) for name, x in {**kl_terms, **others}.items() if x is not None}
    if log_ratio is not None:
        ratio = ratio_from_log(log_ratio)
        metrics["ratio"] = masked_sum_count(ratio, response_mask)
        limited = (jnp.abs(log_ratio) > LOG_RATIO_LIMIT).astype(log_ratio.dtype)
        metrics["ratio_limited"] = masked_sum_count(limited, response_mask)
        outside = surrogates.clip_binds(ratio, advantages, clip_low=recipe.clip_low, clip_high=recipe.clip_high)
        if recipe.surrogate == "clipped_weight":
            outside = (ratio < 1 - recipe.clip_low) | (ratio > 1 + recipe.clip_high)
        if "clipped" in recipe.surrogate:
            metrics["clip_fraction"] = masked_sum_count(outside.astype(ratio.dtype), response_mask)
    if recipe.correction != "none":
        metrics["weight"] = masked_sum_count(weights, response_mask)
        metrics["weight_zero"] = masked_sum_count((weights == 0).astype(weights.dtype), response_mask)
    if recipe.mask != "none":
        metrics["rejected_sequences"] = masks.rejected_sequences(accepted, response_mask)
        metrics["rejected_tokens"] = masks.rejected_tokens(accepted, response_mask)
    return jax.tree.map(jax.lax.stop_gradient, metrics)


def policy_loss(
    recipe: Recipe,
    *,
    log_prob: Float[Array, "B T"],
    advantages: Float[Array, " B"] | Float[Array, "B T"],
    response_mask: Bool[Array, "B T"],
    log_prob_old: Float[Array, "B T"] | None = None,
    log_prob_behaviour: Float[Array, "B T"] | None = None,
    log_prob_ref: Float[Array, "B T"] | None = None,
    kl_t: Float[Array, "B T"] | None = None,
    kl_ref_t: Float[Array, "B T"] | None = None,
    entropy: Float[Array, "B T"] | None = None,
    batch_fraction: ScalarLike = 1.0,
) -> LossTerms:
    """aggregate( mask * correction * surrogate(ratio, advantage) + kl_coefficient * KL - entropy_coefficient * entropy
    ).

    The mask and the correction act on the surrogate alone; the KL and entropy terms stay for rejected sequences, unless
    the recipe normalises by the accepted, which then aggregates everything over them.

    Args:
        recipe: one of `RECIPES`, or your own; static under jit.
        log_prob: log pi(y_t|c_t) of the trained policy [nats], with its gradient.
        advantages: one per sequence or one per token; a constant to the gradient.
        response_mask: true at the tokens that the policy sampled.
        log_prob_old: under the policy at the start of the update [nats].
        log_prob_behaviour: under the policy that sampled [nats].
        log_prob_ref: under the reference policy [nats], for a sampled KL estimator.
        kl_t: exact KL(behaviour || pi) of each context [nats], for the exact masks and for the metrics; a constant to
            the gradient.
        kl_ref_t: exact KL(pi || ref) of each context [nats], with its gradient.
        entropy: exact entropy of each context under pi [nats], with its gradient if the recipe rewards it.
        batch_fraction: the share of the whole batch that these rows are; read by "token-sum" only.

    Returns:
        `LossTerms`: the loss as (sum, count), and metrics as (sum, count) pairs:
        per token: ratio, ratio_limited (log-ratio clamp binds), clip_fraction (the clip removes the gradient; for
            CISPO: changes the weight), weight and weight_zero (correction), kl_old_k3 (KL(old || pi), sampled),
            kl_behaviour_k3 (KL(mu || pi), sampled), kl_behaviour (KL(mu || pi), exact), kl_ref (KL(pi || ref) by the
            recipe's estimator), entropy;
        per sequence: rejected_sequences; per token: rejected_tokens (share of response tokens that lie in rejected
            sequences).

    Raises:
        ValueError, TypeError: if ranks, shapes or dtypes do not fit, or an array that the recipe needs is missing; the
        sentence names it.
    """
    named = {
        "log_prob": log_prob,
        "log_prob_old": log_prob_old,
        "log_prob_behaviour": log_prob_behaviour,
        "log_prob_ref": log_prob_ref,
        "kl_t": kl_t,
        "kl_ref_t": kl_ref_t,
        "entropy": entropy,
    }
    advantages_t = _check(advantages, response_mask, **named)
    weights, accepted = policy_weights(
        recipe,
        log_prob=log_prob,
        response_mask=response_mask,
        log_prob_old=log_prob_old,
        log_prob_behaviour=log_prob_behaviour,
        kl_t=kl_t,
    )
    below = _denominator(recipe, log_prob_old, log_prob_behaviour)
    if below is None and recipe.surrogate != "score_function":
        raise ValueError(f"log_prob_{recipe.denominator} is None; recipe {recipe.name!r} puts it under its ratio.")
    log_ratio = None if below is None else token_log_ratio(log_prob, below, response_mask)
    if log_ratio is not None and recipe.ratio == "geometric":
        log_ratio = jnp.broadcast_to(masked_mean(log_ratio, response_mask, axis=1)[:, None], log_ratio.shape)
    log_ratio_ref = None if log_prob_ref is None else token_log_ratio(log_prob, log_prob_ref, response_mask)
    losses = token_losses(
        recipe,
        log_prob=log_prob,
        advantages=advantages_t,
        log_ratio=log_ratio,
        weights=weights,
        log_ratio_ref=log_ratio_ref,
        kl_ref_t=kl_ref_t,
        entropy=entropy,
    )
    rule = {
        "mode": recipe.aggregation,
        "length_normaliser": recipe.length_normaliser,
        "batch_fraction": batch_fraction,
    }
    if recipe.normalise_by == "accepted":
        loss = aggregate_accepted(losses, response_mask, accepted, **rule)
    else:
        loss = aggregate(losses, response_mask, **rule)
    metrics = _metrics(
        recipe,
        log_ratio=log_ratio,
        weights=weights,
        accepted=accepted,
        advantages=advantages_t,
        response_mask=response_mask,
        kl_terms=_kl_terms(recipe, log_ratio_ref=log_ratio_ref, response_mask=response_mask, **named),
        others={"entropy": entropy},
    )
    return LossTerms(loss, metrics)


def _kl_terms(
    recipe,
    *,
    log_prob,
    log_prob_old,
    log_prob_behaviour,
    log_prob_ref,
    log_ratio_ref,
    kl_t,
    kl_ref_t,
    entropy,
    response_mask,
) -> dict[str, Float[Array, "B T"] | None]:
    del log_prob_ref, entropy
    terms = {"kl_behaviour": kl_t, "kl_old_k3": None, "kl_behaviour_k3": None, "kl_ref": kl_ref_t}
    if log_prob_old is not None:
        terms["kl_old_k3"] = k3(-token_log_ratio(log_prob, log_prob_old, response_mask))
    if log_prob_behaviour is not None:
        terms["kl_behaviour_k3"] = k3(-token_log_ratio(log_prob, log_prob_behaviour, response_mask))
    if kl_ref_t is None and log_ratio_ref is not None:
        name = recipe.kl_estimator if recipe.kl_estimator in ESTIMATORS else "k3"
        terms["kl_ref"] = ESTIMATORS[name](log_ratio_ref)
    return terms
