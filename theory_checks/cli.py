"""The command line: run checks, print a table or JSON, write a report, exit 1 on any violation."""

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from theory_checks import chain_search
from theory_checks.chain_search import Worst
from theory_checks.check import Check
from theory_checks.check import Result
from theory_checks.check import run_checks
from theory_checks.index_size import FAILURE
from theory_checks.index_size import Needed
from theory_checks.index_size import lemma_size
from theory_checks.index_size import needed_sizes
from theory_checks.registry import FAMILIES
from theory_checks.registry import all_checks
from theory_checks.registry import select
from theory_checks.search import Found
from theory_checks.search import search

LIMIT = 1 + 1e-6
"""A ratio of the search above it is a counterexample; bounds below 1e-4 are not resolved better."""

REPORT = Path("runs/theory_checks/report.html")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m theory_checks",
        description="Check every theorem by exact enumeration in float64. Exit code 1 if any is violated.",
    )
    parser.add_argument(
        "name", nargs="?", help=f"one check, a family ({', '.join(FAMILIES)}), or `list`; default: all checks"
    )
    parser.add_argument("--json", action="store_true", help="print a list of objects instead of a table")
    parser.add_argument("--seed", type=int, default=0, help="seed of the random instances (default 0)")
    parser.add_argument(
        "--instances", type=int, default=1000, help="random instances per world, about (default 1000, at least 20)"
    )
    parser.add_argument(
        "--full",
        action="store_true",
        help="then search for the tightest worlds by gradient ascent, up to T = 4096, and for the index dimensions "
        "that suffice (some minutes)",
    )
    parser.add_argument(
        "--report",
        nargs="?",
        type=Path,
        const=REPORT,
        metavar="PATH",
        help=f"write a page with plots that stands alone (default {REPORT})",
    )
    return parser


def as_search_table(found: Sequence[Found]) -> Table:
    """The tightest world of each bound and shape."""
    table = Table(title="Largest |Error| / sharp bound found by gradient ascent on policies and rewards")
    for heading in ("bound", "V", "T", "largest", "median of restarts", "eps there"):
        table.add_column(heading, justify="left" if heading == "bound" else "right")
    for one in found:
        numbers = (f"{one.ratio:.4f}", f"{one.median:.3f}", f"{one.eps:.3f}")
        table.add_row(one.bound, str(one.vocabulary), str(one.horizon), *numbers)
    return table


def as_growth_table(grown: Sequence[Worst]) -> Table:
    """The worst error found at each divergence and horizon, as a share of T delta, and how it grows."""
    horizons = sorted({one.horizon for one in grown})
    table = Table(title="Largest |Error| / (T delta) found on token chains, and the exponent of T in |Error|")
    for heading in ("delta", *(f"T = {horizon}" for horizon in horizons), "exponent"):
        table.add_column(heading, justify="right")
    for delta, rows in chain_search.by_delta(grown).items():
        table.add_row(f"{delta:g}", *(f"{one.ratio:.3f}" for one in rows), f"{chain_search.exponent(rows):.3f}")
    return table


def as_size_table(sizes: Sequence[Needed]) -> Table:
    """The smallest index dimension that tracks the covariance, beside that of the lemma."""
    table = Table(title=f"Smallest M with A A^T within half of Sigma at all t <= T in {1 - FAILURE:.0%} of runs")
    for heading in ("d", "T", "M", "failures", "M of the lemma"):
        table.add_column(heading, justify="right")
    for one in sizes:
        table.add_row(
            str(one.dimension), f"{one.rounds:,}", str(one.size), f"{one.failures:.1%}", f"{lemma_size(one):,.0f}"
        )
    return table


