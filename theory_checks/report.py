"""The report: one HTML file with everything in it."""

import base64
import datetime
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jinja2

from theory_checks import pictures
from theory_checks.chain_search import Worst
from theory_checks.chain_search import by_delta
from theory_checks.chain_search import exponent
from theory_checks.check import Result
from theory_checks.search import Found

TEMPLATES = Path(__file__).parent / "templates"


def write_report(
    path: Path, results: Sequence[Result], *, grown: Sequence[Worst], found: Sequence[Found], seconds: float, seed: int
) -> None:
    """Draw the pictures and write the page; its folder is made."""
    drawn = [
        pictures.bound_against_error(results),
        pictures.tightness(results),
        pictures.growth(grown),
        pictures.searched(found),
    ]
    context = {
        "failed": sum(not result.passed for result in results),
        "count": len(results),
        "seconds": f"{seconds:.0f}",
        "instances": f"{sum(result.instances for result in results):,}",
        "seed": seed,
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "jax": jax.__version__,
        "pictures": [_shown(picture) for picture in drawn if picture is not None],
        "families": _families(results),
        "growth": _growth_rows(grown),
        "found": found,
    }
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    page = environment.get_template("report.html.j2").render(**context)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(page, encoding="utf-8")


def _shown(picture: pictures.Picture) -> dict[str, str]:
    data = base64.b64encode(picture.png).decode("ascii")
    return {"name": picture.name, "title": picture.title, "caption": picture.caption, "data": data}


def _families(results: Sequence[Result]) -> list[dict[str, Any]]:
    families: dict[str, list[dict[str, Any]]] = {}
    for result in results:
        families.setdefault(result.check.family, []).append(
            {
                "name": result.check.name.partition(".")[2],
                "statement": result.check.statement,
                "paper": result.check.paper,
                "passed": result.passed,
                "margin": f"{result.margin:.1e}",
                "tightness": "=" if result.check.equality else f"{result.tightness:.4f}",
                "wrong_caught": f"{result.wrong_caught:.0%}" if result.wrong_caught >= 0.01 else "< 1%",
                "instances": f"{result.instances:,}",
            }
        )
    return [{"name": name.replace("_", " "), "rows": rows} for name, rows in families.items()]


def _growth_rows(grown: Sequence[Worst]) -> list[dict[str, Any]]:
    return [
        {
            "delta": f"{delta:g}",
            "exponent": f"{exponent(rows):.3f}",
            "cells": [
                {"horizon": one.horizon, "error": f"{one.error:.3g}", "ratio": f"{one.ratio:.3f}"} for one in rows
            ],
        }
        for delta, rows in by_delta(grown).items()
    ]
