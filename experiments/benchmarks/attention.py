"""Time and memory of attention with all scores ("reference") and in blocks ("xla"), forward and backward.

Command: python -m experiments.benchmarks.attention [--lengths 256 512 1024 2048 4096] [--heads 4] [--repeats 3]
"""

import argparse
import time

import jax
import jax.numpy as jnp

from jaxrl_llm.models.attention import Visibility
from jaxrl_llm.models.attention import attend
from jaxrl_llm.models.attention import choose

WIDTH = 64
"""Channels of a head, those of SmolLM2."""


def loss(query, keys, values, visibility: Visibility, weights, implementation: str):
    """A sum that every result is part of."""
    precision = jax.lax.Precision.HIGHEST
    mixed = attend(query, keys, values, visibility, precision=precision, implementation=implementation)
    return jnp.sum(mixed * weights)


def measure(implementation: str, rows: int, length: int, heads: int, repeats: int) -> tuple[float, int]:
    """Best time of a forward and backward pass [s], and what it holds beyond arguments and results [bytes]."""
    shapes = [(rows, length, heads, WIDTH), *[(rows, heads, length, WIDTH)] * 2, (rows, length, heads, WIDTH)]
    keys = jax.random.split(jax.random.key(0), 4)
    query, key, value, weights = (jax.random.normal(k, shape) for k, shape in zip(keys, shapes, strict=True))
    visibility = Visibility(jnp.ones((rows, length), bool))
    step = jax.jit(jax.grad(loss, (0, 1, 2)), static_argnums=5)
    compiled = step.lower(query, key, value, visibility, weights, implementation).compile()
    times = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        jax.block_until_ready(compiled(query, key, value, visibility, weights))
        times.append(time.perf_counter() - start)
    return min(times[1:]), compiled.memory_analysis().temp_size_in_bytes


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=[256, 512, 1024, 2048, 4096])
    parser.add_argument("--rows", type=int, default=1)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    print("| T | reference | xla | reference holds | xla holds | chosen |\n|---|---|---|---|---|---|")
    for length in args.lengths:
        found = [measure(name, args.rows, length, args.heads, args.repeats) for name in ("reference", "xla")]
        times = " | ".join(f"{1e3 * seconds:.1f} ms" for seconds, _ in found)
        held = " | ".join(f"{size / 2**20:.1f} MiB" for _, size in found)
        print(f"| {length} | {times} | {held} | {choose((args.rows, length, args.heads, WIDTH), jnp.float32)} |")


if __name__ == "__main__":
    main()
