"""Statistics of sampled tokens under a model: the teacher-forced pass over whole texts."""

from collections.abc import Sequence

import jax.numpy as jnp

from jaxrl_kernels import Reference
from jaxrl_kernels import TokenStatistics
from jaxrl_kernels import token_statistics
from jaxrl_llm.models.transformer import Transformer
from jaxrl_llm.rollouts.texts import check_texts
from jaxrl_llm.typing import Array
from jaxrl_llm.typing import Bool
from jaxrl_llm.typing import Float
from jaxrl_llm.typing import Int


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
        ValueError: if the shapes do not fit; where the values are known (not inside jit), if a prompt is not
            left-padded or a real token is none of the vocabulary. Inside jit the log-prob of such a response token is
            NaN.
    """
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
        tokens,
        vocabulary_axis=axis,
        reference=reference_states,
        temperature=temperature,
        log_min_p=log_min_p,
        statistics=statistics,
        implementation=implementation,
    )


def score_hidden(
    hidden: Float[Array, "B R D"],
    head: Float[Array, "_ _"],
    tokens: Int[Array, "B T"],
    *,
    vocabulary_axis: int,
    reference: Reference | None = None,
    temperature: float = 1.0,
    log_min_p: float | None = None,
    statistics: Sequence[str] | None = None,
    implementation: str | None = None,
) -> TokenStatistics:
    """`score` for hidden states that exist already, such as those that follow a frozen trunk.

    Args:
        hidden: of `predicting`.
        head: of `Transformer.head`.
        tokens: whole texts, or just their last R columns.
        vocabulary_axis: of `Transformer.head`.
        reference: hidden states [B, R, D'] and head of the distribution to compare with, the head in the same layout.
        temperature, log_min_p, statistics, implementation: as for `score`.
    """
    rows, width = hidden.shape[:2]
    if tokens.ndim != 2 or tokens.shape[0] != rows or tokens.shape[1] < width:
        raise ValueError(
            f"tokens must have {rows} rows and at least {width} columns as hidden has, got shape {tokens.shape}"
        )
    if reference is not None:
        reference = Reference(reference.hidden.reshape(rows * width, -1), reference.head)
    flat = token_statistics(
        hidden.reshape(rows * width, -1),
        head,
        tokens[:, tokens.shape[1] - width :].reshape(-1),
        vocabulary_axis=vocabulary_axis,
        reference=reference,
        temperature=temperature,
        log_min_p=log_min_p,
        statistics=statistics,
        implementation=implementation,
    )
    return TokenStatistics(*(None if value is None else value.reshape(rows, width) for value in flat))
