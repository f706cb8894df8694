"""Evaluate a recipe on plain arrays: its loss as (sum, count), and what to look at while it runs."""

from typing import NamedTuple
from typing import overload

import jax
import jax.numpy as jnp
from jaxtyping import Array
from jaxtyping import Bool
from jaxtyping import Float
from jaxtyping import ScalarLike

from jaxrl_llm.checks import checked
from jaxrl_llm.checks import present
from jaxrl_llm.checks import require_dtype
from jaxrl_llm.checks import require_rank
from jaxrl_llm.checks import require_same_shape
from jaxrl_llm.masked import masked_mean
from jaxrl_llm.objectives.aggregation import aggregate
from jaxrl_llm.objectives.aggregation import aggregate_accepted
from jaxrl_llm.objectives.divergences import ESTIMATORS
from jaxrl_llm.objectives.loss_metrics import Pair
from jaxrl_llm.objectives.loss_metrics import loss_metrics
from jaxrl_llm.objectives.ratios import ratio_from_log
from jaxrl_llm.objectives.ratios import token_log_ratio
from jaxrl_llm.objectives.recipe_fields import RecipeFields
from jaxrl_llm.objectives.rules import CORRECTIONS
from jaxrl_llm.objectives.rules import MASKS
from jaxrl_llm.objectives.rules import PRODUCTS
from jaxrl_llm.objectives.rules import SURROGATES
from jaxrl_llm.objectives.rules import CorrectionInputs
from jaxrl_llm.objectives.rules import MaskInputs
from jaxrl_llm.objectives.rules import SurrogateInputs


class LossTerms(NamedTuple):
    """The loss of a batch and its metrics; add the pairs of micro-batches or shards componentwise, then divide once.

    Attributes:
        loss: (sum, count); the number to minimise is their quotient, its gradient that of the sum over the count.
        metrics: name -> (sum, count), constants to the gradient. `loss_metrics` lists them.
    """

    loss: Pair
    metrics: dict[str, Pair]


def _need(recipe: RecipeFields, field: str, name: str, array: Array | None) -> Array:
    if array is None:
        what = f"its {field} ({vars(recipe)[field]!r})"
        raise ValueError(f"{name} is None; recipe {recipe.name!r} needs it for {what}.")
    return array


def _need_all(recipe: RecipeFields, field: str, needs: tuple[str, ...], given: dict[str, Array | None]) -> None:
    for name in needs:
        _need(recipe, field, name, given[name])


@checked
def policy_weights(
    recipe: RecipeFields,
    *,
    log_prob: Float[Array, "B T"],
    response_mask: Bool[Array, "B T"],
    log_prob_old: Float[Array, "B T"] | None = None,
    log_prob_behaviour: Float[Array, "B T"] | None = None,
    kl_t: Float[Array, "B T"] | None = None,
    target_kept: Bool[Array, "B T"] | None = None,
) -> tuple[Float[Array, "B T"], Bool[Array, " B"]]:
    """The constants of the surrogate: correction weight of each token times the acceptance of its sequence.

    Args:
        recipe: whose fields `correction` and `mask` name the parts.
        log_prob: under the trained policy [nats]; read by the sampled masks only.
        response_mask: true at the tokens that the policy sampled.
        log_prob_old: under the policy at the start of the update [nats]; needed by a correction.
        log_prob_behaviour: under the policy that sampled [nats]; needed by a correction and by the sampled masks.
        kl_t: exact KL(behaviour || pi) of each context [nats], needed by the exact masks.
        target_kept: true where the token is in the safe set of the trained policy; needed by a recipe with log_min_p.

    Returns:
        (weight of each token, 0 outside the safe set and in rejected sequences; true for accepted sequences), both
        constants to the gradient.

    Raises:
        ValueError: if an array that the recipe needs is missing.
    """
    weights = jnp.ones(log_prob.shape, log_prob.dtype)
    given = {"log_prob_old": log_prob_old, "log_prob_behaviour": log_prob_behaviour, "kl_t": kl_t}
    if recipe.correction != "none":
        rule = CORRECTIONS[recipe.correction]
        _need_all(recipe, "correction", rule.needs, given)
        log_weight = token_log_ratio(present(log_prob_old), present(log_prob_behaviour), response_mask)
        weights = rule.function(recipe, CorrectionInputs(log_weight, response_mask))
    if recipe.log_min_p is not None:
        kept = _need(recipe, "log_min_p", "target_kept", target_kept) | ~response_mask
        if recipe.correction in PRODUCTS:
            kept = jnp.broadcast_to(jnp.all(kept, axis=1)[:, None], kept.shape)
        weights = jnp.where(kept, weights, jnp.zeros((), weights.dtype))
    if recipe.mask == "none":
        return weights, jnp.ones(log_prob.shape[0], bool)
    rule = MASKS[recipe.mask]
    _need_all(recipe, "mask", rule.needs, given)
    accepted = rule.function(recipe, MaskInputs(response_mask, log_prob, log_prob_behaviour, kl_t))
    return jnp.where(accepted[:, None], weights, jnp.zeros((), weights.dtype)), accepted


