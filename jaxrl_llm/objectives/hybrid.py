"""Imitation and reinforcement in one objective: dense and sparse gradient of a trajectory KL with rewards.

Minimise J(theta) = E_{y ~ pi}[ sum_t l_t - lambda sum_t r_t ], l_t = log pi(y_t|c_t) - log pi_T(y_t|c_t), pi_T the
teacher. With k_t = KL(pi(.|c_t) || pi_T(.|c_t)) the gradient is exactly

    E_{y ~ pi} sum_t [ grad k_t + G_t grad log pi(y_t|c_t) ],
    G_t = sum_{u>t} discount^(u-t) l_u - lambda ( sum_{u>=t} discount^(u-t) r_u - b )          at discount 1.

Source: "Hybrid online RL and imitation learning" note (arXiv 2512.23097), whose abstract states the split; the
decomposition, the discounted form and the gradients are derived in docs/theory.md. discount 0 is token-level on-policy
distillation. A discount below 1 is a trade of bias for variance and not the gradient of any function. A KL term in a
GRPO or PPO loss is the dense part alone.
"""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array
from jaxtyping import Bool
from jaxtyping import Float
from jaxtyping import Int
from jaxtyping import ScalarLike

from jaxrl_kernels import Reference
from jaxrl_kernels import token_loss
from jaxrl_llm import categorical
from jaxrl_llm.checks import checked
from jaxrl_llm.checks import require_dtype
from jaxrl_llm.checks import require_numbers
from jaxrl_llm.checks import require_rank
from jaxrl_llm.checks import require_same_shape

SMALLEST_WEIGHT = 1e-30
"""What a reward weight must exceed to have a logarithm."""


@checked
def dense_gradient(
    logits: Float[Array, "*batch V"], logits_teacher: Float[Array, "*batch V"]
) -> Float[Array, "*batch V"]:
    """dk/dz = p (l - k), the closed form of the gradient of KL(pi || pi_T) with respect to the logits.

    Its components sum to zero, and it vanishes at p = p_T and for confident p. A logit of -inf is a probability of 0
    and has gradient 0; where the teacher cannot draw what the student can, k is infinite and has no gradient (zeros).

    Args:
        logits: of the student.
        logits_teacher: of the teacher.

    Returns:
        the gradient, of the shape of the logits.

    Raises:
        ValueError: if the shapes differ.
    """
    require_same_shape(logits=logits, logits_teacher=logits_teacher)
    log_p, log_q = categorical.log_probs(logits), categorical.log_probs(logits_teacher)
    p, zero = jnp.exp(log_p), jnp.zeros((), log_p.dtype)
    absent = jnp.isneginf(log_p) | jnp.isneginf(log_q)
    infinite = jnp.any(jnp.isneginf(log_q) & ~jnp.isneginf(log_p), axis=-1, keepdims=True)
    difference = jnp.where(absent, zero, log_p) - jnp.where(absent, zero, log_q)
    gradient = p * (difference - jnp.sum(p * difference, axis=-1, keepdims=True))
    return jnp.where(infinite & ~jnp.isnan(gradient), zero, gradient)


def _top_k(logits: Float[Array, "*batch V"], k: int) -> Int[Array, "*batch k"]:
    if not 1 <= k <= logits.shape[-1]:
        raise ValueError(f"k is {k}; it must lie between 1 and the vocabulary size {logits.shape[-1]}.")
    return jax.lax.top_k(jax.lax.stop_gradient(logits), k)[1]


def _gather(x: Float[Array, "*batch V"], index: Int[Array, "*batch k"]) -> Float[Array, "*batch k"]:
    return jnp.take_along_axis(x, index, axis=-1)


@checked
def top_k_kl_partial(
    logits: Float[Array, "*batch V"], logits_teacher: Float[Array, "*batch V"], *, k: int
) -> Float[Array, "*batch"]:
    """sum_{v in S} p_v l_v over the student's k most likely tokens: a part of the KL, of either sign. Do not clip it.

    Gradient: p_v ( 1[v in S](l_v + 1) - sum_S p (l + 1) ) [nats]. +inf, without a gradient, where the teacher
    cannot draw one of them.
    """
    index = _top_k(logits, k)
    log_p, log_q = _gather(categorical.log_probs(logits), index), _gather(categorical.log_probs(logits_teacher), index)
    absent, zero = jnp.isneginf(log_p) | jnp.isneginf(log_q), jnp.zeros((), log_p.dtype)
    total = jnp.sum(jnp.exp(log_p) * (jnp.where(absent, zero, log_p) - jnp.where(absent, zero, log_q)), axis=-1)
    missing = jnp.any(jnp.isneginf(log_q) & ~jnp.isneginf(log_p), axis=-1)
    return jnp.where(missing & ~jnp.isnan(total), jnp.array(jnp.inf, total.dtype), total)


