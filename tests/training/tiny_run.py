"""A run so small that it can be done many times: a tiny byte-level transformer learns to say the digit it is shown.

`python tiny_run.py FOLDER [--field value ...]` trains in a process of its own and prints the fingerprint of the result.
"""

import argparse
import dataclasses
import sys
from pathlib import Path

import numpy as np
from flax import nnx

from jaxrl_llm.environments import Problem
from jaxrl_llm.environments import Score
from jaxrl_llm.environments import stable_key
from jaxrl_llm.models import trainable
from jaxrl_llm.models.config import ExpertsConfig
from jaxrl_llm.models.config import tiny
from jaxrl_llm.models.tokenizers import ByteTokenizer
from jaxrl_llm.models.trainable import Trainable
from jaxrl_llm.models.transformer import Transformer
from jaxrl_llm.objectives import Recipe
from jaxrl_llm.objectives import get_recipe
from jaxrl_llm.rollouts.collect import Collector
from jaxrl_llm.rollouts.collect import Experience
from jaxrl_llm.training import OptimizerSettings
from jaxrl_llm.training import Parts
from jaxrl_llm.training import Trainer
from jaxrl_llm.training import TrainSettings
from jaxrl_llm.training import TrainState
from jaxrl_llm.training import UpdateSettings
from jaxrl_llm.training import make_collector
from jaxrl_llm.training import state_hash
from jaxrl_llm.training import train
from jaxrl_llm.trajectory import single_step


class SayTheDigit:
    """Answer "7>" with "7". The reward of one letter falls on a line with its distance from the digit."""

    name = "say_the_digit"
    stop = ""

    def train(self, seed: int, step: int, count: int) -> list[Problem]:
        digits = [stable_key(seed, step, index) % 10 for index in range(count)]
        return [Problem(f"{digit}>", str(digit), str(digit)) for digit in digits]

    def held_out(self) -> list[Problem]:
        return []

    def score(self, problem: Problem, text: str) -> Score:
        right = text == problem.answer
        distance = abs(ord(text[0]) - ord(problem.answer)) if text else 64
        return Score(reward=max(0.0, 1 - distance / 64), lenient=right, strict=right)


SETTINGS = TrainSettings(
    steps=6,
    prompts=8,
    group_size=8,
    prompt_length=4,
    response_length=1,
    optimizer=OptimizerSettings(learning_rate=3e-3),
    update=UpdateSettings(minibatches=4, micro_batch=1),
    checkpoint_every=2,
)


def make_parts(
    recipe: str | Recipe = "dapo",
    choice: Trainable | None = None,
    *,
    layers: int = 1,
    experts: ExpertsConfig | None = None,
    **changes,
) -> Parts:
    tokenizer = ByteTokenizer()
    recipe = get_recipe(recipe) if isinstance(recipe, str) else recipe
    choice = trainable.full() if choice is None else choice
    config = tiny(vocab_size=tokenizer.vocab_size, num_layers=layers, experts=experts)
    config = dataclasses.replace(config, mtp_layers=int(choice.further))
    model = Transformer(config, rngs=nnx.Rngs(0))
    model = choice.prepare(model, rngs=nnx.Rngs(1))
    parts = Parts(model=model, trainable=choice, tokenizer=tokenizer, task=SayTheDigit(), recipe=recipe)
    return dataclasses.replace(parts, **changes)


def make_trainer(parts: Parts, settings: TrainSettings = SETTINGS) -> tuple[Trainer, Collector]:
    """What a run is made of, without a run."""
    collection = make_collector(parts, settings, Path("nowhere"))
    return Trainer(parts, settings, collection.collector.shape, collection.law), collection.collector


def collected(trainer: Trainer, collector: Collector, state: TrainState, step: int = 0) -> Experience:
    return collector.collect(trainer.snapshot(state), state.key, step, {})


def with_outcomes(experience: Experience, outcomes: np.ndarray, **columns: np.ndarray) -> Experience:
    """The same texts, with these rewards, and other columns of the trajectories."""
    trajectories = dataclasses.replace(experience.trajectories, **columns)
    again = single_step(
        trajectories.tokens,
        trajectories.token_mask,
        trajectories.action_mask,
        group_ids=trajectories.group_ids,
        outcomes=outcomes,
        ended=trajectories.ended,
        log_prob_behaviour=trajectories.log_prob_behaviour,
        version=0,
    )
    return dataclasses.replace(experience, trajectories=again)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--steps", type=int, default=SETTINGS.steps)
    arguments = parser.parse_args()
    settings = dataclasses.replace(SETTINGS, steps=arguments.steps)
    outcome = train(make_parts(), settings, arguments.folder)
    print(outcome.message)
    print(state_hash(outcome.state))
    sys.exit(0 if outcome.finished else 143)


if __name__ == "__main__":
    main()