def _surrogate_losses(
    recipe: RecipeFields,
    log_prob: Float[Array, "*shape"],
    advantages: Float[Array, "*shape"],
    log_ratio: Float[Array, "*shape"] | None,
    kl_t: Float[Array, "*shape"] | None,
) -> Float[Array, "*shape"]:
    rule = SURROGATES[recipe.surrogate]
    ratio = None
    if "ratio" in rule.needs:
        ratio = ratio_from_log(_need(recipe, "surrogate", f"log_prob_{recipe.denominator}", log_ratio))
    inputs = SurrogateInputs(log_prob, advantages, ratio, kl_t)
    _need_all(recipe, "surrogate", rule.needs, inputs._asdict())
    return rule.function(recipe, inputs)


@checked
def token_losses(
    recipe: RecipeFields,
    *,
    log_prob: Float[Array, "*shape"],
    advantages: Float[Array, "*shape"],
    log_ratio: Float[Array, "*shape"] | None = None,
    weights: Float[Array, "*shape"] | None = None,
    log_ratio_ref: Float[Array, "*shape"] | None = None,
    kl_ref_t: Float[Array, "*shape"] | None = None,
    entropy: Float[Array, "*shape"] | None = None,
    kl_t: Float[Array, "*shape"] | None = None,
) -> Float[Array, "*shape"]:
    """The loss of each token, elementwise, from its own statistics and constants: what `token_loss` of the kernels
    takes.

    weights * surrogate + kl_coefficient * KL - entropy_coefficient * entropy.

    Args:
        recipe: which parts to use. Its `ratio` is not read here: pass the log-ratio of the token, or for the geometric
            ratio that of its sequence at each of its tokens (possible only where whole sequences are at hand).
        log_prob: under the trained policy [nats].
        advantages: of each token.
        log_ratio: log pi - log of the recipe's denominator [nats]; not needed by the score function.
        weights: constants from `policy_weights`, 1 if None. A weight of 0 removes the surrogate whatever its value.
        log_ratio_ref: log pi - log pi_ref [nats], for a sampled KL estimator.
        kl_ref_t: exact KL(pi || ref) [nats], for the estimator "exact".
        entropy: exact entropy of each context [nats], for an entropy bonus.
        kl_t: exact KL(behaviour || pi) of each context [nats], for the divergence-masked surrogate; a constant.

    Returns:
        the loss of each token.

    Raises:
        ValueError: if an array that the recipe needs is missing.
    """
    losses = _surrogate_losses(recipe, log_prob, advantages, log_ratio, kl_t)
    if weights is not None:
        fixed = jax.lax.stop_gradient(weights)
        losses = jnp.where(fixed == 0, jnp.zeros((), losses.dtype), fixed * losses)
    if recipe.kl_estimator == "none" or recipe.kl_coefficient == 0:
        pass
    elif recipe.kl_estimator == "exact":
        losses = losses + recipe.kl_coefficient * _need(recipe, "kl_estimator", "kl_ref_t", kl_ref_t)
    else:
        log_ratio_ref = _need(recipe, "kl_estimator", "log_prob_ref", log_ratio_ref)
        losses = losses + recipe.kl_coefficient * ESTIMATORS[recipe.kl_estimator](log_ratio_ref)
    if recipe.entropy_coefficient != 0:
        losses = losses - recipe.entropy_coefficient * _need(recipe, "entropy_coefficient", "entropy", entropy)
    return losses


def _spread_advantages(
    advantages: Float[Array, " B"] | Float[Array, "B T"], response_mask: Bool[Array, "B T"]
) -> Float[Array, "B T"]:
    require_dtype("floating", advantages=advantages)
    if advantages.ndim == 1:
        if advantages.shape[0] != response_mask.shape[0]:
            rows = response_mask.shape[0]
            raise ValueError(
                f"advantages has {advantages.shape[0]} sequences and response_mask {rows}; make them equal."
            )
        return jnp.broadcast_to(advantages[:, None], response_mask.shape)
    require_rank(2, "B T", advantages=advantages)
    require_same_shape(response_mask=response_mask, advantages=advantages)
    return advantages


def _check(response_mask: Bool[Array, "B T"], target_kept: Bool[Array, "B T"] | None, arrays: dict) -> None:
    require_rank(2, "B T", response_mask=response_mask, target_kept=target_kept, **arrays)
    require_same_shape(response_mask=response_mask, target_kept=target_kept, **arrays)
    require_dtype("floating", **arrays)
    require_dtype("boolean", response_mask=response_mask, target_kept=target_kept)


@overload
def _inside(x: Array, kept: Bool[Array, "B T"]) -> Array: ...
@overload
def _inside(x: None, kept: Bool[Array, "B T"]) -> None: ...
def _inside(x: Array | None, kept: Bool[Array, "B T"]) -> Array | None:
    return None if x is None else jnp.where(kept, x, jnp.zeros((), x.dtype))


