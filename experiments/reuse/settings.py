"""Settings of `divergence_chain` and what they may be."""

import dataclasses

from experiments.ranges import PLURAL
from experiments.ranges import POSITIVE
from experiments.ranges import SEED
from experiments.ranges import Range
from experiments.ranges import Ranges


@dataclasses.dataclass(frozen=True)
class ReuseSettings:
    """The worlds, the objective, and how often one batch is used.

    Attributes:
        states: states of every world, chains among them; each has two actions.
        worlds: random worlds of each of the three kinds.
        discount: factor by which a later step counts less.
        coefficient: 1 / eta, weight of the divergence in the objective. [reward per nat]
        reuses: updates on the one batch of the old policy.
        step: sum of the step sizes of all updates, each of the same size.
        drift: drift of the states at which arms are compared, as a share of the one without divergence.
        seed: seed of all the random worlds.
    """

    states: int = 8
    worlds: int = 200
    discount: float = 0.9
    coefficient: float = 0.5
    reuses: int = 32
    step: float = 100.0
    drift: float = 0.5
    seed: int = 0


RANGES: Ranges = {
    "states": Range(3, 100),
    "worlds": PLURAL,
    # At 0 no step has a future; above 0.98 the sweeps of the optimum would not be enough.
    "discount": Range(0, 0.98, above=True),
    "coefficient": Range(0.01, 100),
    "reuses": Range(2, 1000),
    "step": POSITIVE,
    "drift": Range(0, 1, above=True, below=True),
    "seed": SEED,
}
