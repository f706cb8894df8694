"""What value models are trained on: squared errors to rewards that the index perturbs.

Source: HyperAgent (arXiv 2402.10228), GPT-HyperAgent and Ensemble++ (arXiv 2407.13195).
"""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array
from jaxtyping import Float

from jaxrl_llm.exploration.heads import Parts
from jaxrl_llm.exploration.heads import ValueModel
from jaxrl_llm.exploration.inputs import require_width
from jaxrl_llm.exploration.replay import Data


def index_loss(
    model: ValueModel,
    trained: Any,
    prior: Any,
    data: Data,
    indices: Float[Array, "C U M"],
    *,
    noise_scale: float,
) -> Float[Array, " B"]:
    """1/|Xi| sum_xi ( f(x, xi)[a] - (r + sigma <xi, z>) )^2 per datum.

    Args:
        model: f; one without an index takes indices [1, 1, 0] and perturbations [B, 0].
        trained: its trained parameters.
        prior: its prior.
        data: inputs, outputs, rewards and perturbations.
        indices: Xi: an update set for all data (C = 1), or fresh draws for each datum (C = B).
        noise_scale: sigma, in units of reward.

    Returns:
        one loss per datum, in squared units of reward.

    Raises:
        ValueError: if a width is wrong.
    """
    require_width("perturbations", data.perturbations, model.index_dimension)
    every = model.values(trained, prior, data.inputs, indices)  # [B, U, O]
    fitted = jnp.take_along_axis(every, data.outputs[:, None, None], axis=2)[:, :, 0]
    shifts = jnp.sum(indices * data.perturbations[:, None, :], axis=-1)
    return jnp.mean(jnp.square(fitted - data.rewards[:, None] - noise_scale * shifts), axis=1)


def separated_loss(parts: Parts, trained: Any, prior: Any, data: Data, *, noise_scale: float) -> Float[Array, " B"]:
    """( mean - r )^2 + | factor - sigma z |^2 per datum: `index_loss` under every centred isotropic law of the index.

    For f = mean + factor xi with E xi = 0 and E xi xi^T = I the cross terms vanish, so this is the exact expectation,
    at the price of no index at all. With `held_parts` it is the loss of Ensemble++, in which the factor does not train
    the features.

    Args:
        parts: `parts` or `held_parts` of a model that is linear in the index.
        trained, prior, data, noise_scale: as `index_loss`.

    Returns:
        as `index_loss`.
    """
    mean, factor = parts(trained, prior, data.inputs)
    rows = jnp.arange(data.outputs.shape[0])
    error = mean[rows, data.outputs] - data.rewards
    spread = factor[rows, data.outputs] - noise_scale * data.perturbations
    return jnp.square(error) + jnp.sum(jnp.square(spread), axis=-1)


def squared_norm(tree: Any) -> Float[Array, ""]:
    """Sum of the squares of all numbers of a pytree."""
    return sum((jnp.sum(jnp.square(leaf)) for leaf in jax.tree.leaves(tree)), start=jnp.zeros(()))
