"""Divergence-augmented policy optimisation (DAPO, NeurIPS 2019; not the GRPO variant of the same letters).

Maximise reward minus (1/eta) D_F(mu_pi, mu_old), a Bregman divergence between state-action occupancies. Its gradient is
a policy gradient with the pseudo-reward phi = grad F(mu_pi) - grad F(mu_old) held constant, so the divergence enters
the advantage: A - coefficient D_t, D_t the discounted sum of phi from step t on, estimated off-policy by truncated
ratios.

Source: Wang et al. 2019 (arXiv 2501.15034) and its public code. For F the conditional negative entropy, phi = log
pi/pi_old and the statement is exact; other F would need the ratio of state densities as well (errata F8.4).

The three losses of the code are compositions of parts that exist already: A' = `augmented_advantages`, then
`surrogates.importance_weighted(ratio, A')` ("pgis"), `surrogates.clipped(ratio, A')` ("ppg"), and
`surrogates.clipped_weight(log_prob, ratio, A', clip_low=1, clip_high=0)` ("acerg").
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array
from jaxtyping import Bool
from jaxtyping import Float
from jaxtyping import ScalarLike

from jaxrl_llm.checks import checked
from jaxrl_llm.checks import require_choice
from jaxrl_llm.checks import require_dtype
from jaxrl_llm.checks import require_rank
from jaxrl_llm.checks import require_same_shape
from jaxrl_llm.masked import masked_mean
from jaxrl_llm.objectives.ratios import ratio_from_log

PSEUDO_REWARDS = ("kl", "reverse_kl", "hellinger", "total_variation", "entropy")
"""Divergences with a pseudo-reward, as `pseudo_reward` accepts them."""

EXPONENT_LIMIT = 3.0
"""Clamp of the log-ratio inside the exponentials of the pseudo-rewards, as in the released code [nats]."""


@checked
def pseudo_reward(
    log_prob: Float[Array, "*shape"], log_prob_old: Float[Array, "*shape"], *, divergence: str = "kl"
) -> Float[Array, "*shape"]:
    """phi(a) = f'(pi/pi_old) up to a constant, for D_f = sum_a pi_old f(pi/pi_old); a constant to the gradient.

    kl: log(pi/pi_old); reverse_kl: 1 - pi_old/pi; hellinger: 1 - sqrt(pi_old/pi); total_variation: sign(pi - pi_old) /
    2;
    entropy: log pi (F alone, no old policy).

    The exponents of reverse_kl and hellinger are clamped to 3 nats (`EXPONENT_LIMIT`), as in the released code, so that
    a rare action cannot dominate a batch; beyond the clamp they are not f' any more. The others are not clamped.

    Departures: the released code has pi_old sign(pi - pi_old) / 2 for total variation, which is not f' (errata F8.3),
    and one more pseudo-reward that belongs to no divergence named in the paper; both are left out.

    Args:
        log_prob: of the taken actions under the trained policy [nats].
        log_prob_old: under the policy at the start of the update [nats].
        divergence: a name of `PSEUDO_REWARDS`.

    Returns:
        the pseudo-reward of each action.

    Raises:
        ValueError: for an unknown name, or shapes that differ.
    """
    require_choice("divergence", divergence, PSEUDO_REWARDS)
    require_same_shape(log_prob=log_prob, log_prob_old=log_prob_old)
    log_ratio = jax.lax.stop_gradient(log_prob - log_prob_old)
    if divergence == "kl":
        return log_ratio
    if divergence == "reverse_kl":
        return -ratio_from_log(-log_ratio, limit=EXPONENT_LIMIT) + 1
    if divergence == "hellinger":
        return -ratio_from_log(-log_ratio / 2, limit=EXPONENT_LIMIT) + 1
    if divergence == "total_variation":
        return jnp.sign(log_ratio) / 2
    return jax.lax.stop_gradient(log_prob)


UNROLL = 8
"""Steps of the recursions in one turn of their loop: with few rows a turn costs more than what it computes."""


def _check(response_mask: Bool[Array, "B T"], **arrays: Float[Array, "B T"]) -> None:
    require_rank(2, "B T", response_mask=response_mask, **arrays)
    require_same_shape(response_mask=response_mask, **arrays)
    require_dtype("floating", **arrays)
    require_dtype("boolean", response_mask=response_mask)


def _per_step(discount: ScalarLike | Float[Array, "B T"], like: Float[Array, "B T"]) -> Float[Array, "B T"]:
    """A discount for each step of each row."""
    if jnp.ndim(discount):
        require_same_shape(ratio_t=like, discount=discount)
        require_dtype("floating", discount=discount)
    return jnp.broadcast_to(jnp.asarray(discount, like.dtype), like.shape)


@checked
def multi_step_divergence(
    pseudo_reward_t: Float[Array, "B T"],
    ratio_t: Float[Array, "B T"],
    response_mask: Bool[Array, "B T"],
    *,
    discount: ScalarLike | Float[Array, "B T"] = 0.99,
    trace_cap: ScalarLike = 1.0,
) -> Float[Array, "B T"]:
    """D_t = phi_t + discount_t W_{t+1},  W_t = min(1, rho_t) phi_t + discount_t min(trace_cap, rho_t) W_{t+1}, W = 0 at
    the end.

    Args:
        pseudo_reward_t: phi of each step.
        ratio_t: rho_t = pi / pi_old of the taken actions.
        response_mask: true at the steps of the policy; others are skipped.
        discount: of what follows a step; an array has one for each, 0 where an episode ends within a row.
        trace_cap: 1 gives the n-step sum; 0 keeps phi_t + discount min(1, rho_{t+1}) phi_{t+1}, which the code calls
            1-step.

    Returns:
        D_t, a constant to the gradient, 0 outside the mask.

    Raises:
        ValueError, TypeError: if the arrays are not [B, T] of one shape, floating, floating and boolean.

    Departures from the released code: its recursion reads phi of the wrong step (errata F8.1); this is the formula.
    """
    _check(response_mask, pseudo_reward_t=pseudo_reward_t, ratio_t=ratio_t)
    zeros = jnp.zeros(ratio_t.shape[0], ratio_t.dtype)

    def step(later, column):
        phi, ratio, real, factor = column
        value = phi + factor * later
        own = jnp.minimum(ratio, 1) * phi + factor * jnp.minimum(ratio, trace_cap) * later
        return jnp.where(real, own, later), jnp.where(real, value, zeros)

    columns = (pseudo_reward_t.T, ratio_t.T, response_mask.T, _per_step(discount, ratio_t).T)
    _, values = jax.lax.scan(step, zeros, columns, reverse=True, unroll=UNROLL)
    return jax.lax.stop_gradient(values.T)


@checked
def v_trace(
    values_t: Float[Array, "B T"],
    rewards_t: Float[Array, "B T"],
    ratio_t: Float[Array, "B T"],
    response_mask: Bool[Array, "B T"],
    *,
    discount: ScalarLike | Float[Array, "B T"] = 0.99,
    ratio_cap: ScalarLike = 1.0,
    trace_cap: ScalarLike = 1.0,
    bootstrap: Float[Array, " B"] | None = None,
) -> tuple[Float[Array, "B T"], Float[Array, "B T"]]:
    """V-trace: v_t = V_t + delta_t + discount_t min(trace_cap, rho_t)(v_{t+1} - V_{t+1}).

    Q_t = r_t + discount_t v_{t+1}, delta_t = min(ratio_cap, rho_t)(r_t + discount_t V_{t+1} - V_t). Source: IMPALA
    (Espeholt et al. 2018, arXiv 1802.01561, eq. 1).

    Args:
        values_t: V of the state in which step t was taken.
        rewards_t: reward of step t.
        ratio_t: rho_t = pi / pi_old of the taken actions.
        response_mask: true at the steps of the policy; others are skipped.
        discount: of what follows a step; an array has one for each, 0 where an episode ends within a row.
        ratio_cap: truncation of the correction.
        trace_cap: truncation of the trace.
        bootstrap: value after the last step of each row, 0 if None (the episode has ended). It enters V and v alike.

    Returns:
        (v_t, Q_t), constants to the gradient, 0 outside the mask; Q - V is the advantage.

    Raises:
        ValueError, TypeError: if ranks, shapes or dtypes do not fit.

    Departures from the released code: its Q ignores the end of an episode that its v respects (errata F8.2).
    """
    _check(response_mask, values_t=values_t, rewards_t=rewards_t, ratio_t=ratio_t)
    zeros = jnp.zeros(ratio_t.shape[0], ratio_t.dtype)
    last = zeros if bootstrap is None else bootstrap

    def step(carry, column):
        next_value, next_target = carry
        value, reward, ratio, real, factor = column
        delta = jnp.minimum(ratio, ratio_cap) * (reward + factor * next_value - value)
        target = value + delta + factor * jnp.minimum(ratio, trace_cap) * (next_target - next_value)
        q = reward + factor * next_target
        carry = (jnp.where(real, value, next_value), jnp.where(real, target, next_target))
        return carry, (jnp.where(real, target, zeros), jnp.where(real, q, zeros))

    columns = (values_t.T, rewards_t.T, ratio_t.T, response_mask.T, _per_step(discount, ratio_t).T)
    _, (targets, q) = jax.lax.scan(step, (last, last), columns, reverse=True, unroll=UNROLL)
    return jax.lax.stop_gradient(targets.T), jax.lax.stop_gradient(q.T)


@checked
def scaled_by_root_mean_square(
    advantages: Float[Array, "B T"], response_mask: Bool[Array, "B T"]
) -> Float[Array, "B T"]:
    """A / sqrt(mean of A^2 over response tokens): scaled, not centred; 0 where all are 0.

    Departures from the released code: no 1e-4 is added to the denominator.
    """
    _check(response_mask, advantages=advantages)
    advantages = jnp.where(response_mask, advantages, jnp.zeros((), advantages.dtype))
    mean_square = masked_mean(jnp.square(advantages), response_mask)
    positive = mean_square > 0
    root = jnp.sqrt(jnp.where(positive, mean_square, jnp.ones((), mean_square.dtype)))
    return jnp.where(positive, advantages / root, jnp.zeros((), advantages.dtype))


@checked
def augmented_advantages(
    advantages: Float[Array, "B T"], divergence_t: Float[Array, "B T"], *, coefficient: ScalarLike
) -> Float[Array, "B T"]:
    """A_t - coefficient D_t, a constant to the gradient: what every one of the three losses puts into its surrogate.

    Args:
        advantages: of each step.
        divergence_t: from `multi_step_divergence`.
        coefficient: 1 / eta (1 in the named runs of the code, 0.5 in some).

    Returns:
        the augmented advantage of each step.

    Raises:
        ValueError: if the shapes differ.
    """
    require_same_shape(advantages=advantages, divergence_t=divergence_t)
    return jax.lax.stop_gradient(advantages - coefficient * divergence_t)
