"""Divergence terms: estimators of a KL from sampled tokens, forms whose gradient is right, and exact ones.

One orientation throughout. A token a is sampled from p, and `log_ratio` = log p(a) - log q(a). Then E[k1] = KL(p || q)
and E[k3] = KL(p || q); E[k2] equals it up to third order. For a penalty KL(pi || ref) on-policy, log_ratio = log pi -
log ref. For KL(mu || pi) from tokens of mu, log_ratio = log mu - log pi.

A good estimate of the value is not a good loss. Differentiated through log pi with tokens fixed, k1 has zero expected
gradient, k3 has that of the other KL, KL(ref || pi), and only k2 has grad KL(pi || ref) (all on-policy). The
straight-through forms take the value of one estimator and the gradient of k2.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array
from jaxtyping import Float

from jaxrl_llm.checks import checked
from jaxrl_llm.objectives.ratios import LOG_RATIO_LIMIT


@checked
def k1(log_ratio: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """k1 = log(p/q): unbiased for KL(p || q), of either sign [nats].

    Source: Schulman 2020, "Approximating KL divergence". As a loss its expected on-policy gradient is zero; use a
    straight-through form.
    """
    return log_ratio


@checked
def k2(log_ratio: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """k2 = (log(p/q))^2 / 2: not negative, biased at third order in the log-ratio [nats].

    Source: Schulman 2020. As a loss its expected on-policy gradient is exactly grad KL(p || q).
    """
    return log_ratio * log_ratio / 2


@checked
def k3(log_ratio: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """k3 = q/p - 1 + log(p/q): not negative and unbiased for KL(p || q) [nats].

    Source: Schulman 2020. Every -log(q/p) + b (q/p - 1) is unbiased; b = 1 is the one that is never negative (errata
    F2.8). Below -`ratios.LOG_RATIO_LIMIT` the whole log-ratio is clamped, so that log_ratio = -inf is a large
    number and not -inf; above it the exponent alone. Unbiased where p can draw whatever q can; else it misses the mass
    of q outside the support of p: E[k3] = KL(p || q) - q(outside) (errata F2.20). As a loss its expected on-policy
    gradient is grad KL(q || p) with the tokens of p, not grad KL(p || q).
    """
    from_below = jnp.maximum(log_ratio, -LOG_RATIO_LIMIT)
    return jnp.expm1(-jnp.minimum(from_below, LOG_RATIO_LIMIT)) + from_below


def _value_of_gradient_of(value: Float[Array, "*shape"], gradient: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    return jax.lax.stop_gradient(value) + gradient - jax.lax.stop_gradient(gradient)


@checked
def k1_straight_through(log_ratio: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """Value of k1, gradient of k2: an unbiased value with an unbiased on-policy gradient of KL(p || q) [nats]."""
    return _value_of_gradient_of(k1(log_ratio), k2(log_ratio))


@checked
def k3_straight_through(log_ratio: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """Value of k3, gradient of k2: an unbiased value with an unbiased on-policy gradient of KL(p || q) [nats].

    The gradient is that of the sum over contexts of KL(p(.|c_t) || q(.|c_t)) with the contexts fixed. How p changes
    which contexts are visited is the other half of the gradient of the sequence KL (section "hybrid" of
    docs/theory.md), and no per-token term contains it.
    """
    return _value_of_gradient_of(k3(log_ratio), k2(log_ratio))


@checked
def importance_weighted_k1(ratio: Float[Array, "*shape"], log_ratio: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """ratio * log(p/q) for tokens sampled from another policy mu, ratio = p/mu with its gradient.

    E_mu[ratio log(p/q)] = KL(p || q) per context, and because the ratio carries a gradient, the expected gradient is
    grad KL(p || q) exactly: the extra E_p[grad log p] it contains is zero. Both where mu can draw whatever p can; of a
    truncated sampler both sums run over its tokens alone, and are of either sign (errata F2.20).
    """
    return ratio * log_ratio


ESTIMATORS = {
    "k1": k1,
    "k2": k2,
    "k3": k3,
    "k1_straight_through": k1_straight_through,
    "k3_straight_through": k3_straight_through,
}
"""Sampled estimators by name, for recipes."""
