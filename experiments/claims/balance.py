"""Claim 2: loads evened out by a bias, by a loss, or not at all."""

import numpy as np

from experiments.claims.optimisers import decayed
from experiments.claims.optimisers import trunk
from experiments.claims.pretraining import Balance
from experiments.claims.pretraining import pretraining
from experiments.claims.settings import ClaimsSettings


def middle(settings: ClaimsSettings) -> int:
    """Number of the rate of AdamW at which balance is compared; its run with the bias is one of claim 1's."""
    return len(settings.adamw_rates) // 2


def balance_part(name: str, settings: ClaimsSettings) -> dict[str, np.ndarray]:
    """What is measured without any balance ("none"), or with the auxiliary loss alone ("loss"); per seed."""
    balance = Balance(0.0, settings.balance_weight if name == "loss" else 0.0)
    own, rate = pretraining("adamw", settings), settings.adamw_rates[middle(settings)]
    return dict(decayed(own, trunk(own, rate, balance), settings.pieces, rate, balance))
