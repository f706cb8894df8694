"""The inverse problem: which threshold on the divergence makes a bound small enough."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array
from jaxtyping import Float
from jaxtyping import ScalarLike

from jaxrl_llm.bounds.inputs import BoundInputs
from jaxrl_llm.bounds.inputs import bound_inputs_from_scalars

SMALLEST, LARGEST = 1e-30, 50.0


def _differentiable(
    value: Callable[[Float[Array, ""]], Float[Array, ""]], root: Float[Array, ""], target: ScalarLike
) -> Float[Array, ""]:
    # The root of value(x) = target with the slopes of the implicit function theorem: a bisection has none of its own.
    rise = jax.lax.stop_gradient(jax.grad(value)(root))
    rest = (target - value(root)) / jnp.where(rise > 0, rise, jnp.ones((), rise.dtype))
    return root + jnp.where(rise > 0, rest - jax.lax.stop_gradient(rest), jnp.zeros((), root.dtype))


def largest_max_kl(
    bound: Callable[[BoundInputs], Float[Array, ""]],
    *,
    target: ScalarLike,
    horizon: int,
    sequence_kl: ScalarLike | None = None,
) -> Float[Array, ""]:
    """The largest delta = max KL(mu || pi) for which `bound` is at most `target`, everything else at its worst.

    Given delta, the other inputs are the largest it allows (`bound_inputs_from_scalars`); a known sequence_kl is used
    where it is smaller than T delta. Found by bisection of log delta: every bound grows with delta. Derivatives
    with respect to target and sequence_kl are those of the implicit function theorem.

    Args:
        bound: a function of `surrogate_error.PRINTED` or `SHARP`, or the unified minimum of your choice.
        target: the value the bound must not exceed, for rewards in [0, 1]; divide by the span of the rewards otherwise.
        horizon: T [tokens], >= 1.
        sequence_kl: KL between the laws of whole responses, if it is known [nats].

    Returns:
        delta [nats], between 1e-30 and 50; 50 if every delta is small enough, 0 if none is.

    Raises:
        ValueError: if horizon is smaller than 1.
    """

    def value(log_delta: Float[Array, ""]) -> Float[Array, ""]:
        delta = jnp.exp(log_delta)
        kl = horizon * delta
        if sequence_kl is not None:
            kl = jnp.minimum(kl, sequence_kl)
        return bound(bound_inputs_from_scalars(max_kl=delta, horizon=horizon, sequence_kl=kl))

    def halve(_, ends):
        low, high = ends
        middle = (low + high) / 2
        fits = value(middle) <= target
        return jnp.where(fits, middle, low), jnp.where(fits, high, middle)

    low = jnp.log(jnp.asarray(SMALLEST, jnp.result_type(float)))
    high = jnp.log(jnp.asarray(LARGEST, low.dtype))
    inside, _ = jax.lax.fori_loop(0, 60, halve, (low, high))
    inside = _differentiable(value, jax.lax.stop_gradient(inside), target)
    delta = jnp.where(value(high) <= target, LARGEST, jnp.exp(inside))
    return jnp.where(value(low) <= target, delta, jnp.zeros((), delta.dtype))