def as_json(
    results: Sequence[Result], found: Sequence[Found] = (), grown: Sequence[Worst] = (), sizes: Sequence[Needed] = ()
) -> str:
    """The results as a JSON list of objects; last come the searches: `search.*`, `growth.*` and `index_size.*`."""
    rows: list[dict[str, Any]] = [
        {
            "name": result.check.name,
            "passed": result.passed,
            "margin": result.margin,
            "tightness": result.tightness,
            "instances": result.instances,
            "wrong_caught": result.wrong_caught,
            "kind": "identity" if result.check.equality else "bound",
            "paper": result.check.paper,
            "statement": result.check.statement,
            "functions": list(result.check.functions),
        }
        for result in results
    ]
    for one in found:
        name = f"search.{one.bound}_v{one.vocabulary}_t{one.horizon}"
        rows.append({"name": name, "passed": one.ratio <= LIMIT, "margin": LIMIT - one.ratio, "tightness": one.ratio})
    for delta, worst in chain_search.by_delta(grown).items():
        ratio = max(one.ratio for one in worst)
        errors = {str(one.horizon): one.error for one in worst}
        row = {"name": f"growth.delta_{delta:g}", "passed": ratio <= LIMIT, "margin": LIMIT - ratio, "tightness": ratio}
        rows.append({**row, "exponent": chain_search.exponent(worst), "errors": errors})
    for one in sizes:
        ratio = one.size / lemma_size(one)
        row = {"name": f"index_size.d{one.dimension}_t{one.rounds}", "passed": ratio <= 1, "margin": 1 - ratio}
        rows.append({**row, "tightness": ratio, "size": one.size, "failures": one.failures})
    return json.dumps(rows, indent=1)


def as_table(results: Sequence[Result], *, seconds: float) -> Table:
    """The results as a table, the worst margin and the tightest ratio of each check."""
    failed = sum(not result.passed for result in results)
    table = Table(
        title=f"{len(results)} checks, {failed} failed, {seconds:.0f} s",
        caption="margin: smallest right - left plus the rounding allowed. tightness: largest left / right. "
        "wrong twin: instances that catch a wrong constant or sign.",
    )
    table.add_column("check", no_wrap=True)
    table.add_column("statement", ratio=1)
    for heading in ("result", "margin", "tightness", "wrong twin", "instances"):
        table.add_column(heading, justify="right", no_wrap=True)
    for result in results:
        table.add_row(
            result.check.name,
            escape(result.check.statement),
            "[green]holds[/]" if result.passed else "[bold red]VIOLATED[/]",
            f"{result.margin:.1e}",
            "=" if result.check.equality else f"{result.tightness:.4f}",
            f"{result.wrong_caught:.0%}",
            f"{result.instances:,}",
        )
    return table


def as_listing(checks: Sequence[Check]) -> Table:
    """Names, sources, statements and functions of the checks."""
    table = Table(title=f"{len(checks)} checks")
    table.add_column("check", no_wrap=True)
    for heading in ("paper", "statement", "functions"):
        table.add_column(heading)
    for check in checks:
        table.add_row(check.name, check.paper, escape(check.statement), " ".join(check.functions))
    return table


def _console() -> Console:
    # Piped into a file there is no width to ask for, and 80 columns would cut every statement to shreds.
    return Console(width=None if sys.stdout.isatty() else 160)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; the exit code is 1 on any violation, 2 on a wrong argument."""
    parser = _parser()
    arguments = parser.parse_args(argv)
    if arguments.instances < 20:
        parser.error(f"--instances is {arguments.instances}; it must be at least 20, so that every world has some.")
    if arguments.name == "list":
        _console().print(as_listing(all_checks()))
        return 0
    try:
        checks = all_checks() if arguments.name is None else select(arguments.name)
    except ValueError as error:
        parser.error(str(error))
    start = time.perf_counter()
    results = run_checks(checks, seed=arguments.seed, instances=arguments.instances)
    grown = []
    if arguments.full or arguments.name in (None, "token_chains"):
        horizons = chain_search.LONG if arguments.full else chain_search.SHORT
        grown = chain_search.growth(seed=arguments.seed, horizons=horizons, steps=150 if arguments.full else 40)
    found = search(seed=arguments.seed) if arguments.full else []
    sizes = needed_sizes(arguments.seed) if arguments.full else []
    seconds = time.perf_counter() - start
    if arguments.json:
        print(as_json(results, found, grown, sizes))
    else:
        _console().print(as_table(results, seconds=seconds))
        tables = [(grown, as_growth_table(grown)), (found, as_search_table(found)), (sizes, as_size_table(sizes))]
        for rows, table in tables:
            if rows:
                _console().print(table)
    if arguments.report is not None:
        # Only a report needs the libraries for plots and pages.
        from theory_checks.report import write_report

        write_report(arguments.report, results, grown=grown, found=found, seconds=seconds, seed=arguments.seed)
        print(f"Report: {arguments.report}", file=sys.stderr)
    holds = all(result.passed for result in results) and all(one.ratio <= LIMIT for one in [*found, *grown])
    return 0 if holds else 1
