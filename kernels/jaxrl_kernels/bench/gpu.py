"""Time the ops on a GPU, beside a matrix product and a copy of the same size, plain JAX and whatever peers are there.

    python -m jaxrl_kernels.bench.gpu                                the shape whose times peers publish for an H100
    python -m jaxrl_kernels.bench.gpu --size 64 32 512 --implementations xla     tiny, on any machine

Prints milliseconds (median and range of interleaved rounds after two of warm-up), TFLOP/s or GB/s, the ratio to the
ceiling, what the compiler holds beyond arguments and results, and the largest error of log-prob against float64; writes
all of it to results/<device>.json beside this file (or --output).
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array

from jaxrl_kernels import Reference
from jaxrl_kernels import dense_gradient
from jaxrl_kernels import dense_kl
from jaxrl_kernels import token_loss
from jaxrl_kernels import token_statistics
from jaxrl_kernels.bench import gpu_peers
from jaxrl_kernels.bench.gpu_peers import Entry
from jaxrl_kernels.bench.measure import temporaries
from jaxrl_kernels.tuned import device_name
from jaxrl_kernels.tuned import slug

SIZE = (8192, 4096, 131072)
"""N, D, V."""

CHECKED_ROWS = 32
"""Rows whose log-probs are also computed in float64, on the host."""

TWO = ("log_prob", "entropy")
FOUR = (*TWO, "collision", "kl")
SETS = {
    "log_prob+entropy": TWO,
    "log_prob+entropy+collision+kl": FOUR,
    "the same+total_variation": (*FOUR, "total_variation"),
}


class Inputs(NamedTuple):
    """Policy and reference, which share nothing, or a compiler would compute one product for both."""

    hidden: Array
    head: Array
    targets: Array
    reference: Reference


def make_inputs(size: tuple[int, int, int]) -> Inputs:
    """bfloat16 inputs with logits of standard deviation 2; the reference's head differs by a tenth of that."""
    rows, width, vocabulary = size
    keys = jax.random.split(jax.random.key(0), 4)

    @jax.jit
    def make() -> Inputs:
        hidden = jax.random.normal(keys[0], (rows, width), jnp.bfloat16)
        head = jax.random.normal(keys[1], (width, vocabulary), jnp.bfloat16) * jnp.bfloat16(2 / width**0.5)
        near = jax.random.normal(keys[2], (width, vocabulary), jnp.bfloat16) * jnp.bfloat16(0.2 / width**0.5)
        targets = jax.random.randint(keys[3], (rows,), 0, vocabulary)
        return Inputs(hidden, head, targets, Reference(hidden + 0, head + near))

    return make()


def _values(names: tuple[str, ...], implementation: str, inputs: Inputs) -> list[Array]:
    hidden, head, targets, reference = inputs
    found = token_statistics(
        hidden,
        head,
        targets,
        reference=reference if "kl" in names else None,
        statistics=names,
        implementation=implementation,
    )
    return [getattr(found, name) for name in names]


def _plain(inputs: Inputs) -> list[Array]:
    """The same two statistics as they are usually written."""
    log_p = jax.nn.log_softmax((inputs.hidden @ inputs.head).astype(jnp.float32))
    picked = jnp.take_along_axis(log_p, inputs.targets[:, None], axis=1)[:, 0]
    return [picked, -jnp.sum(jnp.exp(log_p) * log_p, axis=1)]


def _gradient(values: Callable[[Inputs], list[Array]]) -> Callable[[Inputs], Any]:
    def run(inputs: Inputs) -> Any:
        def total(hidden: Array, head: Array) -> Array:
            found = values(inputs._replace(hidden=hidden, head=head))
            return jnp.sum(jnp.stack(found))

        return jax.grad(total, (0, 1))(inputs.hidden, inputs.head)

    return run


