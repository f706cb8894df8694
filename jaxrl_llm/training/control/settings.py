"""Numbers of the training of an actor-critic."""

import dataclasses

from jaxrl_llm.training.control.methods import METHODS
from jaxrl_llm.training.control.methods import Method
from jaxrl_llm.training.run.numbers import require_finite
from jaxrl_llm.training.run.optimizer import OptimizerSettings


@dataclasses.dataclass(frozen=True)
class ControlSettings:
    """Numbers of the training of an actor-critic.

    Attributes:
        method: how the policy is improved, see `METHODS`.
        games: games that are played at once.
        steps: steps of each game in a batch.
        iterations: batches in the whole run.
        reuse: how often every step is used by an update, on average where `replay` does not divide it; the first
            batches, which fill the replay alone, more often.
        replay: batches that are kept: a batch is used over as many iterations as this.
        minibatches: parts into which a batch is cut; an update takes a part of the kept batches of this size.
        discount: of what follows a step.
        trace: cap of the ratios in V-trace; on data of the policy itself it is the lambda of its targets' TD(lambda).
        entropy: weight of the policy's entropy in the loss.
        value: weight of the squared error of the values in the loss.
        optimizer: step size, its schedule, and so on.
        torso: of the network, see `networks.TORSOS`.
        width: of the network's last layer.
        memory: width of the network's LSTM; 0 for none.
        measured: whether the divergence of each policy from the one before is measured, one more forward pass a step.
    """

    method: Method = METHODS["ppo"]
    games: int = 64
    steps: int = 32
    iterations: int = 100
    reuse: int = 4
    replay: int = 1
    minibatches: int = 4
    discount: float = 0.99
    trace: float = 0.95
    entropy: float = 0.01
    value: float = 0.5
    optimizer: OptimizerSettings = dataclasses.field(
        default_factory=lambda: OptimizerSettings(
            learning_rate=1e-3, schedule="linear", epsilon=1e-5, max_grad_norm=0.5
        )
    )
    torso: str = "minatar"
    width: int = 128
    memory: int = 0
    measured: bool = False

    def __post_init__(self) -> None:
        """Refuse impossible numbers."""
        require_finite(self)
        for name in ("games", "steps", "iterations", "reuse", "replay", "minibatches", "width"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be 1 or more.")
        for name in ("discount", "trace"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be from 0 to 1.")
        for name in ("entropy", "value", "memory"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be 0 or more.")
        if self.games % self.minibatches:
            raise ValueError(f"games is {self.games} and minibatches {self.minibatches}; it must divide them.")

    @property
    def updates(self) -> int:
        """Optimiser steps of each iteration."""
        return self.reuse * self.minibatches

    @property
    def frames(self) -> int:
        """Steps of all games in the whole run."""
        return self.iterations * self.games * self.steps
