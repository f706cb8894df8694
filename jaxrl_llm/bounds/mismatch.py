"""How far noise in the logits can move probabilities: training engine against inference engine.

Model: inference uses z' = z + e, p = softmax(z), p' = softmax(z'), and D = log p'_a - log p_a of one token. Two noise
models: bounded, |e_k| <= max_noise for every entry; and Gaussian, e_k independent N(0, s^2), to second order in s.

Source: "Taming the Tail" (arXiv 2512.23087), whose theorem is |D| <= 2 max_noise (1 - p). That holds to first order
only; it is exceeded by up to (exp(2 e) - 1) / (2 e) (errata F3.1). The exact statements here are derived in
docs/theory.md.
"""

import math

import jax.numpy as jnp
from jaxtyping import Array
from jaxtyping import Bool
from jaxtyping import Float
from jaxtyping import ScalarLike

from jaxrl_llm.bounds.logit_dynamics import expected_squared_update_norm
from jaxrl_llm.bounds.logit_dynamics import others_squared
from jaxrl_llm.bounds.logit_dynamics import squared_update_norm
from jaxrl_llm.checks import checked
from jaxrl_llm.checks import require_dtype
from jaxrl_llm.checks import require_numbers
from jaxrl_llm.checks import require_same_shape
from jaxrl_llm.masked import masked_sum


@checked
def first_order_log_prob_change(p: Float[Array, "*shape"], *, max_noise: ScalarLike) -> Float[Array, "*shape"]:
    """2 max_noise (1 - p): the printed bound on |log p' - log p|, true as max_noise -> 0 and for D > 0 always.

    Args:
        p: probability of the token under the training policy.
        max_noise: largest |e_k| [nats].

    Returns:
        the printed bound [nats].
    """
    require_numbers(0, math.inf, max_noise=max_noise)
    return (1 - p) * 2 * jnp.asarray(max_noise, p.dtype)


