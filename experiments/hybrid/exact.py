"""What a policy is worth, its expected gradient and where that vanishes, without sampling: recursions over H steps.

Every recursion is the expectation of `objectives.hybrid.sparse_coefficient` given state and action: what comes after a
step enters it as one later token that carries the expected sums.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from experiments.hybrid.arms import Field
from experiments.hybrid.world import Task
from jaxrl_llm import categorical
from jaxrl_llm.objectives import hybrid
from jaxrl_llm.tabular import TabularMdp
from jaxrl_llm.typing import Array
from jaxrl_llm.typing import Float

Policy = Float[Array, "H S A"]


class Worth(NamedTuple):
    """Of one policy: J = kl - lambda reward, and its two parts; leading axes as there are policies.

    Attributes:
        kl: E sum_t KL(pi || pi_T), the trajectory KL to the teacher [nats].
        reward: expected reward.
    """

    kl: Float[Array, "*shape"]
    reward: Float[Array, "*shape"]

    def objective(self, reward_weight: Array | float) -> Float[Array, "*shape"]:
        """J [nats]."""
        return self.kl - reward_weight * self.reward


def occupancy(policy: Policy, mdp: TabularMdp) -> Float[Array, "H S"]:
    """The probability of each state at each step."""

    def step(law: Array, known: tuple[Array, Array]) -> tuple[Array, Array]:
        logits, move = known
        return jnp.einsum("s,sa,sat->t", law, jax.nn.softmax(logits), move), law

    return jax.lax.scan(step, mdp.initial, (policy, mdp.transitions))[1]


def context_kl(policy: Policy, other: Policy, task: Task) -> Float[Array, "H S"]:
    """KL(pi || other) in each state; 0 where the episode is over [nats]."""
    return jnp.where(task.running, categorical.kl(policy, other), 0.0)


def worth(policy: Policy, task: Task) -> Worth:
    """J in its two parts."""
    law = occupancy(policy, task.mdp)
    reward = jnp.einsum("hs,hsa,hsa->", law, jax.nn.softmax(policy), task.mdp.rewards)
    return Worth(jnp.sum(law * context_kl(policy, task.teacher, task)), reward)


def distance(policy: Policy, other: Policy, task: Task) -> Float[Array, ""]:
    """KL of the laws of whole episodes, E_pi sum_t KL(pi || other) [nats]; from the optimum it is J(pi) - J*."""
    return jnp.sum(occupancy(policy, task.mdp) * context_kl(policy, other, task))


def coefficients(field: Field, task: Task, policy: Policy | None = None) -> tuple[Float[Array, "H S A"], Policy]:
    """E[G_t | s, a] of a field by backward induction, without l_t, which the dense part has integrated.

    Args:
        field: which gradient.
        task: one task.
        policy: the policy that acts; without one, the policy at which the field vanishes.

    Returns:
        (the expected coefficients, the logits of the policy).
    """

    def step(later: tuple[Array, Array], known: tuple[Array, ...]) -> tuple[tuple[Array, Array], tuple[Array, Array]]:
        move, reward, teacher, given = known
        diverged, rewarded = move @ later[0], move @ later[1]
        # A row per state and action, of two tokens: this step, and one that stands for all that follow.
        both = (reward.size, 2)
        coefficient = hybrid.sparse_coefficient(
            jnp.stack([jnp.zeros_like(diverged), field.future * diverged], axis=-1).reshape(both),
            jnp.stack([reward, rewarded], axis=-1).reshape(both),
            jnp.ones(both, bool),
            discount=field.discount,
            reward_weight=field.reward_weight,
        )[:, 0].reshape(reward.shape)
        # dk/dz + E[G (e_a - p)] = p (l + G - mean) is 0 where l + G is the same for all actions.
        logits = categorical.log_probs(teacher) - coefficient if policy is None else given
        law, k = jax.nn.softmax(logits), jnp.where(task.running, categorical.kl(logits, teacher), 0.0)
        diverged = k + field.discount * jnp.sum(law * diverged, axis=-1)
        rewarded = jnp.sum(law * (reward + field.discount * rewarded), axis=-1)
        return (diverged, rewarded), (coefficient, logits)

    zero = jnp.zeros(task.running.shape, task.teacher.dtype)
    given = task.teacher if policy is None else policy
    steps = (task.mdp.transitions, task.mdp.rewards, task.teacher, given)
    return jax.lax.scan(step, (zero, zero), steps, reverse=True)[1]


def stationary(field: Field, task: Task) -> Policy:
    """The policy of full support at which a field with a dense part vanishes, pi(a|s) ~ pi_T(a|s) exp(-E[G_t|s, a]).

    There is one: G_t depends on later steps alone, and with full support every state that can be reached is. Of the
    exact field it is the optimum of J: pi_T exp(lambda R) where moves are deterministic, as in Rooms.
    """
    return coefficients(field, task)[1]


def field_loss(policy: Policy, field: Field, task: Task) -> Float[Array, ""]:
    """A loss whose gradient is the expected gradient of a field; its value is nothing."""
    fixed = jax.lax.stop_gradient(policy)
    running, own = task.running[:, None], field.dense + field.own
    weight = jnp.where(running, occupancy(fixed, task.mdp)[..., None] * jax.nn.softmax(fixed), 0.0)
    coefficient, _ = coefficients(field, task, fixed)
    kl = jnp.broadcast_to(context_kl(policy, task.teacher, task)[..., None], policy.shape)
    losses = hybrid.hybrid_losses(own * kl, categorical.log_probs(policy), coefficient)
    taught = jnp.sum(occupancy(task.teacher, task.mdp) * context_kl(task.teacher, policy, task))
    return jnp.sum(weight * losses) + field.offline * taught
