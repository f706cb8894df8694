"""Time the ops against plain autodiff on this machine.

    python -m jaxrl_kernels.bench --quick      one shape, 5 rounds or what fits into 3 minutes on two CPU cores
    python -m jaxrl_kernels.bench              all shapes, 20 rounds
    python -m jaxrl_kernels.bench --torch PYTHON   also the same work by PyTorch, in that interpreter
    python -m jaxrl_kernels.bench --tune       block sizes for this device

Prints a table, writes results/<device>.json beside this file (or --output), and on a CPU exits 1 if a promise of
targets.py is not kept.
"""

import argparse
import json
import math
import platform
import sys
from pathlib import Path
from typing import Any

import jax

from jaxrl_kernels import tuned
from jaxrl_kernels.bench import accuracy
from jaxrl_kernels.bench import dense
from jaxrl_kernels.bench import grouped
from jaxrl_kernels.bench import peers
from jaxrl_kernels.bench import tune
from jaxrl_kernels.bench.cases import PRODUCTS
from jaxrl_kernels.bench.cases import PROGRAMS
from jaxrl_kernels.bench.cases import Shape
from jaxrl_kernels.bench.cases import make_inputs
from jaxrl_kernels.bench.measure import compile_all
from jaxrl_kernels.bench.measure import errors
from jaxrl_kernels.bench.measure import summary
from jaxrl_kernels.bench.measure import temporaries
from jaxrl_kernels.bench.measure import time_all
from jaxrl_kernels.bench.table import HEADER
from jaxrl_kernels.bench.table import table_rows
from jaxrl_kernels.bench.targets import misses
from jaxrl_kernels.bench.targets import unmeasured
from jaxrl_kernels.tuned import device_name

QUICK = (Shape(2048, 576, 49152, "float32"), Shape(2048, 0, 49152, "float32"))
SHAPES = (
    *QUICK,
    Shape(2048, 576, 49152, "bfloat16"),
    Shape(1024, 1024, 151552, "float32"),
    Shape(2048, 0, 49152, "bfloat16"),
)
"""Width 0 means logits that exist already."""

GROUPED_QUICK = (grouped.GroupedShape(4096, 4, 256, 128, 32, "float32"),)
GROUPED = (*GROUPED_QUICK, grouped.GroupedShape(1024, 4, 1024, 512, 16, "float32"))

QUICK_SECONDS = 100
"""After these no further round of --quick begins: a round, compiling, errors and the logits' own shape take the rest of
three minutes."""


def run_shape(shape: Shape, rounds: int, torch: str | None, limit: float) -> dict:
    """Everything measured for one shape of hidden states and head."""
    inputs = make_inputs(shape)
    compiled = compile_all(PROGRAMS, inputs)
    table: dict[str, Any] = time_all(compiled, inputs, rounds, limit)
    gigaflop = 2 * shape.rows * shape.width * shape.vocabulary / 1e9
    for name, program in compiled.items():
        table[name]["temporaries_mib"] = temporaries(program)
        table[name]["gflop_per_cpu_second"] = round(PRODUCTS[name] * gigaflop / table[name]["cpu_seconds"], 1)
    product, forward = (table[name]["cpu_seconds"] for name in ("product", "forward/token_statistics"))
    (_, values), (d_hidden, _) = compiled["gradient/token_statistics"](inputs)
    if torch is not None and shape.dtype == "float32":
        found = peers.measure(torch, shape.rows, shape.width, shape.vocabulary, min(rounds, 5), rounds > 5)
        for name, seconds in found.get("cpu_seconds", {}).items():
            table[name] = summary([(value, value) for value in seconds])
            del table[name]["wall_seconds"]
    return {
        "programs": table,
        "product_gflop_per_cpu_second": round(gigaflop / product, 1),
        "forward_share_of_product_rate": round(2 * product / forward, 3),
        "errors": errors(inputs, values, d_hidden),
    }


