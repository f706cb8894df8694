"""The part of the report on trust-region bounds: which of them say something, next to the error that was measured."""

from typing import Any

import numpy as np

from experiments import metric_names as names
from experiments import words
from experiments.records import Record


def bounds_section(record: Record, pictures: list[dict[str, Any]]) -> dict[str, Any] | None:
    """The bounds in words, figures and a table; None for a run without them."""
    if not len(record.column(names.UNIFIED_PRINTED)[0]):
        return None
    return {
        "pictures": pictures,
        "verdict": " ".join([_vacuous(record), *_against_measured(record)]),
        "table": [_bound_row(record, bound, label) for bound, label in names.BOUNDS.items()],
    }


def _vacuous(record: Record) -> str:
    """In how many batches the smallest bound says nothing."""
    steps, unified, sharpest, threshold = record.together(names.UNIFIED_PRINTED, names.UNIFIED_SHARP, names.THRESHOLD)
    count, printed, sharp = len(steps), int((unified >= threshold).sum()), int((sharpest >= threshold).sum())
    if printed == sharp == count:
        return (
            f"Vacuous here: in all {count} batches even the smallest bound, printed or sharp, is at or above the "
            "trivial one. The theory says nothing about this run."
        )
    return (
        f"The smallest bound is vacuous in {printed} of {count} batches as printed, and in {sharp} of {count} with the "
        "sharp constants."
    )


def _against_measured(record: Record) -> list[str]:
    """How loose the sharp bound is, and whether the estimate of it was ever broken."""
    _, error, spread, sharpest = record.together(names.ERROR, names.ERROR_SE, names.UNIFIED_SHARP)
    largest, least = np.abs(error) + 1.96 * spread, np.abs(error) - 1.96 * spread
    said = []
    moved = largest > 0
    if moved.any():
        ratio = float(np.median(sharpest[moved] / largest[moved]))
        said.append(
            f"In the median batch the sharp bound is {ratio:.3g} times the largest error that the samples are "
            "compatible with (95 %)."
        )
    above = int((least > sharpest).sum())
    if above:
        said.append(
            f"In {above} batches the measured error is above the sharp bound (95 %): visited contexts may miss the "
            "maximum that the theorem asks for."
        )
    return said


def _bound_row(record: Record, bound: str, label: str) -> dict[str, str]:
    row = {"name": label}
    for kind, name in (("printed", names.printed(bound)), ("sharp", names.sharp(bound))):
        steps, values, threshold = record.together(name, names.THRESHOLD)
        row[kind] = words.number(float(np.median(values)) if len(steps) else None)
        row[f"vacuous_{kind}"] = f"{100 * np.mean(values >= threshold):.0f} %" if len(steps) else words.NONE
    return row
