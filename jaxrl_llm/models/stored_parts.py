"""Which tensors hold a model's parameters in checkpoints, as its parts say it."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol
from typing import runtime_checkable

import numpy as np
from flax import nnx


@dataclass(frozen=True)
class Stored:
    """A parameter and the tensors that hold it.

    Attributes:
        parameter: in the model.
        names: of the tensors, by Hugging Face's convention.
        transposed: whether they hold matrices as [out, in], where the parameter is [in, out].
        stacked: whether each holds an entry along the first axis.
    """

    parameter: nnx.Variable
    names: tuple[str, ...]
    transposed: bool = False
    stacked: bool = False

    @property
    def shape(self) -> tuple[int, ...]:
        """Of each of the tensors."""
        shape = self.parameter.get_value().shape[self.stacked :]
        return shape[::-1] if self.transposed else shape

    def under(self, prefix: str) -> "Stored":
        """The same with the name of the block in front."""
        return Stored(self.parameter, tuple(f"{prefix}{name}" for name in self.names), self.transposed, self.stacked)

    def tensors(self) -> Iterator[tuple[str, np.ndarray]]:
        """What checkpoints hold."""
        value = np.asarray(self.parameter.get_value())
        parts = value if self.stacked else value[None]
        for name, part in zip(self.names, parts, strict=True):
            yield name, part.T if self.transposed else part


@runtime_checkable
class Storing(Protocol):
    """A part of a model that has parameters of its own."""

    def stored(self) -> tuple[Stored, ...]:
        """All of them but its adapters, which checkpoints do not hold."""
        ...


def stored_parts(module: nnx.Module) -> list[Stored]:
    """Every parameter of a module and of what is in it, but for adapters."""
    inside = [part for _, part in nnx.iter_modules(module)]
    return [stored for part in inside if isinstance(part, Storing) for stored in part.stored()]
