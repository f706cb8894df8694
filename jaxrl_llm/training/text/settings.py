"""What a run is made of: numbers that are saved and compared, and parts that are passed in."""

import dataclasses
from collections.abc import Callable
from typing import Any

from jax.sharding import Mesh

from jaxrl_llm.environments import Curriculum
from jaxrl_llm.environments import Task
from jaxrl_llm.models.tokenizers import Tokenizer
from jaxrl_llm.models.trainable import Trainable
from jaxrl_llm.models.transformer import Transformer
from jaxrl_llm.objectives import Recipe
from jaxrl_llm.objectives import get_recipe
from jaxrl_llm.rollouts import SamplingSettings
from jaxrl_llm.rollouts.collect import Collector
from jaxrl_llm.rollouts.collect import Sampler
from jaxrl_llm.rollouts.perturb import Perturbation
from jaxrl_llm.testing import Batch
from jaxrl_llm.training.run.numbers import require_finite
from jaxrl_llm.training.run.optimizer import OptimizerSettings
from jaxrl_llm.training.text.critic import CriticSettings
from jaxrl_llm.training.text.minibatches import UpdateSettings
from jaxrl_llm.training.text.objective import Objective
from jaxrl_llm.training.text.signals import UserSignal


@dataclasses.dataclass(frozen=True)
class TrainSettings:
    """The numbers of a run; resuming with others is refused.

    Attributes:
        steps: rollout batches in the run.
        prompts: prompts per rollout batch.
        group_size: answers per prompt.
        prompt_length: width of the prompts, which are padded on the left. [tokens]
        response_length: most tokens of an answer, its end token included. [tokens]
        sampling: how answers are sampled.
        optimizer: the optimiser.
        update: how a batch is turned into optimiser steps.
        seed: of problems, answers and the order of minibatches.
        checkpoint_every: steps between checkpoints; the last step always has one.
        keep_checkpoints: newest checkpoints kept.
        evaluate_every: steps between evaluations; 0 evaluates before the first and after the last step only.
        samples: answers per step written to samples.jsonl.
        reward_low: smallest reward the task can give, for the bounds.
        reward_high: largest reward the task can give.
        critic: the value function of signals that need one.
        ahead: batches that are sampled ahead of the one that is learned, by a sampler that can work meanwhile.
        replay: learn from the last so many batches each step, the new one included; 1 is the new one alone.
        episodes_every: steps between batches that are written down whole, for `show`; 0 writes none.
    """

    steps: int = 50
    prompts: int = 16
    group_size: int = 8
    prompt_length: int = 32
    response_length: int = 8
    sampling: SamplingSettings = dataclasses.field(default_factory=SamplingSettings)
    optimizer: OptimizerSettings = dataclasses.field(default_factory=OptimizerSettings)
    update: UpdateSettings = dataclasses.field(default_factory=UpdateSettings)
    seed: int = 0
    checkpoint_every: int = 10
    keep_checkpoints: int = 2
    evaluate_every: int = 0
    samples: int = 2
    reward_low: float = 0.0
    reward_high: float = 1.0
    critic: CriticSettings = dataclasses.field(default_factory=CriticSettings)
    ahead: int = 0
    replay: int = 1
    episodes_every: int = 0

    def __post_init__(self) -> None:
        """Refuse impossible numbers."""
        require_finite(self)
        least = {"steps": 1, "prompts": 1, "group_size": 1, "prompt_length": 1, "response_length": 1}
        least |= {"seed": 0, "checkpoint_every": 1, "keep_checkpoints": 1, "evaluate_every": 0, "samples": 0}
        least |= {"ahead": 0, "replay": 1, "episodes_every": 0}
        for name, bound in least.items():
            if getattr(self, name) < bound:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least {bound}.")
        if self.prompts < self.update.minibatches:
            raise ValueError(
                f"update.minibatches is {self.update.minibatches}, but a batch has {self.prompts} prompts; "
                "every minibatch needs one."
            )
        if self.sampling.greedy:
            raise ValueError("sampling.temperature is 0; a policy that always gives the same answer cannot learn.")
        if not self.reward_low < self.reward_high:
            raise ValueError(f"reward_low is {self.reward_low}; it must be below reward_high, {self.reward_high}.")

    @property
    def optimizer_steps(self) -> int:
        """Optimiser steps of the whole run, if none is left out."""
        return self.steps * self.update.epochs * self.update.minibatches


@dataclasses.dataclass(frozen=True)
class Parts:
    """What a run trains, and what of: a policy, and for each of the three doors the recipe's own or one of yours.

    Attributes:
        model: the policy before training, with its adapters if only those learn (`trainable.prepare`). Training takes
            its trained parameters over: their buffers are reused, so clone a model that is needed afterwards.
        trainable: which of its parameters learn.
        tokenizer: of the model.
        task: where problems come from and how answers are scored; or tasks in order of difficulty. None where a
            `collector` brings the experience.
        recipe: the objective as data, with its rule for advantages; GRPO's where another objective is given.
        collector: brings the experience; None samples answers to the task.
        objective: what is minimised: a callable of `jaxrl_llm.testing.Batch`, or a name of `OBJECTIVES`; None takes the
            recipe's loss.
        signal: makes the advantages: a callable of `jaxrl_llm.objectives.SignalInputs`; None takes the recipe's rule.
        teacher: the reference policy of divergence terms, imitation, preferences and distillation, with the
            policy's vocabulary; None takes the policy before training.
        sampler: answers the task's prompts; None takes the compiled one, with what `perturbation` does to it.
        end_ids: tokens that end an answer; empty takes the tokenizer's end token and the task's `stop`.
        mesh: devices to spread parameters and batches over; None for one device.
        decode_dtype: dtype of sampling; None for that of the model.
        perturbation: what the compiled sampler does differently from the model; nothing by default.
    """

    model: Transformer
    trainable: Trainable
    tokenizer: Tokenizer
    task: Task | Curriculum | None = None
    recipe: Recipe = dataclasses.field(default_factory=lambda: get_recipe("grpo"))
    collector: Collector | None = None
    objective: Callable[[Batch], Any] | Objective | str | None = None
    signal: UserSignal | None = None
    teacher: Transformer | None = None
    sampler: Sampler | None = None
    end_ids: tuple[int, ...] = ()
    mesh: Mesh | None = None
    decode_dtype: Any = None
    perturbation: Perturbation = dataclasses.field(default_factory=Perturbation)


def end_tokens(tokenizer: Tokenizer, stop: str) -> tuple[int, ...]:
    """The tokens that end an answer: all end tokens of the tokenizer, and `stop` where that is one token."""
    ids = tokenizer.encode(stop, add_special_tokens=False) if stop else []
    return tuple(dict.fromkeys((*tokenizer.eos_ids, *(ids if len(ids) == 1 else ()))))
