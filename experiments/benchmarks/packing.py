"""Training on short answers: packed rows against the padded grid, the whole of `Trainer.prepare` and `Trainer.improve`.

Command: python -m experiments.benchmarks.packing [--prompts 8] [--group-size 8] [--turns 4]
Cost:    two and a half minutes on two cores.

Answers have 1 to 64 tokens, geometric with a mean near 8; the eight of a group stand behind one prompt of 16 to 24
tokens. Both trainers have the same model, settings and batches, and take turns; the grid is what training takes where
packing is not worth it. A batch is run once before it is timed, so nothing is compiled within a measured turn; the last
column counts the layouts of the packed rows. Speed is chosen tokens by seconds, so that padding earns nothing:
medians over the turns, and the ratio of the medians. `planning` is what packing takes on the host of that.

On an Intel Xeon at 2.80 GHz, 2 cores, with ahead-of-time compiles beside it, jax 0.11.2:

| vocabulary | packed [tokens/s] | grid [tokens/s] | ratio | padding | planning | layouts |
|---|---|---|---|---|---|---|
| bytes, 1.8 M | 1139 | 229 | 4.98 | 17% and 76% | 13 ms | 4 of 4 |
| 49k, 3.3 M | 631 | 130 | 4.87 | 25% and 76% | 6 ms | 3 of 4 |

Each new layout is compiled once, which is not in the speed: over 40 batches of 16 prompts there are 11 and 8 of them.
"""

import argparse
import platform
import statistics
import time
from unittest import mock

import jax
import numpy as np
from flax import nnx

from jaxrl_llm.models import trainable
from jaxrl_llm.models.config import TransformerConfig
from jaxrl_llm.models.tokenizers import ByteTokenizer
from jaxrl_llm.models.transformer import Transformer
from jaxrl_llm.objectives import get_recipe
from jaxrl_llm.rollouts.collect import BatchShape
from jaxrl_llm.rollouts.collect import Experience
from jaxrl_llm.training import Parts
from jaxrl_llm.training import Trainer
from jaxrl_llm.training import TrainSettings
from jaxrl_llm.training import TrainState
from jaxrl_llm.training.text import layout
from jaxrl_llm.training.text.policy import parameter_count
from jaxrl_llm.trajectory import Actions
from jaxrl_llm.trajectory import single_step

PROMPT, RESPONSE, MEAN = 24, 64, 8
"""Widest prompt, longest answer, and mean length of answers before they are cut off. [tokens]"""

SIZES = {"bytes": (259, 192, 4), "49k": (49_152, 64, 4)}
"""Vocabulary, width and layers of the models."""


def experience(seed: int, prompts: int, group_size: int) -> Experience:
    """A batch of random texts of which a third earned a reward."""
    rng, rows, columns = np.random.default_rng(seed), prompts * group_size, np.arange(PROMPT + RESPONSE)
    lengths = np.minimum(rng.geometric(1 / MEAN, rows), RESPONSE)
    asked = np.repeat(rng.integers(16, PROMPT + 1, prompts), group_size)
    tokens = rng.integers(0, 256, (rows, len(columns))).astype(np.int32)
    tokens[:, :PROMPT] = np.repeat(tokens[::group_size, :PROMPT], group_size, axis=0)
    real = (columns >= PROMPT - asked[:, None]) & (columns < PROMPT + lengths[:, None])
    return Experience(
        single_step(
            tokens,
            real,
            real & (columns >= PROMPT),
            group_ids=np.repeat(np.arange(prompts), group_size),
            outcomes=(rng.random(rows) < 1 / 3).astype(np.float32),
            ended=lengths < RESPONSE,
        )
    )


class InGrid(Trainer):
    """A trainer to which no packing is worth its program."""

    def arrange(self, experience: Experience, actions: Actions) -> layout.Arrangement:
        """The one grid."""
        with mock.patch.object(layout, "WORTH_PACKING", 0.0):
            return super().arrange(experience, actions)


def make_trainer(size: str, prompts: int, group_size: int, *, packs: bool) -> Trainer:
    """GRPO on a model of random weights."""
    vocabulary, width, layers = SIZES[size]
    config = TransformerConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        num_layers=layers,
        num_heads=width // 32,
        num_kv_heads=width // 32,
        head_dim=32,
        intermediate_size=8 * width // 3,
    )
    parts = Parts(
        model=Transformer(config, rngs=nnx.Rngs(0)),
        trainable=trainable.full(),
        recipe=get_recipe("grpo"),
        tokenizer=ByteTokenizer(),
    )
    settings = TrainSettings(
        prompts=prompts,
        group_size=group_size,
        prompt_length=PROMPT,
        response_length=RESPONSE,
    )
    return (Trainer if packs else InGrid)(
        parts, settings, BatchShape(prompts * group_size, group_size, PROMPT + RESPONSE, RESPONSE, PROMPT)
    )


def turn(trainer: Trainer, state: TrainState, batch: Experience) -> tuple[TrainState, float]:
    """One training step, and its seconds."""
    start = time.perf_counter()
    state, _ = trainer.improve(state, trainer.prepare(state, 0, batch))
    return state, time.perf_counter() - start


def measure(size: str, prompts: int, group_size: int, turns: int) -> None:
    """Print a line of the table."""
    trainers = [make_trainer(size, prompts, group_size, packs=packs) for packs in (True, False)]
    states = [trainer.initial_state() for trainer in trainers]
    speeds: list[list[float]] = [[], []]
    planning, layouts, padded = [], set(), []
    for seed in range(turns):
        batch = experience(seed, prompts, group_size)
        learned = int(np.asarray(batch.trajectories.action_mask).sum())
        for _ in range(2):  # compiled by the first, timed in the second
            seconds = []
            for number, trainer in enumerate(trainers):
                states[number], taken = turn(trainer, states[number], batch)
                seconds.append(taken)
        for speed, taken in zip(speeds, seconds, strict=True):
            speed.append(learned / taken)
        actions, start = Actions.of(batch.trajectories, width=RESPONSE), time.perf_counter()
        rows = trainers[0].arrange(batch, actions)
        planning.append(time.perf_counter() - start)
        layouts.add((len(rows.rows.tokens), rows.rows.layout))
        padded.append((rows.padded_share, trainers[1].arrange(batch, actions).padded_share))
    packed, grid = map(statistics.median, speeds)
    shares = " and ".join(f"{share:.0%}" for share in np.mean(padded, axis=0))
    print(
        f"| {size}, {parameter_count(states[0].params) / 1e6:.1f} M | {packed:.0f} | {grid:.0f} | {packed / grid:.2f} |"
        f" {shares} | {1e3 * statistics.median(planning):.0f} ms | {len(layouts)} of {turns} |",
        flush=True,
    )


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--group-size", type=int, default=8)
    parser.add_argument("--turns", type=int, default=4)
    args = parser.parse_args()
    print(f"{platform.processor() or platform.machine()}, {jax.devices()[0].device_kind}, jax {jax.__version__}")
    print("| vocabulary | packed [tokens/s] | grid [tokens/s] | ratio | padding | planning | layouts |")
    print("|---|---|---|---|---|---|---|")
    for size in SIZES:
        measure(size, args.prompts, args.group_size, args.turns)


if __name__ == "__main__":
    main()
