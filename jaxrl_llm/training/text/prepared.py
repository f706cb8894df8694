"""A batch of experience as its optimiser steps take it: the rows, who is grouped with whom, and the minibatches."""

import dataclasses
from collections.abc import Mapping
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from jaxrl_llm.rollouts.collect import BatchShape
from jaxrl_llm.rollouts.collect import Experience
from jaxrl_llm.training.text.finite import Finite
from jaxrl_llm.training.text.layout import Arrangement
from jaxrl_llm.training.text.layout import Grid
from jaxrl_llm.training.text.minibatches import Minibatch
from jaxrl_llm.training.text.minibatches import UpdateSettings
from jaxrl_llm.training.text.minibatches import plan_minibatches
from jaxrl_llm.training.text.routers import flip_metrics
from jaxrl_llm.training.text.update import Heads
from jaxrl_llm.training.text.update import UpdateBatch
from jaxrl_llm.typing import Array
from jaxrl_llm.typing import Bool
from jaxrl_llm.typing import Float
from jaxrl_llm.typing import Int
from jaxrl_llm.typing import PRNGKey


class Prepared(NamedTuple):
    """A batch of experience ready for its optimiser steps.

    arrangement: where the rows of the batch stand. batch, heads: for `Update`; the response mask is false throughout
    rows that are not finite. plan: its minibatches. kept: which groups take part. finite: which rows of the batch are
    sound. Of each chosen token, in the order of the batch, `[B, R]`: mask, true where the row is sound; advantages;
    entropy of the policy before the update [nats]. counted: the chosen tokens of sound rows where they stand in
    `batch`, learned from or not. flips: how often routers choose otherwise than the sampler's did, where it is known.
    """

    arrangement: Arrangement
    batch: UpdateBatch
    heads: Heads
    plan: list[Minibatch]
    kept: Bool[np.ndarray, " groups"]
    finite: Finite
    mask: Bool[np.ndarray, "B R"]
    advantages: Float[np.ndarray, "B R"]
    entropy: Float[np.ndarray, "B R"]
    counted: Bool[Array, "n S R"]
    flips: Mapping[str, float]

    @property
    def padded_share(self) -> float:
        """Share of the computed tokens that are padding."""
        return self.arrangement.padded_share

    def gather(self, values: Array) -> np.ndarray:
        """Numbers that stand as `batch` does, in the order of the batch."""
        return self.arrangement.gather(values)


def group_rows(group_ids: Int[ArrayLike, " B"], arrangement: Arrangement) -> Int[np.ndarray, "n S"]:
    """Which sequences of the rows belong together, counted from 0; a place without a sequence is alone, below 0."""
    groups = np.unique(np.asarray(group_ids), return_inverse=True)[1].astype(np.int32)
    alone = -1 - np.arange(arrangement.sequences.size, dtype=np.int32).reshape(arrangement.sequences.shape)
    return np.where(arrangement.sequences >= 0, arrangement.spread(groups), alone)


def deal(
    key: PRNGKey,
    batch: UpdateBatch,
    arrangement: Arrangement,
    kept: Bool[np.ndarray, " groups"],
    shape: BatchShape,
    settings: UpdateSettings,
) -> tuple[Bool[Array, "n S R"], list[Minibatch]]:
    """The tokens that are learned from and the minibatches of their rows.

    A group that is not kept leaves a grid with its rows, and packed rows, which it shares with others, with its tokens.

    Args:
        key: of the order.
        batch: the rows.
        arrangement: where they came from.
        kept: groups that take part.
        shape: of the batch of experience.
        settings: how it is turned into optimiser steps.
    """
    layout = batch.rows.layout
    if isinstance(layout, Grid):
        each = shape.group_size // layout.slots
        return batch.response_mask, plan_minibatches(key, kept, rows_per_prompt=each, settings=settings)
    used = arrangement.spread(np.repeat(kept, shape.group_size))
    if settings.micro_batch:
        tokens = settings.micro_batch * shape.group_size * shape.width
        settings = dataclasses.replace(settings, micro_batch=max(tokens // layout.width, 1))
    plan = plan_minibatches(key, used.any(axis=1), rows_per_prompt=1, settings=settings)
    return batch.response_mask & jnp.asarray(used)[:, :, None], plan


def recorded_selections(experience: Experience) -> Int[np.ndarray, "B T L k"]:
    """The experts to which the sampler sent each token.

    Raises:
        ValueError: the collector brought none.
    """
    if experience.selections is None:
        raise ValueError(
            "update.router_replay is set, and the experience has no selections; its sampler must record them."
        )
    return experience.selections


def router_flips(
    experience: Experience, arrangement: Arrangement, own: Int[Array, "n W K k"] | None
) -> Mapping[str, float]:
    """`flip_metrics` of a batch; nothing where the trainer's choices are not known."""
    if own is None:
        return {}
    real = np.asarray(experience.trajectories.token_mask)
    # Nobody reads the last token of a text.
    read = real & np.pad(real[:, 1:], ((0, 0), (0, 1)))
    there = arrangement.of_tokens(read) & (arrangement.origins >= 0)
    return flip_metrics(arrangement.of_tokens(recorded_selections(experience)), np.asarray(own), there)
