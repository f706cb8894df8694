"""How much the estimates of one gradient scatter, and whether their mean is the expectation that they claim."""

from collections.abc import Mapping

import jax
import jax.numpy as jnp

from experiments.hybrid.arms import Field
from experiments.hybrid.exact import Policy
from experiments.hybrid.train import Gradient
from experiments.hybrid.world import Task
from jaxrl_llm.typing import Array
from jaxrl_llm.typing import PRNGKey

_FORMS = {
    "reinforce": ("REINFORCE, all in the score", Field(1.0, dense=0.0, own=1.0)),
    "hybrid": ("dense + sparse", Field(1.0)),
    "rao_blackwell": ("dense + sparse, Rao-Blackwell", Field(1.0, rao_blackwell=1.0)),
}
_BASELINES = {
    "none": ("no baseline", {"step_baseline": 0.0}),
    "reward": ("reward baseline", {"step_baseline": 0.0, "reward_baseline": 1.0}),
    "step": ("step baseline", {}),
}
ESTIMATORS = {
    f"{form}_{baseline}": (f"{label}, {words}", field._replace(**changes))
    for form, (label, field) in _FORMS.items()
    for baseline, (words, changes) in _BASELINES.items()
} | {
    "kl_loss_step": ("KL loss + reward, step baseline", Field(1.0, future=0.0)),
    "discount_0.9_step": ("discount 0.9, step baseline", Field(1.0, discount=0.9)),
    "discount_0.5_step": ("discount 0.5, step baseline", Field(1.0, discount=0.5)),
    "discount_0_step": ("discount 0, step baseline", Field(1.0, discount=0.0)),
}
"""Names -> (words, field at lambda 1). The first nine are unbiased for the gradient of J, the others are not."""

UNBIASED = tuple(name for name in ESTIMATORS if name.split("_")[0] in ("reinforce", "hybrid", "rao"))
PER_CHUNK = 16
"""Batches of episodes whose gradients are held at once."""


def scatter(
    sampled: Gradient, exact: Gradient, policy: Policy, tasks: Task, key: PRNGKey, *, reward_weight: float, batches: int
) -> Mapping[str, Array]:
    """Of every estimator at one policy, over `batches` independent batches, the same ones for all estimators.

    Args:
        sampled: one estimate of the gradient of a field.
        exact: the expectation.
        policy: where.
        tasks: the tasks.
        key: of the episodes.
        reward_weight: lambda.
        batches: how many, a multiple of `PER_CHUNK`.

    Returns:
        one number per estimator. variance: trace of the covariance; bias: norm of (its expectation - grad J), exact;
        distance: n |mean - its expectation|^2 / variance, 1 on average where the estimate is unbiased; along and
        along_error: the mean of (estimate - grad J) along the unit vector of what a KL loss leaves out of grad J, and
        its standard error. norm: |grad J|, the same for all.
    """
    fields = [field._replace(reward_weight=reward_weight) for _, field in ESTIMATORS.values()]
    stacked = jax.tree.map(lambda *numbers: jnp.asarray(numbers, policy.dtype), *fields)
    expected = jax.vmap(exact, in_axes=(None, 0, None, None))(policy, stacked, tasks, key)
    names = list(ESTIMATORS)
    truth = expected[names.index("hybrid_none")]
    direction = truth - expected[names.index("kl_loss_step")]
    direction = direction / jnp.linalg.norm(direction)
    entries = tuple(range(1, policy.ndim + 1))

    def one(key: PRNGKey) -> Array:
        return jax.vmap(sampled, in_axes=(None, 0, None, None))(policy, stacked, tasks, key) - expected

    def chunk(carry: tuple[Array, Array], key: PRNGKey) -> tuple[tuple[Array, Array], Array]:
        away = jax.vmap(one)(jax.random.split(key, PER_CHUNK))
        squares = jnp.sum(jnp.square(away), axis=(0, *(axis + 1 for axis in entries)))
        along = jnp.tensordot(away, direction, axes=policy.ndim)
        return (carry[0] + jnp.sum(away, axis=0), carry[1] + squares), along

    start = jnp.zeros_like(expected), jnp.zeros(len(names), policy.dtype)
    (total, squares), along = jax.lax.scan(chunk, start, jax.random.split(key, batches // PER_CHUNK))
    mean = total / batches
    away = jnp.sum(jnp.square(mean), axis=entries)
    variance = (squares - batches * away) / (batches - 1)
    bias = expected - truth
    projected = along.reshape(batches, -1) + jnp.tensordot(bias, direction, axes=policy.ndim)
    return {
        "variance": variance,
        "bias": jnp.sqrt(jnp.sum(jnp.square(bias), axis=entries)),
        "distance": batches * away / variance,
        "along": jnp.mean(projected, axis=0),
        "along_error": jnp.std(projected, axis=0, ddof=1) / batches**0.5,
        "norm": jnp.linalg.norm(truth) * jnp.ones(len(names)),
    }
