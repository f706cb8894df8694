"""Statistics of sampled tokens under a model: the teacher-forced pass over whole texts.

In a text of T = P + R columns the last R are the response. `response_columns` cuts them out, `predicting` takes the
states that predict them, `align` puts their numbers back; nothing else counts columns.
"""

from collections.abc import Sequence
from functools import partial
from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from jaxrl_kernels import Reference
from jaxrl_kernels import TokenStatistics
from jaxrl_kernels import token_statistics
from jaxrl_llm.models.sharding import automatic_mesh
from jaxrl_llm.models.sharding import batch_devices
from jaxrl_llm.models.transformer import Transformer
from jaxrl_llm.rollouts.scoring_over_devices import statistics_over_devices
from jaxrl_llm.rollouts.texts import check_texts
from jaxrl_llm.rollouts.texts import require_arrays
from jaxrl_llm.rollouts.texts import require_ids
from jaxrl_llm.typing import Array
from jaxrl_llm.typing import Bool
from jaxrl_llm.typing import Float
from jaxrl_llm.typing import Int

Columns = TypeVar("Columns", np.ndarray, jax.Array)


def response_columns(values: Columns, response_width: int) -> Columns:
    """The columns of the response, `[B, R, ..]`, of a whole text's, `[B, T, ..]`."""
    return values[:, values.shape[1] - response_width :]


def predicting(hidden: Float[Array, "B T D"], response_width: int) -> Float[Array, "B R D"]:
    """The hidden states that predict the response: token t is predicted at t - 1.

    Raises:
        ValueError: if there is no prompt token before the response.
    """
    length = hidden.shape[1]
    if not 1 <= response_width < length:
        raise ValueError(
            f"response_width must leave at least one prompt column: 1 .. {length - 1} of {length}, got {response_width}"
        )
    return hidden[:, length - response_width - 1 : length - 1]


def align(values: Float[Array, "B R"], length: int) -> Float[Array, "B T"]:
    """Response columns put where their tokens are in the whole text; 0 at the prompt."""
    return jnp.pad(values, ((0, 0), (length - values.shape[1], 0)))


def score(
    model: Transformer,
    tokens: Int[Array, "B T"],
    token_mask: Bool[Array, "B T"],
    *,
    response_width: int,
    reference: Transformer | None = None,
    temperature: float = 1.0,
    log_min_p: float | None = None,
    statistics: Sequence[str] | None = None,
    remat: bool = False,
    implementation: str | None = None,
) -> TokenStatistics:
    """Statistics of every response token under a model, and against a reference model if there is one.

    Args:
        model: the policy that is asked.
        tokens: left-padded prompts followed by responses.
        token_mask: which tokens are real.
        response_width: R, the last columns, which hold the responses.
        reference: model of the distribution to compare with, read on the same contexts.
        temperature: of the policy that is asked; 1 unless the rollouts' own distribution is meant.
        log_min_p: see `jaxrl_kernels.token_statistics`.
        statistics: names to compute; None for all that apply.
        remat: compute each layer again in the backward pass.
        implementation: see `jaxrl_kernels.token_statistics`.

    Returns:
        TokenStatistics of [B, R] arrays, column r about the token in column T - R + r; they mean nothing at padding.

    Raises:
        TypeError: if texts are no arrays, or the width is no integer.
        ValueError: if the shapes do not fit or the tokens are no integers; where the values are known (not inside jit),
            if a prompt is not left-padded or a real token is none of the vocabulary. Inside jit the log-prob of such a
            response token is NaN.
    """
    require_arrays(tokens=tokens, token_mask=token_mask)
    require_ids("tokens", tokens)
    if isinstance(response_width, bool):
        raise TypeError(f"response_width is {response_width}; it must be an integer.")
    if not tokens.size:
        raise ValueError(f"tokens has shape {tokens.shape}; it must hold a text")
    check_texts(tokens, token_mask, response_width=response_width, vocabulary=model.config.vocab_size)
    if token_mask.shape == tokens.shape:
        tokens = jnp.where(token_mask, tokens, 0)  # what stands at padding may be no token
    hidden = predicting(model(tokens, token_mask, remat=remat), response_width)
    head, axis = model.head()
    reference_states = None
    if reference is not None:
        reference_head, reference_axis = reference.head()
        reference_head = reference_head if reference_axis == axis else reference_head.T
        reference_states = Reference(predicting(reference(tokens, token_mask), response_width), reference_head)
    return score_hidden(
        hidden,
        head,
        response_columns(tokens, response_width),
        vocabulary_axis=axis,
        reference=reference_states,
        temperature=temperature,
        log_min_p=log_min_p,
        statistics=statistics,
        implementation=implementation,
    )


def score_hidden(
    hidden: Float[Array, "*shape D"],
    head: Float[Array, "_ _"],
    targets: Int[Array, "*shape"],
    *,
    vocabulary_axis: int,
    reference: Reference | None = None,
    temperature: float = 1.0,
    log_min_p: float | None = None,
    statistics: Sequence[str] | None = None,
    implementation: str | None = None,
) -> TokenStatistics:
    """Statistics of tokens whose predicting states exist already, such as those that follow a frozen trunk.

    Args:
        hidden: of `predicting`, or of any other tokens.
        head: of `Transformer.head`.
        targets: the token that each state predicts.
        vocabulary_axis: of `Transformer.head`.
        reference: hidden states [*shape, D'] and head of the distribution to compare with, the head in the same layout.
        temperature, log_min_p, statistics, implementation: as for `score`.

    Returns:
        TokenStatistics of arrays of the shape of `targets`.

    Raises:
        ValueError: there is not one target for every state.
    """
    shape = hidden.shape[:-1]
    if targets.shape != shape:
        raise ValueError(f"targets has shape {targets.shape}; it must be {shape}, one for each of the hidden states.")
    if reference is not None:
        reference = Reference(reference.hidden.reshape(-1, reference.hidden.shape[-1]), reference.head)
    found = partial(
        token_statistics,
        vocabulary_axis=vocabulary_axis,
        temperature=temperature,
        log_min_p=log_min_p,
        statistics=statistics,
        implementation=implementation,
    )
    arrays, mesh = (hidden.reshape(-1, hidden.shape[-1]), head, targets.reshape(-1)), automatic_mesh()
    if mesh is None or mesh.size == 1 or targets.size % batch_devices(mesh):
        flat = found(*arrays, reference=reference)
    else:
        flat = statistics_over_devices(mesh, found, *arrays, vocabulary_axis=vocabulary_axis, reference=reference)
    return TokenStatistics(*(None if value is None else value.reshape(shape) for value in flat))
