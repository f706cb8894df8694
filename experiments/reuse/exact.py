"""One batch of the old policy in expectation, what an update makes of it, and what the new policy is: no sampling."""

from typing import Any
from typing import NamedTuple

import jax
import jax.numpy as jnp

from experiments.reuse.arms import KINDS
from experiments.reuse.arms import Charge
from experiments.reuse.arms import Number
from experiments.reuse.worlds import World
from jaxrl_llm import categorical
from jaxrl_llm.objectives import divergence_augmented as augmented
from jaxrl_llm.objectives import surrogates
from jaxrl_llm.tabular import discounted_occupancy
from jaxrl_llm.tabular import discounted_sums
from jaxrl_llm.typing import Array
from jaxrl_llm.typing import Float

Table = Float[Array, "S A"]


def occupancy(logits: Table, world: World, discount: Number) -> Float[Array, " S"]:
    """d_pi, the law of the states."""
    return discounted_occupancy(world.transitions, jax.nn.softmax(logits), world.initial, discount=discount)


def action_values(logits: Table, rewards: Table, world: World, discount: Number) -> Table:
    """Q(s, a): the reward now and the discounted sum of what follows under the policy."""
    policy = jax.nn.softmax(logits)
    values = discounted_sums(world.transitions, policy, jnp.sum(policy * rewards, axis=1), discount=discount)
    return rewards + discount * world.transitions @ values


def advantages(logits: Table, rewards: Table, world: World, discount: Number) -> Table:
    """Q(s, a) - V(s)."""
    found = action_values(logits, rewards, world, discount)
    return found - jnp.sum(jax.nn.softmax(logits) * found, axis=1, keepdims=True)


class Batch(NamedTuple):
    """What the old policy saw, in expectation, and what it knows.

    Attributes:
        world: the world and the old policy.
        states: d_old, the law of its states.
        advantages: of the old policy.
        log_old: log-probabilities of the old policy [nats].
    """

    world: World
    states: Float[Array, " S"]
    advantages: Table
    log_old: Table


def gather(world: World, discount: Number) -> Batch:
    """The batch of the old policy."""
    return Batch(
        world,
        occupancy(world.old, world, discount),
        advantages(world.old, world.rewards, world, discount),
        categorical.log_probs(world.old),
    )


def pseudo_rewards(logits: Table, batch: Batch, charge: Charge, discount: Number) -> Table:
    """phi(s, a) of an arm, with the ratio of state densities where it has one."""
    new = categorical.log_probs(logits)
    kinds = [augmented.pseudo_reward(new, batch.log_old, divergence=kind) for kind in KINDS]
    states = jax.lax.stop_gradient(occupancy(logits, batch.world, discount))
    # A state that no policy reaches has no density, and no part in anything.
    reached = batch.states > 0
    ratio = jnp.where(reached, states, 1.0) / jnp.where(reached, batch.states, 1.0)
    return jnp.stack(kinds)[charge.kind] + charge.density * jnp.log(ratio)[:, None]


def charged(logits: Table, batch: Batch, charge: Charge, discount: Number) -> Table:
    """E[D_t | s, a] over the trajectories of the old policy, D_t as `multi_step_divergence` has it.

    D = phi + discount P W, W = sum_a pi_old [min(c, rho) phi + discount min(c', rho) P W]. Without caps W is the value
    of phi under the current policy.
    """
    phi = pseudo_rewards(logits, batch, charge, discount)
    old, ratio = jnp.exp(batch.log_old), jnp.exp(categorical.log_probs(logits) - batch.log_old)
    met = jnp.sum(old * jnp.minimum(ratio, charge.ratio_cap) * phi, axis=1)
    trace = old * jnp.minimum(ratio, charge.trace_cap)
    later = discounted_sums(batch.world.transitions, trace, met, discount=discount)
    return jax.lax.stop_gradient(phi + charge.future * discount * batch.world.transitions @ later)


def slope(
    logits: Table, batch: Batch, charge: Charge, *, discount: Number, coefficient: Number, current: Number
) -> Table:
    """The expected gradient of minus the surrogate loss over what the old policy sees.

    Args:
        logits: of the policy that is updated.
        batch: the world and what its old policy saw.
        charge: how the update is held back.
        discount: per step.
        coefficient: 1 / eta.
        current: 1 for advantages of the current policy, which V-trace estimates without its caps; 0 for those of the
            old policy, as PPO has them.
    """
    fixed, world = jax.lax.stop_gradient(logits), batch.world
    now = advantages(fixed, world.rewards, world, discount)
    gains = augmented.augmented_advantages(
        batch.advantages + current * (now - batch.advantages),
        charged(fixed, batch, charge, discount),
        coefficient=coefficient * charge.weight,
    )

    def loss(moving: Table) -> Array:
        ratio = jnp.exp(categorical.log_probs(moving) - batch.log_old)
        losses = surrogates.clipped(ratio, gains, clip_low=charge.clip, clip_high=charge.clip)
        return jnp.sum(batch.states[:, None] * jnp.exp(batch.log_old) * losses)

    return -jax.grad(loss)(logits)


