"""Entropy-modulated advantages (EMPG): steps of a trajectory weighted by how certain the policy was.

A response is cut into steps (`step_ids`, -1 outside any step). H is the mean token entropy of a step under the policy
that sampled. Everything here is a constant to the gradient; the result replaces the advantage of a clipped
policy-gradient loss.

Source: EMPG (Wang et al. 2025, arXiv 2509.09265, eqs. 7, 8, 10, 11, 12).

Departures from the paper: no 1e-8 is added to denominators. Where all steps of the batch have the same entropy, the
normalised entropy is 0 by definition, so the scale is 1.
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
from jaxrl_llm.checks import require_dtype
from jaxrl_llm.checks import require_numbers
from jaxrl_llm.checks import require_rank
from jaxrl_llm.checks import require_same_shape
from jaxrl_llm.masked import masked_max
from jaxrl_llm.masked import masked_mean
from jaxrl_llm.masked import masked_min
from jaxrl_llm.masked import masked_sum
from jaxrl_llm.masked import safe_divide


@checked
def step_entropy(
    entropy: Float[Array, "B T"], step_ids: Int[Array, "B T"], response_mask: Bool[Array, "B T"], *, steps: int
) -> tuple[Float[Array, "B K"], Bool[Array, "B K"]]:
    """H_k = mean entropy of the response tokens of step k (eq. 7).

    Args:
        entropy: exact entropy of the context of each token under the policy that sampled [nats].
        step_ids: index of the step of each token in 0..steps-1, -1 outside any step.
        response_mask: true at the tokens that the policy sampled.
        steps: the largest number of steps of a trajectory.

    Returns:
        (mean entropy of each step, 0 where there is none; true where the trajectory has that step).

    Raises:
        ValueError, TypeError: if the arrays are not [B, T] of one shape, floating, integer and boolean.
    """
    require_numbers(1, math.inf, steps=steps)
    require_rank(2, "B T", entropy=entropy, step_ids=step_ids, response_mask=response_mask)
    require_same_shape(entropy=entropy, step_ids=step_ids, response_mask=response_mask)
    require_dtype("floating", entropy=entropy)
    require_dtype("integer", step_ids=step_ids)
    require_dtype("boolean", response_mask=response_mask)
    inside = response_mask & (step_ids >= 0) & (step_ids < steps)
    slot = jnp.where(inside, step_ids, steps)  # one slot more, for what belongs to no step
    clean = jnp.where(inside, jax.lax.stop_gradient(entropy), jnp.zeros((), entropy.dtype))

    def of_row(values, slots):
        total = jax.ops.segment_sum(values, slots, num_segments=steps + 1)[:steps]
        count = jax.ops.segment_sum(jnp.ones_like(values), slots, num_segments=steps + 1)[:steps]
        return safe_divide(total, count), count > 0

    return jax.vmap(of_row)(clean, slot)


@checked
def entropy_before_step(
    entropy: Float[Array, "B T"], step_ids: Int[Array, "B T"], response_mask: Bool[Array, "B T"], *, steps: int
) -> tuple[Float[Array, "B K"], Bool[Array, "B K"]]:
    """The entropy of the first response token of step k: what is known of a step before it is taken.

    Not in the paper, whose mean over the step (`step_entropy`) depends on the tokens taken in it. Args, Returns, Raises
    as `step_entropy`.
    """
    inside = response_mask & (step_ids >= 0) & (step_ids < steps)
    taken = inside[:, :, None] & (step_ids[:, :, None] == jnp.arange(steps)[None, None, :])
    first = taken & (jnp.cumsum(taken, axis=1) == 1)
    alone = jnp.where(jnp.any(first, axis=2), step_ids, -1)
    return step_entropy(entropy, alone, response_mask, steps=steps)


@checked
def normalised_entropy(step_h: Float[Array, "B K"], step_mask: Bool[Array, "B K"]) -> Float[Array, "B K"]:
    """(H - min H) / (max H - min H) over all steps of the batch (eq. 12); 0 where no step exists or all are equal.

    Two outlying steps set the scale, and steps of different prompts are compared.
    """
    low, high = masked_min(step_h, step_mask), masked_max(step_h, step_mask)
    spread = jnp.where(jnp.any(step_mask), high - low, jnp.zeros((), step_h.dtype))
    above = jnp.where(step_mask, step_h - jnp.where(jnp.any(step_mask), low, 0), jnp.zeros((), step_h.dtype))
    return safe_divide(above, jnp.broadcast_to(spread, above.shape))


@checked
def self_calibrating_scale(
    normalised: Float[Array, "B K"], step_mask: Bool[Array, "B K"], *, sharpness: ScalarLike = 1.0
) -> Float[Array, "B K"]:
    """g = exp(-k Hn) / mean over the batch of exp(-k Hn) (eq. 10): mean 1 over steps, larger where the policy was
    certain.

    The mean is 1 over steps, not over the advantage they carry: the mean of A g is not zero in general (errata F4.4).

    Args:
        normalised: from `normalised_entropy`.
        step_mask: true where the trajectory has that step.
        sharpness: k; the ratio of the largest to the smallest scale is at most exp(k).

    Returns:
        the scale of each step, 0 where there is none.
    """
    certain = jnp.exp(jnp.negative(sharpness) * normalised)
    mean = masked_mean(certain, step_mask)
    return jnp.where(step_mask, safe_divide(certain, jnp.broadcast_to(mean, certain.shape)), jnp.zeros((), mean.dtype))


@checked
def future_clarity(
    normalised: Float[Array, "B K"], step_mask: Bool[Array, "B K"], *, sharpness: ScalarLike = 1.0
) -> Float[Array, "B K"]:
    """f_k = exp(-k' Hn of the next step of the same trajectory) (eq. 11); 0 for the last step, which has no next one.

    The bonus has no sign: it pays for reaching a clear state whether or not the trajectory succeeds (errata F4.2).
    """
    next_exists = jnp.concatenate([step_mask[:, 1:], jnp.zeros_like(step_mask[:, :1])], axis=1) & step_mask
    next_value = jnp.concatenate([normalised[:, 1:], jnp.zeros_like(normalised[:, :1])], axis=1)
    return jnp.where(next_exists, jnp.exp(jnp.negative(sharpness) * next_value), jnp.zeros((), normalised.dtype))


@checked
def modulated_advantages(
    advantages: Float[Array, " B"],
    step_h: Float[Array, "B K"],
    step_mask: Bool[Array, "B K"],
    *,
    sharpness: ScalarLike = 1.0,
    clarity_sharpness: ScalarLike = 1.0,
    clarity_weight: ScalarLike = 0.1,
) -> Float[Array, "B K"]:
    """A_i g_k + zeta f_{k+1}, minus its mean over all steps of the batch (eq. 8 and the final normalisation).

    Args:
        advantages: one per trajectory (GRPO's or DAPO's).
        step_h: entropy of each step, from `step_entropy`.
        step_mask: true where the trajectory has that step.
        sharpness: k of the scale.
        clarity_sharpness: k' of the bonus.
        clarity_weight: zeta of the bonus (0.1 in the paper's listing; others use 0.05).

    Returns:
        one advantage per step, 0 where there is none; mean 0 over the steps of the batch.

    Raises:
        ValueError, TypeError: if the arrays are not [B], [B, K] and [B, K] of floating, floating and boolean type.
    """
    require_rank(1, "B", advantages=advantages)
    require_rank(2, "B K", step_h=step_h, step_mask=step_mask)
    require_same_shape(step_h=step_h, step_mask=step_mask)
    require_dtype("floating", advantages=advantages, step_h=step_h)
    require_dtype("boolean", step_mask=step_mask)
    normalised = normalised_entropy(step_h, step_mask)
    scale = self_calibrating_scale(normalised, step_mask, sharpness=sharpness)
    bonus = clarity_weight * future_clarity(normalised, step_mask, sharpness=clarity_sharpness)
    modulated = advantages[:, None] * scale + bonus
    return jax.lax.stop_gradient(
        jnp.where(step_mask, modulated - masked_mean(modulated, step_mask), jnp.zeros((), modulated.dtype))
    )


@checked
def potential_shaping(
    potential: Float[Array, "B K"], step_mask: Bool[Array, "B K"], *, discount: ScalarLike = 1.0
) -> Float[Array, "B K"]:
    """F_k = discount Phi_{k+1} - Phi_k, Phi := 0 after the last step: a reward that leaves the optimal policy as it is.

    Source: Ng, Harada and Russell 1999. It is a reward: what step k contributes to the policy gradient is the
    discounted sum of F_k, F_{k+1}, ..., see `potential_bonus`. Adding F_k alone to the advantage of step k is not
    invariant (errata F4.3).

    Args:
        potential: Phi of the state in which each step was taken, e.g. exp(-k' H) with H of `entropy_before_step`.
        step_mask: true where the trajectory has that step.
        discount: per step.

    Returns:
        the shaping reward of each step.
    """
    clean = jnp.where(step_mask, potential, jnp.zeros((), potential.dtype))
    following = jnp.concatenate([clean[:, 1:], jnp.zeros_like(clean[:, :1])], axis=1)
    return jnp.where(step_mask, discount * following - clean, jnp.zeros((), clean.dtype))


@checked
def potential_bonus(potential: Float[Array, "B K"], step_mask: Bool[Array, "B K"]) -> Float[Array, "B K"]:
    """sum_{j>=k} discount^(j-k) F_j = -Phi_k for every discount: the potential-based variant of the clarity bonus.

    Where Phi_k is a function of the state before step k, this is a baseline: it changes the variance of the gradient
    and not its expectation. The mean entropy of a step (`step_entropy`) is such a function for steps of one token only:
    in a longer one the entropies of its later tokens depend on its earlier ones, and the bonus moves the expected
    gradient (by -+0.042 at root logits (0.3, -0.2) before (2, -2) or (0.1, 0); errata F4.3). `entropy_before_step` is
    one for steps of any length. A scale taken from the batch (`normalised_entropy`) is a constant only if it does not
    come from the trajectory itself.
    """
    return jnp.where(step_mask, -potential, jnp.zeros((), potential.dtype))


@checked
def potential_modulated_advantages(
    advantages: Float[Array, " B"],
    step_h: Float[Array, "B K"],
    step_mask: Bool[Array, "B K"],
    *,
    sharpness: ScalarLike = 1.0,
    clarity_sharpness: ScalarLike = 1.0,
    clarity_weight: ScalarLike = 0.1,
) -> Float[Array, "B K"]:
    """A_i g_k - zeta exp(-k' Hn_k), minus its mean over all steps: EMPG with the potential-based bonus.

    The bonus leaves the expected gradient as it is only if step_h is known before the step: for steps of one token, or
    with `entropy_before_step` in the place of `step_entropy`, up to what the trajectory adds to the extremes of its own
    batch (see `potential_bonus`). Args, Returns, Raises as `modulated_advantages`.
    """
    require_rank(1, "B", advantages=advantages)
    require_rank(2, "B K", step_h=step_h, step_mask=step_mask)
    normalised = normalised_entropy(step_h, step_mask)
    scale = self_calibrating_scale(normalised, step_mask, sharpness=sharpness)
    clarity = jnp.exp(jnp.negative(clarity_sharpness) * normalised)
    modulated = advantages[:, None] * scale + clarity_weight * potential_bonus(clarity, step_mask)
    return jax.lax.stop_gradient(
        jnp.where(step_mask, modulated - masked_mean(modulated, step_mask), jnp.zeros((), modulated.dtype))
    )


@checked
def sign_preserving_scale(
    advantages: Float[Array, " B"],
    normalised: Float[Array, "B K"],
    step_mask: Bool[Array, "B K"],
    *,
    sharpness: ScalarLike = 1.0,
) -> Float[Array, "B K"]:
    """g = exp(-k Hn) sum |A| / sum |A| exp(-k Hn), both sums over the steps whose advantage has the sign of its own.

    Not in the paper, whose scale has mean 1 over steps and so moves the sum of A g away from that of A (errata F4.4).
    Here the sums of A g over the steps with A > 0 and over those with A < 0 are those of A: nothing has to be centred
    afterwards, and no step changes the sign of its advantage. Where A is 0 the scale is exp(-k Hn), and scales nothing.

    Args:
        advantages: one per trajectory.
        normalised: from `normalised_entropy`.
        step_mask: true where the trajectory has that step.
        sharpness: k.

    Returns:
        the scale of each step, 0 where there is none.
    """
    require_rank(1, "B", advantages=advantages)
    require_same_shape(normalised=normalised, step_mask=step_mask)
    certain = jnp.where(step_mask, jnp.exp(jnp.negative(sharpness) * normalised), jnp.zeros((), normalised.dtype))
    size = jnp.broadcast_to(jnp.abs(advantages)[:, None], certain.shape)
    scale = certain
    for side in (advantages > 0, advantages < 0):
        of_side = step_mask & side[:, None]
        share = safe_divide(masked_sum(size, of_side), masked_sum(size * certain, of_side))
        scale = jnp.where(of_side, certain * share, scale)
    return scale


@checked
def sign_preserving_advantages(
    advantages: Float[Array, " B"],
    step_h: Float[Array, "B K"],
    step_mask: Bool[Array, "B K"],
    *,
    sharpness: ScalarLike = 1.0,
) -> Float[Array, "B K"]:
    """A_i g_k with g of `sign_preserving_scale`: EMPG's scaling without its bonus and without its last centring.

    Args, Returns, Raises as `modulated_advantages`.
    """
    require_rank(2, "B K", step_h=step_h, step_mask=step_mask)
    normalised = normalised_entropy(step_h, step_mask)
    scale = sign_preserving_scale(advantages, normalised, step_mask, sharpness=sharpness)
    return jax.lax.stop_gradient(advantages[:, None] * scale)


@checked
def spread_to_tokens(
    per_step: Float[Array, "B K"], step_ids: Int[Array, "B T"], response_mask: Bool[Array, "B T"]
) -> Float[Array, "B T"]:
    """The value of its step at every response token; 0 outside any step.

    Args:
        per_step: one value per step.
        step_ids: index of the step of each token, -1 outside any step.
        response_mask: true at the tokens that the policy sampled.

    Returns:
        one value per token, ready for `policy_loss`.
    """
    steps = per_step.shape[1]
    inside = response_mask & (step_ids >= 0) & (step_ids < steps)
    values = jnp.take_along_axis(per_step, jnp.clip(step_ids, 0, steps - 1), axis=1)
    return jnp.where(inside, values, jnp.zeros((), per_step.dtype))
