"""Balance of a router's experts: how their loads are measured, and the two ways in which they are evened out.

A load is the number of tokens that were sent to an expert; padding does not count. Loads of micro-batches and of shards
are added before anything is made of them: a quotient of sums is not a sum of quotients.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array
from jaxtyping import Bool
from jaxtyping import Float
from jaxtyping import Int
from jaxtyping import ScalarLike

from jaxrl_llm.checks import checked
from jaxrl_llm.checks import require_at_least
from jaxrl_llm.masked import masked_sum
from jaxrl_llm.masked import safe_divide


class BalanceMetrics(NamedTuple):
    """How even the loads of E experts are; 0 everywhere where no token was sent.

    Attributes:
        violation: max_e c_e / mean_e c_e - 1: 0 where all loads are equal, E / k - 1 at most.
        entropy: of the shares c_e / sum c, over log E: 1 where all are equal, 0 where one expert has everything.
        dead: experts without any token. [experts]
    """

    violation: Float[Array, ""]
    entropy: Float[Array, ""]
    dead: Float[Array, ""]


@checked
def expert_loads(
    selection: Int[Array, "B T k"], token_mask: Bool[Array, "B T"], *, num_experts: int
) -> Float[Array, " E"]:
    """c_e = number of real tokens that were sent to expert e.

    Args:
        selection: the k experts of each token, 0 .. E - 1; anything at padding.
        token_mask: true at real tokens.
        num_experts: E.

    Returns:
        the loads, float32; they add up to k times the number of real tokens. [tokens]

    Raises:
        ValueError: fewer than one expert.
    """
    require_at_least("num_experts", num_experts, 1)
    sent = jnp.broadcast_to(token_mask[..., None], selection.shape)
    where = jnp.where(sent, selection, num_experts)
    return jnp.zeros(num_experts, jnp.float32).at[where.reshape(-1)].add(1.0, mode="drop")


@checked
def balance_metrics(loads: Float[Array, " E"]) -> BalanceMetrics:
    """Largest violation (arXiv:2408.15664, section 2.1), entropy, and dead experts.

    Args:
        loads: of `expert_loads`, added over everything that is to be judged. [tokens]
    """
    count, total = loads.shape[0], jnp.sum(loads)
    share = safe_divide(loads, total)
    entropy = -jnp.sum(jax.scipy.special.xlogy(share, share))
    some = total > 0
    return BalanceMetrics(
        violation=jnp.where(some, count * jnp.max(share) - 1, 0.0),
        entropy=entropy / jnp.log(count) if count > 1 else jnp.where(some, 1.0, 0.0),
        dead=jnp.where(some, jnp.sum(loads == 0), 0).astype(loads.dtype),
    )


@checked
def updated_router_bias(bias: Float[Array, " E"], loads: Float[Array, " E"], *, rate: ScalarLike) -> Float[Array, " E"]:
    """b_e + rate sign(mean c - c_e), less its mean: balance without a loss.

    Experts with less than the mean load are chosen sooner the next time. The bias moves once per optimiser step, by the
    loads of the whole batch, and never in evaluation or in a recomputed forward pass.

    Source: Wang et al. 2024 (arXiv:2408.15664, algorithm 1); GLM-4.5 (arXiv:2508.06471, section 2.4): rate 0.001 for
    the first 15 trillion tokens, then 0.

    Args:
        bias: what is added to an expert's score where experts are chosen.
        loads: of `expert_loads`. [tokens]
        rate: how far a bias moves; 0 freezes it.

    Departures from the paper: the mean is taken away. Choices depend on differences alone, so it changes none of them,
    and the bias cannot drift to where float32 is coarse.
    """
    moved = bias + rate * jnp.sign(jnp.mean(loads) - loads)
    return jnp.where(rate == 0, bias, moved - jnp.mean(moved))


@checked
def sequence_balance_loss(
    scores: Float[Array, "B T E"], selection: Int[Array, "B T k"], token_mask: Bool[Array, "B T"]
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """sum over sequences of sum_e f_e P_e, where the share of a sequence's n tokens that chose e is held constant:

        f_e = E / (k n) #{t : e chosen by t},   P_e = 1/n sum_t s_te / sum_j s_tj

    1 for a sequence whose loads are even, E / k at most; its gradient lowers the scores of the experts that were chosen
    often.

    Source: DeepSeek-V3 (arXiv:2412.19437, equations 17 to 20); GLM-4.5 weighs it with 0.0001.

    Args:
        scores: of every expert, without the correction bias, 0 or more.
        selection: the k experts of each token.
        token_mask: true at real tokens.

    Returns:
        (sum over sequences, number of sequences with a token).
    """
    count, chosen = scores.shape[-1], selection.shape[-1]
    tokens = jnp.sum(token_mask, axis=1).astype(scores.dtype)
    loads = jax.vmap(lambda one, mask: expert_loads(one[None], mask[None], num_experts=count))(selection, token_mask)
    share = safe_divide(count * loads, chosen * tokens[:, None])
    # A NaN at padding would reach the gradient through the quotient.
    inside = jnp.where(token_mask[..., None], scores, 1.0)
    relative = safe_divide(inside, jnp.sum(inside, axis=-1, keepdims=True))
    mean = safe_divide(masked_sum(relative, token_mask[..., None], axis=1), tokens[:, None])
    return jnp.sum(jax.lax.stop_gradient(share) * mean), jnp.sum(tokens > 0).astype(scores.dtype)
