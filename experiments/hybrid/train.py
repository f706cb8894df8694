"""Training by the gradient of an arm, estimated from episodes or exact; seeds are vmapped, updates are one scan."""

from collections.abc import Callable
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from experiments.hybrid.arms import ARMS
from experiments.hybrid.arms import SCHEDULES
from experiments.hybrid.arms import Field
from experiments.hybrid.arms import scheduled
from experiments.hybrid.arms import with_weight
from experiments.hybrid.exact import Policy
from experiments.hybrid.exact import field_loss
from experiments.hybrid.exact import worth
from experiments.hybrid.world import Episodes
from experiments.hybrid.world import Task
from experiments.hybrid.world import play
from jaxrl_llm import categorical
from jaxrl_llm.masked import masked_sum
from jaxrl_llm.objectives import hybrid
from jaxrl_llm.objectives.advantages import leave_one_out
from jaxrl_llm.typing import Array
from jaxrl_llm.typing import Float
from jaxrl_llm.typing import PRNGKey

Gradient = Callable[[Policy, Field, Task, PRNGKey], Policy]
"""(policies, field, tasks, key) -> gradient of the mean over tasks, the leading axis of policies and of tasks."""


def _at(tables: Policy, met: Episodes) -> Float[Array, "B H A"]:
    """The row of each state that was met at its step."""
    return tables[jnp.arange(tables.shape[0]), met.states]


def sampled_loss(policy: Policy, field: Field, task: Task, met: Episodes, taught: Episodes) -> Float[Array, ""]:
    """A loss whose gradient is the estimate of a field from episodes of the policy, which are one group.

    Args:
        policy: that sampled.
        field: which gradient.
        task: one task.
        met: episodes of the policy.
        taught: episodes of the teacher, for imitation offline.

    Returns:
        the mean over episodes of the sum over their steps.
    """
    logits, teacher = _at(policy, met), _at(task.teacher, met)
    kl, log_prob = categorical.kl(logits, teacher), categorical.log_prob(logits, met.actions)
    log_ratio = jax.lax.stop_gradient(log_prob - categorical.log_prob(teacher, met.actions))
    group = jnp.zeros(met.mask.shape[0], int)
    returns = masked_sum(met.rewards, met.mask, axis=1)
    coefficient = field.own * log_ratio + hybrid.sparse_coefficient(
        field.future * jnp.where(field.rao_blackwell > 0, kl, log_ratio),
        met.rewards,
        met.mask,
        discount=field.discount,
        reward_weight=field.reward_weight,
        baseline=field.reward_baseline * (returns - leave_one_out(returns, group)),
    )
    coefficient = jnp.where(met.mask, coefficient, 0.0)
    # Where the others have ended, theirs is 0: whatever they did, it does not depend on this episode.
    centred = jax.vmap(leave_one_out, in_axes=(1, None), out_axes=1)(coefficient, group)
    coefficient = jnp.where(field.step_baseline > 0, centred, coefficient)
    losses = hybrid.hybrid_losses(field.dense * kl, log_prob, coefficient)
    towards = categorical.kl(_at(task.teacher, taught), _at(policy, taught))
    total = masked_sum(losses, met.mask) + field.offline * masked_sum(towards, taught.mask)
    return total / met.mask.shape[0]


def exact_gradient(policy: Policy, field: Field, tasks: Task, key: PRNGKey) -> Policy:
    """The expected gradient of the mean over tasks, a `Gradient`; the key is not used."""
    del key

    def loss(policy: Policy) -> Array:
        return jnp.mean(jax.vmap(field_loss, in_axes=(0, None, 0))(policy, field, tasks))

    return jax.grad(loss)(policy)


def sampled_gradient(group_size: int) -> Gradient:
    """The same, estimated from a group of new episodes of each task."""

    def loss(policy: Policy, field: Field, task: Task, key: PRNGKey) -> Array:
        own, other = jax.random.split(key)
        met = play(jax.lax.stop_gradient(policy), task, own, episodes=group_size)
        taught = play(task.teacher, task, other, episodes=group_size)
        return sampled_loss(policy, field, task, met, taught)

    def total(policy: Policy, field: Field, tasks: Task, key: PRNGKey) -> Array:
        keys = jax.random.split(key, tasks.teacher.shape[0])
        return jnp.mean(jax.vmap(loss, in_axes=(0, None, 0, 0))(policy, field, tasks, keys))

    return jax.grad(total)


class ArmScan:
    """The tasks and one kind of gradient: compiled once, for whichever arm is trained."""

    def __init__(
        self,
        tasks: Task,
        gradient: Gradient,
        *,
        updates: int,
        learning_rate: float,
        reward_weight: float,
        kept: tuple[int, ...] = (),
    ) -> None:
        """Nothing is compiled yet; `kept` are the updates before which the policy is kept."""
        self._tasks, self._gradient, self._updates = tasks, gradient, updates
        self._reward_weight, self._kept = reward_weight, kept
        self._optimizer = optax.adam(optax.cosine_decay_schedule(learning_rate, updates))
        self._run = jax.jit(jax.vmap(self._train, in_axes=(None, None, None, 0)))

    def train(self, name: str, keys: PRNGKey) -> Mapping[str, Array]:
        """J's two parts before each update and after the last, [seeds, updates + 1], and the policies that are kept.

        One update: a gradient, from new episodes of every task if it is sampled, and one step of Adam, whose step size
        falls to 0 as a cosine. The start is the uniform policy.
        """
        arm = ARMS[name]
        field = jax.tree.map(jnp.asarray, with_weight(arm.field, self._reward_weight))
        return self._run(self._tasks, field, jnp.asarray(SCHEDULES.index(arm.schedule)), keys)

    def _train(self, tasks: Task, field: Field, schedule: Array, key: PRNGKey) -> dict[str, Array]:
        def measured(policy: Policy) -> dict[str, Array]:
            found = jax.vmap(worth)(policy, tasks)
            return {"kl": jnp.mean(found.kl), "reward": jnp.mean(found.reward)}

        def update(carry: Any, step: Array) -> tuple[Any, dict[str, Array]]:
            policy, state, kept = carry
            kept = [jnp.where(step == number, policy, old) for number, old in zip(self._kept, kept, strict=True)]
            now = scheduled(field, schedule, step, updates=self._updates)
            gradient = self._gradient(policy, now, tasks, jax.random.fold_in(key, step))
            changes, state = self._optimizer.update(gradient, state)
            return (optax.apply_updates(policy, changes), state, kept), measured(policy)

        start = jnp.zeros_like(tasks.teacher)
        carry = start, self._optimizer.init(start), [start for _ in self._kept]
        (policy, _, kept), curves = jax.lax.scan(update, carry, jnp.arange(self._updates))
        curves = jax.tree.map(jnp.append, curves, measured(policy))
        return curves | {"policies": jnp.stack(kept)} if kept else curves
