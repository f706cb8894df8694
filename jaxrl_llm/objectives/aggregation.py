"""From per-token losses to one number: five rules, each returning (sum, count).

Sums and counts of micro-batches and of shards are added, and divided once at the end: the result is that of the whole
batch, exactly. Losses of tokens outside the mask never enter. Rows without any response token (padding of a batch) are
not sequences and are not counted.

A sequence rejected by a mask still counts: its losses are zero and its place in the denominator stays, because the
estimator is an average over what was sampled (errata F2.13). Dividing by the accepted alone is another estimator and
another function, with `_accepted` in its name.
"""

import math

import jax.numpy as jnp
from jaxtyping import Array
from jaxtyping import Bool
from jaxtyping import Float
from jaxtyping import ScalarLike

from jaxrl_llm.checks import checked
from jaxrl_llm.checks import require_choice
from jaxrl_llm.checks import require_dtype
from jaxrl_llm.checks import require_numbers
from jaxrl_llm.checks import require_rank
from jaxrl_llm.checks import require_same_shape
from jaxrl_llm.masked import masked_count
from jaxrl_llm.masked import masked_mean
from jaxrl_llm.masked import masked_sum
from jaxrl_llm.masked import masked_sum_count

Aggregate = tuple[Float[Array, ""], Float[Array, ""]]

AGGREGATIONS = (
    "token-mean",
    "token-sum",
    "seq-mean-token-sum",
    "seq-mean-token-sum-norm",
    "seq-mean-token-mean",
)
"""The names users know, as `aggregate` accepts them."""


def _check(loss_t: Float[Array, "B T"], response_mask: Bool[Array, "B T"]) -> None:
    require_rank(2, "B T", loss_t=loss_t, response_mask=response_mask)
    require_same_shape(loss_t=loss_t, response_mask=response_mask)
    require_dtype("floating", loss_t=loss_t)
    require_dtype("boolean", response_mask=response_mask)


@checked
def token_mean(loss_t: Float[Array, "B T"], response_mask: Bool[Array, "B T"]) -> Aggregate:
    """sum over all response tokens / number of response tokens of the batch: every token weighs the same.

    Source: DAPO (arXiv 2503.14476, section 3.3).

    Args:
        loss_t: loss of each token.
        response_mask: true at the tokens that the policy sampled.

    Returns:
        (sum of the losses, number of response tokens).

    Raises:
        ValueError, TypeError: if the arrays are not [B, T] of one shape, floating and boolean.
    """
    _check(loss_t, response_mask)
    return masked_sum_count(loss_t, response_mask)


@checked
def token_sum(
    loss_t: Float[Array, "B T"], response_mask: Bool[Array, "B T"], *, batch_fraction: ScalarLike = 1.0
) -> Aggregate:
    """The sum over all response tokens, not divided.

    Args:
        loss_t: loss of each token.
        response_mask: true at the tokens that the policy sampled.
        batch_fraction: the share of the whole batch that these rows are; k equal micro-batches pass 1/k each, so that
            their counts add to 1.

    Returns:
        (sum of the losses, batch_fraction).

    Raises:
        ValueError, TypeError: if the arrays are not [B, T] of one shape, floating and boolean.
    """
    _check(loss_t, response_mask)
    return masked_sum(loss_t, response_mask), jnp.asarray(batch_fraction, loss_t.dtype)


def _count_sequences(loss_t: Float[Array, "B T"], response_mask: Bool[Array, "B T"]) -> Float[Array, ""]:
    return masked_count(loss_t[:, 0], jnp.any(response_mask, axis=1))


@checked
def seq_mean_token_sum(loss_t: Float[Array, "B T"], response_mask: Bool[Array, "B T"]) -> Aggregate:
    """The mean over sequences of the sum over their tokens: the gradient of the expected return, long sequences in
    proportion.

    Source: REINFORCE, RLOO (arXiv 2402.14740), TRM (arXiv 2512.23075), Dr.GRPO (arXiv 2503.20783).

    Returns:
        (sum of the losses, number of sequences). Args and Raises as `token_mean`.
    """
    _check(loss_t, response_mask)
    return masked_sum(loss_t, response_mask), _count_sequences(loss_t, response_mask)


@checked
def seq_mean_token_sum_norm(
    loss_t: Float[Array, "B T"], response_mask: Bool[Array, "B T"], *, length_normaliser: ScalarLike
) -> Aggregate:
    """The mean over sequences of (the sum over their tokens / a constant length).

    Source: the listing of Dr.GRPO (arXiv 2503.20783, appendix), whose constant is the largest number of tokens a
    response may have. The constant belongs to the run, not to the batch, so it cannot favour short or long responses;
    it is equivalent to a smaller learning rate.

    Args:
        loss_t: loss of each token.
        response_mask: true at the tokens that the policy sampled.
        length_normaliser: the constant [tokens], > 0.

    Returns:
        (sum of the losses / length_normaliser, number of sequences).

    Raises:
        ValueError, TypeError: if the arrays are not [B, T] of one shape, floating and boolean.
    """
    require_numbers(1e-30, math.inf, length_normaliser=length_normaliser)
    _check(loss_t, response_mask)
    return masked_sum(loss_t, response_mask) / length_normaliser, _count_sequences(loss_t, response_mask)


