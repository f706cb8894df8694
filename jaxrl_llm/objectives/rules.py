"""The places of the policy loss as tables: what may fill each, and which arrays that needs.

A row is `Rule(function, needs)`. The choices of a recipe are the names of the rows, and `policy_loss` asks for what the
chosen rows need and for nothing else. A new surrogate, correction or mask is one function and one row.
"""

from collections.abc import Callable
from typing import Any
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array
from jaxtyping import Bool
from jaxtyping import Float

from jaxrl_llm.checks import present
from jaxrl_llm.objectives import corrections
from jaxrl_llm.objectives import masks
from jaxrl_llm.objectives import surrogates
from jaxrl_llm.objectives.ratios import token_log_ratio
from jaxrl_llm.objectives.ratios import token_ratio
from jaxrl_llm.objectives.recipe_fields import RecipeFields


class Rule(NamedTuple):
    """One choice of a recipe.

    Attributes:
        function: of the recipe, whose numbers it reads, and of the inputs of its table.
        needs: names of those inputs that may be None and must be there for this rule.
    """

    function: Callable[..., Any]
    needs: tuple[str, ...] = ()


class SurrogateInputs(NamedTuple):
    """What a surrogate may read, elementwise; the ratio is that of the recipe's denominator."""

    log_prob: Float[Array, "*shape"]
    advantages: Float[Array, "*shape"]
    ratio: Float[Array, "*shape"] | None = None
    kl_t: Float[Array, "*shape"] | None = None


def _score_function(recipe: RecipeFields, x: SurrogateInputs) -> Array:
    return surrogates.score_function(x.log_prob, x.advantages)


def _importance_weighted(recipe: RecipeFields, x: SurrogateInputs) -> Array:
    return surrogates.importance_weighted(present(x.ratio), x.advantages)


def _clipped(recipe: RecipeFields, x: SurrogateInputs) -> Array:
    return surrogates.clipped(present(x.ratio), x.advantages, clip_low=recipe.clip_low, clip_high=recipe.clip_high)


def _dual_clipped(recipe: RecipeFields, x: SurrogateInputs) -> Array:
    return surrogates.dual_clipped(
        present(x.ratio), x.advantages, clip_low=recipe.clip_low, clip_high=recipe.clip_high, dual_clip=recipe.dual_clip
    )


def _clipped_weight(recipe: RecipeFields, x: SurrogateInputs) -> Array:
    return surrogates.clipped_weight(
        x.log_prob, present(x.ratio), x.advantages, clip_low=recipe.clip_low, clip_high=recipe.clip_high
    )


def _divergence_masked(recipe: RecipeFields, x: SurrogateInputs) -> Array:
    return surrogates.divergence_masked(
        present(x.ratio), x.advantages, present(x.kl_t), threshold=recipe.divergence_threshold
    )


SURROGATES = {
    "score_function": Rule(_score_function),
    "importance_weighted": Rule(_importance_weighted, ("ratio",)),
    "clipped": Rule(_clipped, ("ratio",)),
    "dual_clipped": Rule(_dual_clipped, ("ratio",)),
    "clipped_weight": Rule(_clipped_weight, ("ratio",)),
    "divergence_masked": Rule(_divergence_masked, ("ratio", "kl_t")),
}
"""Rules of (recipe, `SurrogateInputs`): the loss of each token."""


class CorrectionInputs(NamedTuple):
    """What a correction may read: log pi_old - log mu of each token, and which tokens the policy sampled."""

    log_weight: Float[Array, "B T"]
    response_mask: Bool[Array, "B T"]


def _token_truncated(recipe: RecipeFields, x: CorrectionInputs) -> Array:
    return corrections.token_truncated(x.log_weight, x.response_mask, cap=recipe.correction_high)


def _token_masked(recipe: RecipeFields, x: CorrectionInputs) -> Array:
    return corrections.token_masked(
        x.log_weight, x.response_mask, low=recipe.correction_low, high=recipe.correction_high
    )


def _sequence_truncated(recipe: RecipeFields, x: CorrectionInputs) -> Array:
    return corrections.sequence_truncated(x.log_weight, x.response_mask, cap=recipe.correction_high)


def _sequence_masked(recipe: RecipeFields, x: CorrectionInputs) -> Array:
    return corrections.sequence_masked(
        x.log_weight, x.response_mask, low=recipe.correction_low, high=recipe.correction_high
    )


def _geometric_masked(recipe: RecipeFields, x: CorrectionInputs) -> Array:
    return corrections.geometric_masked(
        x.log_weight, x.response_mask, low=recipe.correction_low, high=recipe.correction_high
    )


_BOTH = ("log_prob_old", "log_prob_behaviour")

