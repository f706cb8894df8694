"""What is measured of a policy that learns: its logits at the sampled tokens, and one batch of them."""

from collections.abc import Callable
from typing import Any
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxrl_llm import categorical
from jaxrl_llm.masked import masked_sum
from jaxrl_llm.typing import Array
from jaxrl_llm.typing import Bool
from jaxrl_llm.typing import Float
from jaxrl_llm.typing import Int
from jaxrl_llm.typing import PRNGKey
from jaxrl_llm.typing import PyTree


class Batch(NamedTuple):
    """B episodes of at most K actions.

    Attributes:
        texts: what the logits are computed from; every array has the B episodes first.
        actions: what was sampled, each from the logits of its context.
        mask: which of them are real.
        advantages: of the episodes; every action of one has the same.
        reward: mean over the episodes.
    """

    texts: PyTree
    actions: Int[Array, "B K"]
    mask: Bool[Array, "B K"]
    advantages: Float[Array, " B"]
    reward: Float[Array, ""]


class Learner(NamedTuple):
    """A policy and the task that it learns.

    Attributes:
        init: key -> (parameters that learn, those that do not).
        sample: (parameters, the others, key) -> a batch.
        logits: (parameters, the others, texts) -> logits of every action's context.
    """

    init: Callable[[PRNGKey], tuple[PyTree, PyTree]]
    sample: Callable[[PyTree, PyTree, PRNGKey], Batch]
    logits: Callable[[PyTree, PyTree, PyTree], Float[Array, "B K V"]]


def policy_gradient(learner: Learner, params: PyTree, fixed: PyTree, batch: Batch) -> PyTree:
    """Gradient of (1 / B) sum over episodes and actions of A log pi: that which is ascended."""

    def gain(params: PyTree) -> Array:
        log_prob = categorical.log_prob(learner.logits(params, fixed, batch.texts), batch.actions)
        return masked_sum(batch.advantages[:, None] * log_prob, batch.mask) / batch.mask.shape[0]

    return jax.grad(gain)(params)


def token_steps(batch: Batch, learning_rate: Any) -> Float[Array, "B K"]:
    """eta A of every action: the learning rate, times its advantage, times its weight 1 / B in the batch."""
    return jnp.broadcast_to(learning_rate * batch.advantages[:, None] / batch.mask.shape[0], batch.mask.shape)


def scaled(tree: PyTree, factor: Any) -> PyTree:
    """Every array times a number."""
    return jax.tree.map(lambda x: factor * x, tree)


def moved(params: PyTree, change: PyTree) -> PyTree:
    """The parameters after a change."""
    return jax.tree.map(jnp.add, params, change)
