"""AdamW or Muon with warm-up, a decay and clipping by the global norm, from one dataclass of numbers."""

import dataclasses
from typing import Literal

import optax

from jaxrl_llm.checks import LATER
from jaxrl_llm.training.run.muon import muon_and
from jaxrl_llm.training.run.numbers import require_finite
from jaxrl_llm.training.run.parameters import are_matrices
from jaxrl_llm.training.run.parameters import in_float32

SCHEDULES = ("constant", "linear", "cosine", "wsd")
OPTIMIZERS = ("adamw", "muon")


@dataclasses.dataclass(frozen=True)
class OptimizerSettings:
    """Numbers of the optimiser.

    Attributes:
        learning_rate: the largest learning rate, reached at the end of the warm-up.
        schedule: how the rate goes on after the warm-up: it stays, or falls on a line or half a cosine to
            `final_fraction` of itself, or ("wsd") stays and falls on a line in the last `decay_steps`.
        warmup_steps: optimiser steps over which the rate rises on a line from 0; 0 starts at the full rate.
        final_fraction: last rate as a fraction of the largest one; for "linear", "cosine" and "wsd".
        beta1: decay of Adam's mean of gradients.
        beta2: decay of Adam's mean of squared gradients.
        epsilon: added to the root of the squares.
        weight_decay: decoupled decay of matrices; vectors and scalars (norm scales, biases) are never decayed.
        max_grad_norm: the gradient is scaled down to this global norm; 0 leaves it as it is.
        optimizer: "adamw", or "muon" for matrices (`run.muon` says which) and AdamW for the rest, all at one rate.
        momentum: decay of Muon's mean of gradients; GLM-4.5 (arXiv 2508.06471) has 0.95.
        decay_steps: optimiser steps at the end in which the rate of "wsd" falls.
    """

    learning_rate: float = 3e-5
    schedule: Literal["constant", "linear", "cosine", "wsd"] = "constant"
    warmup_steps: int = 0
    final_fraction: float = 0.0
    beta1: float = 0.9
    beta2: float = 0.999
    epsilon: float = 1e-8
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    optimizer: Literal["adamw", "muon"] = dataclasses.field(default="adamw", metadata=LATER)
    momentum: float = dataclasses.field(default=0.95, metadata=LATER)
    decay_steps: int = dataclasses.field(default=0, metadata=LATER)

    def __post_init__(self) -> None:
        """Refuse impossible numbers."""
        for name, choices in (("schedule", SCHEDULES), ("optimizer", OPTIMIZERS)):
            if getattr(self, name) not in choices:
                listed = ", ".join(map(repr, choices[:-1]))
                raise ValueError(f"{name} is {getattr(self, name)!r}; it must be {listed} or {choices[-1]!r}.")
        require_finite(self)
        least_zero = ("learning_rate", "warmup_steps", "final_fraction", "epsilon", "weight_decay", "max_grad_norm")
        for name in (*least_zero, "decay_steps"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be 0 or more.")
        for name in ("warmup_steps", "decay_steps"):
            if getattr(self, name) != int(getattr(self, name)):
                raise ValueError(f"{name} is {getattr(self, name)}; it must be a whole number.")
        for name in ("beta1", "beta2", "momentum"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be in [0, 1).")
        if (self.schedule == "wsd") != (self.decay_steps > 0):
            raise ValueError(
                f"decay_steps is {self.decay_steps} and schedule {self.schedule!r}; 'wsd' needs at least 1, and no "
                "other schedule has any."
            )


def learning_rate_schedule(settings: OptimizerSettings, total_steps: int) -> optax.Schedule:
    """Learning rate as a function of the number of optimiser steps already taken.

    Args:
        settings: the numbers.
        total_steps: optimiser steps in the whole run, where "linear", "cosine" and "wsd" end. [steps]

    Raises:
        ValueError: the warm-up is longer than the run, so that its rate is never reached; or as long, where the rate is
            to fall after it; or it leaves less than `decay_steps` of the run.
    """
    constant = settings.schedule == "constant"
    if total_steps < settings.warmup_steps + (not constant):
        raise ValueError(
            f"warmup_steps is {settings.warmup_steps}, the run has {total_steps} optimiser steps; it must be "
            f"{'at most as many' if constant else 'smaller'}."
        )
    peak, rest = settings.learning_rate, total_steps - settings.warmup_steps
    if settings.decay_steps > rest:
        raise ValueError(
            f"decay_steps is {settings.decay_steps}, the run has {rest} optimiser steps after its warm-up; it must be "
            "at most as many."
        )
    if settings.schedule == "linear":
        after = optax.linear_schedule(peak, peak * settings.final_fraction, rest)
    elif settings.schedule == "cosine":
        after = optax.cosine_decay_schedule(peak, rest, alpha=settings.final_fraction)
    elif settings.schedule == "wsd":
        stable = rest - settings.decay_steps
        after = optax.linear_schedule(peak, peak * settings.final_fraction, settings.decay_steps, stable)
    else:
        after = optax.constant_schedule(peak)
    if not settings.warmup_steps:
        return after
    # Step k of a warm-up over n steps uses (k + 1) / n of the rate: a first step at rate 0 would waste a batch.
    warmup = optax.linear_schedule(peak / settings.warmup_steps, peak, max(settings.warmup_steps - 1, 1))
    return optax.join_schedules([warmup, after], [settings.warmup_steps])


def make_optimizer(
    settings: OptimizerSettings, total_steps: int, *, scan: bool = False
) -> optax.GradientTransformation:
    """AdamW, or Muon with AdamW for what is no matrix, behind clipping by the global norm.

    Args:
        settings: the numbers.
        total_steps: optimiser steps in the whole run. [steps]
        scan: of `muon_and`.
    """
    rate = learning_rate_schedule(settings, total_steps)
    adamw = optax.adamw(
        rate,
        b1=settings.beta1,
        b2=settings.beta2,
        eps=settings.epsilon,
        weight_decay=settings.weight_decay,
        mask=are_matrices,
    )
    made: optax.GradientTransformation = adamw
    if settings.optimizer == "muon":
        made = muon_and(adamw, rate, momentum=settings.momentum, weight_decay=settings.weight_decay, scan=scan)
    if settings.max_grad_norm:
        made = optax.chain(optax.clip_by_global_norm(settings.max_grad_norm), made)
    # AdamW keeps its means in the dtype of the parameters: checkpoints of runs in bfloat16 hold them so.
    return in_float32(made) if settings.optimizer == "muon" else made
