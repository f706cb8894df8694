"""The surrogate, its error and the distances, estimated from sampled responses: what the bounds are to be compared
with.

Responses come from mu; l_t = log pi(y_t|c_t) - log mu(y_t|c_t), rho_t = exp l_t. Every l_t and every sum of them is
clamped to [-limit, limit] nats before it is exponentiated (20 by default), which matters only for policies that are far
apart. Every estimate is a mean over sequences with a standard error clustered by group: answers to one prompt are not
independent. Rows without a response token are not sequences.

"Unbiased" of an error, a gain of J or a TV means: if mu can sample whatever pi can. Of what only pi can draw no sample
tells; E_pi[R 1(y is such a response)] is then missing. So is, from every expectation of rho_t - 1, the mass x_t that pi
has on such tokens: E_mu[rho_t - 1 | c_t] = -x_t and E_mu[|rho_t - 1| | c_t] = 2 TV - x_t. A baseline b then adds b
E_mu[sum_t x_t] to a surrogate gain, which without one is right as L' is defined. `sampled_sequence_tv_one_sided` alone
needs no such assumption (errata F2.20).
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array
from jaxtyping import Bool
from jaxtyping import Float
from jaxtyping import Int
from jaxtyping import ScalarLike

from jaxrl_llm.bounds.inputs import safe_sqrt
from jaxrl_llm.checks import checked
from jaxrl_llm.checks import require_dtype
from jaxrl_llm.checks import require_rank
from jaxrl_llm.checks import require_same_shape
from jaxrl_llm.masked import masked_count
from jaxrl_llm.masked import masked_mean

LOG_RATIO_LIMIT = 20.0


class Estimate(NamedTuple):
    """A mean over sequences and its standard error.

    Attributes:
        value: the mean.
        standard_error: clustered by group; infinite where there is only one group, since nothing is known then.
    """

    value: Float[Array, ""]
    standard_error: Float[Array, ""]


@checked
def clustered_mean(
    values: Float[Array, " B"], real: Bool[Array, " B"], group_ids: Int[Array, " B"] | None = None
) -> Estimate:
    """Mean of values over rows that are sequences, with the standard error of a mean over G clusters.

    m = sum_i v_i / n;  se^2 = G / (G - 1) sum_g ( sum_{i in g} (v_i - m) )^2 / n^2, the usual cluster-robust form.

    Args:
        values: one number per row.
        real: true for rows that are sequences.
        group_ids: equal for sequences that answer the same prompt; None makes every row its own cluster.

    Returns:
        the estimate.

    Raises:
        ValueError, TypeError: if the ranks or shapes differ from [B].
    """
    require_rank(1, "B", values=values, real=real, group_ids=group_ids)
    require_same_shape(values=values, real=real, group_ids=group_ids)
    rows = values.shape[0]
    if group_ids is None:
        segments = jnp.arange(rows)
    else:
        segments = jnp.unique(group_ids, return_inverse=True, size=rows)[1]
    mean = masked_mean(values, real)
    count = masked_count(values, real)
    deviation = jnp.where(real, values - mean, jnp.zeros((), values.dtype))
    sums = jax.ops.segment_sum(deviation, segments, num_segments=rows)
    ones = jnp.where(real, jnp.ones((), values.dtype), jnp.zeros((), values.dtype))
    groups = jnp.sum(jax.ops.segment_max(ones, segments, num_segments=rows) > 0, dtype=values.dtype)
    several = groups > 1
    scale = jnp.where(several, groups / jnp.maximum(groups - 1, 1), jnp.ones((), values.dtype))
    squared = scale * jnp.sum(sums * sums) / jnp.maximum(count * count, 1)
    return Estimate(mean, jnp.where(several, safe_sqrt(squared), jnp.array(jnp.inf, values.dtype)))


def _prepare(
    log_ratio_t: Float[Array, "B T"], response_mask: Bool[Array, "B T"], rewards: Float[Array, " B"] | None = None
) -> tuple[Float[Array, "B T"], Bool[Array, " B"]]:
    # The log-ratio with 0 outside the mask, and which rows are sequences.
    require_rank(2, "B T", log_ratio_t=log_ratio_t, response_mask=response_mask)
    require_same_shape(log_ratio_t=log_ratio_t, response_mask=response_mask)
    require_dtype("floating", log_ratio_t=log_ratio_t, rewards=rewards)
    require_dtype("boolean", response_mask=response_mask)
    require_rank(1, "B", rewards=rewards)
    if rewards is not None and rewards.shape[0] != log_ratio_t.shape[0]:
        raise ValueError(
            f"rewards has {rewards.shape[0]} sequences and log_ratio_t {log_ratio_t.shape[0]}; make them equal."
        )
    return jnp.where(response_mask, log_ratio_t, jnp.zeros((), log_ratio_t.dtype)), jnp.any(response_mask, axis=1)


def _expm1(log_ratio: Float[Array, "*shape"], limit: ScalarLike) -> Float[Array, "*shape"]:
    return jnp.expm1(jnp.clip(log_ratio, jnp.negative(limit), limit))


def _ratio_form(log_ratio: Float[Array, "B T"], limit: ScalarLike) -> Float[Array, " B"]:
    # prod rho - 1 - sum (rho - 1), telescoped. A masked token adds nothing: its own factor expm1(0) is 0.
    after = jnp.cumsum(log_ratio[:, ::-1], axis=1)[:, ::-1] - log_ratio
    return jnp.sum(_expm1(log_ratio, limit) * _expm1(after, limit), axis=1)


@checked
def sampled_surrogate_error(
    log_ratio_t: Float[Array, "B T"],
    response_mask: Bool[Array, "B T"],
    rewards: Float[Array, " B"],
    *,
    group_ids: Int[Array, " B"] | None = None,
    baseline: ScalarLike = 0.0,
    limit: ScalarLike = LOG_RATIO_LIMIT,
) -> Estimate:
    """Unbiased estimate of Error = J(pi) - J(mu) - L'(pi) by its ratio form.

    Error = -E_mu[ R sum_t (rho_t - 1)(1 - prod_{j>t} rho_j) ] = E_mu[ R sum_t expm1(l_t) expm1(sum_{j>t} l_j) ].
    The second form does not cancel when the ratios are near 1. Source: TRM, arXiv 2512.23075, the telescoping product
    identity of its appendix.

    Args:
        log_ratio_t: log pi - log mu of the sampled tokens [nats].
        response_mask: true at the tokens that mu sampled.
        rewards: one per sequence.
        group_ids: equal for sequences that answer the same prompt; None makes every sequence its own cluster.
        baseline: subtracted from every reward. Where mu can sample whatever pi can, the expectation does not depend on
            it, the variance does; the middle of the reward range is safe, and a mean of the same rewards adds a bias of
            order 1/B. Otherwise use 0.
        limit: clamp of l_t and of its partial sums [nats].

    Returns:
        the estimate, in units of reward.

    Raises:
        ValueError, TypeError: if the arrays are not [B, T], [B, T] and [B] of floating, boolean and floating type.
    """
    log_ratio, real = _prepare(log_ratio_t, response_mask, rewards)
    return clustered_mean((rewards - baseline) * _ratio_form(log_ratio, limit), real, group_ids)


@checked
def sampled_worst_surrogate_error(
    log_ratio_t: Float[Array, "B T"],
    response_mask: Bool[Array, "B T"],
    *,
    group_ids: Int[Array, " B"] | None = None,
    limit: ScalarLike = LOG_RATIO_LIMIT,
) -> Estimate:
    """Unbiased estimate of E_mu[max(0, -X)], X = prod_t rho_t - 1 - sum_t (rho_t - 1): the worst reward's |Error|.

    Error = E_mu[R X] and E_mu X = 0, so over all rewards in [0, 1] the largest |Error| is E_mu max(0, -X), attained by
    R = 1 where X < 0. No bound on |Error| that does not read the rewards can be below it; it is at most D_KL and at
    most sum_t Dbar_t (docs/theory.md). Each term is at most sum_t (rho_t - 1 - log rho_t). Derived here.

    This needs that mu can sample whatever pi can. Otherwise it is the largest -Error alone, and what only pi can draw
    may be rewarded: at T = 1 it is 0, and the largest |Error| the mass of that (errata F2.20).

    Args:
        log_ratio_t: log pi - log mu of the sampled tokens [nats].
        response_mask: true at the tokens that mu sampled.
        group_ids: equal for sequences that answer the same prompt; None makes every sequence its own cluster.
        limit: clamp of l_t and of its partial sums [nats].

    Returns:
        the estimate, in units of the span of the rewards.

    Raises:
        ValueError, TypeError: if the arrays are not [B, T] of one shape, floating and boolean.
    """
    log_ratio, real = _prepare(log_ratio_t, response_mask)
    return clustered_mean(jnp.maximum(-_ratio_form(log_ratio, limit), 0), real, group_ids)


@checked
def sampled_surrogate_gain(
    log_ratio_t: Float[Array, "B T"],
    response_mask: Bool[Array, "B T"],
    rewards: Float[Array, " B"],
    *,
    group_ids: Int[Array, " B"] | None = None,
    baseline: ScalarLike = 0.0,
    limit: ScalarLike = LOG_RATIO_LIMIT,
) -> Estimate:
    """Unbiased estimate of L'(pi) = E_mu[ R sum_t (rho_t - 1) ], the gain that the surrogate promises.

    What it promises depends on where rewards start unless mu can sample whatever pi can: rewards of -3 everywhere and a
    mass of 0.02 that mu cannot draw have L' = 0.06 and a gain of 0 (errata F2.20). Args, Raises as
    `sampled_surrogate_error`.

    Returns:
        the estimate, in units of reward.
    """
    log_ratio, real = _prepare(log_ratio_t, response_mask, rewards)
    return clustered_mean((rewards - baseline) * jnp.sum(_expm1(log_ratio, limit), axis=1), real, group_ids)


@checked
def sampled_gain(
    log_ratio_t: Float[Array, "B T"],
    response_mask: Bool[Array, "B T"],
    rewards: Float[Array, " B"],
    *,
    group_ids: Int[Array, " B"] | None = None,
    baseline: ScalarLike = 0.0,
    limit: ScalarLike = LOG_RATIO_LIMIT,
) -> Estimate:
    """Unbiased estimate of J(pi) - J(mu) = E_mu[ R (prod_t rho_t - 1) ], by whole-sequence importance sampling.

    It equals the surrogate gain plus the surrogate error on every sample, up to rounding. Args, Raises as
    `sampled_surrogate_error`.

    Returns:
        the estimate, in units of reward; its variance grows quickly with the length.
    """
    log_ratio, real = _prepare(log_ratio_t, response_mask, rewards)
    return clustered_mean((rewards - baseline) * _expm1(jnp.sum(log_ratio, axis=1), limit), real, group_ids)


@checked
def sampled_sequence_tv(
    log_ratio_t: Float[Array, "B T"],
    response_mask: Bool[Array, "B T"],
    *,
    group_ids: Int[Array, " B"] | None = None,
    limit: ScalarLike = LOG_RATIO_LIMIT,
) -> Estimate:
    """Unbiased estimate of TV(P^mu, P^pi) = (1/2) E_mu | prod_t rho_t - 1 | between the laws of whole responses.

    Where mu cannot sample whatever pi can, half the mass of that is missing (the one-sided form misses nothing). Args,
    Raises as `sampled_surrogate_error`.

    Returns:
        the estimate [prob]; above 1 when a rare sequence has a large ratio.
    """
    log_ratio, real = _prepare(log_ratio_t, response_mask)
    return clustered_mean(jnp.abs(_expm1(jnp.sum(log_ratio, axis=1), limit)) / 2, real, group_ids)


@checked
def sampled_sequence_tv_one_sided(
    log_ratio_t: Float[Array, "B T"],
    response_mask: Bool[Array, "B T"],
    *,
    group_ids: Int[Array, " B"] | None = None,
    limit: ScalarLike = LOG_RATIO_LIMIT,
) -> Estimate:
    """Unbiased estimate of the same TV as E_mu[ max(0, 1 - prod_t rho_t) ], every term of which lies in [0, 1].

    It sums mu - pi where that is positive, so it holds whatever mu can sample. Args, Raises as
    `sampled_surrogate_error`.

    Returns:
        the estimate [prob], never above 1.
    """
    log_ratio, real = _prepare(log_ratio_t, response_mask)
    drop = -jnp.minimum(_expm1(jnp.sum(log_ratio, axis=1), limit), 0)
    return clustered_mean(drop, real, group_ids)


@checked
def sampled_weighted_deviation(
    log_ratio_t: Float[Array, "B T"],
    response_mask: Bool[Array, "B T"],
    weights_t: Float[Array, " T"],
    *,
    group_ids: Int[Array, " B"] | None = None,
    limit: ScalarLike = LOG_RATIO_LIMIT,
) -> Estimate:
    """E_mu[W], W = sum_t |rho_t - 1| w_t, from sampled log-probs alone; |Error| <= E_mu[W] for rewards in [0, 1].

    For weights w_t that are at least the TV between pi and mu over what follows position t, given any context: for
    instance w_t = min(1, (T - t) eps). Proof: Error = E_mu sum_t (rho_t - 1) E_mu[R (prod_{j>t} rho_j - 1) | c_t, y_t],
    and the inner expectation is a difference of mean rewards, at most w_t. Because E_mu |rho_t - 1| = 2 Dbar_t, it
    estimates the adaptive bound. All of this where mu can sample whatever pi can: else it sees too little and bounds
    nothing (at T = 1 it is 0, and the Error the reward of what mu cannot draw; errata F2.20).
    Source: the length-neutral variant of TRM (arXiv 2512.23075, appendix), which states 2 E_mu[W] (errata F2.2). The
    weights must belong to the largest length, not to the realised one (errata F2.12).

    Args:
        log_ratio_t: log pi - log mu of the sampled tokens [nats].
        response_mask: true at the tokens that mu sampled.
        weights_t: weight of each column.
        group_ids: equal for sequences that answer the same prompt.
        limit: clamp of the log-ratio [nats].

    Returns:
        the estimate of E_mu[W].

    Raises:
        ValueError, TypeError: if the arrays are not [B, T], [B, T] and [T].
    """
    log_ratio, real = _prepare(log_ratio_t, response_mask)
    require_rank(1, "T", weights_t=weights_t)
    return clustered_mean(jnp.sum(jnp.abs(_expm1(log_ratio, limit)) * weights_t[None, :], axis=1), real, group_ids)