@checked
def seq_mean_token_mean(loss_t: Float[Array, "B T"], response_mask: Bool[Array, "B T"]) -> Aggregate:
    """The mean over sequences of the mean over their tokens: a token weighs 1 / (length of its own response).

    Source: GRPO (arXiv 2402.03300, eq. 3). Two responses of one advantage pull equally hard, so a long wrong answer is
    punished less per token.

    Returns:
        (sum over sequences of the mean loss of their tokens, number of sequences). Args and Raises as `token_mean`.
    """
    _check(loss_t, response_mask)
    return jnp.sum(masked_mean(loss_t, response_mask, axis=1)), _count_sequences(loss_t, response_mask)


@checked
def aggregate(
    loss_t: Float[Array, "B T"],
    response_mask: Bool[Array, "B T"],
    *,
    mode: str,
    length_normaliser: ScalarLike | None = None,
    batch_fraction: ScalarLike = 1.0,
) -> Aggregate:
    """One of the five rules by the name users know (`AGGREGATIONS`): for recipes and configuration files.

    Args:
        loss_t: loss of each token.
        response_mask: true at the tokens that the policy sampled.
        mode: a name of `AGGREGATIONS`.
        length_normaliser: needed by "seq-mean-token-sum-norm" and ignored by the others [tokens].
        batch_fraction: used by "token-sum" only.

    Returns:
        (sum, count).

    Raises:
        ValueError: for an unknown mode, or a missing length_normaliser.
    """
    require_choice("mode", mode, AGGREGATIONS)
    if mode == "token-mean":
        return token_mean(loss_t, response_mask)
    if mode == "token-sum":
        return token_sum(loss_t, response_mask, batch_fraction=batch_fraction)
    if mode == "seq-mean-token-sum":
        return seq_mean_token_sum(loss_t, response_mask)
    if mode == "seq-mean-token-mean":
        return seq_mean_token_mean(loss_t, response_mask)
    if length_normaliser is None:
        raise ValueError("length_normaliser is None; seq-mean-token-sum-norm needs the constant length it divides by.")
    return seq_mean_token_sum_norm(loss_t, response_mask, length_normaliser=length_normaliser)


@checked
def aggregate_accepted(
    loss_t: Float[Array, "B T"],
    response_mask: Bool[Array, "B T"],
    accepted: Bool[Array, " B"],
    *,
    mode: str,
    length_normaliser: ScalarLike | None = None,
    batch_fraction: ScalarLike = 1.0,
) -> Aggregate:
    """The same rule over accepted sequences alone, in the sum and in the count.

    This is what multiplying the response mask by the acceptance does. It divides by a random number that the policy
    itself controls, so the step does not shrink when most of the batch is rejected (errata F2.13).

    Args:
        loss_t: loss of each token.
        response_mask: true at the tokens that the policy sampled.
        accepted: true for sequences that contribute.
        mode, length_normaliser, batch_fraction: as in `aggregate`.

    Returns:
        (sum, count) over the accepted sequences; if there is none, (0, 0), and (0, batch_fraction) for "token-sum",
        whose count says which part of the batch the rows are and not how many of them were accepted: the counts of
        micro-batches add to 1 whatever was accepted in them.
    """
    require_rank(1, "B", accepted=accepted)
    return aggregate(
        loss_t,
        response_mask & accepted[:, None],
        mode=mode,
        length_normaliser=length_normaliser,
        batch_fraction=batch_fraction,
    )


@checked
def token_weights(
    response_mask: Bool[Array, "B T"],
    *,
    mode: str,
    length_normaliser: ScalarLike | None = None,
    batch_fraction: ScalarLike = 1.0,
) -> tuple[Float[Array, "B T"], Float[Array, ""]]:
    """Weights w and count n with aggregate(loss_t) = (sum_t w_t loss_t, n): every rule is linear in the losses.

    For routes that make the loss of a token and its gradient together, such as `jaxrl_kernels.token_loss`, where the
    weight enters as a side array.

    Returns:
        (weights, 0 outside the mask; count). Args and Raises as `aggregate`.
    """
    ones = jnp.ones(response_mask.shape, jnp.result_type(float))
    _, count = aggregate(
        ones, response_mask, mode=mode, length_normaliser=length_normaliser, batch_fraction=batch_fraction
    )
    zero = jnp.zeros((), ones.dtype)
    if mode == "seq-mean-token-mean":
        length = masked_count(ones, response_mask, axis=1)
        return jnp.where(response_mask, 1 / jnp.maximum(length, 1)[:, None], zero), count
    if mode == "seq-mean-token-sum-norm":
        ones = ones / length_normaliser  # pyright: ignore[reportOperatorIssue]
    return jnp.where(response_mask, ones, zero), count
