"""Baselines of single tokens, weighted by how much gradient was spent: the optimal token baseline and its twin.

Both are the constant B that minimises E[(R - B)^2 w_t], w_t a squared norm of logit gradients. Which norm depends on
the estimator whose variance is meant. A reward at position t times the score of everything before it, (R - B_t)
sum_{j<=t} grad log pi_j, has w_t = W_t, the cumulated norm (`optimal_token_baseline`). The sum over tokens of
(R - B_t) grad log pi_t, which a token loss with advantages R - B_t has, needs the norm of the token itself
(`own_token_baseline`); with cumulated norms its variance is not the smallest (errata F5.3). Both are exact where
different contexts have logits of their own.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array
from jaxtyping import Bool
from jaxtyping import Float
from jaxtyping import Int

from jaxrl_llm.checks import checked
from jaxrl_llm.checks import require_dtype
from jaxrl_llm.checks import require_rank
from jaxrl_llm.checks import require_same_shape
from jaxrl_llm.masked import safe_divide
from jaxrl_llm.objectives.advantages import group_centred


@checked
def spent_gradient(
    log_prob: Float[Array, "B T"], collision: Float[Array, "B T"], response_mask: Bool[Array, "B T"]
) -> Float[Array, "B T"]:
    """W_t = sum_{j<=t} (1 - 2 pi_j + C_j): cumulative squared norm of the logit gradients of the sampled tokens.

    Each term is |e_a - p|^2, the squared norm of d log pi(a) / dz (arXiv 2506.12912), computed as (1 - pi)^2 + (C -
    pi^2): the second part, the squares of the other tokens, lies in [0, (1 - pi)^2] and is held to it. So the term is
    never negative, and right within a factor of 2 even where pi is so near 1 that C says nothing about the others.

    Args:
        log_prob: of the sampled tokens [nats].
        collision: sum_k p_k^2 of each context [prob].
        response_mask: true at the tokens that the policy sampled.

    Returns:
        W_t, a constant to the gradient; outside the mask the last value before it.

    Raises:
        ValueError, TypeError: if the arrays are not [B, T] of one shape, floating, floating and boolean.
    """
    return jax.lax.stop_gradient(jnp.cumsum(_squared_norm(log_prob, collision, response_mask), axis=1))


def _squared_norm(
    log_prob: Float[Array, "B T"], collision: Float[Array, "B T"], response_mask: Bool[Array, "B T"]
) -> Float[Array, "B T"]:
    # |e_a - p|^2 of each sampled token, 0 outside the mask.
    require_rank(2, "B T", log_prob=log_prob, collision=collision, response_mask=response_mask)
    require_same_shape(log_prob=log_prob, collision=collision, response_mask=response_mask)
    require_dtype("floating", log_prob=log_prob, collision=collision)
    require_dtype("boolean", response_mask=response_mask)
    zero = jnp.zeros((), log_prob.dtype)
    log_p = jnp.where(response_mask, log_prob, zero)
    rest = jnp.square(jnp.expm1(log_p))  # (1 - p)^2
    others = jnp.clip(collision - jnp.exp(2 * log_p), zero, rest)
    return jnp.where(response_mask, rest + others, zero)


def _against_weighted_mean(
    rewards: Float[Array, " B"],
    weight: Float[Array, "B T"],
    response_mask: Bool[Array, "B T"],
    group_ids: Int[Array, " B"],
) -> Float[Array, "B T"]:
    # R_i - sum_i R_i w_{i,t} / sum_i w_{i,t} over the sequences of the group that have a token at t.
    weight = jnp.where(response_mask, weight, jnp.zeros((), weight.dtype))
    # Centred first: the baseline moves with a shift of the rewards, and equal rewards then give exactly zero.
    centred = group_centred(rewards, group_ids)
    if centred.shape[0] != weight.shape[0]:
        raise ValueError(f"rewards has {centred.shape[0]} sequences and log_prob {weight.shape[0]}; make them equal.")
    rows = rewards.shape[0]
    segments = jnp.unique(group_ids, return_inverse=True, size=rows)[1]

    def of_group(x: Float[Array, "B T"]) -> Float[Array, "B T"]:
        return jax.ops.segment_sum(x, segments, num_segments=rows)[segments]

    baseline = safe_divide(of_group(weight * centred[:, None]), of_group(weight))
    present = of_group(response_mask.astype(weight.dtype))
    # Alone at its position a sequence is its own baseline; written out, because R W / W misses R by a rounding.
    compared = response_mask & (present > 1) & (of_group(weight) > 0)
    return jax.lax.stop_gradient(jnp.where(compared, centred[:, None] - baseline, jnp.zeros((), weight.dtype)))


@checked
def optimal_token_baseline(
    rewards: Float[Array, " B"],
    log_prob: Float[Array, "B T"],
    collision: Float[Array, "B T"],
    response_mask: Bool[Array, "B T"],
    group_ids: Int[Array, " B"],
) -> Float[Array, "B T"]:
    """A_{i,t} = R_i - B_t,  B_t = sum_i R_i W_{i,t} / sum_i W_{i,t} over the sequences of the group that have a token
    at t.

    Source: verl's optimal token baseline, from the variance-minimising baseline E[R |score|^2] / E[|score|^2]. It
    minimises the variance of (R - B_t) sum_{j<=t} grad log pi_j, not that of the sum over tokens of (R - B_t) grad log
    pi_t, for which `own_token_baseline` is (errata F5.3). Columns are positions: responses of one group must start in
    the same column, as this project's batches do. The baseline contains the sequence itself, which adds a bias of order
    1 / group size.

    Args:
        rewards: one per sequence.
        log_prob: of the sampled tokens [nats].
        collision: sum_k p_k^2 of each context [prob].
        response_mask: true at the tokens that the policy sampled.
        group_ids: equal for sequences that answer the same prompt.

    Returns:
        one advantage per token, 0 outside the mask and wherever no other sequence of the group has a token at that
        position.

    Raises:
        ValueError, TypeError: if ranks, shapes or dtypes do not fit.
    """
    spent = spent_gradient(log_prob, collision, response_mask)
    return _against_weighted_mean(rewards, spent, response_mask, group_ids)


@checked
def own_token_baseline(
    rewards: Float[Array, " B"],
    log_prob: Float[Array, "B T"],
    collision: Float[Array, "B T"],
    response_mask: Bool[Array, "B T"],
    group_ids: Int[Array, " B"],
    *,
    token_weights: Float[Array, "B T"] | None = None,
) -> Float[Array, "B T"]:
    """A_{i,t} = R_i - B_t,  B_t = sum_i R_i n_{i,t} / sum_i n_{i,t},  n_{i,t} = |e_a - p|^2 of the token at t alone.

    Derived here: where every context has logits of its own, the scores of different tokens are orthogonal, so the
    variance of sum_t (R - B_t) grad log pi_t is a sum over t that these B_t minimise, each for itself. What
    `optimal_token_baseline` minimises is the variance of another estimator (errata F5.3).

    This holds where all tokens weigh the same ("seq-mean-token-sum"). With weights w_{i,t} in the loss, as the 1 /
    length of "seq-mean-token-mean", n is to be multiplied by w^2: give them as token_weights (errata F5.4). What is
    smallest then is the mean squared norm of sum_t w_t (R - B_t) grad log pi_t; a weight that depends on later tokens,
    as a length does, makes the expectation depend on every baseline.

    Args:
        rewards, log_prob, collision, response_mask, group_ids: as `optimal_token_baseline`.
        token_weights: w of each token in the loss, for instance `aggregation.token_weights`; equal if None.

    Returns, Raises as `optimal_token_baseline`.
    """
    norm = jax.lax.stop_gradient(_squared_norm(log_prob, collision, response_mask))
    if token_weights is not None:
        require_same_shape(log_prob=log_prob, token_weights=token_weights)
        norm = norm * jnp.square(jax.lax.stop_gradient(jnp.where(response_mask, token_weights, 0)).astype(norm.dtype))
    return _against_weighted_mean(rewards, norm, response_mask, group_ids)
