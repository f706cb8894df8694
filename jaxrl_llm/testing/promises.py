"""What a loss says about itself, so that the kit knows what to hold it to."""

import dataclasses
from collections.abc import Callable
from typing import Any

from jaxrl_llm.checks import require_choice
from jaxrl_llm.testing.batch import ADVANTAGES

AGGREGATIONS = ("token-mean", "token-sum", "seq-mean-token-sum", "seq-mean-token-sum-norm", "seq-mean-token-mean")


@dataclasses.dataclass(frozen=True)
class Promises:
    """The keyword arguments of `check_objective`, all optional.

    Attributes:
        advantages: where the loss gets them. "sequence": `batch.advantages`, `[B]`. "token": `batch.advantages`,
            `[B, T]`. "group": computes them from `batch.rewards` within the groups of `batch.group_ids`, as GRPO does.
            "batch": computes them from the rewards of the whole batch, as REINFORCE++ does.
        aggregation: a name of `objectives.AGGREGATIONS`, to which the weight of each token is then held. None: any of
            them will do, and the report names the one that was found.
        kl_coefficient: the loss has a penalty with this coefficient whose expected on-policy gradient is that of
            KL(pi || ref). Leave it None for a penalty that does not claim this, such as GRPO's k3.
        keeps_ratio: (low, high) if tokens contribute only where pi_old / mu of the sampled token lies between them; low
            may be 0 and high inf.
        rejects_above_kl: threshold [nats] if a sequence with KL(mu || pi) above it at its contexts must not contribute.
        normalise_by: whether rejected sequences stay in the denominator ("all") or not ("accepted"); looked at only
            with rejects_above_kl.
        length_one_equals: another loss that this one must equal on responses of one token, as GSPO equals GRPO.
        regularised: true if there is a gradient at zero advantage and pi = ref, as an entropy bonus has.
        skip: names of checks to leave out.

    Raises:
        ValueError: for a name that does not exist.
    """

    advantages: str = "sequence"
    aggregation: str | None = None
    kl_coefficient: float | None = None
    keeps_ratio: tuple[float, float] | None = None
    rejects_above_kl: float | None = None
    normalise_by: str = "all"
    length_one_equals: Callable[..., Any] | None = None
    regularised: bool = False
    skip: tuple[str, ...] = ()

    def __post_init__(self):
        require_choice("advantages", self.advantages, ADVANTAGES)
        require_choice("normalise_by", self.normalise_by, ("all", "accepted"))
        if self.aggregation is not None:
            require_choice("aggregation", self.aggregation, AGGREGATIONS)

    @property
    def given(self) -> bool:
        """Whether the loss reads `batch.advantages`."""
        return self.advantages in ("sequence", "token")