@checked
def first_order_violation(max_noise: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """(exp(2 e) - 1) / (2 e), 1 at e = 0: by how much |D| can exceed the printed bound, approached as p -> 1."""
    small = max_noise < 1e-8  # where 1 + e is all the digits there are
    twice = jnp.where(small, jnp.ones((), max_noise.dtype), 2 * max_noise)
    return jnp.where(small, 1 + max_noise, jnp.expm1(twice) / twice)


@checked
def log_prob_change_range(
    p: Float[Array, "*shape"], *, max_noise: ScalarLike
) -> tuple[Float[Array, "*shape"], Float[Array, "*shape"]]:
    """The exact range of D: [ -log(p + (1 - p) exp(2 e)), -log(p + (1 - p) exp(-2 e)) ]. Both ends are attained.

    They are attained by noise of one sign on the token and of the other on all others.

    Args:
        p: probability of the token under the training policy.
        max_noise: e, largest |e_k| [nats].

    Returns:
        (smallest, largest) value of log p' - log p [nats].
    """
    require_numbers(0, math.inf, max_noise=max_noise)
    twice = 2 * jnp.asarray(max_noise, p.dtype)
    return -_log_mean_exp(p, twice), -_log_mean_exp(p, -twice)


def _log_mean_exp(p: Float[Array, "*shape"], x: Float[Array, ""]) -> Float[Array, "*shape"]:
    # log(p + (1 - p) exp x) = log(1 + (1 - p)(exp x - 1)), exact near p = 1 where the printed bound fails most. For a
    # large x, whose exponential overflows, exp x is taken out; for a small p below a negative x nothing cancels.
    rest, one = 1 - p, jnp.ones((), p.dtype)
    near = jnp.log1p(rest * jnp.expm1(jnp.minimum(x, one)))
    far = jnp.maximum(x, one)
    inside = rest + p * jnp.exp(-far)
    some = inside > 0  # not where p = 1 and exp(-x) underflows: the logarithm of exp(-x) is -x
    far = jnp.where(some, far + jnp.log(jnp.where(some, inside, one)), jnp.zeros((), p.dtype))
    plain = p + rest * jnp.exp(jnp.minimum(x, -one))
    some = plain > 0  # not where p = 0 and exp x underflows: the logarithm is x
    low = jnp.where(some, jnp.log(jnp.where(some, plain, one)), x)
    return jnp.where(x > 1, far, jnp.where((x < -1) & (p < 0.5), low, near))


@checked
def two_sided_log_prob_change(
    p: Float[Array, "*shape"], p_other: Float[Array, "*shape"], *, max_noise: ScalarLike
) -> Float[Array, "*shape"]:
    """|D| <= 2 max_noise (1 - min(p, p')): the correct form of the printed theorem, at any noise.

    Args:
        p: probability of the token under one policy.
        p_other: probability of the same token under the other.
        max_noise: largest |e_k| [nats].

    Returns:
        a bound on |log p' - log p| [nats].
    """
    require_numbers(0, math.inf, max_noise=max_noise)
    require_same_shape(p=p, p_other=p_other)
    return (1 - jnp.minimum(p, p_other)) * 2 * jnp.asarray(max_noise, p.dtype)


@checked
def uniform_log_prob_change(p: Float[Array, "*shape"], *, max_noise: ScalarLike) -> Float[Array, "*shape"]:
    """|D| <= log(1 + (1 - p)(exp(2 e) - 1)) from p alone, at most 2 e: the larger end of the exact range.

    Args:
        p: probability of the token under the training policy.
        max_noise: e, largest |e_k| [nats].

    Returns:
        a bound on |log p' - log p| [nats].
    """
    require_numbers(0, math.inf, max_noise=max_noise)
    return _log_mean_exp(p, 2 * jnp.asarray(max_noise, p.dtype))


@checked
def sequence_log_prob_change(
    p_t: Float[Array, "B T"],
    p_other_t: Float[Array, "B T"],
    response_mask: Bool[Array, "B T"],
    *,
    max_noise: ScalarLike,
) -> Float[Array, " B"]:
    """|sum_t D_t| <= 2 max_noise sum_t (1 - min(p_t, p'_t)) over the response tokens of each sequence [nats].

    Args:
        p_t: probabilities of the sampled tokens under one policy.
        p_other_t: under the other.
        response_mask: true at response tokens.
        max_noise: largest |e_k| [nats].

    Returns:
        one bound per sequence.

    Raises:
        ValueError, TypeError: if shapes or dtypes do not fit.
    """
    require_numbers(0, math.inf, max_noise=max_noise)
    require_same_shape(p_t=p_t, p_other_t=p_other_t, response_mask=response_mask)
    require_dtype("boolean", response_mask=response_mask)
    return masked_sum(two_sided_log_prob_change(p_t, p_other_t, max_noise=max_noise), response_mask, axis=1)


@checked
def kl_from_noise(max_noise: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """KL <= e^2 / 2 [nats] per context in both directions: Hoeffding's lemma on log E_p exp(e) - E_p e."""
    return max_noise * max_noise / 2


@checked
def tv_from_noise(max_noise: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """TV <= tanh(e / 2) [prob] per context; attained where a set of probability sigmoid(-e) moves up, the rest down."""
    return jnp.tanh(max_noise / 2)


@checked
def gaussian_log_prob_variance(
    p: Float[Array, "*shape"], collision: Float[Array, "*shape"], *, scale: ScalarLike
) -> Float[Array, "*shape"]:
    """Var(D) = s^2 (1 - 2 p + C) to second order in s: the factor of `logit_dynamics.squared_update_norm`.

    Args:
        p: probability of the token.
        collision: C = sum_k p_k^2 of its context.
        scale: s, standard deviation of the noise of each logit [nats].

    Returns:
        the variance [nats^2].
    """
    return squared_update_norm(p, collision, step=scale)


@checked
def gaussian_sampled_bias(
    p: Float[Array, "*shape"], collision: Float[Array, "*shape"], *, scale: ScalarLike
) -> Float[Array, "*shape"]:
    """E[log p_infer(a) - log p_train(a) | a was sampled by inference] = s^2 (1/2 - 2 p + 3/2 C) to second order in s.

    A sampled tail token was, on average, over-estimated by inference; a dominant token can be under-estimated. The bias
    is flat in p below about one per cent, so it does not single out the extreme tail (errata F3.2).

    Args:
        p: probability of the sampled token.
        collision: C = sum_k p_k^2 of its context.
        scale: s, standard deviation of the noise of each logit [nats].

    Returns:
        the expected log-ratio [nats].
    """
    # 1/2 - 2 p + 3/2 C = (1 - p)(1 - 3 p) / 2 + 3/2 (C - p^2), which does not cancel near p = 1.
    return jnp.square(scale) * ((1 - p) * (1 - 3 * p) / 2 + 1.5 * others_squared(p, collision))


@checked
def gaussian_expected_kl(collision: Float[Array, "*shape"], *, scale: ScalarLike) -> Float[Array, "*shape"]:
    """E[KL(p' || p)] = s^2 (1 - C) / 2 [nats] to second order in s: the average of the sampled bias over tokens."""
    return expected_squared_update_norm(collision, step=scale) / 2
