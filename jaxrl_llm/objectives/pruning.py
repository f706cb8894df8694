"""Dynamic vocabulary pruning (DVP): the objective of the policy renormalised on a safe set.

    pi_S(a|c) = pi(a|c) 1[a in V_S(c)] / Z(c),   V_S(c) = { a : pi(a|c) >= exp(log_min_p) max_k pi(k|c) },   Z =
    pi(V_S|c).

The safe set is relative to the largest logit, so shifting all logits changes nothing; public code overwrites pruned
logits with a constant instead, which under a shift can make a pruned token the most likely one (errata F3.3). A sampled
token outside the training policy's safe set has importance weight 0 and contributes neither loss nor gradient.

Source: "Taming the Tail" (arXiv 2512.23087). From hidden states, `jaxrl_kernels.token_statistics(..., log_min_p=...)`
gives the same log-prob, kept mass and membership.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array
from jaxtyping import Bool
from jaxtyping import Float
from jaxtyping import Int
from jaxtyping import ScalarLike

from jaxrl_llm import categorical
from jaxrl_llm.checks import checked
from jaxrl_llm.checks import require_dtype
from jaxrl_llm.checks import require_rank
from jaxrl_llm.checks import require_same_shape
from jaxrl_llm.objectives.ratios import sequence_ratio
from jaxrl_llm.objectives.ratios import token_log_ratio
from jaxrl_llm.objectives.ratios import token_ratio


class PrunedLogProb(NamedTuple):
    """Log-probabilities of targets under the pruned policy.

    Attributes:
        log_prob: log pi_S(a) [nats] where the target is in the safe set; 0, with gradient 0, where it is not, and NaN
            where it is no token of the vocabulary.
        kept: true where the target is in the safe set.
        kept_mass: Z [prob], with its gradient.
    """

    log_prob: Float[Array, "*batch"]
    kept: Bool[Array, "*batch"]
    kept_mass: Float[Array, "*batch"]


@checked
def pruned_log_prob(
    logits: Float[Array, "*batch V"], targets: Int[Array, "*batch"], *, log_min_p: ScalarLike
) -> PrunedLogProb:
    """log pi_S of the targets, whether they are in the safe set, and its mass.

    d log pi_S(a) / dz = e_a - pi_S on the safe set and exactly 0 outside; the safe set is a constant to the gradient,
    which is right except where a logit lies on the threshold.

    Args:
        logits: already divided by the temperature.
        targets: token ids.
        log_min_p: log of the threshold relative to the most likely token [nats], <= 0; the paper's is about -13.

    Returns:
        `PrunedLogProb`.

    Raises:
        ValueError, TypeError: if logits are not floating, targets not integer, or log_min_p is a number above 0; for a
            target outside the vocabulary, where targets are known (not inside jit).
    """
    require_dtype("floating", logits=logits)
    require_dtype("integer", targets=targets)
    if isinstance(log_min_p, (int, float)) and log_min_p > 0:
        raise ValueError(f"log_min_p is {log_min_p}; it must be at most 0, since no token exceeds the most likely one.")
    keep = categorical.safe_set(logits, log_min_p=log_min_p)
    token = categorical.in_vocabulary(targets, logits.shape[-1])
    index = jnp.where(token, targets, jnp.zeros((), targets.dtype))
    kept = token & jnp.take_along_axis(keep, index[..., None], axis=-1)[..., 0]
    # A pruned target is replaced by the most likely token before the gather, so that no -inf enters the gradient.
    inside = jnp.where(kept, targets, jnp.argmax(logits, axis=-1).astype(targets.dtype))
    log_prob = categorical.log_prob(categorical.restrict(logits, keep), inside)
    zero, nan = jnp.zeros((), log_prob.dtype), jnp.array(jnp.nan, log_prob.dtype)
    log_prob = jnp.where(kept, log_prob, jnp.where(token, zero, nan))
    return PrunedLogProb(log_prob, kept, categorical.kept_mass(logits, keep))


def _check_kept(kept: Bool[Array, "B T"], response_mask: Bool[Array, "B T"]) -> None:
    require_rank(2, "B T", kept=kept, response_mask=response_mask)
    require_same_shape(kept=kept, response_mask=response_mask)
    require_dtype("boolean", kept=kept, response_mask=response_mask)


@checked
def pruned_token_weights(
    log_prob: Float[Array, "B T"],
    log_prob_behaviour: Float[Array, "B T"],
    kept: Bool[Array, "B T"],
    response_mask: Bool[Array, "B T"],
    *,
    cap: ScalarLike = 2.0,
) -> Float[Array, "B T"]:
    """w_t = min(pi_S / mu_S', cap) where the token is in the training safe set, else 0: token-level truncated
    correction.

    mu_S' is the inference policy on its own safe set. The weight turns the draw of a token into one of pi_S given its
    context, up to the mass of pi_S outside S', which the sampler never produces, and up to the cap. The contexts stay
    those that mu_S' visits, so a mean of weighted tokens is not an expectation under pi_S, however large the cap: a
    second token whose worth depends on the first keeps the first's frequency under mu_S' (errata F3.6).
    `pruned_sequence_weights` is unbiased up to P_{pi_S}(some token outside S').

    Args:
        log_prob: log pi_S of the sampled tokens [nats]; a constant here.
        log_prob_behaviour: log mu_S' as the sampler recorded it [nats].
        kept: true where the token is in the training policy's safe set.
        response_mask: true at the tokens that were sampled.
        cap: truncation of the weight.

    Returns:
        one weight per token, 1 outside the mask; a constant to the gradient.

    Raises:
        ValueError, TypeError: if the arrays are not [B, T] of one shape.
    """
    _check_kept(kept, response_mask)
    log_weight = token_log_ratio(log_prob, log_prob_behaviour, response_mask & kept)
    weight = jnp.minimum(token_ratio(log_weight, response_mask), cap)
    return jax.lax.stop_gradient(jnp.where(response_mask & ~kept, jnp.zeros((), weight.dtype), weight))


@checked
def pruned_sequence_weights(
    log_prob: Float[Array, "B T"],
    log_prob_behaviour: Float[Array, "B T"],
    kept: Bool[Array, "B T"],
    response_mask: Bool[Array, "B T"],
    *,
    cap: ScalarLike = 2.0,
) -> Float[Array, " B"]:
    """min(prod_t pi_S / mu_S', cap), and 0 for a sequence with any token outside the training safe set.

    Args, Raises as `pruned_token_weights`.

    Returns:
        one weight per sequence; a constant to the gradient. With cap = inf, E[w f] = E_{pi_S}[f 1(all tokens in S')]
        exactly.
    """
    _check_kept(kept, response_mask)
    log_weight = token_log_ratio(log_prob, log_prob_behaviour, response_mask & kept)
    weight = jnp.minimum(sequence_ratio(log_weight, response_mask), cap)
    outside = jnp.any(response_mask & ~kept, axis=1)
    return jax.lax.stop_gradient(jnp.where(outside, jnp.zeros((), weight.dtype), weight))
