"""Array types shared by every floor; axis letters are those of docs/notation.md."""

from jaxtyping import Array
from jaxtyping import Bool
from jaxtyping import Float
from jaxtyping import Int
from jaxtyping import Key
from jaxtyping import PyTree
from jaxtyping import Scalar
from jaxtyping import UInt32

__all__ = ["Array", "Bool", "Float", "Int", "Key", "PRNGKey", "PyTree", "Scalar", "SumCount", "UInt32"]

PRNGKey = Key[Array, ""]
SumCount = tuple[Float[Array, "*batch"], Float[Array, "*batch"]]
"""A reduction before its division: (sum, count). Micro-batches and shards add componentwise and divide once."""
