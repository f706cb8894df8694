"""Time and memory of attention with all scores ("reference") and in blocks ("xla"), forward and backward.

Command: python -m experiments.benchmarks.attention [--lengths 256 512 1024 2048 4096] [--heads 4] [--repeats 3]
Cost:    half a minute on two quiet cores.

One row, 4 heads of 64, float32, on an Intel Xeon at 2.80 GHz with 2 cores and jax 0.11.2, with other work beside it: a
load of 2.4 up to T = 2048; the last row is of another time with a load of 10, where T = 2048 took 2476 and 1896 ms.

| T | reference | xla | reference holds | xla holds | chosen |
|---|---|---|---|---|---|
| 256 | 2.1 ms | 3.9 ms | 4.3 MiB | 5.8 MiB | reference |
| 512 | 14.7 ms | 17.3 ms | 16.5 MiB | 18.0 MiB | reference |
| 1024 | 37.8 ms | 34.8 ms | 49.0 MiB | 25.8 MiB | reference |
| 2048 | 149.4 ms | 117.5 ms | 194.1 MiB | 29.8 MiB | reference |
| 4096 | 5546.5 ms | 3760.1 ms | 772.1 MiB | 37.9 MiB | xla |

With 32 rows of 9 heads (load 2.4): T = 56 14.7 and 22.6 ms, 10 and 15 MiB; 128 119.7 and 256.3 ms, 54 and 63 MiB;
256 624.0 and 410.2 ms, 217 and 154 MiB. Single runs, good to a quarter or so at the lower load.
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
    memory = compiled.memory_analysis()
    assert memory is not None
    return min(times[1:]), memory.temp_size_in_bytes


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
