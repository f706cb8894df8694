"""Gaussian noise on gradient steps, so that weights wander over a posterior instead of settling at its mode."""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array
from jaxtyping import Float

from jaxrl_llm.checks import require_positive
from jaxrl_llm.typing import PRNGKey


def langevin_noise(
    inner: optax.GradientTransformation, *, step_size: float, temperature: float
) -> optax.GradientTransformationExtraArgs:
    """change = -step_size inner(gradient) + sqrt(2 step_size temperature / count) N(0, I).

    With inner the identity and J the mean loss of `count` data this is Langevin's iteration, whose stationary law is
    nearly exp(-count J / temperature). Source: LMC-TS, Xu et al. 2022 (arXiv 2206.11254).

    Args:
        inner: what is done to the gradient first, without turning it around: optax.identity(), or a preconditioner such
            as optax.scale_by_rms(). A whole optimizer such as optax.adam gives a step of descent already.
        step_size: eta.
        temperature: in units of the loss of one datum.

    Returns:
        an optax transformation whose update also takes `key` and `count`; its init raises a ValueError if `inner` turns
        a gradient of ones around.

    Raises:
        ValueError: if step_size or temperature is not positive.
    """
    require_positive("step_size", step_size)
    require_positive("temperature", temperature)
    direction = optax.with_extra_args_support(inner)

    def init(params: Any) -> Any:
        # Of the shapes alone, so that it is known at trace time too.
        with jax.ensure_compile_time_eval():
            ones = jax.tree.map(lambda leaf: jnp.ones(jnp.shape(leaf), jnp.result_type(leaf)), params)
            turned, _ = direction.update(ones, direction.init(ones), ones)
            along = sum(float(jnp.sum(leaf)) for leaf in jax.tree.leaves(turned))
        if along < 0:
            raise ValueError(
                "inner turns gradients around, as a whole optimizer does; it must be optax.identity() or a "
                "preconditioner such as optax.scale_by_rms(), or weights would climb the loss."
            )
        return direction.init(params)

    def update(
        updates: Any, state: Any, params: Any = None, *, key: PRNGKey, count: Float[Array, ""], **extra: Any
    ) -> tuple[Any, Any]:
        updates, state = direction.update(updates, state, params, **extra)
        leaves, structure = jax.tree.flatten(updates)
        keys = jax.random.split(key, len(leaves))
        scale = jnp.sqrt(2 * step_size * temperature / count)
        moved = [
            -step_size * leaf + scale.astype(leaf.dtype) * jax.random.normal(one, leaf.shape, leaf.dtype)
            for one, leaf in zip(keys, leaves, strict=True)
        ]
        return jax.tree.unflatten(structure, moved), state

    return optax.GradientTransformationExtraArgs(init, update)  # pyright: ignore[reportArgumentType]
