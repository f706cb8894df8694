"""Time token_statistics and dense_gradient on an accelerator, beside a matrix product and a copy of the same size.

    python -m jaxrl_kernels.bench.gpu                                the shapes whose times peers publish for an H100
    python -m jaxrl_kernels.bench.gpu --size 64 32 512 --implementations xla     tiny, on any machine

Prints milliseconds (median and range of interleaved rounds after one of warm-up), TFLOP/s or GB/s, the ratio to the
ceiling, what the compiler holds beyond arguments and results, and the largest error of log-prob against float64.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array

from jaxrl_kernels import Reference
from jaxrl_kernels import dense_gradient
from jaxrl_kernels import token_statistics
from jaxrl_kernels.bench.measure import temporaries

SIZE = (8192, 4096, 131072)
"""N, D, V."""

CHECKED_ROWS = 32
"""Rows whose log-probs are also computed in float64, on the host."""

SETS = {
    "log_prob+entropy": ("log_prob", "entropy"),
    "log_prob+entropy+collision+kl": ("log_prob", "entropy", "collision", "kl"),
    "the same+total_variation": ("log_prob", "entropy", "collision", "kl", "total_variation"),
}


def programs(implementations: list[str], size: tuple[int, int, int]) -> dict[str, tuple[Callable, float, str]]:
    """Per name: the program of (hidden, head, targets), the work it counts as, and its unit."""
    rows, width, vocabulary = size
    product = 2.0 * rows * width * vocabulary / 1e12

    def ceiling(hidden: Array, head: Array, _: Array) -> Array:
        return jnp.matmul(hidden, head)

    def values(names: tuple[str, ...], implementation: str) -> Callable:
        def run(hidden: Array, head: Array, targets: Array) -> list[Array]:
            other = Reference(hidden, head) if "kl" in names else None
            found = token_statistics(
                hidden, head, targets, reference=other, statistics=names, implementation=implementation
            )
            return [getattr(found, name) for name in names]

        return run

    table: dict[str, tuple[Callable, float, str]] = {"matrix product": (ceiling, product, "TFLOP")}
    for implementation in implementations:
        for label, names in SETS.items():
            heads = 1 + ("kl" in names)
            table[f"{implementation} forward {label}"] = (values(names, implementation), heads * product, "TFLOP")
        first = values(SETS["log_prob+entropy"], implementation)

        def total(hidden: Array, head: Array, targets: Array, first: Callable = first) -> Array:
            return sum(jnp.sum(x) for x in first(hidden, head, targets))  # pyright: ignore[reportReturnType]

        table[f"{implementation} full log_prob+entropy"] = (jax.grad(total, (0, 1)), 4 * product, "TFLOP")
    return table


def dense_programs(implementations: list[str], size: tuple[int, int, int]) -> dict[str, tuple[Callable, float, str]]:
    """The same for programs of (logits, reference logits)."""
    gigabytes = 3 * size[0] * size[2] * 2 / 1e9

    def copied(z: Array, z_ref: Array) -> Array:
        return z + z_ref

    table: dict[str, tuple[Callable, float, str]] = {"two reads and a write": (copied, gigabytes, "GB")}
    for implementation in implementations:

        def both(z: Array, z_ref: Array, implementation: str = implementation) -> Any:
            return dense_gradient(z, z_ref, implementation=implementation)

        table[f"{implementation} dense_gradient"] = (both, gigabytes, "GB")
    return table


def measure(table: dict[str, tuple[Callable, float, str]], arguments: tuple[Array, ...], rounds: int) -> None:
    """Compile, time in turn, print one line each; the first program is the ceiling."""
    compiled = {name: jax.jit(entry[0]).lower(*arguments).compile() for name, entry in table.items()}
    times: dict[str, list[float]] = {name: [] for name in table}
    for index in range(rounds + 1):
        for name, program in compiled.items():
            start = time.perf_counter()
            jax.block_until_ready(program(*arguments))
            if index:
                times[name].append(time.perf_counter() - start)
    rates = {name: work / statistics.median(times[name]) for name, (_, work, _) in table.items()}
    ceiling = rates[next(iter(table))]
    for name, (_, _, unit) in table.items():
        middle, low, high = (1e3 * f(times[name]) for f in (statistics.median, min, max))
        spread, rate = f"{low:.2f}-{high:.2f}", f"{rates[name]:.1f} {unit}/s"
        held = temporaries(compiled[name])
        print(f"| {name} | {middle:.2f} | {spread} | {rate} | {rates[name] / ceiling:.2f} | {held:.0f} |", flush=True)


def log_prob_error(implementation: str, hidden: Array, head: Array, targets: Array) -> float:
    """Largest difference of log-probs from float64 of the same inputs [nats]."""
    few = slice(None, CHECKED_ROWS)
    found = token_statistics(
        hidden[few], head, targets[few], statistics=("log_prob",), implementation=implementation
    ).log_prob
    exact = [np.asarray(x.astype(jnp.float32), np.float64) for x in (hidden[few], head)]
    z = exact[0] @ exact[1]
    z = z - z.max(axis=1, keepdims=True)
    wanted = z[np.arange(len(z)), np.asarray(targets[few])] - np.log(np.exp(z).sum(axis=1))
    return float(np.max(np.abs(np.asarray(found, np.float64) - wanted)))


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(prog="python -m jaxrl_kernels.bench.gpu", description="Time an accelerator.")
    parser.add_argument("--size", type=int, nargs=3, default=SIZE, metavar=("N", "D", "V"))
    parser.add_argument("--implementations", nargs="+", default=["xla", "pallas_mosaic_gpu"])
    parser.add_argument("--rounds", type=int, default=20)
    options = parser.parse_args()
    rows, width, vocabulary = size = tuple(options.size)
    keys = jax.random.split(jax.random.key(0), 3)
    hidden = jax.random.normal(keys[0], (rows, width), jnp.bfloat16)
    head = jax.random.normal(keys[1], (width, vocabulary), jnp.bfloat16) * (2 / width**0.5)
    targets = jax.random.randint(keys[2], (rows,), 0, vocabulary)
    print(f"{jax.devices()[0].device_kind}, jax {jax.__version__}, N={rows} D={width} V={vocabulary} bfloat16")
    print("| program | ms | range | rate | of the ceiling | temporaries MiB |\n|---|---|---|---|---|---|")
    arguments = (hidden, lax.convert_element_type(head, jnp.bfloat16), targets)
    measure(programs(options.implementations, size), arguments, options.rounds)
    for name in options.implementations:
        print(f"log-prob error of {name}: {log_prob_error(name, *arguments):.1e} nats")
    logits = jax.random.normal(keys[0], (rows, vocabulary), jnp.bfloat16)
    measure(dense_programs(options.implementations, size), (logits, logits[::-1]), options.rounds)


if __name__ == "__main__":
    main()
