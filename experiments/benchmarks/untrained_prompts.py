"""How well a pretrained model does before any training, by the words of the prompt.

    python -m experiments.benchmarks.untrained_prompts sums_to_49 sums_to_99 [--problems 256]

For each family: greedy answers to problems of the training side (never the held-out ones), last number counts. A task
takes the prompt that comes out best, so that what reinforcement learning adds is not the format alone.
"""

import argparse
import dataclasses
from collections.abc import Sequence

import numpy as np
from flax import nnx

from experiments.evaluation import score_answers
from experiments.held_out import HeldOutAnswerer
from experiments.intervals import accuracy
from jaxrl_llm.environments import Problem
from jaxrl_llm.environments import Score
from jaxrl_llm.environments import Task
from jaxrl_llm.environments.arithmetic import addition
from jaxrl_llm.environments.arithmetic import sum_identity
from jaxrl_llm.environments.splits import is_held_out
from jaxrl_llm.models.pretrained import smollm2_135m
from jaxrl_llm.models.trainable import full
from jaxrl_llm.objectives import get_recipe
from jaxrl_llm.training import Parts
from jaxrl_llm.training import TrainSettings

CANDIDATES = ("3 + 5", "14 + 8", "27 + 15", "1 + 2", "14 + 9", "36 + 17")
FAMILIES = {"sums_to_30": 30, "sums_to_49": 49, "sums_to_99": 99}
WORDINGS = (
    "",
    "Sum: ",
    "Problem: ",
    "arithmetic problem: ",
    "State the final answer to the following arithmetic problem: ",
)


@dataclasses.dataclass(frozen=True)
class TrainingSide:
    """A task whose held-out problems are replaced by problems to train on."""

    task: Task
    problems: tuple[Problem, ...]

    @property
    def name(self) -> str:
        """Of the task."""
        return self.task.name

    @property
    def stop(self) -> str:
        """Of the task."""
        return self.task.stop

    def train(self, seed: int, step: int, count: int) -> list[Problem]:
        """Of the task."""
        return self.task.train(seed, step, count)

    def held_out(self) -> list[Problem]:
        """Problems to train on."""
        return list(self.problems)

    def score(self, problem: Problem, text: str) -> Score:
        """Of the task."""
        return self.task.score(problem, text)


def main(arguments: Sequence[str] | None = None) -> None:
    """Print a line per prompt as soon as it is measured, and the best of each family."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("families", nargs="+", choices=sorted(FAMILIES))
    parser.add_argument("--problems", type=int, default=256)
    parser.add_argument("--shots", type=int, nargs="+", default=[2, 3])
    parser.add_argument("--wordings", nargs="+", default=WORDINGS)
    options = parser.parse_args(arguments)
    expressions = tuple(shot for shot in CANDIDATES if not is_held_out(sum_identity(shot)))
    model, tokenizer = smollm2_135m()
    for family in options.families:
        found = []
        for wording in options.wordings:
            for shots in options.shots:
                task = addition(family, largest=FAMILIES[family], shots=expressions[:shots], wording=wording)
                side = TrainingSide(task, tuple(task.train(seed=1, step=0, count=options.problems)))
                width = max(len(tokenizer.encode(problem.prompt)) for problem in side.held_out())
                settings = TrainSettings(prompt_length=width, response_length=4)
                parts = Parts(model=model, trainable=full(), tokenizer=tokenizer, task=task, recipe=get_recipe("grpo"))
                texts = HeldOutAnswerer(parts, side, settings)(nnx.split(model)[1])
                estimate = accuracy(np.array([row["lenient"] for row in score_answers(side, texts)], float))
                found.append((estimate.value, wording, shots, width))
                line = f"{estimate.value:.3f} ({estimate.low:.3f} to {estimate.high:.3f})"
                print(f"{family}  {wording!r}, {shots} shots, {width} tokens: {line}", flush=True)
        print(f"{family}  best: {max(found)}", flush=True)


if __name__ == "__main__":
    main()
