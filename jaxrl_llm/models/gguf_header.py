"""The header of a GGUF file, checked against the file's size before anything is allocated for what it promises.

A header is: magic, version, number of tensors, number of entries; the entries (key, type, value); for each tensor its
name, dimensions, format and offset; then the tensors themselves, each at a multiple of the alignment. What llama.cpp
refuses is refused here: tensors that overlap, leave gaps or reach beyond the file, keys or names given twice, arrays of
arrays, other byte orders.
"""

import math
import struct
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any
from typing import NamedTuple

import gguf
import numpy as np

from jaxrl_llm.models.files import ModelFileError
from jaxrl_llm.models.files import read_from
from jaxrl_llm.models.files import regular_file

MAGIC = b"GGUF"
VERSIONS = (2, 3)
HEADER_LIMIT = 128 * 2**20
"""Largest header [bytes]; one with a vocabulary of 256,000 tokens has 16 MB."""
ARRAY_LIMIT = 2**20
"""Most elements of an array; the longest in use are lists of merges, with half a million."""
TOGETHER_LIMIT = 2**21
"""Most elements of all arrays together; a vocabulary of 256,000 tokens and its merges have 1.3 million."""
ENTRY_LIMIT = 2**16
"""Most entries, and most tensors."""
SPARE_LIMIT = 2**20
"""Most bytes behind the last tensor."""
MOST_DIMENSIONS, LONGEST_NAME = 4, 63

STRING, ARRAY, BOOL = 8, 9, 7
SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "B", 10: "Q", 11: "q", 12: "d"}
"""Types of entries and their codes in the module struct; 7 is a truth value."""


class GGUFTensor(NamedTuple):
    """A tensor as the header describes it; `shape` from the outermost axis on, as numpy counts."""

    name: str
    shape: tuple[int, ...]
    kind: gguf.GGMLQuantizationType
    start: int
    size: int


@dataclass(frozen=True)
class GGUFHeader:
    """What stands in the header of a GGUF file, and the file itself as a memory map.

    Attributes:
        data: the whole file, bytes.
        entries: the key-value entries.
        tensors: the tensors by name.
    """

    data: np.memmap
    entries: dict[str, Any]
    tensors: dict[str, GGUFTensor]

    def values(self, name: str) -> np.ndarray:
        """A tensor dequantised to float32, in its shape."""
        tensor = self.tensors[name]
        stored = self.data[tensor.start : tensor.start + tensor.size]
        dtype = {"F32": np.float32, "F16": np.float16}.get(tensor.kind.name, np.uint8)
        rows = stored.view(dtype).reshape(*tensor.shape[:-1], -1)
        return gguf.dequantize(rows, tensor.kind).reshape(tensor.shape)


def read_header(path: Path) -> GGUFHeader:
    """The header of a GGUF file.

    Raises:
        MissingModelFileError: no such file.
        ModelFileError: the file is truncated, none in the GGUF format, or inconsistent.
    """
    size = regular_file(path, expected="a GGUF file")
    if size < 24:
        raise _damaged(path, size, "it is shorter than any header")
    with read_from(path):
        data = np.memmap(path, mode="r")
        cursor = _Cursor(data, path, size)
        _check_start(cursor)
        tensor_count, entry_count = cursor.number("Q"), cursor.number("Q")
        for what, count in (("tensors", tensor_count), ("entries", entry_count)):
            if count > ENTRY_LIMIT:
                raise cursor.fault(f"it promises {count} {what}; the most that is read is {ENTRY_LIMIT}")
        entries = _entries(cursor, entry_count)
        return GGUFHeader(data, entries, _tensors(cursor, tensor_count, entries))


def _damaged(path: Path, size: int, reason: str) -> ModelFileError:
    return ModelFileError(
        f"{path} ({size} bytes) is truncated or not a GGUF file ({reason}); copy or install it again."
    )


class _Cursor:
    """A place in the file that moves as things are read; nothing is read beyond the end."""

    def __init__(self, data: np.memmap, path: Path, size: int) -> None:
        self.data, self.path, self.size, self.place = memoryview(data), path, size, 0
        self.elements = 0

    def fault(self, reason: str) -> ModelFileError:
        return _damaged(self.path, self.size, reason)

    def take(self, count: int) -> memoryview:
        """The next `count` bytes."""
        end = self.place + count
        if end > self.size:
            raise self.fault(f"{count} bytes are promised at byte {self.place}, where {self.size - self.place} remain")
        if end > HEADER_LIMIT:
            raise self.fault(f"its header is longer than {HEADER_LIMIT} bytes")
        piece = self.data[self.place : end]
        self.place = end
        return piece

    def number(self, code: str) -> Any:
        """The next number, little-endian, of the type with this code in the module struct."""
        return struct.unpack(f"<{code}", self.take(struct.calcsize(f"<{code}")))[0]

    def text(self) -> str:
        """The next text: its length, then its bytes in UTF-8."""
        piece = self.take(self.number("Q"))
        try:
            return str(piece, "utf-8")
        except UnicodeDecodeError as error:
            raise self.fault(f"the text at byte {self.place - len(piece)} is not UTF-8") from error


def _check_start(cursor: _Cursor) -> None:
    if bytes(cursor.take(4)) != MAGIC:
        raise cursor.fault("it does not begin with GGUF")
    version = cursor.number("I")
    if version not in VERSIONS:
        turned = struct.unpack(">I", struct.pack("<I", version))[0]
        other = ", in the byte order of other machines" if turned in VERSIONS else ""
        raise cursor.fault(f"version {version}{other}; supported are {VERSIONS[0]} and {VERSIONS[1]}")


