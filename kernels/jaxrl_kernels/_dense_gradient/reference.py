"""KL and its gradient in plain jax.numpy with plain autodiff: the oracle."""

import jax
import jax.numpy as jnp
from jaxtyping import Array
from jaxtyping import Float


def kl(z: Float[Array, "N V"], z_ref: Float[Array, "N V"]) -> Float[Array, " N"]:
    """sum_k p_k (l_k + e^{-l_k} - 1), l = log p - log q: KL as a sum of terms that are never negative."""
    log_p, log_q = jax.nn.log_softmax(z), jax.nn.log_softmax(jax.lax.stop_gradient(z_ref))
    # Where the policy has no weight in this dtype, log p and its gradient are kept out: 0 * inf is NaN.
    seen = ~(jnp.exp(log_p) == 0)
    log_ratio = jnp.where(seen, log_p - log_q, 0.0)
    p, q = jnp.exp(log_p), jnp.exp(log_q)
    small = jnp.abs(log_ratio) < 0.5
    tame = jnp.where(small, log_ratio, 0.0)
    terms = jnp.where(small, p * (tame + jnp.expm1(-tame)), p * log_ratio + q - p)
    return jnp.sum(jnp.where(seen, terms, q), axis=1)


def kl_and_gradient(
    z: Float[Array, "N V"], z_ref: Float[Array, "N V"], weights: Float[Array, " N"]
) -> tuple[Float[Array, " N"], Float[Array, "N V"]]:
    """KL of each row, and weights * dKL/dz: zeros where the weight is 0 or KL infinite, whatever the row holds."""
    value, pull = jax.vjp(lambda z: kl(z, z_ref), z)
    (gradient,) = pull(weights)
    counts = (weights != 0) & (value != jnp.inf)
    return value, jnp.where(counts[:, None], gradient, jnp.zeros_like(gradient))


@jax.custom_vjp
def kl_of_rows(z: Float[Array, "N V"], z_ref: Float[Array, "N V"]) -> Float[Array, " N"]:
    """`kl` with the gradient of `kl_and_gradient`: autodiff alone multiplies a 0 with what the row holds."""
    return kl(z, z_ref)


def _forward_rule(z: Array, z_ref: Array):
    return kl(z, z_ref), (z, z_ref)


def _backward_rule(residuals: tuple[Array, Array], cotangent: Array):
    z, z_ref = residuals
    return kl_and_gradient(z, z_ref, cotangent)[1], None


kl_of_rows.defvjp(_forward_rule, _backward_rule)
