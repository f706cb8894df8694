"""KL and its gradient in plain jax.numpy with plain autodiff: the oracle."""

import jax
import jax.numpy as jnp
from jaxtyping import Array
from jaxtyping import Float


def kl(z: Float[Array, "N V"], z_ref: Float[Array, "N V"]) -> Float[Array, " N"]:
    """sum_k p_k (l_k + e^{-l_k} - 1), l = log p - log q: KL as a sum of terms that are never negative."""
    log_p, log_q = jax.nn.log_softmax(z), jax.nn.log_softmax(jax.lax.stop_gradient(z_ref))
    # Where a logit is -inf, log p and its gradient are kept out: 0 * inf is NaN.
    seen = log_p != -jnp.inf
    log_ratio = jnp.where(seen, log_p - log_q, 0.0)
    p, q = jnp.exp(log_p), jnp.exp(log_q)
    small = jnp.abs(log_ratio) < 0.5
    tame = jnp.where(small, log_ratio, 0.0)
    terms = jnp.where(small, p * (tame + jnp.expm1(-tame)), p * log_ratio + q - p)
    return jnp.sum(jnp.where(seen, terms, q), axis=1)


def kl_and_gradient(
    z: Float[Array, "N V"], z_ref: Float[Array, "N V"], weights: Float[Array, " N"]
) -> tuple[Float[Array, " N"], Float[Array, "N V"]]:
    """KL of each row, and weights * dKL/dz."""
    value, pull = jax.vjp(lambda z: kl(z, z_ref), z)
    (gradient,) = pull(weights)
    return value, jnp.where(weights[:, None] != 0, gradient, jnp.zeros_like(gradient))