def _recipe_log_ratio(
    recipe: RecipeFields, log_ratio: Float[Array, "B T"] | None, response_mask: Bool[Array, "B T"]
) -> Float[Array, "B T"] | None:
    if log_ratio is None or recipe.ratio == "token":
        return log_ratio
    return jnp.broadcast_to(masked_mean(log_ratio, response_mask, axis=1)[:, None], log_ratio.shape)


def _aggregate(
    recipe: RecipeFields,
    losses: Float[Array, "B T"],
    response_mask: Bool[Array, "B T"],
    accepted: Bool[Array, " B"],
    batch_fraction: ScalarLike,
) -> Pair:
    rule = {
        "mode": recipe.aggregation,
        "length_normaliser": recipe.length_normaliser,
        "batch_fraction": batch_fraction,
    }
    if recipe.normalise_by == "accepted":
        return aggregate_accepted(losses, response_mask, accepted, **rule)
    return aggregate(losses, response_mask, **rule)


@checked
def policy_loss(
    recipe: RecipeFields,
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
    target_kept: Bool[Array, "B T"] | None = None,
    batch_fraction: ScalarLike = 1.0,
) -> LossTerms:
    """aggregate( mask * correction * surrogate(ratio, advantage) + kl_coefficient KL - entropy_coefficient entropy ).

    The mask and the correction act on the surrogate alone; the KL and entropy terms of rejected sequences stay, unless
    the recipe normalises by the accepted, which then aggregates everything over them.

    Args:
        recipe: one of `RECIPES`, or your own; static under jit.
        log_prob: log pi(y_t|c_t) of the trained policy [nats], with its gradient.
        advantages: one per sequence or one per token; a constant to the gradient.
        response_mask: true at the tokens that the policy sampled; elsewhere every array may hold anything, NaN
            included, and neither loss nor gradient nor metrics notice.
        log_prob_old: under the policy at the start of the update [nats].
        log_prob_behaviour: under the policy that sampled [nats].
        log_prob_ref: under the reference policy [nats], for a sampled KL estimator.
        kl_t: exact KL(behaviour || pi) of each context [nats], for the exact masks, the divergence-masked
            surrogate and the metrics; a constant.
        kl_ref_t: exact KL(pi || ref) of each context [nats], with its gradient.
        entropy: exact entropy of each context under pi [nats], with its gradient if the recipe rewards it.
        target_kept: true where the token is in the safe set of the trained policy, for a recipe with log_min_p and
            ignored otherwise. The log-probs are then those of pruned policies and may hold anything where it is false.
        batch_fraction: the share of the whole batch that these rows are; read by "token-sum" only.

    Returns:
        `LossTerms`: the loss as (sum, count), and the metrics that `loss_metrics.loss_metrics` lists.

    Raises:
        ValueError, TypeError: if ranks, shapes or dtypes do not fit, or an array that the recipe needs is missing.
    """
    statistics = {"kl_t": kl_t, "kl_ref_t": kl_ref_t, "entropy": entropy}
    others = {"log_prob_old": log_prob_old, "log_prob_behaviour": log_prob_behaviour, "log_prob_ref": log_prob_ref}
    _check(response_mask, target_kept, {"log_prob": log_prob, **others, **statistics})
    # Before any arithmetic: a NaN at padding that meets a cotangent of 0 is a NaN in the gradient.
    advantages = _inside(_spread_advantages(advantages, response_mask), response_mask)
    log_prob = _inside(log_prob, response_mask)
    statistics = {name: _inside(x, response_mask) for name, x in statistics.items()}
    kl_t, kl_ref_t, entropy = statistics.values()
    if recipe.log_min_p is not None and target_kept is not None:
        log_prob = jnp.where(target_kept, log_prob, jnp.zeros((), log_prob.dtype))
        others = {name: _inside(x, target_kept) for name, x in others.items()}
    to_old, to_behaviour, to_ref = (
        None if x is None else token_log_ratio(log_prob, x, response_mask) for x in others.values()
    )
    log_ratio = _recipe_log_ratio(recipe, to_old if recipe.denominator == "old" else to_behaviour, response_mask)
    weights, accepted = policy_weights(
        recipe,
        log_prob=log_prob,
        response_mask=response_mask,
        log_prob_old=others["log_prob_old"],
        log_prob_behaviour=others["log_prob_behaviour"],
        kl_t=kl_t,
        target_kept=target_kept,
    )
    losses = token_losses(
        recipe,
        log_prob=log_prob,
        advantages=advantages,
        log_ratio=log_ratio,
        weights=weights,
        log_ratio_ref=to_ref,
        kl_ref_t=kl_ref_t,
        entropy=entropy,
        kl_t=kl_t,
    )
    metrics = loss_metrics(
        recipe,
        response_mask,
        weights=weights,
        accepted=accepted,
        advantages=advantages,
        log_ratio=log_ratio,
        log_ratio_old=to_old,
        log_ratio_behaviour=to_behaviour,
        log_ratio_ref=to_ref,
        **statistics,
    )
    return LossTerms(_aggregate(recipe, losses, response_mask, accepted, batch_fraction), metrics)
