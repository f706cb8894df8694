"""Losses of pairs: in each group, the rows with more reward are preferred to those with less.

A pair (i, j) is two rows of one group with rewards_i > rewards_j; every such pair of a group counts once, whatever the
size of the group, so two rows with labels 1 and 0 are one pair, and a ranking of n rows is n (n - 1) / 2. Rows with
equal rewards are no pair (`dropped_pairs` counts them), and a row without response tokens is no row.

s_i = sum_t log pi(y_t|c_t) - log pi_ref(y_t|c_t) is the log-ratio of the whole answer. Sums of pairs add over batches
that keep groups whole; a group that is cut loses the pairs across the cut.
"""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array
from jaxtyping import Bool
from jaxtyping import Float
from jaxtyping import Int
from jaxtyping import ScalarLike

from jaxrl_llm.checks import checked
from jaxrl_llm.checks import require_numbers
from jaxrl_llm.masked import masked_sum_count
from jaxrl_llm.objectives.ratios import sequence_log_ratio
from jaxrl_llm.objectives.ratios import token_log_ratio
from jaxrl_llm.typing import SumCount

LEAST = 1e-30
"""The smallest beta and tau, of which the losses need to be positive."""


@checked
def preferred(
    rewards: Float[Array, " B"], group_ids: Int[Array, " B"], response_mask: Bool[Array, "B R"]
) -> Bool[Array, "B B"]:
    """True at [i, j] where row i is preferred to row j: same group, rewards_i > rewards_j, both with tokens.

    Args:
        rewards: one per row; only their order within a group is read. NaN is above and below nothing.
        group_ids: equal for rows that are compared with each other.
        response_mask: true at response tokens.

    Returns:
        one bool per ordered pair.
    """
    return _same_group(group_ids, response_mask) & (rewards[:, None] > rewards[None, :])


def _same_group(group_ids: Int[Array, " B"], response_mask: Bool[Array, "B R"]) -> Bool[Array, "B B"]:
    real = jnp.any(response_mask, axis=1)
    return (group_ids[:, None] == group_ids[None, :]) & real[:, None] & real[None, :]


def _margins(
    log_prob: Float[Array, "B R"],
    log_prob_ref: Float[Array, "B R"],
    response_mask: Bool[Array, "B R"],
    pairs: Bool[Array, "B B"],
) -> Float[Array, "B B"]:
    # 0 where there is no pair: an infinite s, less itself, would be NaN in the gradient.
    s = sequence_log_ratio(token_log_ratio(log_prob, log_prob_ref, response_mask), response_mask)
    zero = jnp.zeros((), s.dtype)
    return jnp.where(pairs, s[:, None], zero) - jnp.where(pairs, s[None, :], zero)


@checked
def dpo(
    log_prob: Float[Array, "B R"],
    log_prob_ref: Float[Array, "B R"],
    response_mask: Bool[Array, "B R"],
    group_ids: Int[Array, " B"],
    rewards: Float[Array, " B"],
    *,
    beta: ScalarLike = 0.1,
) -> SumCount:
    """sum over pairs of -log sigmoid( beta (s_i - s_j) ), i preferred to j, and the number of pairs.

    Its gradient in s_i is -beta sigmoid(-beta (s_i - s_j)), and the opposite in s_j. If pairs are drawn by
    Bradley-Terry with rewards r, the minimum is pi_ref exp(r / beta), normalised.
    Source: DPO (Rafailov et al. 2023, arXiv 2305.18290, eq. 7); for more than two rows per group, every pair of the
    ranking (not the Plackett-Luce likelihood of the paper's appendix).

    Args:
        log_prob: of the tokens under the trained policy [nats], with its gradient.
        log_prob_ref: under the reference policy [nats]; a constant.
        response_mask: true at the tokens of the answers.
        group_ids: equal for the sides of a pair, or for all answers to one prompt.
        rewards: one per row; only their order within a group is read.
        beta: the weight of KL(pi || pi_ref) in the problem whose optimum this is, in reward per nat; above 0.

    Returns:
        (sum, number of pairs); add those of micro-batches and shards, then divide.

    Raises:
        ValueError: if beta is not above 0.
    """
    require_numbers(LEAST, math.inf, beta=beta)
    pairs = preferred(rewards, group_ids, response_mask)
    losses = jax.nn.softplus(jnp.negative(beta * _margins(log_prob, log_prob_ref, response_mask, pairs)))
    return masked_sum_count(losses, pairs)