def _loss(names: tuple[str, ...], inputs: Inputs) -> Any:
    def total(hidden: Array, head: Array) -> Array:
        reference = inputs.reference if "kl" in names else None
        return token_loss(
            hidden,
            head,
            inputs.targets,
            lambda found: sum(getattr(found, name) for name in names),  # pyright: ignore[reportArgumentType]
            reference=reference,
            statistics=names,
        )[0]

    return jax.value_and_grad(total, (0, 1))(inputs.hidden, inputs.head)


def programs(implementations: list[str], size: tuple[int, int, int]) -> dict[str, Entry]:
    """Programs of the inputs by name; the first is the ceiling. `full` is forward and backward."""
    rows, width, vocabulary = size
    product = 2.0 * rows * width * vocabulary / 1e12

    def entry(program: Callable, products: int) -> Entry:
        return Entry(program, products * product, "TFLOP")

    table = {
        "matrix product": entry(lambda x: jnp.matmul(x.hidden, x.head), 1),
        "naive forward log_prob+entropy": entry(_plain, 1),
        "naive full log_prob+entropy": entry(_gradient(_plain), 3),
    }
    for implementation in implementations:
        for label, names in SETS.items():

            def forward(inputs: Inputs, names=names, implementation: str = implementation) -> list[Array]:
                return _values(names, implementation, inputs)

            heads = 1 + ("kl" in names)
            table[f"{implementation} forward {label}"] = entry(forward, heads)
            if "total_variation" not in names:
                table[f"{implementation} full {label}"] = entry(_gradient(forward), 2 * heads + 2)
    table["token_loss full log_prob+entropy"] = entry(lambda x: _loss(TWO, x), 3)
    table["token_loss full log_prob+entropy+collision+kl"] = entry(lambda x: _loss(FOUR, x), 4)
    return table


def dense_programs(implementations: list[str], size: tuple[int, int, int]) -> dict[str, Entry]:
    """Programs of (logits, reference logits), counted by the arrays' bytes, each read or written once."""
    gigabytes = size[0] * size[2] * 2 / 1e9

    def plain(z: Array, z_ref: Array) -> Any:
        def total(z: Array) -> Array:
            log_p, log_q = (jax.nn.log_softmax(x.astype(jnp.float32)) for x in (z, z_ref))
            return jnp.sum(jnp.exp(log_p) * (log_p - log_q))

        return jax.value_and_grad(total)(z)

    table = {
        "two reads and a write": Entry(lambda z, z_ref: z + z_ref, 3 * gigabytes, "GB"),
        "naive KL and gradient": Entry(plain, 3 * gigabytes, "GB"),
    }
    for implementation in implementations:

        def both(z: Array, z_ref: Array, implementation: str = implementation) -> Any:
            return dense_gradient(z, z_ref, implementation=implementation)

        def kl(z: Array, z_ref: Array, implementation: str = implementation) -> Any:
            return dense_kl(z, z_ref, implementation=implementation)

        table[f"{implementation} dense_gradient"] = Entry(both, 3 * gigabytes, "GB")
        table[f"{implementation} dense_kl"] = Entry(kl, 2 * gigabytes, "GB")
    return table


def measure(table: dict[str, Entry], arguments: tuple, rounds: int) -> dict[str, dict[str, Any]]:
    """Compile, time in turn, print one line each; the first program is the ceiling."""
    compiled = {name: jax.jit(entry.program).lower(*arguments).compile() for name, entry in table.items()}
    times: dict[str, list[float]] = {name: [] for name in table}
    for index in range(rounds + 2):
        for name, program in compiled.items():
            start = time.perf_counter()
            jax.block_until_ready(program(*arguments))
            if index > 1:
                times[name].append(time.perf_counter() - start)
    rates = {name: entry.work / statistics.median(times[name]) for name, entry in table.items()}
    ceiling, found = rates[next(iter(table))], {}
    for name, entry in table.items():
        middle, low, high = (round(1e3 * f(times[name]), 3) for f in (statistics.median, min, max))
        found[name] = {
            "milliseconds": middle,
            "range": [low, high],
            "rate": round(rates[name], 1),
            "unit": f"{entry.unit}/s",
            "of_the_ceiling": round(rates[name] / ceiling, 3),
            "temporaries_mib": temporaries(compiled[name]),
        }
        print(row(name, found[name]), flush=True)
    return found