def run_dense(shape: Shape, rounds: int) -> dict:
    """Everything measured for one shape of logits."""
    inputs = dense.make_inputs(shape)
    compiled = compile_all(dense.PROGRAMS, inputs)
    table: dict[str, Any] = time_all(compiled, inputs, rounds)
    for name, program in compiled.items():
        table[name]["temporaries_mib"] = temporaries(program)
        table[name]["gb_per_cpu_second"] = round(dense.minimal_bytes(shape) / 1e9 / table[name]["cpu_seconds"], 2)
    kl, gradient = compiled["dense/dense_gradient"](inputs)
    seconds = {name: measured["cpu_seconds"] for name, measured in table.items()}
    return {
        "programs": table,
        "dense_gradient_share_of_copy_rate": round(seconds["copy"] / seconds["dense/dense_gradient"], 3),
        "errors": dense.errors(inputs, kl, gradient),
    }


def run_grouped(shape: grouped.GroupedShape, rounds: int) -> dict:
    """Everything measured for one layer of experts."""
    inputs = grouped.make_inputs(shape)
    compiled = compile_all(grouped.PROGRAMS, inputs)
    table: dict[str, Any] = time_all(compiled, inputs, rounds)
    for name, program in compiled.items():
        table[name]["temporaries_mib"] = temporaries(program)
        work = grouped.PRODUCTS[name.split("/")[0]] * shape.flop / 1e9
        table[name]["gflop_per_cpu_second"] = round(work / table[name]["cpu_seconds"], 1)
    seconds = {name: measured["cpu_seconds"] for name, measured in table.items()}
    return {
        "programs": table,
        "grouped_matmul_over_products": round(seconds["grouped/grouped_matmul"] / seconds["grouped/products"], 2),
        "layer_over_products": round(seconds["layer/experts"] / seconds["layer/products"], 2),
        "errors": grouped.errors(inputs, compiled["grouped/grouped_matmul"](inputs)),
    }


def main() -> int:
    """Run, print, write; the exit code says whether all promises were kept."""
    parser = argparse.ArgumentParser(
        prog="python -m jaxrl_kernels.bench", description="Time the ops against plain autodiff."
    )
    parser.add_argument("--quick", action="store_true", help="one shape and at most five rounds")
    parser.add_argument("--rounds", type=int, help="interleaved rounds (default 20, or 5 with --quick)")
    parser.add_argument("--shapes", nargs="*", help="run only shapes whose name holds one of these words")
    parser.add_argument("--torch", metavar="PYTHON", help="an interpreter with PyTorch, to measure the same work there")
    parser.add_argument("--tune", action="store_true", help="time block sizes instead, and write tuned/<device>.json")
    parser.add_argument("--output", type=Path, help="JSON file to write (default: results/<device>.json)")
    options = parser.parse_args()
    rounds = options.rounds or (5 if options.quick else 20)
    device, slug = device_name(), tuned.slug(device_name())
    if options.tune:
        output = options.output or tuned.FOLDER / f"{slug}.json"
        output.write_text(json.dumps(tune.tune(device, rounds), indent=1) + "\n")
        print(f"wrote {output}")
        return 0
    results = {
        "device": device,
        "jax": jax.__version__,
        "python": platform.python_version(),
        "rounds": rounds,
        "shapes": {},
        "bfloat16_log_prob_errors": accuracy.bfloat16_log_prob_errors(),
    }
    print(f"{device}, jax {jax.__version__}, median of {rounds} interleaved rounds")
    print(HEADER)
    for shape in (*QUICK, *GROUPED_QUICK) if options.quick else (*SHAPES, *GROUPED):
        if options.shapes and not any(word in shape.name for word in options.shapes):
            continue
        limit = QUICK_SECONDS if options.quick else math.inf
        if isinstance(shape, grouped.GroupedShape):
            result = run_grouped(shape, rounds)
        else:
            result = run_shape(shape, rounds, options.torch, limit) if shape.width else run_dense(shape, rounds)
        results["shapes"][shape.name] = result
        print("\n".join(table_rows(shape.name, result)), flush=True)
    output = options.output or Path(__file__).parent / "results" / f"{slug}.json"
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(results, indent=1) + "\n")
    print(f"wrote {output}")
    for name, result in results["shapes"].items():
        print(name, {key: value for key, value in result.items() if key != "programs"})
    if jax.default_backend() != "cpu":
        return 0
    missed = misses(results)
    print("\n".join(f"not measured {sentence}" for sentence in unmeasured(results)))
    print("\n".join(f"MISSED {sentence}" for sentence in missed) or "all promises that were measured are kept")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
