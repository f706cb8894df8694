"""AdamW with warm-up, a decay and clipping by the global norm, from one dataclass of numbers."""

import dataclasses
from typing import Literal

import jax
import optax

from jaxrl_llm.training.run.numbers import require_finite


@dataclasses.dataclass(frozen=True)
class OptimizerSettings:
    """Numbers of the optimiser.

    Attributes:
        learning_rate: the largest learning rate, reached at the end of the warm-up.
        schedule: how the rate goes on after the warm-up: it stays, or falls on a line or half a cosine to
            `final_fraction` of itself.
        warmup_steps: optimiser steps over which the rate rises on a line from 0; 0 starts at the full rate.
        final_fraction: last rate as a fraction of the largest one; for "linear" and "cosine".
        beta1: decay of Adam's mean of gradients.
        beta2: decay of Adam's mean of squared gradients.
        epsilon: added to the root of the squares.
        weight_decay: decoupled decay of matrices; vectors and scalars (norm scales, biases) are never decayed.
        max_grad_norm: the gradient is scaled down to this global norm; 0 leaves it as it is.
    """

    learning_rate: float = 3e-5
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    warmup_steps: int = 0
    final_fraction: float = 0.0
    beta1: float = 0.9
    beta2: float = 0.999
    epsilon: float = 1e-8
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0

    def __post_init__(self) -> None:
        """Refuse impossible numbers."""
        if self.schedule not in ("constant", "linear", "cosine"):
            raise ValueError(f"schedule is {self.schedule!r}; it must be 'constant', 'linear' or 'cosine'.")
        require_finite(self)
        for name in ("learning_rate", "warmup_steps", "final_fraction", "epsilon", "weight_decay", "max_grad_norm"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be 0 or more.")
        for name in ("beta1", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be in [0, 1).")


def learning_rate_schedule(settings: OptimizerSettings, total_steps: int) -> optax.Schedule:
    """Learning rate as a function of the number of optimiser steps already taken.

    Args:
        settings: the numbers.
        total_steps: optimiser steps in the whole run, where "linear" and "cosine" end. [steps]

    Raises:
        ValueError: the warm-up is longer than the run, so that its rate is never reached; or as long, where the rate is
            to fall after it.
    """
    constant = settings.schedule == "constant"
    if total_steps < settings.warmup_steps + (not constant):
        raise ValueError(
            f"warmup_steps is {settings.warmup_steps}, the run has {total_steps} optimiser steps; it must be "
            f"{'at most as many' if constant else 'smaller'}."
        )
    peak, rest = settings.learning_rate, total_steps - settings.warmup_steps
    if settings.schedule == "linear":
        after = optax.linear_schedule(peak, peak * settings.final_fraction, rest)
    elif settings.schedule == "cosine":
        after = optax.cosine_decay_schedule(peak, rest, alpha=settings.final_fraction)
    else:
        after = optax.constant_schedule(peak)
    if not settings.warmup_steps:
        return after
    # Step k of a warm-up over n steps uses (k + 1) / n of the rate: a first step at rate 0 would waste a batch.
    warmup = optax.linear_schedule(peak / settings.warmup_steps, peak, max(settings.warmup_steps - 1, 1))
    return optax.join_schedules([warmup, after], [settings.warmup_steps])


def _matrices(params: optax.Params) -> optax.Params:
    return jax.tree.map(lambda leaf: leaf.ndim >= 2, params)


def make_optimizer(settings: OptimizerSettings, total_steps: int) -> optax.GradientTransformation:
    """AdamW behind clipping by the global norm.

    Args:
        settings: the numbers.
        total_steps: optimiser steps in the whole run. [steps]
    """
    adamw = optax.adamw(
        learning_rate_schedule(settings, total_steps),
        b1=settings.beta1,
        b2=settings.beta2,
        eps=settings.epsilon,
        weight_decay=settings.weight_decay,
        mask=_matrices,
    )
    if not settings.max_grad_norm:
        return adamw
    return optax.chain(optax.clip_by_global_norm(settings.max_grad_norm), adamw)