@checked
def top_k_kl_renormalised(
    logits: Float[Array, "*batch V"], logits_teacher: Float[Array, "*batch V"], *, k: int
) -> Float[Array, "*batch"]:
    """KL between the two policies renormalised on the student's k most likely tokens [nats].

    Gradient: q_v (l_v - KL) on S with q = p / p(S), 0 elsewhere. It says nothing about the mass outside S.
    """
    index = _top_k(logits, k)
    return categorical.kl(_gather(logits, index), _gather(logits_teacher, index))


@checked
def top_k_kl_with_tail(
    logits: Float[Array, "*batch V"], logits_teacher: Float[Array, "*batch V"], *, k: int
) -> Float[Array, "*batch"]:
    """KL after all tokens outside the student's k most likely ones are merged into one bucket; never above the exact
    KL.

    Source: log-sum inequality. It is a divergence, at least 0, and equals the exact KL at k = V - 1 and above [nats].
    """
    index = _top_k(logits, k)
    if k == logits.shape[-1]:
        return categorical.kl(logits, logits_teacher)

    def merged(z: Float[Array, "*batch V"]) -> Float[Array, "*batch m"]:
        nothing = jnp.array(-jnp.inf, z.dtype)
        rows = jnp.put_along_axis(z, index, nothing, axis=-1, inplace=False)
        # A tail without any mass is cut off before the logarithm, whose gradient there would be NaN.
        empty = jnp.all(jnp.isneginf(rows), axis=-1, keepdims=True)
        tail = jax.nn.logsumexp(jnp.where(empty, jnp.zeros((), z.dtype), rows), axis=-1, keepdims=True)
        return jnp.concatenate([_gather(z, index), jnp.where(empty, nothing, tail)], axis=-1)

    return categorical.kl(merged(logits), merged(logits_teacher))


@checked
def sparse_coefficient(
    divergence_t: Float[Array, "B T"],
    rewards_t: Float[Array, "B T"],
    response_mask: Bool[Array, "B T"],
    *,
    discount: ScalarLike = 1.0,
    reward_weight: ScalarLike = 1.0,
    baseline: Float[Array, " B"] | None = None,
) -> Float[Array, "B T"]:
    """G_t = sum_{u>t} discount^(u-t) d_u - reward_weight ( sum_{u>=t} discount^(u-t) r_u - b ), a constant to the
    gradient.

    Pass d_u = l_u for the plain estimate, or d_u = k_u, the exact KL of the context, for the Rao-Blackwell form: the
    same expectation, and another variance: smaller far from the optimum and larger near it in what was measured (errata
    F1.1). Steps are response tokens; masked ones are skipped.

    Args:
        divergence_t: l_t or k_t of each token [nats].
        rewards_t: reward received for token t; a terminal reward sits on the last response token (`terminal_rewards`).
        response_mask: true at the tokens that the student sampled.
        discount: 1 for the exact gradient, 0 for the immediate reward and no future divergence.
        reward_weight: lambda, the inverse of the temperature of KL-regularised reinforcement learning.
        baseline: b, one per sequence and independent of the sequence itself (for instance a leave-one-out mean).

    Returns:
        one coefficient per token, 0 outside the mask.

    Raises:
        ValueError, TypeError: if the arrays are not [B, T] of one shape, floating, floating and boolean.
    """
    require_rank(2, "B T", divergence_t=divergence_t, rewards_t=rewards_t, response_mask=response_mask)
    require_same_shape(divergence_t=divergence_t, rewards_t=rewards_t, response_mask=response_mask)
    require_dtype("floating", divergence_t=divergence_t, rewards_t=rewards_t)
    require_dtype("boolean", response_mask=response_mask)
    zeros = jnp.zeros(divergence_t.shape[0], divergence_t.dtype)
    subtract = zeros if baseline is None else baseline

    def step(carry, column):
        # carry: sums over later tokens, discounted once for the step between.
        later_divergence, later_reward = carry
        divergence, reward, real = column
        value = later_divergence - reward_weight * (reward + later_reward - subtract)
        carry = (
            jnp.where(real, discount * (divergence + later_divergence), later_divergence),
            jnp.where(real, discount * (reward + later_reward), later_reward),
        )
        return carry, jnp.where(real, value, zeros)

    _, values = jax.lax.scan(step, (zeros, zeros), (divergence_t.T, rewards_t.T, response_mask.T), reverse=True)
    return jax.lax.stop_gradient(values.T)


