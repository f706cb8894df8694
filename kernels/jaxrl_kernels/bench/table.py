"""The bench's results as a Markdown table: python -m jaxrl_kernels.bench.table results/<device>.json"""

import json
import sys
from pathlib import Path

HEADER = """\
| shape | program | CPU s (range) | temporaries MiB | rate per CPU s | time / naive | temporaries / naive |
|---|---|---|---|---|---|---|"""


def table_rows(name: str, result: dict) -> list[str]:
    """Rows of one shape: time, temporaries and rate, and their ratios to the naive program of the same group."""
    rows = []
    for program, measured in result["programs"].items():
        base = result["programs"].get(program.split("/")[0] + "/naive")
        memory, rate = measured.get("temporaries_mib"), "-"
        if "gflop_per_cpu_second" in measured:
            rate = f"{measured['gflop_per_cpu_second']:.0f} GFLOP"
        if "gb_per_cpu_second" in measured:
            rate = f"{measured['gb_per_cpu_second']:.1f} GB"
        time_ratio = memory_ratio = "-"
        if base:
            time_ratio = f"{measured['cpu_seconds'] / base['cpu_seconds']:.2f}"
            memory_ratio = "-" if memory is None else f"{memory / base['temporaries_mib']:.4f}"
        low, high = measured["cpu_seconds_range"]
        memory = "-" if memory is None else f"{memory:.1f}"
        rows.append(
            f"| {name} | {program} | {measured['cpu_seconds']:.2f} ({low:.2f} to {high:.2f}) | {memory} | {rate} | "
            f"{time_ratio} | {memory_ratio} |"
        )
    return rows


def markdown(results: dict) -> str:
    """The whole table, under a line that names the device."""
    title = f"{results['device']}, jax {results['jax']}, median of {results['rounds']} interleaved rounds:"
    rows = [row for name, result in results["shapes"].items() for row in table_rows(name, result)]
    return "\n".join([title, "", HEADER, *rows])


if __name__ == "__main__":
    print(markdown(json.loads(Path(sys.argv[1]).read_text())))
