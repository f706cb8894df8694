"""The header of a safetensors file, checked against the file's size before anything is allocated for what it promises.

A file is: the length of the header (8 bytes, little-endian), the header (a JSON object: for each tensor its dtype, its
shape, and where it begins and ends in what follows), and the tensors, side by side.
"""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from typing import NamedTuple

import ml_dtypes  # noqa: F401 - it tells numpy what bfloat16 is
import numpy as np

from jaxrl_llm.models.files import ModelFileError
from jaxrl_llm.models.files import read_from
from jaxrl_llm.models.files import regular_file

HEADER_LIMIT = 16 * 2**20
"""Largest header [bytes]; 100 bytes per tensor are usual."""

DTYPES = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "I64": "int64",
    "I32": "int32",
    "I16": "int16",
    "I8": "int8",
    "U64": "uint64",
    "U32": "uint32",
    "U16": "uint16",
    "U8": "uint8",
    "BOOL": "bool",
}
"""The dtypes that are read, by their names in the header."""


class SafetensorsHeader(NamedTuple):
    """Shapes and dtypes of the tensors by name, and the text entries."""

    shapes: dict[str, tuple[int, ...]]
    dtypes: dict[str, str]
    metadata: dict[str, str]


def read_safetensors_header(path: Path) -> SafetensorsHeader:
    """The header of a safetensors file.

    Raises:
        MissingModelFileError: no such file.
        ModelFileError: the file is truncated, no safetensors file, inconsistent, or holds a dtype that is not read.
    """
    size = regular_file(path, expected="a safetensors file")
    with read_from(path), path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > size - 8:
            raise _damaged(path, f"a header of {length} bytes is promised in a file of {size}")
        if length > HEADER_LIMIT:
            raise _damaged(path, f"its header has {length} bytes; the most that is read is {HEADER_LIMIT}")
        content = _parsed(path, file.read(length))
        metadata = content.pop("__metadata__", None)
        metadata = {} if metadata is None else metadata
        if not isinstance(metadata, dict) or not all(isinstance(text, str) for text in metadata.values()):
            raise _damaged(path, "its __metadata__ are not texts by name")
        spans = {name: _span(path, name, entry) for name, entry in content.items()}
        end = 0
        for name, (begin, stop) in sorted(spans.items(), key=lambda item: item[1]):
            if begin != end:
                raise _damaged(path, f"{name!r:.100} begins at {begin}, where {end} is behind the tensor before it")
            end = stop
        if end != size - 8 - length:
            raise _damaged(path, f"its tensors have {end} bytes, and {size - 8 - length} follow the header")
        shapes = {name: tuple(entry["shape"]) for name, entry in content.items()}
        return SafetensorsHeader(shapes, {name: DTYPES[entry["dtype"]] for name, entry in content.items()}, metadata)


def _damaged(path: Path, reason: str) -> ModelFileError:
    return ModelFileError(f"{path} is truncated or not a safetensors file ({reason}); copy or download it again.")


def _parsed(path: Path, text: bytes) -> dict[str, Any]:
    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            twice = next(name for index, (name, _) in enumerate(pairs) if name in dict(pairs[:index]))
            raise _damaged(path, f"{twice!r:.100} is given twice")
        return found

    try:
        content = json.loads(text.decode("utf-8"), object_pairs_hook=once)
    except ModelFileError:
        raise
    except (ValueError, RecursionError) as error:
        raise _damaged(path, f"its header is no JSON: {type(error).__name__}") from error
    if not isinstance(content, dict):
        raise _damaged(path, f"its header is a {type(content).__name__}; expected an object")
    return content


def _span(path: Path, name: str, entry: Any) -> tuple[int, int]:
    """Where a tensor begins and ends, when that is what its dtype and shape need."""
    if not isinstance(entry, Mapping) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise _damaged(path, f"{name!r:.100} is not described by dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise ModelFileError(
            f"{path} holds {name!r:.100} in the dtype {dtype!r:.40}, which is not read here; expected one of "
            f"{', '.join(DTYPES)}."
        )
    if not _are_sizes(shape) or not _are_sizes(offsets) or len(offsets) != 2 or len(shape) > 32:
        raise _damaged(path, f"{name!r:.100} has the shape {shape!r:.80} and the offsets {offsets!r:.80}")
    if offsets[1] - offsets[0] != math.prod(shape) * np.dtype(DTYPES[dtype]).itemsize:
        raise _damaged(path, f"{name!r:.100} is {dtype} {shape!r:.80} in {offsets[1] - offsets[0]} bytes")
    return offsets[0], offsets[1]


def _are_sizes(value: Any) -> bool:
    return isinstance(value, list) and all(type(item) is int and 0 <= item < 2**63 for item in value)
