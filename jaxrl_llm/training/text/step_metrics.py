"""The numbers of one training step, by name. Names that verl has mean what they mean there.

critic/rewards/*, critic/advantages/*   per sequence
critic/value_loss, critic/explained_variance    per chosen token, over all optimiser steps; only where there is a critic
rollout/staleness                       updates between the weights that sampled a token and the policy [per token]
layout/padded_share                     share of the tokens computed in the update that are padding
task/lenient, task/strict               share of answers that are right, by the two ways of looking [per sequence]
response_length/*, prompt_length/mean   [tokens]; clip_ratio is the share of answers that did not end in time
groups/*                                prompts: all answers earned the same, and took part in the update
actor/*                                 means over the response tokens of all optimiser steps of this batch; entropy is
                                        that of the policy before the update, at the sampled contexts
rollout/dropped_nonfinite               rollouts left out of everything else, as a log-prob or the reward is not finite
rollout_corr/*, training/*              the trainer's policy before the update against the sampler (`diagnostics`)
shift/*                                 the policy after all optimiser steps (pi) against the one that sampled (mu),
                                        exactly, at every sampled context; mu is the policy before the update, with
                                        the sampler's weights where they are perturbed. Perturbations of its cache or
                                        logits are not in it, nor are truncation and pruning, of either
bounds/*                                bounds on |J(pi) - J(mu) - L'|, beside sampled estimates of that error; only
                                        where mu is the law of the sampler, as the samples must be mu's
"""

from collections import defaultdict
from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxrl_llm.bounds import BoundInputs
from jaxrl_llm.bounds import SurrogateErrorBounds
from jaxrl_llm.bounds import bound_inputs_from_tokens
from jaxrl_llm.bounds import sampled_gain
from jaxrl_llm.bounds import sampled_sequence_tv
from jaxrl_llm.bounds import sampled_surrogate_error
from jaxrl_llm.bounds import sampled_surrogate_gain
from jaxrl_llm.bounds import surrogate_error_bounds
from jaxrl_llm.masked import masked_max
from jaxrl_llm.masked import masked_mean
from jaxrl_llm.objectives.values import explained_variance
from jaxrl_llm.rollouts.collect import Experience
from jaxrl_llm.training.text.scoring import Shift
from jaxrl_llm.trajectory import Actions
from jaxrl_llm.typing import Array
from jaxrl_llm.typing import Bool
from jaxrl_llm.typing import Float
from jaxrl_llm.typing import Int
from jaxrl_llm.typing import SumCount

ESTIMATE_NOTE = (
    "Maxima run over the contexts that were sampled, not over all that can be reached: these bounds are estimates on "
    "visited contexts, never certificates."
)

ACTOR_NAMES = {
    "loss": "actor/loss",
    "grad_norm": "actor/grad_norm",
    "skipped": "actor/skipped",
    "clip_fraction": "actor/pg_clipfrac",
    "kl_old_k3": "actor/ppo_kl",
    "kl_behaviour": "actor/kl_behaviour",
    "kl_behaviour_k3": "actor/kl_behaviour_k3",
    "kl_ref": "actor/kl_loss",
    "entropy": "actor/entropy_during_update",
    "ratio": "actor/ratio",
    "ratio_limited": "actor/ratio_limited",
    "weight": "actor/correction_weight",
    "weight_zero": "actor/correction_rejected",
    "rejected_sequences": "actor/rejected_sequences",
    "rejected_tokens": "actor/rejected_tokens",
    "value_loss": "critic/value_loss",
}
"""What `policy_loss` and `Update` call a metric, and what the run calls it; others are `actor/` and their name."""

VALUE_MOMENTS = ("value_target", "value_target_squared", "value_error", "value_error_squared")
"""The moments of which `critic/explained_variance` is made."""


def sequence_metrics(
    experience: Experience,
    advantages: Float[np.ndarray, "B R"],
    mask: Bool[np.ndarray, "B R"],
    sound: Bool[np.ndarray, " B"],
) -> dict[str, float]:
    """Rewards, advantages and lengths of the sound rows of a batch, and the means of the collector's own columns.

    Args:
        experience: the batch.
        advantages: of each chosen token; a row's is the mean over its tokens.
        mask: true at the chosen tokens of sound rows.
        sound: which rows are counted.
    """
    trajectories = experience.trajectories
    lengths = mask.sum(axis=1)
    per_row = np.where(mask, advantages, 0).sum(axis=1, dtype=np.float64) / np.maximum(lengths, 1)
    spread = {
        "critic/rewards": np.asarray(trajectories.returns, np.float64),
        "critic/advantages": per_row,
        "response_length": lengths,
    }
    values = {
        f"{name}/{what}": float(getattr(np, what)(x[sound]))
        for name, x in spread.items()
        for what in ("mean", "max", "min")
    }
    # In float64, which a column that was kept on disk comes back in.
    values |= {
        name: float(np.mean(np.asarray(column, np.float64)[sound])) for name, column in experience.per_row.items()
    }
    return values | {"response_length/clip_ratio": float(np.mean(~np.asarray(trajectories.ended)[sound]))}


def staleness_metrics(experience: Experience, mask: Bool[np.ndarray, "B R"], version: int) -> dict[str, float]:
    """How many updates older than the policy the weights were that sampled each chosen token: mean and largest; nothing
    where nobody said.
    """
    columns = Actions.of(experience.trajectories, width=mask.shape[1])
    versions = columns.take(experience.trajectories.versions, fill=-1)
    known = mask & (versions >= 0)
    if not known.any():
        return {}
    age = version - versions[known]
    return {"rollout/staleness": float(age.mean()), "rollout/staleness_max": float(age.max())}


