"""All numbers of a step, from what it collected, prepared and updated."""

from collections.abc import Sequence

import jax
import numpy as np

from jaxrl_llm.rollouts.collect import Experience
from jaxrl_llm.training.text.diagnostics import mismatch_metrics
from jaxrl_llm.training.text.scoring import Shift
from jaxrl_llm.training.text.step_metrics import group_metrics
from jaxrl_llm.training.text.step_metrics import sequence_metrics
from jaxrl_llm.training.text.step_metrics import shift_metrics
from jaxrl_llm.training.text.step_metrics import staleness_metrics
from jaxrl_llm.training.text.step_metrics import update_metrics
from jaxrl_llm.training.text.trainer import Prepared
from jaxrl_llm.typing import Array
from jaxrl_llm.typing import SumCount


def _rows(array: Array) -> Array:
    # One row per sequence.
    return array.reshape(-1, *array.shape[2:])


def step_metrics(
    experience: Experience, prepared: Prepared, updates: Sequence[dict[str, SumCount]], version: int
) -> dict[str, float]:
    """What the batch was, what its update did, and how far sampler and trainer are apart.

    Args:
        experience: as it was collected.
        prepared: as it was learned from.
        updates: metrics of each optimiser step.
        version: updates of the policy before this step.
    """
    batch, sound = prepared.batch, prepared.finite.rows
    metrics = sequence_metrics(experience, prepared.advantages, prepared.mask, sound)
    metrics |= group_metrics(np.where(sound, experience.trajectories.returns, 0), prepared.kept, sound)
    metrics |= update_metrics(updates) | staleness_metrics(experience, prepared.mask, version)
    metrics |= {
        "actor/entropy": float(prepared.entropy[prepared.mask].mean()) if prepared.mask.any() else 0.0,
        "rollout/dropped_nonfinite": float(prepared.finite.dropped),
        "layout/padded_share": prepared.padded_share,
    }
    if batch.log_prob_behaviour is not None:
        arrays = (batch.log_prob_old, batch.log_prob_behaviour, prepared.counted)
        metrics |= _floats(mismatch_metrics(*map(_rows, arrays)))
    return metrics | dict(prepared.flips) | dict(experience.metrics)


def bound_metrics(
    shift: Shift, prepared: Prepared, *, reward_range: tuple[float, float], sampled_by_mu: bool
) -> dict[str, float]:
    """`shift_metrics` of a batch.

    Args:
        shift: the policy after the update against the one that sampled.
        prepared: the batch.
        reward_range: smallest and largest reward.
        sampled_by_mu: whether the samples are of the policy that `shift` compares with.
    """
    batch = prepared.batch
    arrays = map(_rows, (prepared.counted, batch.rewards, batch.group_ids))
    rows = jax.tree.map(_rows, shift)
    return _floats(shift_metrics(rows, *arrays, reward_range=reward_range, sampled_by_mu=sampled_by_mu))


def _floats(values: dict[str, Array]) -> dict[str, float]:
    return {name: float(np.asarray(value)) for name, value in jax.device_get(values).items()}
