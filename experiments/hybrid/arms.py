"""The gradients that are compared, as numbers: all of them are one program, and which one it is, is data."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxrl_llm.objectives import hybrid
from jaxrl_llm.typing import Array

Number = Array | float


class Field(NamedTuple):
    """One gradient field: dense grad k_t + G_t grad log pi(y_t | c_t), its parts weighted; the exact one by default.

    G_t = own l_t + future sum_{u>t} discount^(u-t) d_u - reward_weight sum_{u>=t} discount^(u-t) r_u.

    Attributes:
        reward_weight: lambda.
        discount: of later divergences and of later rewards, as `objectives.hybrid.sparse_coefficient` has it.
        dense: weight of the dense part.
        future: weight of the divergences of later steps, the sparse part of the KL.
        own: weight of l_t in its own coefficient: 1 instead of the dense part is REINFORCE, all in the score.
        rao_blackwell: 1 for d_u = k_u, 0 for d_u = l_u.
        offline: weight of KL(pi_T || pi) on the states of the teacher's episodes.
        step_baseline: 1 to subtract from G_t the mean of the others of the group at the same step.
        reward_baseline: 1 to subtract from the rewards the mean return of the others of the group.
    """

    reward_weight: Number
    discount: Number = 1.0
    dense: Number = 1.0
    future: Number = 1.0
    own: Number = 0.0
    rao_blackwell: Number = 0.0
    offline: Number = 0.0
    step_baseline: Number = 1.0
    reward_baseline: Number = 0.0


class Arm(NamedTuple):
    """What is trained.

    Attributes:
        label: in words.
        field: the gradient; its reward weight is a share of the lambda of the objective.
        schedule: of the reward weight, one of `SCHEDULES`.
    """

    label: str
    field: Field
    schedule: str = "constant"


SCHEDULES = ("constant", "linear", "cosine", "log_linear")
WARM_UP = 0.5
"""Share of the updates in which a schedule raises the reward weight to its final value."""

FIRST_WEIGHT = 0.05
"""Where the log-linear schedule begins, as a share of the final weight; it cannot begin at 0."""

ARMS = {
    "rl": Arm("reward only", Field(1.0, dense=0.0, future=0.0)),
    "offline": Arm("imitation, offline", Field(0.0, dense=0.0, future=0.0, offline=1.0)),
    "on_policy": Arm("imitation, on-policy", Field(0.0, discount=0.0)),
    "kl_loss": Arm("KL loss + reward", Field(1.0, future=0.0)),
    "hybrid_0": Arm("hybrid, discount 0", Field(1.0, discount=0.0)),
    "hybrid_0.5": Arm("hybrid, discount 0.5", Field(1.0, discount=0.5)),
    "hybrid_0.9": Arm("hybrid, discount 0.9", Field(1.0, discount=0.9)),
    "hybrid": Arm("hybrid", Field(1.0)),
    "rao_blackwell": Arm("hybrid, Rao-Blackwell", Field(1.0, rao_blackwell=1.0)),
    "reinforce": Arm("REINFORCE, all in the score", Field(1.0, dense=0.0, own=1.0)),
    "linear": Arm("hybrid, linear warm-up", Field(1.0), "linear"),
    "cosine": Arm("hybrid, cosine warm-up", Field(1.0), "cosine"),
    "log_linear": Arm("hybrid, log-linear", Field(1.0), "log_linear"),
}
"""The arms by name."""


def with_weight(field: Field, reward_weight: Number) -> Field:
    """The field of an arm at the lambda of an objective."""
    return field._replace(reward_weight=reward_weight * field.reward_weight)


def scheduled(field: Field, schedule: Array, step: Array, *, updates: int) -> Field:
    """The field with the reward weight of an update; `schedule` is a number of `SCHEDULES`."""
    final, warm = jnp.asarray(field.reward_weight), max(1, int(WARM_UP * updates))
    choices = (
        lambda: final,
        lambda: hybrid.linear_warmup(step, steps=warm, final=final),
        lambda: hybrid.cosine_warmup(step, steps=warm, final=final),
        lambda: final * hybrid.log_linear(step, steps=warm, start=FIRST_WEIGHT, final=1.0),
    )
    return field._replace(reward_weight=jax.lax.switch(schedule, choices))
