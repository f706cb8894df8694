"""Claim 1: Muon needs fewer tokens than AdamW for the same held-out loss, both at their best rate, after decay."""

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from experiments.claims.pretraining import Balance
from experiments.claims.pretraining import Learner
from experiments.claims.pretraining import Pretraining
from experiments.claims.pretraining import pretraining
from experiments.claims.settings import ClaimsSettings


def constant(rate: float, steps: int, *, warmup: int, first: int) -> np.ndarray:
    """The rates of steps `first` on: up on a line over the warm-up, then constant."""
    return rate * np.minimum((first + np.arange(steps) + 1) / warmup, 1.0)


def falling(rate: float, steps: int, *, warmup: int, first: int) -> np.ndarray:
    """The same, falling on a line towards 0."""
    return constant(rate, steps, warmup=warmup, first=first) * (1 - np.arange(steps) / steps)


def trunk(own: Pretraining, rate: float, balance: Balance) -> list[Learner]:
    """The start and what is left after each piece at a constant rate, but for the last piece."""
    settings = own.settings
    learners = [own.start()]
    for piece in range(settings.pieces - 1):
        first = piece * settings.piece
        rates = constant(rate, settings.piece, warmup=settings.warmup, first=first)
        learners.append(own.train(learners[-1], rates, first, balance))
    return learners


def decayed(own: Pretraining, learners: list[Learner], pieces: int, rate: float, balance: Balance) -> Mapping[str, Any]:
    """What is measured after so many pieces, in the last of which the rate falls."""
    first = (pieces - 1) * own.settings.piece
    rates = falling(rate, own.settings.piece, warmup=own.settings.warmup, first=first)
    return jax.device_get(own.measure(own.train(learners[pieces - 1], rates, first, balance)))


def optimiser_part(optimizer: str, settings: ClaimsSettings) -> dict[str, np.ndarray]:
    """All of one optimiser.

    Returns:
        what `Pretraining.measure` gives for each rate after the longest run, [rates, seeds, ..]; `best`, the rate of
        the smallest held-out loss; `curve`, the held-out loss of that rate after 2, 3, .. pieces, [budgets, seeds].
    """
    own, balance = pretraining(optimizer, settings), Balance(settings.bias_rate, 0.0)
    measured: list[Mapping[str, Any]] = []
    best: tuple[float, list[Learner]] = np.inf, []
    rates = settings.adamw_rates if optimizer == "adamw" else settings.muon_rates
    for rate in rates:
        learners = trunk(own, rate, balance)
        measured.append(decayed(own, learners, settings.pieces, rate, balance))
        # Negated, so that a loss that is not a number is never the best.
        if not best[1] or not measured[-1]["loss"].mean() >= best[0]:
            best = float(measured[-1]["loss"].mean()), learners
            chosen = len(measured) - 1
    curve = [decayed(own, best[1], pieces, rates[chosen], balance)["loss"] for pieces in range(2, settings.pieces)]
    found = {name: np.stack([one[name] for one in measured]) for name in measured[0]}
    return found | {"best": np.asarray(chosen), "curve": np.stack([*curve, measured[chosen]["loss"]])}


def tokens_to(loss: float, budgets: np.ndarray, curve: np.ndarray) -> float:
    """Tokens after which a run ends with this loss, on lines between the budgets; the largest budget where none does.

    A loss that the smallest budget already ends with counts as that budget: the saving is then understated.
    """
    reached = np.minimum.accumulate(curve)
    if loss < reached[-1]:
        return float(budgets[-1])
    # From the largest loss to the smallest; np.interp wants rising ones.
    return float(np.interp(loss, reached[::-1], budgets[::-1]))


def saved(muon: np.ndarray, adamw: np.ndarray, budgets: np.ndarray) -> np.ndarray:
    """Share of the tokens that Muon saves, per seed: to end with the loss with which AdamW ends after all tokens.

    Where Muon ends above it, minus the share that AdamW saves to end with Muon's loss: a mirror image, so that neither
    optimiser is favoured.

    Args:
        muon, adamw: held-out losses after the decay, [budgets, seeds].
        budgets: tokens of each run, rising.
    """
    shares = []
    for ours, theirs in zip(muon.T, adamw.T, strict=True):
        better, worse, sign = (ours, theirs, 1) if ours[-1] <= theirs[-1] else (theirs, ours, -1)
        shares.append(sign * (1 - tokens_to(worse[-1], budgets, better) / budgets[-1]))
    return np.array(shares)
