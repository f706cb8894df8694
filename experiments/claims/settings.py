"""Settings of `glm_claims`."""

import dataclasses

from experiments.claims.text import MOST_TIMES
from experiments.ranges import PLURAL
from experiments.ranges import RATE
from experiments.ranges import SEED
from experiments.ranges import SIZE
from experiments.ranges import Range
from experiments.ranges import Ranges
from experiments.ranges import check_ranges


@dataclasses.dataclass(frozen=True)
class ClaimsSettings:
    """How large the model is, how much text it reads and how long it learns from rewards.

    Attributes:
        seeds: models trained at once; every arm has the same ones.
        seed: seed of all random numbers.
        width: of the model, a multiple of 16; experts are as wide.
        layers: of the model, the dense one and those with experts.
        experts: of a layer, two of which each token goes to.
        longest: tokens of the longest answer, its end included.
        length: of a row of pre-training. [tokens]
        rows: of a batch of pre-training.
        held_out_rows: rows that nobody learns from.
        warmup: steps over which the rate of pre-training rises.
        piece: steps that are compiled as one program of pre-training, and over which the rate falls at the end.
        pieces: of the longest run of pre-training.
        adamw_rates: step sizes of AdamW among which the best one is chosen.
        muon_rates: step sizes of Muon among which the best one is chosen.
        bias_rate: of the correction bias of routers.
        balance_weight: of the auxiliary loss, per layer.
        imitation_steps: updates on right answers before reinforcement learning.
        imitation_rate: step size of Adam for them.
        rl_rows: answers per batch.
        group_size: answers per problem.
        rl_rate: step size of Adam.
        chunk: steps that are compiled as one program of reinforcement learning.
        chunks: of every arm.
        many: answers to each problem, in units of four, one of which solves a hard problem.
        temperatures: among which the dynamic one is chosen.
        window: steps of each of the two means that are compared to find a plateau.
    """

    seeds: int = 8
    seed: int = 0
    width: int = 32
    layers: int = 2
    experts: int = 8
    longest: int = 7
    length: int = 48
    rows: int = 8
    held_out_rows: int = 32
    warmup: int = 10
    piece: int = 40
    pieces: int = 4
    adamw_rates: tuple[float, ...] = (3e-3, 1e-2, 3e-2)
    muon_rates: tuple[float, ...] = (3e-3, 1e-2, 3e-2, 1e-1)
    bias_rate: float = 1e-3
    balance_weight: float = 1e-2
    imitation_steps: int = 55
    imitation_rate: float = 3e-3
    rl_rows: int = 128
    group_size: int = 8
    rl_rate: float = 3e-4
    chunk: int = 10
    chunks: int = 6
    many: int = 16
    temperatures: tuple[float, ...] = (1.0, 1.1, 1.2, 1.4)
    window: int = 10


RANGES: Ranges = {
    "seeds": PLURAL,
    "seed": SEED,
    "width": Range(16, 4096),
    "layers": Range(2, 64),
    "experts": Range(2, 256),
    "longest": Range(3, MOST_TIMES + 1),
    "length": Range(8, 100_000),
    "rows": PLURAL,
    "held_out_rows": PLURAL,
    "warmup": SIZE,
    "piece": SIZE,
    "pieces": PLURAL,
    "adamw_rates": RATE,
    "muon_rates": RATE,
    "bias_rate": Range(0, 1),
    "balance_weight": Range(0, 1000),
    "imitation_steps": Range(0, 1_000_000),
    "imitation_rate": RATE,
    "rl_rows": PLURAL,
    "group_size": PLURAL,
    "rl_rate": RATE,
    "chunk": SIZE,
    "chunks": PLURAL,
    "many": PLURAL,
    "temperatures": Range(0, 100, above=True),
    "window": SIZE,
}
"""What the fields of `ClaimsSettings` may be."""


def check(settings: ClaimsSettings) -> None:
    """Refuse impossible numbers before anything is computed.

    Raises:
        ValueError: naming the field.
    """
    check_ranges(settings, RANGES)
    if settings.width % 16:
        raise ValueError(f"Field --width is {settings.width}; it must be a multiple of 16.")
    if settings.rl_rows % settings.group_size:
        raise ValueError(
            f"Field --rl-rows is {settings.rl_rows}; it must be a multiple of --group-size {settings.group_size}."
        )
    for name in ("adamw_rates", "muon_rates", "temperatures"):
        values = getattr(settings, name)
        if not values or list(values) != sorted(set(values)):
            raise ValueError(f"Field --{name.replace('_', '-')} is {values}; it must be rising numbers, one at least.")