@checked
def terminal_rewards(rewards: Float[Array, " B"], response_mask: Bool[Array, "B T"]) -> Float[Array, "B T"]:
    """The reward of a sequence at its last response token, 0 elsewhere."""
    position = jnp.broadcast_to(jnp.arange(response_mask.shape[1])[None, :], response_mask.shape)
    last = jnp.max(jnp.where(response_mask, position, -1), axis=1)
    return jnp.where(position == last[:, None], rewards[:, None], jnp.zeros((), rewards.dtype))


@checked
def hybrid_losses(
    kl_t: Float[Array, "*shape"], log_prob: Float[Array, "*shape"], coefficient: Float[Array, "*shape"]
) -> Float[Array, "*shape"]:
    """k_t + stop(G_t) log pi(y_t|c_t): a loss whose gradient is the dense plus the sparse part, token by token.

    Its value is not J; watch KL and reward instead.

    Args:
        kl_t: exact KL(pi || pi_T) of each context [nats], with its gradient.
        log_prob: of the sampled token under the student [nats], with its gradient.
        coefficient: from `sparse_coefficient`.

    Returns:
        the loss of each token.

    Raises:
        ValueError: if the shapes differ.
    """
    require_same_shape(kl_t=kl_t, log_prob=log_prob, coefficient=coefficient)
    return kl_t + jax.lax.stop_gradient(coefficient) * log_prob


@checked
def chunked_hybrid_loss(
    hidden: Float[Array, "N D"],
    head: Float[Array, "_ _"],
    targets: Int[Array, " N"],
    coefficient: Float[Array, " N"],
    reference: Reference,
    *,
    vocabulary_axis: int = 1,
    mask: Bool[Array, " N"] | None = None,
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """`hybrid_losses` from hidden states, vocabulary chunk by chunk: no [N, V] array, gradient made in the forward
    sweep.

    Args:
        hidden: final states of the student at the positions that predict the targets.
        head: output matrix, [D, V] for vocabulary_axis 1, [V, D] for 0.
        targets: sampled tokens.
        coefficient: from `sparse_coefficient`, flattened.
        reference: final states and head of the teacher.
        vocabulary_axis: which axis of `head` is the vocabulary.
        mask: true at tokens that count; all if None.

    Returns:
        (sum over tokens, number of tokens).
    """

    def per_token(stats, coefficient):
        return hybrid_losses(stats.kl, stats.log_prob, coefficient)

    return token_loss(
        hidden,
        head,
        targets,
        per_token,
        jax.lax.stop_gradient(coefficient),
        vocabulary_axis=vocabulary_axis,
        reference=reference,
        mask=mask,
    )


def linear_warmup(step: ScalarLike, *, steps: int, final: ScalarLike = 1.0) -> Float[Array, ""]:
    """lambda = final min(1, step / steps): imitation first, then reward. The schedules are ours; the note's are
    unknown.
    """
    require_numbers(1, math.inf, steps=steps)
    share = jnp.clip(jnp.asarray(step, jnp.result_type(float)) / steps, 0.0, 1.0)
    return share * jnp.asarray(final, share.dtype)


def cosine_warmup(step: ScalarLike, *, steps: int, final: ScalarLike = 1.0) -> Float[Array, ""]:
    """lambda = final (1 - cos(pi min(1, step / steps))) / 2."""
    require_numbers(1, math.inf, steps=steps)
    share = jnp.clip(jnp.asarray(step, jnp.result_type(float)) / steps, 0.0, 1.0)
    return (1 - jnp.cos(math.pi * share)) / 2 * jnp.asarray(final, share.dtype)


def log_linear(step: ScalarLike, *, steps: int, start: ScalarLike, final: ScalarLike) -> Float[Array, ""]:
    """lambda from start to final at a constant rate of log lambda.

    The optimum is proportional to pi_T exp(lambda R), so its temperature 1 / lambda moves at a constant relative speed.
    """
    require_numbers(SMALLEST_WEIGHT, math.inf, start=start, final=final)
    require_numbers(1, math.inf, steps=steps)
    share = jnp.clip(jnp.asarray(step, jnp.result_type(float)) / steps, 0.0, 1.0)
    first, last = jnp.asarray(start, share.dtype), jnp.asarray(final, share.dtype)
    return jnp.exp((1 - share) * jnp.log(first) + share * jnp.log(last))
