"""Logit changes that an update causes, before and after it and to first order, beside the formula.

The formula is `bounds.logit_dynamics`: |dz| = |eta A| sqrt(1 - 2 p_c + C). Three things are told apart. One token's
gradient alone moves the logits of its own context by eta A K (e_c - p) to first order, K = J J^T the empirical neural
tangent kernel there. The batch's update moves them by that and by the gradients of all other tokens. And what is
realised differs from first order by the curvature of the network.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from experiments.dynamics.learner import Batch
from experiments.dynamics.learner import Learner
from experiments.dynamics.learner import moved
from experiments.dynamics.learner import scaled
from experiments.dynamics.learner import token_steps
from jaxrl_llm import categorical
from jaxrl_llm.bounds import logit_dynamics
from jaxrl_llm.masked import masked_sum
from jaxrl_llm.masked import safe_divide
from jaxrl_llm.typing import Array
from jaxrl_llm.typing import Float
from jaxrl_llm.typing import Int
from jaxrl_llm.typing import PRNGKey
from jaxrl_llm.typing import PyTree

Measured = dict[str, Array]


def size(vector: Float[Array, "*batch V"]) -> Float[Array, "*batch"]:
    """Euclidean norm over the vocabulary."""
    return jnp.linalg.norm(vector, axis=-1)


def _in_log_probs(p: Float[Array, "*batch V"], change: Float[Array, "*batch V"]) -> Float[Array, "*batch V"]:
    """Change of the log-probabilities, to first order in that of the logits."""
    return change - jnp.sum(p * change, axis=-1, keepdims=True)


def _others(
    p: Float[Array, "*batch V"], action: Int[Array, "*batch"], change: Float[Array, "*batch V"], step: Array
) -> Measured:
    """Which actions besides the sampled one rise, by the formula and by a change of the logits."""
    other = ~jax.nn.one_hot(action, p.shape[-1], dtype=bool)
    formula = logit_dynamics.log_prob_changes(p, action) * jnp.sign(step)[..., None] > 0
    found = _in_log_probs(p, change) > 0

    def share(rises: Array) -> Array:
        return masked_sum(rises.astype(p.dtype), other, axis=-1) / (p.shape[-1] - 1)

    # By probability: most of a large vocabulary is its tail.
    agreeing = safe_divide(
        masked_sum(jnp.where(formula == found, p, 0.0), other, axis=-1), masked_sum(p, other, axis=-1)
    )
    return {
        "rising_formula": share(formula),
        "rising": share(found),
        "agreeing": share(formula == found),
        "agreeing_mass": agreeing,
    }


def _sizes(logits: Array, action: Array, step: Array, first: Array, realised: Array) -> Measured:
    """The formula and what became of it, in one or many contexts."""
    p = jnp.exp(categorical.log_probs(logits))
    chosen = categorical.at_target(p, action)
    collision = categorical.collision(logits)
    return {
        "p": chosen,
        "step": step,
        "unit": logit_dynamics.update_norm(chosen, collision),
        "predicted": logit_dynamics.update_norm(chosen, collision) * jnp.abs(step),
        "first": size(first),
        "realised": size(realised),
        # A shift of all logits by the same is no change of the policy.
        "centred": size(realised - jnp.mean(realised, axis=-1, keepdims=True)),
        # What one unit in the last place of every logit amounts to.
        "rounding": jnp.finfo(logits.dtype).eps * size(logits),
        **_others(p, action, first, step),
    }


def batch_probe(
    learner: Learner, params: PyTree, fixed: PyTree, batch: Batch, change: PyTree, learning_rate: Any
) -> tuple[Measured, Float[Array, "B K V"]]:
    """Every token of a batch under one change of the parameters.

    Args:
        learner: whose logits.
        params: before the change.
        fixed: parameters that do not learn.
        batch: the tokens.
        change: what is added to the parameters.
        learning_rate: eta of the formula.

    Returns:
        (numbers [B, K], changes of the logits to first order).
    """

    def logits(params: PyTree) -> Array:
        return learner.logits(params, fixed, batch.texts)

    before, first = jax.jvp(logits, (params,), (change,))
    realised = logits(moved(params, change)) - before
    measured = _sizes(before, batch.actions, token_steps(batch, learning_rate), first, realised)
    return measured | {"mask": batch.mask, "entropy": categorical.entropy(before)}, first


def kernel(
    logits: Callable[[PyTree], Float[Array, " V"]], params: PyTree
) -> Callable[[Float[Array, " V"]], Float[Array, " V"]]:
    """v -> K v = J (J^T v): the empirical neural tangent kernel of one context, which is never written down."""
    _, pullback = jax.vjp(logits, params)
    return lambda vector: jax.jvp(logits, (params,), pullback(vector))[1]


def eigenvalue_range(product: Callable[[Array], Array], vocabulary: int) -> tuple[Array, Array]:
    """Smallest and largest eigenvalue of K, from K written down; for small vocabularies."""
    dense = jax.lax.map(product, jnp.eye(vocabulary))
    eigenvalues = jnp.linalg.eigvalsh((dense + dense.T) / 2)
    return eigenvalues[0], eigenvalues[-1]


def largest_eigenvalue(product: Callable[[Array], Array], start: Float[Array, " V"], iterations: int) -> Array:
    """|K v| / |v| after some steps of power iteration: it grows towards the largest eigenvalue, from below."""

    def step(vector: Array, _: None) -> tuple[Array, Array]:
        image = product(vector / size(vector))
        return image, size(image)

    return jax.lax.scan(step, start, length=iterations)[1][-1]


def token_probe(
    learner: Learner,
    params: PyTree,
    fixed: PyTree,
    batch: Batch,
    first: Float[Array, "B K V"],
    place: Int[Array, ""],
    *,
    learning_rate: Any,
    power_iterations: int = 0,
) -> Measured:
    """The gradient of one token's log pi alone, with its weight in the batch, and what it is of the batch's update.

    A is 1 here: to first order it is a factor of formula and change alike, and so a token without an advantage counts.

    Args:
        learner, params, fixed, batch: as for `batch_probe`.
        first: of `batch_probe`, for the step of the batch.
        place: row * K + column of the token.
        learning_rate: eta.
        power_iterations: 0 to compute every eigenvalue of K.

    Returns:
        numbers of this token; `own` is the size of its own change, times its |A|, over that of the batch, and
        `own_cosine` the cosine between them.
    """
    row, column = place // batch.mask.shape[1], place % batch.mask.shape[1]
    texts = jax.tree.map(lambda x: jax.lax.dynamic_slice_in_dim(x, row, 1), batch.texts)
    action = batch.actions[row, column]

    def logits(params: PyTree) -> Array:
        return learner.logits(params, fixed, texts)[0, column]

    step = jnp.asarray(learning_rate / batch.mask.shape[0])
    before, pullback = jax.vjp(logits, params)
    residual = jax.grad(categorical.log_prob)(before, action)
    change = scaled(pullback(residual)[0], step)
    own = jax.jvp(logits, (params,), (change,))[1]
    realised = logits(moved(params, change)) - before
    product = kernel(logits, params)
    if power_iterations:
        low, high = jnp.full((), jnp.nan), largest_eigenvalue(product, residual, power_iterations)
    else:
        low, high = eigenvalue_range(product, len(before))
    whole, part = first[row, column], batch.advantages[row] * own
    return _sizes(before, action, step, own, realised) | {
        "kernel_low": low,
        "kernel_high": high,
        "own": safe_divide(size(part), size(whole)),
        "own_cosine": safe_divide(jnp.sum(part * whole), size(part) * size(whole)),
        "advantage": batch.advantages[row],
        "real": batch.mask[row, column],
    }


def choose_tokens(batch: Batch, count: int, key: PRNGKey) -> Int[Array, " count"]:
    """Places of some tokens of the batch; where it has too few, of padding, which counts for nothing."""
    order = jax.random.uniform(key, (batch.mask.size,)) + jnp.where(batch.mask.reshape(-1), 0.0, 1.0)
    return jnp.argsort(order)[:count]