def reuse(
    batch: Batch,
    charge: Charge,
    *,
    discount: Number,
    coefficient: Number,
    rates: Float[Array, " U"],
    current: Number,
) -> Float[Array, "U S A"]:
    """The logits after each update on one batch; the first update is the first reuse, its step size the first rate."""

    def update(logits: Table, rate: Array) -> tuple[Table, Table]:
        ascent = slope(logits, batch, charge, discount=discount, coefficient=coefficient, current=current)
        moved = logits + rate * ascent
        return moved, moved

    return jax.lax.scan(update, batch.world.old, rates)[1]


class Measures(NamedTuple):
    """Of one policy against the old one; every field exact.

    Attributes:
        states: TV(d_pi, d_old) [prob].
        pairs: TV(mu_pi, mu_old) over states and actions [prob].
        bound: discount / (1 - discount) E_{d_old} TV(pi, pi_old), at least `states`.
        divergence: D_F(mu_pi, mu_old) of the conditional entropy, sum_s d_pi KL(pi || pi_old) [nats].
        gain: J(pi) - J(pi_old), discounted return.
    """

    states: Number
    pairs: Number
    bound: Number
    divergence: Number
    gain: Number


def measure(logits: Table, batch: Batch, discount: Number) -> Measures:
    """How far a policy has moved, and what for."""
    states = occupancy(logits, batch.world, discount)
    pairs = states[:, None] * jax.nn.softmax(logits) - batch.states[:, None] * jnp.exp(batch.log_old)
    change = categorical.total_variation(logits, batch.world.old)
    return Measures(
        states=jnp.sum(jnp.abs(states - batch.states)) / 2,
        pairs=jnp.sum(jnp.abs(pairs)) / 2,
        bound=discount / (1 - discount) * jnp.sum(batch.states * change),
        divergence=divergence(logits, batch, discount),
        gain=jnp.sum(pairs * batch.world.rewards) / (1 - discount),
    )


def divergence(logits: Table, batch: Batch, discount: Number) -> Float[Array, ""]:
    """D_F(mu_pi, mu_old) of the conditional entropy, sum_s d_pi KL(pi || pi_old) [nats]."""
    return jnp.sum(occupancy(logits, batch.world, discount) * categorical.kl(logits, batch.world.old))


def full_divergence(logits: Table, batch: Batch, discount: Number) -> Float[Array, ""]:
    """KL(mu_pi || mu_old), the divergence of the full entropy: that of the states beside the conditional one [nats]."""
    states = occupancy(logits, batch.world, discount)
    reached = batch.states > 0
    ratio = jnp.where(reached, states, 1.0) / jnp.where(reached, batch.states, 1.0)
    return divergence(logits, batch, discount) + jnp.sum(states * jnp.log(ratio))


def objective(gain: Any, charged: Any, *, discount: Any, coefficient: Any) -> Any:
    """<r, mu_pi> - coefficient D_F, less that of the old policy, from the gain in return and D_F."""
    return (1 - discount) * gain - coefficient * charged


def optimum(batch: Batch, *, discount: Number, coefficient: Number, sweeps: int = 500) -> Table:
    """Logits of the mirror-descent step pi ~ pi_old exp((Q - V) / coefficient), Q and V soft, by value iteration.

    V(s) = coefficient log sum_a pi_old exp(Q / coefficient), Q = r + discount P V. For rewards in [0, 1] the error of V
    after n sweeps is below discount^n / (1 - discount).
    """
    world = batch.world

    def backed_up(values: Array) -> Table:
        return world.rewards + discount * world.transitions @ values

    def sweep(values: Array, _: None) -> tuple[Array, None]:
        return coefficient * jax.nn.logsumexp(batch.log_old + backed_up(values) / coefficient, axis=1), None

    values, _ = jax.lax.scan(sweep, jnp.zeros_like(batch.states), None, length=sweeps)
    return batch.log_old + backed_up(values) / coefficient


def distance(logits: Table, best: Table, batch: Batch, *, discount: Number, coefficient: Number) -> Number:
    """How far the objective is below its optimum: coefficient sum_s d_pi KL(pi || best)."""
    return coefficient * jnp.sum(occupancy(logits, batch.world, discount) * categorical.kl(logits, best))
