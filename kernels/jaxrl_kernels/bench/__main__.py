"""Time the ops against plain autodiff on this machine.

    python -m jaxrl_kernels.bench --quick      one shape, 5 rounds, about two minutes on two CPU cores
    python -m jaxrl_kernels.bench              all shapes, 20 rounds

Prints a table, writes results/<device>.json beside this file (or --output), and on a CPU exits 1 if a promise of
targets.py is not kept.
"""

import argparse
import json
import os
import platform
import re
import sys
from pathlib import Path

import jax

from jaxrl_kernels.bench.cases import PROGRAMS
from jaxrl_kernels.bench.cases import Shape
from jaxrl_kernels.bench.cases import make_inputs
from jaxrl_kernels.bench.measure import compile_all
from jaxrl_kernels.bench.measure import errors
from jaxrl_kernels.bench.measure import temporaries
from jaxrl_kernels.bench.measure import time_all
from jaxrl_kernels.bench.targets import misses

QUICK = (Shape(2048, 576, 49152, "float32"),)
SHAPES = (
    *QUICK,
    Shape(2048, 576, 49152, "bfloat16"),
    Shape(1024, 1024, 151552, "float32"),
)


def device_name() -> str:
    """Name of the first device, for people and for the file."""
    device = jax.devices()[0]
    if device.platform != "cpu":
        return device.device_kind
    model = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        found = re.search(r"model name\s*:\s*(.+)", info.read_text())
        model = found.group(1) if found else model
    return f"CPU {model}, {os.cpu_count()} cores"


def run_shape(shape: Shape, rounds: int) -> dict:
    """Everything measured for one shape."""
    inputs = make_inputs(shape)
    compiled = compile_all(PROGRAMS, inputs)
    table = time_all(compiled, inputs, rounds)
    for name, program in compiled.items():
        table[name]["temporaries_mib"] = temporaries(program)
    gigaflop = 2 * shape.rows * shape.width * shape.vocabulary / 1e9
    product, forward = (float(str(table[name]["cpu_seconds"])) for name in ("product", "forward/token_statistics"))
    (_, values), (d_hidden, _) = compiled["gradient/token_statistics"](inputs)
    return {
        "programs": table,
        "product_gflop_per_cpu_second": round(gigaflop / product, 1),
        "forward_share_of_product_rate": round(2 * product / forward, 3),
        "errors": errors(inputs, values, d_hidden),
    }


def table_rows(name: str, result: dict) -> list[str]:
    """Markdown rows of one shape: time and temporaries, alone and as ratios to the naive program of the same group."""
    rows = []
    for program, measured in result["programs"].items():
        base = result["programs"].get(program.split("/")[0] + "/naive")
        ratios = "| |"
        if base:
            time_ratio = measured["cpu_seconds"] / base["cpu_seconds"]
            memory_ratio = measured["temporaries_mib"] / base["temporaries_mib"]
            ratios = f"| {time_ratio:.2f} | {memory_ratio:.4f} |"
        rows.append(
            f"| {name} | {program} | {measured['cpu_seconds']:.2f} | {measured['wall_seconds']:.2f} "
            f"| {measured['temporaries_mib']:.1f} {ratios}"
        )
    return rows


def main() -> int:
    """Run, print, write; the exit code says whether all promises were kept."""
    parser = argparse.ArgumentParser(
        prog="python -m jaxrl_kernels.bench", description="Time the ops against plain autodiff."
    )
    parser.add_argument("--quick", action="store_true", help="one shape and five rounds")
    parser.add_argument("--rounds", type=int, help="interleaved rounds (default 20, or 5 with --quick)")
    parser.add_argument("--output", type=Path, help="JSON file to write (default: results/<device>.json)")
    options = parser.parse_args()
    rounds = options.rounds or (5 if options.quick else 20)
    results = {
        "device": device_name(),
        "jax": jax.__version__,
        "python": platform.python_version(),
        "rounds": rounds,
        "shapes": {},
    }
    print(f"{results['device']}, jax {jax.__version__}, median of {rounds} interleaved rounds")
    print("| shape | program | CPU s | wall s | temporaries MiB | time / naive | temporaries / naive |")
    print("|---|---|---|---|---|---|---|")
    for shape in QUICK if options.quick else SHAPES:
        result = run_shape(shape, rounds)
        results["shapes"][shape.name] = result
        print("\n".join(table_rows(shape.name, result)), flush=True)
        print(
            f"{shape.name}: product {result['product_gflop_per_cpu_second']} GFLOP per CPU second, forward at "
            f"{result['forward_share_of_product_rate']} of that rate, errors {result['errors']}"
        )
    slug = re.sub(r"[^a-z0-9]+", "-", results["device"].lower()).strip("-")
    output = options.output or Path(__file__).parent / "results" / f"{slug}.json"
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(results, indent=1) + "\n")
    print(f"wrote {output}")
    if jax.default_backend() != "cpu":
        return 0
    missed = misses(results)
    print("\n".join(f"MISSED {sentence}" for sentence in missed) or "all promises kept")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
