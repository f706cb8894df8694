"""Which rows of a rollout batch make up which optimiser step."""

import dataclasses
from typing import Literal
from typing import NamedTuple

import jax
import numpy as np

from jaxrl_llm.checks import LATER
from jaxrl_llm.training.run.numbers import require_finite
from jaxrl_llm.typing import Bool
from jaxrl_llm.typing import Int
from jaxrl_llm.typing import PRNGKey


@dataclasses.dataclass(frozen=True)
class UpdateSettings:
    """How a rollout batch is turned into optimiser steps.

    Attributes:
        minibatches: optimiser steps per pass over the batch; prompts, with all their answers, are dealt out at random.
        epochs: passes over the batch.
        micro_batch: prompts whose gradient is computed at a time; 0 takes a minibatch at once. Smaller needs less
            memory and changes the result by rounding only.
        skip_equal_groups: leave out prompts whose answers all earned the same, so that their advantages are 0. Their
            KL and entropy terms, if the recipe has any, are left out with them. False keeps every prompt.
        remat: recompute activations in the backward pass instead of keeping them.
        share_prompts: compute a prompt once for all its answers where that is cheaper; False repeats it.
        stop_after_skipped: stop the run after this many updates in a row whose loss or gradient is not finite.
        bounds_every: compare the policy before and after the update on the sampled contexts every so many steps, and
            where a batch is written down whole (`episodes_every`); 0 for those alone.
        score_rows: rows scored at a time; 0 scores the batch at once.
        router_bias_rate: how far each optimiser step moves the correction bias of a router's expert, up where its load
            was below the mean and down where it was above; 0 leaves it. GLM-4.5: 0.001 in pre-training, 0 afterwards.
        router_balance: weight of the loss for even loads within each row. GLM-4.5: 0.0001.
        mtp_weight: weight of the cross-entropy of the layer that predicts the token after the next one, at the chosen
            tokens that count. GLM-4.5: 0.3, later 0.1.
        mtp_detached: that loss moves its own layer alone, as it should in reinforcement learning; False lets it move
            the rest of the model too, as in pre-training.
        router_replay: "on" sends each token in training to the experts to which the sampler sent it, with the weights
            of the live scores; "measure" lets routers choose anew and measures how often they choose otherwise.
    """

    minibatches: int = 4
    epochs: int = 1
    micro_batch: int = 0
    skip_equal_groups: bool = True
    remat: bool = False
    share_prompts: bool = True
    stop_after_skipped: int = 5
    bounds_every: int = 1
    score_rows: int = 0
    router_bias_rate: float = dataclasses.field(default=0.0, metadata=LATER)
    router_balance: float = dataclasses.field(default=0.0, metadata=LATER)
    mtp_weight: float = dataclasses.field(default=0.0, metadata=LATER)
    mtp_detached: bool = dataclasses.field(default=True, metadata=LATER)
    router_replay: Literal["off", "measure", "on"] = dataclasses.field(default="off", metadata=LATER)

    def __post_init__(self) -> None:
        """Refuse impossible numbers."""
        require_finite(self)
        for name, least in {
            "minibatches": 1,
            "epochs": 1,
            "micro_batch": 0,
            "stop_after_skipped": 1,
            "bounds_every": 0,
            "score_rows": 0,
            "router_bias_rate": 0,
            "router_balance": 0,
            "mtp_weight": 0,
        }.items():
            if getattr(self, name) < least:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least {least}.")
        if self.router_replay not in (allowed := ("off", "measure", "on")):
            raise ValueError(f"router_replay is {self.router_replay!r}; it must be one of {', '.join(allowed)}.")


class Minibatch(NamedTuple):
    """Rows of one optimiser step, [micro-batches, rows each]; -1 is no row, and only the first `used` hold any."""

    rows: Int[np.ndarray, "A m"]
    used: int


def plan_minibatches(
    key: PRNGKey,
    kept: Bool[np.ndarray, " prompts"],
    *,
    rows_per_prompt: int,
    settings: UpdateSettings,
) -> list[Minibatch]:
    """Deal the kept prompts out to `minibatches` optimiser steps, in a new random order each epoch.

    Every minibatch has the same shape whatever the number of kept prompts, so that the update compiles once. Sizes
    differ by one prompt at most; minibatches that would be empty are left out.

    Args:
        key: of this rollout batch; epochs fold their number in.
        kept: which prompts take part.
        rows_per_prompt: packed rows of one prompt, neighbours of each other.
        settings: number of minibatches and epochs, size of a micro-batch.
    """
    largest = -(-len(kept) // settings.minibatches)
    micro = min(settings.micro_batch or largest, largest)
    count = -(-largest // micro)
    plan = []
    for epoch in range(settings.epochs):
        # All prompts are shuffled before some are left out, so that one program serves every number of them.
        order = np.asarray(jax.random.permutation(jax.random.fold_in(key, epoch), len(kept)))
        for part in np.array_split(order[kept[order]], settings.minibatches):
            if not len(part):
                continue
            padded = np.full(count * micro, -1, np.int32)
            padded[: len(part)] = part
            rows = padded[:, None] * rows_per_prompt + np.arange(rows_per_prompt, dtype=np.int32)
            rows = np.where(padded[:, None] < 0, np.int32(-1), rows).reshape(count, micro * rows_per_prompt)
            plan.append(Minibatch(rows, -(-len(part) // micro)))
    return plan
