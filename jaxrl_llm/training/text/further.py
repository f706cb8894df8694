"""The loss of the layer that predicts the token after the next one: multi-token prediction."""

import dataclasses
from typing import Any
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from jaxrl_llm.models.experts import Routes
from jaxrl_llm.models.transformer import Transformer
from jaxrl_llm.rollouts import score_hidden
from jaxrl_llm.training.run.parameters import is_variable
from jaxrl_llm.training.text.layout import Grid
from jaxrl_llm.training.text.layout import Packed
from jaxrl_llm.training.text.layout import Rows
from jaxrl_llm.training.text.layout import by_sequence
from jaxrl_llm.training.text.layout import chosen_states
from jaxrl_llm.training.text.layout import visibility
from jaxrl_llm.training.text.minibatches import UpdateSettings
from jaxrl_llm.training.text.routers import gradient_norm
from jaxrl_llm.typing import Array
from jaxrl_llm.typing import Bool
from jaxrl_llm.typing import Float
from jaxrl_llm.typing import Int
from jaxrl_llm.typing import PyTree
from jaxrl_llm.typing import SumCount

FURTHER = "further"
"""Where the layer stands in a tree of parameters."""


class FurtherLoss(NamedTuple):
    """The loss as (sum, count); where the layer's router sent the tokens, and which tokens the layer read."""

    loss: SumCount
    routes: Routes | None
    token_mask: Bool[Array, "n W"]


def predecessors(rows: Rows) -> tuple[Int[Array, "n W"], Bool[Array, "n W"]]:
    """The column of the token before each token in its own text, and whether there is one: a text's first has none."""
    layout, (count, width) = rows.layout, rows.tokens.shape
    columns = jnp.broadcast_to(jnp.arange(width), (count, width))
    if rows.segments is None:
        assert isinstance(layout, Grid)
        places = np.arange(width) - layout.prompt_length
        first = (places >= 0) & (places % max(layout.response_length - 1, 1) == 0)
        before = jnp.where(jnp.asarray(first), layout.prompt_length - 1, columns - 1)
    else:
        assert rows.prefixes is not None
        # Segments lie in one piece: the last column of each, and padding in a place of its own. A row has as many
        # prompts as sequences at most; answers of one token are segments without a column.
        assert isinstance(layout, Packed)
        ends = (
            jnp.full((count, 2 * layout.sequences + 1), -1).at[jnp.arange(count)[:, None], rows.segments].max(columns)
        )
        begins = rows.segments != jnp.roll(rows.segments, 1, axis=1)
        begins = begins.at[:, 0].set(True)
        continued = jnp.where(
            rows.prefixes == rows.segments, -1, jnp.take_along_axis(ends, jnp.maximum(rows.prefixes, 0), axis=1)
        )
        before = jnp.where(begins, continued, columns - 1)
    there = jnp.take_along_axis(rows.token_mask, jnp.maximum(before, 0), axis=1) & (before >= 0)
    return jnp.maximum(before, 0), there & rows.token_mask


def further_loss(
    model: Transformer,
    x: Float[Array, "n W D"],
    rows: Rows,
    response_mask: Bool[Array, "n S R"],
    *,
    temperature: float,
    detached: bool,
    remat: bool,
) -> FurtherLoss:
    """Cross-entropy of the chosen tokens, each predicted without the token before it having passed the model:

        L = - sum_t M_t log q(y_t | h_{t-2}, y_{t-1}) / sum_t M_t,   q = softmax(head(further(h_{t-2}, e_{t-1})) / T)

    GLM-4.5 (arXiv:2508.06471), section 2; DeepSeek-V3 (arXiv:2412.19437), equation 24, over the chosen tokens. The
    first two tokens of a text have no such state and do not count.

    Args:
        model: with a layer for further tokens.
        x: what its last layer passed on, before the last norm.
        rows: what it read.
        response_mask: true at chosen tokens that count.
        temperature: T, that of the policy, whose drafts the layer makes.
        detached: hold states, embeddings and head still.
        remat: recompute the layer in the backward pass.
    """
    before, real = predecessors(rows)
    states = jnp.take_along_axis(model.final_norm(x), before[:, :, None], axis=1)
    embedded, (head, axis) = model.embed(rows.tokens), model.head()
    if detached:
        states, embedded, head = jax.lax.stop_gradient((states, embedded, head))
    sight = dataclasses.replace(visibility(rows), real=real)
    hidden, routes = model.further_rows(states, embedded, rows.positions, sight, remat=remat)
    found = score_hidden(
        chosen_states(hidden, rows),
        head,
        rows.targets,
        vocabulary_axis=axis,
        temperature=temperature,
        statistics=("log_prob",),
    )
    assert found.log_prob is not None
    counts = response_mask & by_sequence(chosen_states(real[:, :, None], rows)[..., 0], rows)
    lost = jnp.where(counts, -by_sequence(found.log_prob, rows), 0.0)
    return FurtherLoss((jnp.sum(lost), jnp.sum(counts, dtype=lost.dtype)), routes, real)


def _is_further(path: tuple) -> bool:
    return jax.tree_util.keystr(path[:1], simple=True) == FURTHER


def policy_part(tree: nnx.State) -> nnx.State:
    """Parameters or gradients without those of the layer for further tokens."""
    return nnx.State({name: part for name, part in tree.items() if name != FURTHER})


def further_norm(gradients: nnx.State) -> Float[Array, ""]:
    """Global norm of that layer's gradient."""
    return gradient_norm(nnx.State({FURTHER: gradients[FURTHER]}))


def without_broken_further(gradients: nnx.State, norm: Float[Array, ""]) -> nnx.State:
    """The gradients, that layer's 0 where its norm is not finite: the policy's step is not lost for it."""

    def keep(path: tuple, leaf: Array) -> Array:
        return jnp.where(jnp.isfinite(norm), leaf, 0) if _is_further(path) else leaf

    return jax.tree_util.tree_map_with_path(keep, gradients)


def with_further_apart(
    policy: optax.GradientTransformation, further: optax.GradientTransformation
) -> optax.GradientTransformation:
    """Two optimisers, so that neither part is clipped by the other's norm: the policy's, and that of its layer for
    further tokens.
    """

    def label(path: tuple, _: Any) -> str:
        return "further" if _is_further(path) else "policy"

    return optax.partition(
        {"policy": policy, "further": further},
        lambda tree: jax.tree_util.tree_map_with_path(label, tree, is_leaf=is_variable),
    )


def require_further(settings: UpdateSettings, params: PyTree) -> None:
    """The loss has a weight where its layer learns, and only there.

    Raises:
        ValueError: one without the other.
    """
    learns = FURTHER in params
    if settings.mtp_weight and not learns:
        raise ValueError(
            f"update.mtp_weight is {settings.mtp_weight}, and no layer for further tokens learns; it must be 0, or the "
            "model must have such a layer (mtp_layers) and the choice of parameters take it (Trainable(further=True))."
        )
    if learns and not settings.mtp_weight:
        raise ValueError(
            "the layer for further tokens learns (Trainable(further=True)), and update.mtp_weight, the weight of its "
            "loss, is 0; it must be above 0."
        )
