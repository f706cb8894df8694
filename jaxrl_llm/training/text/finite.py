"""Rollouts with numbers that are none: found, counted and left out, so that no mean ever contains them."""

import dataclasses
from typing import Any
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxrl_llm.training.run.state import TrainState
from jaxrl_llm.training.text.update import UpdateBatch
from jaxrl_llm.typing import Array
from jaxrl_llm.typing import Bool
from jaxrl_llm.typing import Float


class Finite(NamedTuple):
    """Which rollouts are sound.

    Attributes:
        rows: true where every log-prob and the reward are finite.
        sampler: rollouts with a log-prob of the sampler that is not finite.
        trainer: rollouts with one of the trainer that is not finite.
        reward: rollouts whose reward is not finite.
    """

    rows: Bool[np.ndarray, " B"]
    sampler: int
    trainer: int
    reward: int

    @property
    def dropped(self) -> int:
        """Rollouts that are left out."""
        return int((~self.rows).sum())

    def sentence(self, step: int) -> str:
        """What happened, for a person."""
        causes = {"the sampler's log-probs": self.sampler, "the trainer's": self.trainer, "the reward": self.reward}
        found = ", ".join(f"{name}: {count}" for name, count in causes.items() if count)
        return (
            f"Step {step}: dropped {self.dropped} of {len(self.rows)} rollouts with numbers that are not finite "
            f"({found}); they are in no loss, advantage or metric."
        )


def find_finite(
    log_prob_behaviour: Float[np.ndarray, "B R"] | None,
    log_prob_old: Float[np.ndarray, "B R"],
    response_mask: Bool[np.ndarray, "B R"],
    rewards: Float[np.ndarray, " B"],
) -> Finite:
    """Look at the response tokens of every rollout; what is at padding does not matter.

    Args:
        log_prob_behaviour: as the sampler recorded them, if it did.
        log_prob_old: under the trainer's policy before the update.
        response_mask: true at response tokens.
        rewards: one per rollout.
    """
    recorded = np.zeros(1) if log_prob_behaviour is None else log_prob_behaviour
    sampler, trainer = ((np.isfinite(log_probs) | ~response_mask).all(axis=1) for log_probs in (recorded, log_prob_old))
    reward = np.isfinite(rewards)
    return Finite(sampler & trainer & reward, *(int((~sound).sum()) for sound in (sampler, trainer, reward)))


def finite_states(hidden: Float[Array, "n K D"]) -> Bool[np.ndarray, " n"]:
    """Rows whose states are all finite. In the others every sequence shares the broken forward pass."""
    return np.asarray(jnp.all(jnp.isfinite(hidden), axis=(1, 2)))


def without_broken_rows(batch: UpdateBatch, sound: Bool[np.ndarray, " n"]) -> UpdateBatch:
    """The batch with a sound row, without a response token, in the place of each row that is not.

    A mask on the loss would not do: the backward pass multiplies its zeros with what the forward pass made of the row,
    and 0 * NaN is NaN.

    Args:
        batch: in which no response token of a broken row counts.
        sound: which rows have finite states, at least one of them.
    """
    rows = np.where(sound, np.arange(len(sound)), np.argmax(sound))
    replaced = jax.tree.map(lambda leaf: leaf[rows], batch)
    return dataclasses.replace(replaced, response_mask=batch.response_mask, group_ids=batch.group_ids)


@jax.jit
def _all_finite(tree: Any) -> Array:
    leaves = [leaf for leaf in jax.tree.leaves(tree) if jnp.issubdtype(leaf.dtype, jnp.floating)]
    return jnp.all(jnp.stack([jnp.all(jnp.isfinite(leaf)) for leaf in leaves]))


def finite_arrays(state: TrainState) -> bool:
    """Whether every trained parameter and every state of an optimiser is finite."""
    return bool(_all_finite((state.params, state.opt_state, state.critic, state.critic_opt_state)))


def finite_at(mask: Bool[Array, "*shape"], *columns: Float[Array, "*shape"] | None) -> bool:
    """Whether numbers are finite where the mask says that they count; columns that are None are not looked at."""
    found = [jnp.all(jnp.isfinite(column) | ~mask) for column in columns if column is not None]
    return bool(jnp.all(jnp.stack(found)))
