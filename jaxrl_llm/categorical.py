"""Statistics of categorical distributions given by their logits, in plain jax.numpy.

This is the route for places where logits exist already: samplers, enumerable worlds, a user's own arrays. From hidden
states use `jaxrl_kernels.token_statistics`, which never holds `[N, V]`. Both give the same numbers.

Every function works on `[..., V]` in the dtype of its input (float64 when jax is told so), accepts logits of -inf
(probability zero) without NaN, and leaves a temperature to the caller (divide the logits). All divergences are in nats;
l_k = log p_k - log q_k below.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array
from jaxtyping import Bool
from jaxtyping import Float
from jaxtyping import Int
from jaxtyping import ScalarLike


def log_probs(logits: Float[Array, "*batch V"]) -> Float[Array, "*batch V"]:
    """log softmax: z_k - log sum_j exp z_j [nats]; -inf where the logit is -inf."""
    return jax.nn.log_softmax(logits, axis=-1)


def _finite(log_p: Float[Array, "*batch V"], other: Float[Array, "*batch V"]) -> Float[Array, "*batch V"]:
    # log_p where `other` is a positive probability, 0 elsewhere: keeps 0 * -inf, and its gradient, out of every sum.
    return jnp.where(jnp.isneginf(other), jnp.zeros((), log_p.dtype), log_p)


def _log_ratio(
    log_p: Float[Array, "*batch V"], log_q: Float[Array, "*batch V"]
) -> tuple[Float[Array, "*batch V"], Bool[Array, "*batch"]]:
    # (log p - log q, 0 where one of them is -inf; whether some p_k > 0 = q_k). That p_k may be below the smallest
    # number of the dtype, 0 times an infinite log-ratio: it is found by its logarithm.
    absent = jnp.isneginf(log_p) | jnp.isneginf(log_q)
    missing = jnp.any(jnp.isneginf(log_q) & ~jnp.isneginf(log_p), axis=-1)
    zero = jnp.zeros((), log_p.dtype)
    return jnp.where(absent, zero, log_p) - jnp.where(absent, zero, log_q), missing


def _or_infinity(divergence: Float[Array, "*batch"], missing: Bool[Array, "*batch"]) -> Float[Array, "*batch"]:
    # NaN stays NaN: a row without any positive probability is no distribution.
    return jnp.where(missing & ~jnp.isnan(divergence), jnp.array(jnp.inf, divergence.dtype), divergence)


def log_prob(logits: Float[Array, "*batch V"], targets: Int[Array, "*batch"]) -> Float[Array, "*batch"]:
    """log p_a of the target a [nats].

    Raises:
        ValueError: for a target outside the vocabulary, where targets are known. Inside jit it gives NaN instead, with
            gradient 0 for its logits: never the log-probability of another token.
    """
    return at_target(log_probs(logits), targets)


def at_target(values: Float[Array, "*batch V"], targets: Int[Array, "*batch"]) -> Float[Array, "*batch"]:
    """values[..., a] of the target a, NaN where it lies outside the vocabulary. Raises as `log_prob`."""
    inside = in_vocabulary(targets, values.shape[-1])
    index = jnp.where(inside, targets, jnp.zeros((), targets.dtype))
    chosen = jnp.take_along_axis(values, index[..., None], axis=-1)[..., 0]
    return jnp.where(inside, chosen, jnp.array(jnp.nan, values.dtype))


def in_vocabulary(targets: Int[Array, "*batch"], vocabulary: int) -> Bool[Array, "*batch"]:
    """True where 0 <= target < vocabulary. -1 is no token, nor is the -100 of other libraries.

    Raises:
        ValueError: naming the first target that is outside, where targets are known (not inside jit).
    """
    # The size of the vocabulary may not fit into a narrow type.
    wide = targets.astype(jnp.int32) if targets.dtype.itemsize < 4 else targets
    inside = (wide >= 0) & (wide < vocabulary)
    if not isinstance(inside, Tracer) and not np.all(inside):
        first = np.asarray(targets)[~np.asarray(inside)][0]
        raise ValueError(f"targets holds {first}; each must be a token of the vocabulary, 0 .. {vocabulary - 1}.")
    return inside


def max_log_prob(logits: Float[Array, "*batch V"]) -> Float[Array, "*batch"]:
    """max_k log p_k [nats]."""
    return jnp.max(log_probs(logits), axis=-1)


def entropy(logits: Float[Array, "*batch V"]) -> Float[Array, "*batch"]:
    """Shannon entropy -sum_k p_k log p_k [nats]."""
    log_p = log_probs(logits)
    return -jnp.sum(jnp.exp(log_p) * _finite(log_p, log_p), axis=-1)


def collision(logits: Float[Array, "*batch V"]) -> Float[Array, "*batch"]:
    """Collision probability C = sum_k p_k^2 [prob], at most 1 whatever the sum rounds to; the Renyi-2 entropy is -log
    C.
    """
    total = jnp.sum(jnp.exp(2 * log_probs(logits)), axis=-1)
    return jnp.minimum(total, jnp.ones((), total.dtype))


def kl(logits: Float[Array, "*batch V"], logits_ref: Float[Array, "*batch V"]) -> Float[Array, "*batch"]:
    """KL(p || q) = sum_k p_k (log p_k - log q_k) [nats], p from `logits`, q from `logits_ref`; +inf where p_k > 0 =
    q_k.

    Summed as p_k (l_k + exp(-l_k) - 1), which adds sum_k (q_k - p_k) = 0: each term is non-negative and of second order
    in l_k, so that digits are not lost to terms of first order that cancel when p is near q. Where it is infinite it
    has no gradient (zeros).
    """
    log_p, log_q = log_probs(logits), log_probs(logits_ref)
    p, q = jnp.exp(log_p), jnp.exp(log_q)
    log_ratio, missing = _log_ratio(log_p, log_q)
    # Where p is far below q there is nothing to cancel, and exp(-l) may overflow.
    near = log_ratio > -1
    close = p * (log_ratio + jnp.expm1(-jnp.where(near, log_ratio, jnp.zeros((), log_ratio.dtype))))
    terms = jnp.where(near, close, p * log_ratio + (q - p))
    return _or_infinity(jnp.sum(jnp.where(jnp.isneginf(log_p), q, terms), axis=-1), missing)


def total_variation(logits: Float[Array, "*batch V"], logits_ref: Float[Array, "*batch V"]) -> Float[Array, "*batch"]:
    """TV(p, q) = 1/2 sum_k |p_k - q_k| [prob]."""
    return jnp.sum(jnp.abs(jnp.exp(log_probs(logits)) - jnp.exp(log_probs(logits_ref))), axis=-1) / 2


def chi_square(logits: Float[Array, "*batch V"], logits_ref: Float[Array, "*batch V"]) -> Float[Array, "*batch"]:
    """chi^2(p || q) = sum_k (p_k - q_k)^2 / q_k = sum_k p_k^2 / q_k - 1; +inf where p_k > 0 = q_k.

    Summed as (p_k - q_k)(p_k / q_k - 1) where p_k is near q_k, which does not cancel, and elsewhere as exp(2 log p_k -
    log q_k) - 2 p_k + q_k, which lives where p_k and q_k are too small for the dtype. Where it is infinite, or too
    large for the dtype, it has no gradient (zeros).
    """
    log_p, log_q = log_probs(logits), log_probs(logits_ref)
    p, q = jnp.exp(log_p), jnp.exp(log_q)
    log_ratio, missing = _log_ratio(log_p, log_q)
    near = jnp.abs(log_ratio) < 0.5
    close = (p - q) * jnp.expm1(jnp.where(near, log_ratio, jnp.zeros((), log_ratio.dtype)))
    exponent = jnp.where(near | jnp.isneginf(log_p), jnp.zeros((), log_p.dtype), log_p + log_ratio)
    beyond = exponent > jnp.log(jnp.finfo(log_p.dtype).max)  # a number, but none of this dtype
    far = jnp.exp(jnp.where(beyond, jnp.zeros((), log_p.dtype), exponent)) - 2 * p + q
    terms = jnp.where(jnp.isneginf(log_p), q, jnp.where(near, close, far))
    return _or_infinity(jnp.sum(terms, axis=-1), missing | jnp.any(beyond, axis=-1))


def safe_set(logits: Float[Array, "*batch V"], *, log_min_p: ScalarLike) -> Bool[Array, "*batch V"]:
    """The vocabulary entries kept by min-p: p_k >= exp(log_min_p) max_j p_j, that is z_k >= max_j z_j + log_min_p.

    A constant to the gradient, and unchanged when a constant is added to all logits. The arg-max is always kept if
    log_min_p <= 0.
    """
    fixed = jax.lax.stop_gradient(logits)
    return fixed >= jnp.max(fixed, axis=-1, keepdims=True) + log_min_p


def restrict(logits: Float[Array, "*batch V"], keep: Bool[Array, "*batch V"]) -> Float[Array, "*batch V"]:
    """Logits of the distribution renormalised on `keep`: -inf outside (gradient exactly 0 there), unchanged inside."""
    return jnp.where(keep, logits, jnp.array(-jnp.inf, logits.dtype))


def kept_mass(logits: Float[Array, "*batch V"], keep: Bool[Array, "*batch V"]) -> Float[Array, "*batch"]:
    """Z = sum_{k in keep} p_k [prob], at most 1 whatever the sum rounds to."""
    total = jnp.sum(jnp.where(keep, jnp.exp(log_probs(logits)), jnp.zeros((), logits.dtype)), axis=-1)
    return jnp.minimum(total, jnp.ones((), total.dtype))