CORRECTIONS = {
    "token_truncated": Rule(_token_truncated, _BOTH),
    "token_masked": Rule(_token_masked, _BOTH),
    "sequence_truncated": Rule(_sequence_truncated, _BOTH),
    "sequence_masked": Rule(_sequence_masked, _BOTH),
    "geometric_masked": Rule(_geometric_masked, _BOTH),
}
"""Rules of (recipe, `CorrectionInputs`): the weight of each token."""

PRODUCTS = ("sequence_truncated", "sequence_masked")
"""Corrections that are a product over the sequence: one token outside the safe set makes all of its weights 0."""


class MaskInputs(NamedTuple):
    """What a mask may read."""

    response_mask: Bool[Array, "B T"]
    log_prob: Float[Array, "B T"]
    log_prob_behaviour: Float[Array, "B T"] | None = None
    kl_t: Float[Array, "B T"] | None = None

    def log_ratio(self) -> Float[Array, "B T"]:
        """log pi - log mu of each sampled token [nats]."""
        return token_log_ratio(self.log_prob, present(self.log_prob_behaviour), self.response_mask)


def _maximum(recipe: RecipeFields, x: MaskInputs) -> Array:
    return masks.accept_by_maximum(present(x.kl_t), x.response_mask, threshold=recipe.mask_maximum)


def _average(recipe: RecipeFields, x: MaskInputs) -> Array:
    return masks.accept_by_average(present(x.kl_t), x.response_mask, threshold=recipe.mask_average)


def _both(recipe: RecipeFields, x: MaskInputs) -> Array:
    return masks.accept_by_both(
        present(x.kl_t), x.response_mask, maximum=recipe.mask_maximum, average=recipe.mask_average
    )


def _sampled_maximum(recipe: RecipeFields, x: MaskInputs) -> Array:
    return masks.accept_by_sampled_maximum(x.log_ratio(), x.response_mask, threshold=recipe.mask_maximum)


def _sampled_average(recipe: RecipeFields, x: MaskInputs) -> Array:
    return masks.accept_by_sampled_average(x.log_ratio(), x.response_mask, threshold=recipe.mask_average)


def _sampled_both(recipe: RecipeFields, x: MaskInputs) -> Array:
    return masks.accept_by_sampled_both(
        x.log_ratio(), x.response_mask, maximum=recipe.mask_maximum, average=recipe.mask_average
    )


def _ratio_deviation(recipe: RecipeFields, x: MaskInputs) -> Array:
    ratio = token_ratio(x.log_ratio(), x.response_mask)
    return masks.accept_by_ratio_deviation(ratio, x.response_mask, threshold=recipe.mask_average)


def horizon_weights(horizon: int, columns: int, *, slope: float) -> Float[Array, " T"]:
    """w_t = min(1, (horizon - t) slope) for t = 1 .. columns, never below 0: LN-TRM's weights of a fixed horizon.

    A token at t can change what happens in the horizon - t contexts after it, each by at most `slope` in total
    variation. The last token of the horizon has weight 0: nothing comes after it.

    Source: TRM (Li et al. 2025, arXiv 2512.23075), the weights of the adaptive bound.

    Args:
        horizon: the longest response that is allowed [tokens].
        columns: how many weights.
        slope: eps, the largest total variation of a context [prob].

    Returns:
        one weight per position in the response, 0 beyond the horizon.
    """
    left = jnp.asarray(horizon, jnp.result_type(float)) - jnp.arange(1, columns + 1, dtype=jnp.result_type(float))
    return jnp.clip(left * slope, 0.0, 1.0)


def _weighted_ratio_deviation(recipe: RecipeFields, x: MaskInputs) -> Array:
    # Columns become positions in the response, whatever stands before or between its tokens.
    order = jnp.argsort(~x.response_mask, axis=1, stable=True)
    ratio = jnp.take_along_axis(token_ratio(x.log_ratio(), x.response_mask), order, axis=1)
    mask = jnp.take_along_axis(x.response_mask, order, axis=1)
    columns = mask.shape[1]
    weights = horizon_weights(recipe.mask_horizon or columns, columns, slope=recipe.mask_slope)
    return masks.accept_by_weighted_ratio_deviation(
        ratio, mask, weights.astype(ratio.dtype), threshold=recipe.mask_average
    )


_KL = ("kl_t",)
_SAMPLED = ("log_prob_behaviour",)

MASKS = {
    "maximum": Rule(_maximum, _KL),
    "average": Rule(_average, _KL),
    "both": Rule(_both, _KL),
    "sampled_maximum": Rule(_sampled_maximum, _SAMPLED),
    "sampled_average": Rule(_sampled_average, _SAMPLED),
    "sampled_both": Rule(_sampled_both, _SAMPLED),
    "ratio_deviation": Rule(_ratio_deviation, _SAMPLED),
    "weighted_ratio_deviation": Rule(_weighted_ratio_deviation, _SAMPLED),
}
"""Rules of (recipe, `MaskInputs`): which sequences are accepted."""