def group_metrics(
    rewards: Float[np.ndarray, " B"], kept: Bool[np.ndarray, " prompts"], sound: Bool[np.ndarray, " B"]
) -> dict[str, float]:
    """How many prompts carried a signal; only sound rollouts are compared."""
    groups, sound = rewards.reshape(len(kept), -1), sound.reshape(len(kept), -1)
    # A group of which nothing is left has no two rewards that differ.
    high, low = groups.max(axis=1, where=sound, initial=-np.inf), groups.min(axis=1, where=sound, initial=np.inf)
    return {
        "groups/equal_rewards": float((high <= low).sum()),
        "groups/used": float(kept.sum()),
        "groups/total": float(len(kept)),
    }


def update_metrics(steps: Sequence[dict[str, SumCount]]) -> dict[str, float]:
    """Means over all optimiser steps of a batch: sums and counts are added, then divided once."""
    totals: dict[str, Any] = defaultdict(lambda: np.zeros(2))
    for step in steps:
        for name, pair in step.items():
            totals[name] += np.array(pair, np.float64)
    means = {name: float(total / count) for name, (total, count) in totals.items() if count}
    moments = {name.removeprefix("value_"): means.pop(name) for name in VALUE_MOMENTS if name in means}
    values = {ACTOR_NAMES.get(name, f"actor/{name}"): mean for name, mean in means.items()}
    if moments:
        values["critic/explained_variance"] = explained_variance(moments)
    values["actor/optimizer_steps"] = float(len(steps))
    values["actor/skipped"] = float(totals["skipped"][0])
    if "actor/rejected_sequences" in values:
        values["actor/acceptance"] = 1.0 - values["actor/rejected_sequences"]
    return values


@partial(jax.jit, static_argnames=("reward_range", "sampled_by_mu"))
def shift_metrics(
    shift: Shift,
    response_mask: Bool[Array, "B R"],
    rewards: Float[Array, " B"],
    group_ids: Int[Array, " B"],
    *,
    reward_range: tuple[float, float],
    sampled_by_mu: bool = True,
) -> dict[str, Float[Array, ""]]:
    """What the update did to the policy on the sampled contexts, and every bound on the error of its surrogate.

    Args:
        shift: the policy after the update (pi) against the one that sampled (mu).
        response_mask: true at sampled tokens; R is the horizon of the bounds.
        rewards: one per sequence.
        group_ids: clusters of the standard errors.
        reward_range: smallest and largest reward.
        sampled_by_mu: whether the samples are mu's; else what is made of them and of the rewards, the bounds among it,
            is left out.
    """
    inputs = bound_inputs_from_tokens(shift.kl, shift.total_variation, response_mask, horizon=response_mask.shape[1])
    values: dict[str, Any] = {
        "shift/kl_mean": masked_mean(shift.kl, response_mask),
        "shift/kl_max": inputs.max_kl,
        "shift/kl_reverse_mean": masked_mean(shift.kl_reverse, response_mask),
        "shift/kl_reverse_max": masked_max(shift.kl_reverse, response_mask),
        "shift/tv_mean": masked_mean(shift.total_variation, response_mask),
        "shift/tv_max": inputs.max_tv,
    }
    if sampled_by_mu:
        values |= _bounds(inputs, shift.log_ratio, response_mask, rewards, group_ids, reward_range)
    return {name: jnp.asarray(value, jnp.float32) for name, value in values.items()}


def unified_bounds(bounds: SurrogateErrorBounds) -> dict[str, Array]:
    """What all bounds together say, by the names that metrics have."""
    return {
        "unified_printed": bounds.unified_printed,
        "unified_sharp": bounds.unified_sharp,
        "dominating": bounds.dominating,
        "threshold": bounds.threshold,
        "vacuous": bounds.vacuous,
    }


def _bounds(
    inputs: BoundInputs,
    log_ratio: Float[Array, "B R"],
    response_mask: Bool[Array, "B R"],
    rewards: Float[Array, " B"],
    group_ids: Int[Array, " B"],
    reward_range: tuple[float, float],
) -> dict[str, Any]:
    sampled = {"group_ids": group_ids, "baseline": sum(reward_range) / 2}
    gain = sampled_surrogate_gain(log_ratio, response_mask, rewards, **sampled)
    # A row without response tokens is no sequence: its rollout was dropped.
    mean_reward = masked_mean(rewards, jnp.any(response_mask, axis=1))
    bounds = surrogate_error_bounds(
        inputs, reward_range=reward_range, mean_reward=mean_reward, surrogate_gain=gain.value
    )
    estimates = {
        "bounds/surrogate_gain": gain,
        "bounds/error": sampled_surrogate_error(log_ratio, response_mask, rewards, **sampled),
        "bounds/gain": sampled_gain(log_ratio, response_mask, rewards, **sampled),
        "shift/sequence_tv_sampled": sampled_sequence_tv(log_ratio, response_mask, group_ids=group_ids),
    }
    values: dict[str, Any] = {
        "shift/sequence_kl": inputs.sequence_kl,
        "shift/sequence_tv": inputs.sequence_tv,
        **{f"bounds/{name}": value for name, value in unified_bounds(bounds).items()},
    }
    values |= {f"bounds/printed/{name}": value for name, value in bounds.printed.items()}
    values |= {f"bounds/sharp/{name}": value for name, value in bounds.sharp.items()}
    values |= {f"bounds/vacuous/{name}": value for name, value in bounds.vacuous_each.items()}
    values |= {name: estimate.value for name, estimate in estimates.items()}
    return values | {f"{name}_se": estimate.standard_error for name, estimate in estimates.items()}
