"""Methods of actor-critics, as data: which surrogate, which divergence, and how far into the future it looks.

Every one is composed of the parts in `jaxrl_llm.objectives`; none has a formula of its own.
"""

import dataclasses
import math
from typing import Literal

from jaxrl_llm.checks import require_choice
from jaxrl_llm.objectives import divergence_augmented as augmented
from jaxrl_llm.objectives import surrogates
from jaxrl_llm.typing import Array
from jaxrl_llm.typing import Float

SURROGATES = ("clipped", "importance_weighted", "truncated")
"""PPO's clip; rho A without a clip; min(1, rho) A grad log pi, the policy gradient of V-trace."""


@dataclasses.dataclass(frozen=True)
class Method:
    """How a policy is improved on data of older policies.

    Attributes:
        name: of the method.
        surrogate: one of `SURROGATES`.
        divergence: a name of `divergence_augmented.PSEUDO_REWARDS` for what is held small, or "none".
        coefficient: 1 / eta, of the divergence in advantages whose root mean square is 1.
        divergence_trace: cD, the cap of the ratios through which later divergence is seen: 1 for all of it, 0 for that
            of the next step alone (which the paper's code calls one-step).
        clip: of "clipped": the ratio counts between 1 - clip and 1 + clip.
    """

    name: str
    surrogate: Literal["clipped", "importance_weighted", "truncated"] = "clipped"
    divergence: str = "none"
    coefficient: float = 1.0
    divergence_trace: float = 1.0
    clip: float = 0.2

    def __post_init__(self) -> None:
        """Refuse what is not there."""
        require_choice("surrogate", self.surrogate, SURROGATES)
        require_choice("divergence", self.divergence, ("none", *augmented.PSEUDO_REWARDS))
        for field in ("coefficient", "divergence_trace", "clip"):
            value = getattr(self, field)
            if not (math.isfinite(value) and value >= 0):
                raise ValueError(f"{field} is {value}; it must be a number of 0 or more.")


METHODS = {
    method.name: method
    for method in (
        Method("ppo"),
        Method("vtrace", "truncated"),
        Method("kl_one_step", "importance_weighted", "kl", divergence_trace=0.0),
        Method("kl", "importance_weighted", "kl"),
        Method("kl_clipped", "clipped", "kl"),
        Method("kl_truncated", "truncated", "kl"),
        Method("reverse_kl", "importance_weighted", "reverse_kl"),
        Method("hellinger", "importance_weighted", "hellinger"),
        Method("total_variation", "importance_weighted", "total_variation"),
        Method("entropy", "importance_weighted", "entropy"),
        Method("unregularised", "importance_weighted"),
    )
}
"""By name; kl_one_step, kl, kl_clipped and kl_truncated are MKL-1s, MKL-ns, PKL-ns and ACER-ns in the paper's code."""


def policy_loss(
    method: Method, log_prob: Float[Array, "B T"], ratio: Float[Array, "B T"], advantages: Float[Array, "B T"]
) -> Float[Array, "B T"]:
    """The method's loss of each step, to be minimised.

    Args:
        method: its surrogate is read.
        log_prob: of the actions under the policy that learns [nats].
        ratio: exp(log_prob - that of the policy that acted).
        advantages: of each step, less the divergence; constants.
    """
    if method.surrogate == "clipped":
        return surrogates.clipped(ratio, advantages, clip_low=method.clip, clip_high=method.clip)
    if method.surrogate == "importance_weighted":
        return surrogates.importance_weighted(ratio, advantages)
    return surrogates.clipped_weight(log_prob, ratio, advantages, clip_low=1.0, clip_high=0.0)