HEADER = "| program | ms | range | rate | of the ceiling | temporaries MiB |\n|---|---|---|---|---|---|"


def row(name: str, found: dict[str, Any]) -> str:
    """One line of the table."""
    low, high = found["range"]
    rate = f"{found['rate']:.0f} {found['unit']}" if "rate" in found else "-"
    share, held = found.get("of_the_ceiling", "-"), found.get("temporaries_mib", "-")
    return f"| {name} | {found['milliseconds']:.2f} | {low:.2f} to {high:.2f} | {rate} | {share} | {held} |"


def log_prob_error(implementation: str, inputs: Inputs) -> float:
    """Largest difference of log-probs from float64 of the same inputs [nats]."""
    few = slice(None, CHECKED_ROWS)
    hidden, head, targets = inputs.hidden[few], inputs.head, inputs.targets[few]
    found = token_statistics(hidden, head, targets, statistics=("log_prob",), implementation=implementation).log_prob
    exact = [np.asarray(x.astype(jnp.float32), np.float64) for x in (hidden, head)]
    z = exact[0] @ exact[1]
    z = z - z.max(axis=1, keepdims=True)
    wanted = z[np.arange(len(z)), np.asarray(targets)] - np.log(np.exp(z).sum(axis=1))
    return float(f"{np.max(np.abs(np.asarray(found, np.float64) - wanted)):.2g}")


def main() -> None:
    """Run, print, write."""
    parser = argparse.ArgumentParser(prog="python -m jaxrl_kernels.bench.gpu", description="Time a GPU.")
    parser.add_argument("--size", type=int, nargs=3, default=SIZE, metavar=("N", "D", "V"))
    parser.add_argument("--implementations", nargs="+", default=["xla", "pallas_mosaic_gpu"])
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--torch", metavar="PYTHON", help="an interpreter with PyTorch and, if there, Liger and CCE")
    parser.add_argument("--output", type=Path, help="JSON file to write (default: results/<device>.json)")
    options = parser.parse_args()
    size = tuple(options.size)
    # PyTorch first, while the card's memory is free.
    peers = gpu_peers.measure(options.torch, size, options.rounds) if options.torch else {}
    device = device_name()
    print(f"{device}, jax {jax.__version__}, N={size[0]} D={size[1]} V={size[2]} bfloat16")
    print(HEADER)
    inputs = make_inputs(size)
    results: dict[str, Any] = {"device": device, "jax": jax.__version__, "size": size, "rounds": options.rounds}
    table = programs(options.implementations, size) | gpu_peers.in_jax(size)
    results["programs"] = measure(table, (inputs,), options.rounds)
    results["log_prob_error"] = {name: log_prob_error(name, inputs) for name in options.implementations}
    print("largest error of log-prob [nats]:", results["log_prob_error"])
    logits, far = (jax.random.normal(jax.random.key(k), (size[0], size[2]), jnp.bfloat16) for k in (1, 2))
    near = lax.convert_element_type(logits + 0.1 * far, jnp.bfloat16)
    del far
    dense = dense_programs(options.implementations, size)
    results["dense"] = measure(dense, (logits, near), options.rounds)
    results["peers"] = peers
    for name, found in peers.items():
        print(row(name, found) if isinstance(found, dict) else f"{name}: {found}")
    output = options.output or Path(__file__).parent / "results" / f"{slug(device)}.json"
    output.write_text(json.dumps(results, indent=1) + "\n")
    print(f"wrote {output}")


if __name__ == "__main__":
    main()