@checked
def ipo(
    log_prob: Float[Array, "B R"],
    log_prob_ref: Float[Array, "B R"],
    response_mask: Bool[Array, "B R"],
    group_ids: Int[Array, " B"],
    rewards: Float[Array, " B"],
    *,
    tau: ScalarLike = 0.1,
) -> SumCount:
    """sum over pairs of ( (s_i - s_j) - 1 / (2 tau) )^2, i preferred to j, and the number of pairs.

    Where i is preferred to j in a share p of the pairs of the two, the minimum is s_i - s_j = (2 p - 1) / (2 tau): it
    stays finite where p = 1, which that of DPO does not.
    Source: IPO (Azar et al. 2023, arXiv 2310.12036, eq. 17).

    Departures: none. Several implementations divide s_i and s_j by the lengths of the answers, which is another
    objective, with another tau; this is the paper's form, of whole answers.

    Args:
        log_prob, log_prob_ref, response_mask, group_ids, rewards: as in `dpo`.
        tau: the weight of KL(pi || pi_ref) against the probability of being preferred, per nat; above 0.

    Returns:
        (sum [nats^2], number of pairs); add those of micro-batches and shards, then divide.

    Raises:
        ValueError: if tau is not above 0.
    """
    require_numbers(LEAST, math.inf, tau=tau)
    pairs = preferred(rewards, group_ids, response_mask)
    margins = _margins(log_prob, log_prob_ref, response_mask, pairs)
    return masked_sum_count(jnp.square(margins - jnp.asarray(1 / (2 * tau), margins.dtype)), pairs)


@checked
def dropped_pairs(
    rewards: Float[Array, " B"], group_ids: Int[Array, " B"], response_mask: Bool[Array, "B R"]
) -> SumCount:
    """(number of pairs of rows of one group that are not compared, number of all): their rewards are equal, or NaN."""
    earlier = jnp.triu(jnp.ones((rewards.shape[0],) * 2, bool), k=1)
    together = _same_group(group_ids, response_mask) & earlier
    above = preferred(rewards, group_ids, response_mask)
    dropped = (together & ~(above | above.T)).astype(rewards.dtype)
    return masked_sum_count(dropped, together)


@checked
def preference_metrics(
    log_prob: Float[Array, "B R"],
    log_prob_ref: Float[Array, "B R"],
    response_mask: Bool[Array, "B R"],
    group_ids: Int[Array, " B"],
    rewards: Float[Array, " B"],
    *,
    beta: ScalarLike = 0.1,
) -> dict[str, SumCount]:
    """Name -> (sum, count), constants to the gradient: what to look at while pairs are learned.

    Per pair: accuracy (the implicit reward beta s orders the pair as its rewards do; a tie does not), margin (beta
    (s_i - s_j)), log_ratio_preferred and log_ratio_other (s_i and s_j [nats]: both may fall while the margin grows).
    Per pair of rows of one group: dropped (not compared).

    Args:
        log_prob, log_prob_ref, response_mask, group_ids, rewards, beta: as in `dpo`; tau in the place of beta for
            `ipo`.

    Returns:
        the pairs; add those of micro-batches and shards, then divide.
    """
    s = sequence_log_ratio(token_log_ratio(log_prob, log_prob_ref, response_mask), response_mask)
    margins = s[:, None] - s[None, :]
    values = {
        "accuracy": (margins > 0).astype(s.dtype),
        "margin": beta * margins,
        "log_ratio_preferred": jnp.broadcast_to(s[:, None], margins.shape),
        "log_ratio_other": jnp.broadcast_to(s[None, :], margins.shape),
    }
    pairs = preferred(rewards, group_ids, response_mask)
    metrics = {name: masked_sum_count(x, pairs) for name, x in values.items()}
    metrics["dropped"] = dropped_pairs(rewards, group_ids, response_mask)
    return jax.tree.map(jax.lax.stop_gradient, metrics)
