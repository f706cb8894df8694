"""Reusing one batch on a chain: how far the states drift when the divergence is charged now, or with its future."""

import jax
import jax.numpy as jnp

from jaxrl_llm import tabular
from jaxrl_llm.objectives import divergence_augmented as augmented

STATES, DISCOUNT, COEFFICIENT = 8, 0.9, 0.5


def reuse(*, future: bool, reuses: int, rate: float = 100.0) -> tuple[jax.Array, jax.Array]:
    """TV(d_pi, d_old) and J(pi) - J(pi_old) after each update on what the old policy saw, in expectation.

    A chain of 8 states with actions stay and forward; the reward falls from the first state on and is 1 at the last.
    Every update follows the expected gradient of "pgis", -(rho A) + coefficient rho D, over the states of the old
    policy, with D the immediate pseudo-reward or its discounted sum under the current policy.
    """
    forward = jnp.minimum(jnp.arange(STATES) + 1, STATES - 1)
    kernel = jnp.stack([jnp.eye(STATES), jnp.eye(STATES)[forward]], axis=1)
    reward = jnp.where(jnp.arange(STATES) == STATES - 1, 1.0, 0.1 - 0.02 * jnp.arange(STATES))
    start = jnp.zeros(STATES).at[0].set(1.0)
    old = jnp.tile(jnp.array([1.0, 0.0]), (STATES, 1))

    def occupancy(pi):
        return tabular.discounted_occupancy(kernel, pi, start, discount=DISCOUNT)

    def values(pi, rewards):
        return tabular.discounted_sums(kernel, pi, jnp.sum(pi * rewards, axis=1), discount=DISCOUNT)

    pi_old = jax.nn.softmax(old)
    d_old = occupancy(pi_old)
    value_old = values(pi_old, jnp.broadcast_to(reward[:, None], old.shape))
    advantages = reward[:, None] + DISCOUNT * kernel @ value_old - value_old[:, None]

    def update(logits, _):
        pi = jax.nn.softmax(logits)
        phi = augmented.pseudo_reward(jax.nn.log_softmax(logits), jax.nn.log_softmax(old))
        charge = phi + DISCOUNT * kernel @ values(pi, phi) if future else phi
        gains = augmented.augmented_advantages(advantages, charge, coefficient=COEFFICIENT)
        slope = jax.grad(lambda z: jnp.sum(d_old[:, None] * jax.nn.softmax(z) * gains))(logits)
        moved = logits + rate / reuses * slope
        pi = jax.nn.softmax(moved)
        drift = jnp.sum(jnp.abs(occupancy(pi) - d_old)) / 2
        return moved, (drift, jnp.sum((occupancy(pi) - d_old) * reward) / (1 - DISCOUNT))

    return jax.jit(lambda z: jax.lax.scan(update, z, None, length=reuses)[1])(old)
