"""One GRPO step of SmolLM2-135M: this project against TRL and tunix, on this machine, in one run.

    python -m experiments.benchmarks.grpo_step --trl-python /path/to/python --tunix-python /path/to/python

The work is the same for all: full fine-tuning in float32, 8 prompts of one length, 8 answers each, 16 new tokens per
answer (none may end earlier), one optimiser step. Every engine runs in a process of its own, in turn, several rounds;
its first step compiles and is not counted. Seconds are wall time; where other work shares the machine, read the
processor seconds. Memory is the largest resident set of the later steps less what the process held before it loaded
the model, less weights, gradients and Adam's moments (16 bytes per parameter).
"""

import argparse
import dataclasses
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from rich.console import Console
from rich.table import Table

PEERS = "experiments.benchmarks.peers"
ROOT = Path(__file__).parents[2]
PROMPTS = tuple(f"3 + 5 = 8\n14 + 8 = 22\n{a} + {b} =" for a, b in zip(range(21, 29), range(31, 39), strict=True))


@dataclasses.dataclass(frozen=True)
class Engine:
    """Something to time: its name, and the command before the work's file."""

    name: str
    command: tuple[str, ...]


def engines(arguments: argparse.Namespace) -> list[Engine]:
    """This project, and the peers whose Python was given."""
    found = [Engine("jaxrl_llm", (sys.executable, "-m", f"{PEERS}.jaxrl_grpo_step"))]
    if arguments.trl_python:
        worker = (arguments.trl_python, "-m", f"{PEERS}.trl_grpo_step")
        found.append(Engine("trl", worker))
        if arguments.compile:
            found.append(Engine("trl, torch.compile", (*worker, "--compile")))
    if arguments.tunix_python:
        found.append(Engine("tunix", (arguments.tunix_python, "-m", f"{PEERS}.tunix_grpo_step")))
    return found


def measure(engine: Engine, work: Path, timeout: float) -> dict | None:
    """Run one engine on the work; None, with what it printed last, if it fails."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "JAX_PLATFORMS": "cpu", "TOKENIZERS_PARALLELISM": "false"}
    done = subprocess.run(
        [*engine.command, str(work)],
        capture_output=True,
        text=True,
        env=environment,
        cwd=ROOT,
        timeout=timeout,
        check=False,
    )
    if done.returncode:
        print(f"{engine.name} failed:\n{done.stderr[-1500:]}", file=sys.stderr)
        return None
    return json.loads(done.stdout.strip().splitlines()[-1])


def summarise(rounds: dict[str, list[dict]]) -> dict[str, dict]:
    """Median over the counted steps of all rounds, and ratios to TRL where it ran."""
    table = {}
    for name, runs in rounds.items():
        row = {
            what: statistics.median(value for run in runs for value in run[what][1:])
            for what in ("seconds", "cpu_seconds")
        }
        row["peak_beyond_state_mib"] = statistics.median(run["peak_beyond_state_bytes"] for run in runs) / 2**20
        table[name] = row
    for row in table.values():
        row |= {f"{what}_over_trl": row[what] / table["trl"][what] for what in list(row) if "trl" in table}
    return table


def floors(runs: list[dict]) -> dict[str, float]:
    """Share of each phase's time that its matrix products need at the rate measured in the same process."""
    steps = [step for run in runs for step in run["steps"][1:]]
    rate = statistics.median(run["matmul_flops_per_second"] for run in runs)
    flops = runs[0]["flops"]
    return {phase: flops[phase] / rate / statistics.median(step[phase] for step in steps) for phase in flops}


def show(table: dict[str, dict], shares: dict[str, float]) -> None:
    """Print both tables."""
    console, grid = Console(), Table(title="One GRPO step, SmolLM2-135M, float32")
    for column in (
        "engine",
        "seconds",
        "processor seconds",
        "MiB beyond state",
        "time / TRL",
        "CPU / TRL",
        "MiB / TRL",
    ):
        grid.add_column(column, justify="left" if column == "engine" else "right")
    for name, row in table.items():
        ratios = [row.get(f"{what}_over_trl") for what in ("seconds", "cpu_seconds", "peak_beyond_state_mib")]
        cells = [f"{row[what]:.1f}" for what in ("seconds", "cpu_seconds", "peak_beyond_state_mib")]
        grid.add_row(name, *cells, *("" if ratio is None else f"{ratio:.2f}" for ratio in ratios))
    console.print(grid)
    console.print("share of the arithmetic floor: " + ", ".join(f"{k} {v:.0%}" for k, v in shares.items()))


def main() -> None:
    """Measure every engine in turn and write the result beside this file."""
    parser = argparse.ArgumentParser(description="One GRPO step: this project against TRL and tunix.")
    parser.add_argument("--trl-python", help="a Python with torch and trl")
    parser.add_argument("--tunix-python", help="a Python with google-tunix")
    parser.add_argument("--compile", action="store_true", help="also time TRL with torch.compile")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--steps", type=int, default=4, help="steps per round; the first is not counted")
    parser.add_argument("--timeout", type=float, default=1800.0, help="seconds for one engine")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "grpo_step.json")
    arguments = parser.parse_args()

    from jaxrl_llm.models.pretrained import smollm2_135m
    from jaxrl_llm.models.weights import save_hf

    rounds: dict[str, list[dict]] = {}
    with tempfile.TemporaryDirectory() as scratch:
        model, tokenizer = smollm2_135m()
        save_hf(model, Path(scratch) / "model", tokenizer=tokenizer)
        work = {"model": f"{scratch}/model", "scratch": f"{scratch}/peer", "prompts": PROMPTS, "group_size": 8}
        work |= {"new_tokens": 16, "steps": arguments.steps, "threads": os.cpu_count(), "unused_token": 16}
        file = Path(scratch) / "work.json"
        file.write_text(json.dumps(work))
        del model
        for _ in range(arguments.rounds):
            for engine in engines(arguments):
                result = measure(engine, file, arguments.timeout)
                if result:
                    rounds.setdefault(engine.name, []).append(result)
    table, shares = summarise(rounds), floors(rounds["jaxrl_llm"])
    show(table, shares)
    machine = {"processor": platform.processor() or platform.machine(), "cores": os.cpu_count()}
    arguments.output.parent.mkdir(exist_ok=True)
    record = {"machine": machine, "engines": table, "share_of_arithmetic_floor": shares, "rounds": rounds}
    arguments.output.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
