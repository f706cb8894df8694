"""Measured block sizes, one JSON file per device, and the look-up of the nearest shape.

A file holds {"device": name, "entries": [{"op", "rows", "width", "vocabulary", "dtype", "block", ...}]}. `python -m
jaxrl_kernels.bench --tune` writes it. A device without a file gets the sizes that blocks.py computes.
"""

import functools
import json
import math
import os
import platform
import re
from pathlib import Path

import jax
import jax.numpy as jnp

FOLDER = Path(__file__).parent

NEAR = 4.0
"""An entry serves shapes whose rows, width and vocabulary differ by no more than this factor together."""


def device_name() -> str:
    """Name of the first device, for people and for file names."""
    device = jax.devices()[0]
    if device.platform != "cpu":
        return device.device_kind
    model = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        found = re.search(r"model name\s*:\s*(.+)", info.read_text())
        model = found.group(1) if found else model
    return f"CPU {model}, {os.cpu_count()} cores"


def slug(device: str) -> str:
    """The device's name as a file name."""
    return re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")


@functools.cache
def entries(device: str) -> tuple[dict, ...]:
    """What was measured on this device; nothing if there is no file."""
    path = FOLDER / f"{slug(device)}.json"
    return tuple(json.loads(path.read_text())["entries"]) if path.exists() else ()


def nearest(found: tuple[dict, ...], op: str, rows: int, width: int, vocabulary: int, dtype: str) -> int | None:
    """Block of the entry of this op and dtype whose rows, width and vocabulary are nearest in ratio; None if none is
    near."""
    shape = {"rows": rows, "width": width, "vocabulary": vocabulary}

    def distance(entry: dict) -> float:
        return sum(abs(math.log(max(size, 1) / entry[name])) for name, size in shape.items())

    same = [entry for entry in found if (entry["op"], entry["dtype"]) == (op, dtype)]
    near = [entry for entry in same if distance(entry) <= math.log(NEAR)]
    return min(near, key=distance)["block"] if near else None


def block(op: str, rows: int, width: int, vocabulary: int, dtype: jnp.dtype) -> int | None:
    """The tuned block for this op on the device that runs, if there is one for a shape near this."""
    size = nearest(entries(_this_device()), op, rows, width, vocabulary, jnp.dtype(dtype).name)
    return None if size is None else min(size, vocabulary)


@functools.cache
def _this_device() -> str:
    return device_name()
