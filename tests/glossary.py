"""docs/metrics.md as data: what every name in metrics.jsonl and timings.jsonl means."""

import json
import re
from pathlib import Path

from jaxrl_llm.bounds import BOUND_NAMES
from jaxrl_llm.bounds.surrogate_error import PRINTED

PAGE = Path(__file__).parents[1] / "docs/metrics.md"
ROW = re.compile(r"^\| `(?P<name>[^`]+)` \| (?P<unit>[^|]+) \| (?P<over>[^|]+) \| (?P<meaning>[^|]+) \|$")


def glossary() -> dict[str, tuple[str, str, str]]:
    """Name -> unit, over what, meaning; a name with <bound> stands for one of each bound."""
    rows = [match for line in PAGE.read_text().splitlines() if (match := ROW.match(line))]
    found = [(name, row) for row in rows for name in _expanded(row["name"])]
    assert len(found) == len(dict(found)), "a name stands there twice"
    return {name: (row["unit"], row["over"], row["meaning"]) for name, row in found}


def _expanded(name: str) -> list[str]:
    bounds = PRINTED if name.startswith("bounds/printed/") else BOUND_NAMES
    return [name.replace("<bound>", bound) for bound in bounds] if "<bound>" in name else [name]


def unexplained(folder: Path) -> set[str]:
    """Names in the files of a run that the page does not have."""
    lines = [line for name in ("metrics", "timings") for line in (folder / f"{name}.jsonl").read_text().splitlines()]
    return {name for line in lines for name in json.loads(line)} - {"step"} - set(glossary())
