"""The loss of the layer that predicts the token after the next one: multi-token prediction."""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxrl_llm.models.experts import Routes
from jaxrl_llm.models.transformer import Transformer
from jaxrl_llm.rollouts import score_hidden
from jaxrl_llm.training.text.layout import Rows
from jaxrl_llm.training.text.layout import by_sequence
from jaxrl_llm.training.text.layout import chosen_states
from jaxrl_llm.training.text.layout import predecessors
from jaxrl_llm.training.text.layout import visibility
from jaxrl_llm.training.text.minibatches import UpdateSettings
from jaxrl_llm.typing import Array
from jaxrl_llm.typing import Bool
from jaxrl_llm.typing import Float
from jaxrl_llm.typing import PyTree
from jaxrl_llm.typing import SumCount


class FurtherLoss(NamedTuple):
    """The loss as (sum, count); where the layer's router sent the tokens, and which tokens the layer read."""

    loss: SumCount
    routes: Routes | None
    token_mask: Bool[Array, "n W"]


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


def require_further(settings: UpdateSettings, params: PyTree) -> None:
    """The loss has a weight where its layer learns, and only there.

    Raises:
        ValueError: one without the other.
    """
    learns = "further" in params
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