def _entries(cursor: _Cursor, count: int) -> dict[str, Any]:
    entries: dict[str, Any] = {}
    for _ in range(count):
        key = cursor.text()
        if key in entries:
            raise cursor.fault(f"the entry {key!r:.80} is given twice")
        entries[key] = _value(cursor, key, cursor.number("I"))
    return entries


def _value(cursor: _Cursor, key: str, kind: int) -> Any:
    if kind == STRING:
        return cursor.text()
    if kind in SCALARS:
        return _truth(cursor, key, cursor.number("B")) if kind == BOOL else cursor.number(SCALARS[kind])
    if kind != ARRAY:
        raise cursor.fault(f"the entry {key!r:.80} has the type {kind}, which GGUF does not have")
    element, count = cursor.number("I"), cursor.number("Q")
    if element != STRING and element not in SCALARS:
        raise cursor.fault(f"the entry {key!r:.80} is an array of the type {element}; expected numbers or texts")
    smallest = 8 if element == STRING else struct.calcsize(f"<{SCALARS[element]}")
    if count * smallest > cursor.size - cursor.place or count > ARRAY_LIMIT:
        raise cursor.fault(f"the entry {key!r:.80} promises {count} elements")
    cursor.elements += count
    if cursor.elements > TOGETHER_LIMIT:
        raise cursor.fault(f"its arrays promise {cursor.elements} elements; the most that is read is {TOGETHER_LIMIT}")
    if element == STRING:
        return [cursor.text() for _ in range(count)]
    numbers = list(struct.unpack(f"<{count}{SCALARS[element]}", cursor.take(count * smallest)))
    return [_truth(cursor, key, number) for number in numbers] if element == BOOL else numbers


def _truth(cursor: _Cursor, key: str, number: int) -> bool:
    if number > 1:
        raise cursor.fault(f"the entry {key!r:.80} is a truth value of {number}")
    return bool(number)


def _tensors(cursor: _Cursor, count: int, entries: dict[str, Any]) -> dict[str, GGUFTensor]:
    alignment = entries.get("general.alignment", gguf.GGUF_DEFAULT_ALIGNMENT)
    if not isinstance(alignment, int) or not 1 <= alignment <= 2**16 or alignment & (alignment - 1):
        raise cursor.fault(f"general.alignment is {alignment!r:.80}; expected a power of two")
    described = [_described(cursor) for _ in range(count)]
    base = _padded(cursor.place, alignment)
    tensors: dict[str, GGUFTensor] = {}
    expected = 0
    for name, shape, kind, offset in described:
        if name in tensors:
            raise cursor.fault(f"the tensor {name!r} is given twice")
        if offset != expected:
            raise cursor.fault(f"the tensor {name!r} begins at {offset}, where {expected} is behind the one before it")
        block, block_bytes = gguf.GGML_QUANT_SIZES[kind]
        size = math.prod(shape) // block * block_bytes
        if base + offset + size > cursor.size:
            raise cursor.fault(f"the tensor {name!r} ends at byte {base + offset + size}")
        tensors[name] = GGUFTensor(name, shape, kind, base + offset, size)
        expected = _padded(offset + size, alignment)
    if cursor.size > base + expected + SPARE_LIMIT:
        raise cursor.fault(f"its tensors end at byte {base + expected}")
    return tensors


def _described(cursor: _Cursor) -> tuple[str, tuple[int, ...], gguf.GGMLQuantizationType, int]:
    """Name, shape, format and offset of the next tensor."""
    name = cursor.text()
    if len(name.encode()) > LONGEST_NAME:
        raise cursor.fault(f"the name of a tensor has {len(name.encode())} bytes; the most is {LONGEST_NAME}")
    axes = cursor.number("I")
    if not 1 <= axes <= MOST_DIMENSIONS:
        raise cursor.fault(f"the tensor {name!r} has {axes} dimensions; expected 1 to {MOST_DIMENSIONS}")
    # GGUF counts dimensions from the innermost, numpy from the outermost.
    shape = tuple(reversed([cursor.number("Q") for _ in range(axes)]))
    number, offset = cursor.number("I"), cursor.number("Q")
    if min(shape) == 0 or math.prod(shape) >= 2**63:
        raise cursor.fault(f"the tensor {name!r} has the shape {list(shape)}")
    try:
        kind = gguf.GGMLQuantizationType(number)
    except ValueError as error:
        raise ModelFileError(f"{cursor.path} stores {name!r} in the format {number}, which is not known.") from error
    if not _can_be_dequantised(kind):
        raise ModelFileError(
            f"{cursor.path} stores {name!r} in the format {kind.name}, which cannot be dequantised here."
        )
    block = gguf.GGML_QUANT_SIZES[kind][0]
    if shape[-1] % block:
        raise cursor.fault(f"the tensor {name!r} has rows of {shape[-1]} elements, and {kind.name} blocks of {block}")
    return name, shape, kind, offset


@cache
def _can_be_dequantised(kind: gguf.GGMLQuantizationType) -> bool:
    """Whether the package gguf has a decoder of this format, found by trying it on one block of zeros."""
    dtype = {"F32": np.float32, "F16": np.float16}.get(kind.name, np.uint8)
    stored = np.zeros(gguf.GGML_QUANT_SIZES[kind][1] // np.dtype(dtype).itemsize, dtype)
    decode: Callable[..., np.ndarray] = gguf.dequantize
    try:
        return np.issubdtype(decode(stored, kind).dtype, np.floating)
    except (NotImplementedError, KeyError, ValueError, TypeError):
        return False


def _padded(place: int, alignment: int) -> int:
    return -(-place // alignment) * alignment
