"""Which tensors hold a model's parameters in checkpoints, as its parts say it."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from flax import nnx


@dataclass(frozen=True)
class Stored:
    """A parameter and the tensors that hold it.

    Attributes:
        parameter: in the model.
        names: of the tensors, by Hugging Face's convention; several hold the entries along the first axis.
        transposed: whether they hold matrices as [out, in], where the parameter is [in, out].
    """

    parameter: nnx.Variable
    names: tuple[str, ...]
    transposed: bool = False

    @property
    def shape(self) -> tuple[int, ...]:
        """Of each of the tensors."""
        shape = self.parameter.get_value().shape[len(self.names) > 1 :]
        return shape[::-1] if self.transposed else shape

    def under(self, prefix: str) -> "Stored":
        """The same with the name of the block in front."""
        return Stored(self.parameter, tuple(f"{prefix}{name}" for name in self.names), self.transposed)

    def tensors(self) -> Iterator[tuple[str, np.ndarray]]:
        """What checkpoints hold."""
        value = np.asarray(self.parameter.get_value())
        parts = value if len(self.names) > 1 else value[None]
        for name, part in zip(self.names, parts, strict=True):
            yield name, part.T if self.transposed else part


def stored_parts(module: nnx.Module) -> list[Stored]:
    """Every parameter below a module but for its adapters, which checkpoints do not hold."""
    return [part for _, inner in nnx.iter_modules(module) if hasattr(inner, "stored") for part in inner.stored()]
