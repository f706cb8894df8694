"""Episodes of many turns against as many tokens sampled in one turn: tokens per second of both, taking turns.

Command: python -m experiments.benchmarks.agent_rollouts [--tasks 16] [--group-size 8] [--turns 5]

Every row reads and writes the same number of tokens in both: the prompt, and what follows it, of which an episode is
given three of four by the world. Both are one compiled program that reads each token once; an episode needs the head
of the model for its actions only. No episode ends early (the policy is untrained), nor does an answer.

On an Intel Xeon at 2.80 GHz, 2 cores, with much other work beside it (read the ratios only), jax 0.11.2:

| model | episodes [tokens/s] | answers [tokens/s] | ratio |
|---|---|---|---|
| bytes | 19,426 | 11,152 | 1.74 |
| bytes, wider | 1,759 | 1,335 | 1.32 |
| 49k | 1,264 | 682 | 1.85 |
"""

import argparse
import platform
import statistics
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx

from jaxrl_llm.environments.worlds import Rooms
from jaxrl_llm.environments.worlds import split_panels
from jaxrl_llm.models.config import TransformerConfig
from jaxrl_llm.models.tokenizers import ByteTokenizer
from jaxrl_llm.models.transformer import Transformer
from jaxrl_llm.rollouts import SamplingSettings
from jaxrl_llm.rollouts import make_generate
from jaxrl_llm.rollouts.play import alphabet
from jaxrl_llm.rollouts.play import episode_width
from jaxrl_llm.rollouts.play import make_play

SIZES = {"bytes": (259, 64, 2), "bytes, wider": (259, 256, 4), "49k": (49_152, 256, 4)}
"""Vocabulary, width and layers of the models."""


def make_model(size: str) -> Transformer:
    """Random weights."""
    vocabulary, width, layers = SIZES[size]
    config = TransformerConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        num_layers=layers,
        num_heads=width // 32,
        num_kv_heads=width // 32,
        head_dim=32,
        intermediate_size=3 * width,
        max_positions=256,
    )
    return Transformer(config, rngs=nnx.Rngs(0))


def seconds(run: Callable[[], object]) -> float:
    """Of one call."""
    start = time.perf_counter()
    jax.block_until_ready(run())
    return time.perf_counter() - start


def measure(size: str, tasks: int, group_size: int, turns: int) -> None:
    """Print a line of the table."""
    world, tokenizer, model = Rooms(), ByteTokenizer(), make_model(size)
    graphdef, state = nnx.split(model)
    letters, seeds = alphabet(world, tokenizer), jnp.asarray(split_panels(world)[0].seeds[:tasks])
    options = {"group_size": group_size, "sampling": SamplingSettings(), "pad_id": tokenizer.pad_id}
    play = make_play(graphdef, world, letters, **options)
    prompt = jnp.asarray(letters.symbols)[world.reset(seeds)[1]]
    length = episode_width(world) - world.prompt_length
    generate = make_generate(graphdef, max_new_tokens=length, eos_id=(), **options)
    key, order = jax.random.key(0), jnp.arange(tasks)
    runs = {
        "episodes": lambda: play(state, seeds, key, 0, order),
        "answers": lambda: generate(state, prompt, jnp.ones(prompt.shape, bool), key, 0, order),
    }
    for run in runs.values():
        seconds(run)
    taken = {name: [] for name in runs}
    for _ in range(turns):
        for name, run in runs.items():
            taken[name].append(seconds(run))
    rates = {name: tasks * group_size * length / statistics.median(times) for name, times in taken.items()}
    print(
        f"| {size} | {rates['episodes']:,.0f} | {rates['answers']:,.0f} | {rates['episodes'] / rates['answers']:.2f} |",
        flush=True,
    )


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", type=int, default=16)
    parser.add_argument("--group-size", type=int, default=8)
    parser.add_argument("--turns", type=int, default=5)
    arguments = parser.parse_args()
    print(f"{platform.processor() or platform.machine()}, {jax.devices()[0].device_kind}, jax {jax.__version__}")
    print("| model | episodes [tokens/s] | answers [tokens/s] | ratio |")
    print("|---|---|---|---|")
    for size in SIZES:
        measure(size, arguments.tasks, arguments.group_size, arguments.turns)


if __name__ == "__main__":
    main()
