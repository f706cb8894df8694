"""What the divergence charges, as numbers: all arms are one program, and which one it is, is data."""

from typing import NamedTuple

import numpy as np

from jaxrl_llm.objectives.divergence_augmented import PSEUDO_REWARDS
from jaxrl_llm.typing import Array

Number = Array | float
NEVER = np.inf
"""A cap or a clip that never binds."""

KINDS = PSEUDO_REWARDS[:4]
"""Divergences with an old policy, by number."""


class Charge(NamedTuple):
    """How an update is held back; the discounted sum of log pi/pi_old under the current policy by default.

    Attributes:
        weight: times the coefficient of the objective; 0 for no divergence.
        kind: pseudo-reward, a number of `KINDS`.
        future: 0 for phi of the own step alone, 1 for what comes later as well.
        ratio_cap: c of min(c, rho) before the phi of a later step.
        trace_cap: c of min(c, rho) before all that follows a later step.
        density: 1 to add log d/d_old to phi.
        clip: rho of the surrogate is clipped to 1 - clip .. 1 + clip.
    """

    weight: Number = 1.0
    kind: Number = 0
    future: Number = 1.0
    ratio_cap: Number = NEVER
    trace_cap: Number = NEVER
    density: Number = 0.0
    clip: Number = NEVER


class Arm(NamedTuple):
    """What is compared.

    Attributes:
        label: in words.
        charge: how its updates are held back.
    """

    label: str
    charge: Charge


ARMS = {
    "none": Arm("no divergence", Charge(weight=0.0)),
    "ppo_clip": Arm("PPO's clip, 0.2", Charge(weight=0.0, clip=0.2)),
    "one_step": Arm("one step", Charge(future=0.0)),
    "two_terms": Arm("two terms (cD = 0)", Charge(ratio_cap=1.0, trace_cap=0.0)),
    "truncated": Arm("truncated sum (cD = 1)", Charge(ratio_cap=1.0, trace_cap=1.0)),
    "multi_step": Arm("multi-step", Charge()),
    "reverse_kl": Arm("multi-step, reverse KL", Charge(kind=KINDS.index("reverse_kl"))),
    "hellinger": Arm("multi-step, Hellinger", Charge(kind=KINDS.index("hellinger"))),
    "total_variation": Arm("multi-step, total variation", Charge(kind=KINDS.index("total_variation"))),
    "full_entropy": Arm("multi-step, full entropy", Charge(density=1.0)),
}
"""The arms by name; the full entropy without log d/d_old is `multi_step`, number for number."""
