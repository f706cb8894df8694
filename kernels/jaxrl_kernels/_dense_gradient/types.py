"""What comes out of the dense gradient."""

from typing import NamedTuple

from jaxtyping import Array
from jaxtyping import Float


class DenseGradient(NamedTuple):
    """KL of each row and its gradient with respect to the logits.

    kl: KL(p || q) [nats], in the wider of float32 and the inputs' dtype.
    gradient: weight * dKL/dlogits, in the logits' dtype.
    """

    kl: Float[Array, " N"]
    gradient: Float[Array, "N V"]
