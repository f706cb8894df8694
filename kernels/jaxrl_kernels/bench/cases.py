"""What is timed: the ops and what a user would write without them, on the same inputs."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from jaxrl_kernels import Reference
from jaxrl_kernels import TokenStatistics
from jaxrl_kernels import token_loss
from jaxrl_kernels import token_statistics
from jaxrl_kernels._token_statistics.blocks import block_size

NAMES = ("log_prob", "entropy", "collision", "kl")
"""Statistics that the timed losses use."""


@dataclass(frozen=True)
class Shape:
    """Size of a case: N rows, width D, vocabulary V, dtype of the inputs."""

    rows: int
    width: int
    vocabulary: int
    dtype: str

    @property
    def name(self) -> str:
        """Key of this shape in the results."""
        if not self.width:
            return f"N{self.rows}_V{self.vocabulary}_{self.dtype}"
        return f"N{self.rows}_D{self.width}_V{self.vocabulary}_{self.dtype}"


class Inputs(NamedTuple):
    """Policy and reference, and the constants of the loss, all arguments of the timed programs."""

    hidden: Array
    head: Array
    hidden_ref: Array
    head_ref: Array
    targets: Array
    coefficients: Array


def make_inputs(shape: Shape) -> Inputs:
    """Gaussian inputs with logits of standard deviation 2; the reference differs from the policy by a tenth of it."""
    keys = jax.random.split(jax.random.key(0), 6)
    dtype = jnp.dtype(shape.dtype)
    hidden = jax.random.normal(keys[0], (shape.rows, shape.width))
    head = jax.random.normal(keys[1], (shape.width, shape.vocabulary)) * (2 / shape.width**0.5)
    hidden_ref = hidden + 0.1 * jax.random.normal(keys[2], hidden.shape)
    head_ref = head + 0.1 * jax.random.normal(keys[3], head.shape) * (2 / shape.width**0.5)
    targets = jax.random.randint(keys[4], (shape.rows,), 0, shape.vocabulary)
    coefficients = jax.random.normal(keys[5], (shape.rows, len(NAMES)))
    hidden, head, hidden_ref, head_ref = (x.astype(dtype) for x in (hidden, head, hidden_ref, head_ref))
    return Inputs(hidden, head, hidden_ref, head_ref, targets, coefficients)


def loss(statistics: TokenStatistics, coefficients: Array) -> Array:
    """A loss with every timed statistic in it, the KL squared so that its cotangent depends on its value."""
    log_prob, entropy, collision, kl = (getattr(statistics, name) for name in NAMES)
    a, b, c, d = coefficients.T
    return a * log_prob + b * entropy + c * collision + d * kl**2


def from_logits(z: Array, z_ref: Array, targets: Array) -> TokenStatistics:
    """The four statistics from log_softmax, as they are usually written."""
    log_p, log_q = jax.nn.log_softmax(z), jax.nn.log_softmax(lax.stop_gradient(z_ref))
    p = jnp.exp(log_p)
    return TokenStatistics(
        log_prob=jnp.take_along_axis(log_p, targets[:, None], axis=1)[:, 0],
        entropy=-jnp.sum(p * log_p, axis=-1),
        collision=jnp.sum(p * p, axis=-1),
        kl=jnp.sum(p * (log_p - log_q), axis=-1),
    )


def naive_statistics(inputs: Inputs) -> TokenStatistics:
    """Logits of both heads first, then the statistics."""
    z = jnp.matmul(inputs.hidden, inputs.head, preferred_element_type=jnp.float32)
    z_ref = jnp.matmul(inputs.hidden_ref, inputs.head_ref, preferred_element_type=jnp.float32)
    return from_logits(z, z_ref, inputs.targets)


def op_statistics(inputs: Inputs) -> TokenStatistics:
    """The same four by token_statistics with its defaults."""
    return token_statistics(
        inputs.hidden,
        inputs.head,
        inputs.targets,
        reference=Reference(inputs.hidden_ref, inputs.head_ref),
        statistics=NAMES,
    )


def _with_gradient(statistics: Callable[[Inputs], TokenStatistics]) -> Callable[[Inputs], object]:
    def run(inputs: Inputs):
        def total(hidden: Array, head: Array):
            values = statistics(inputs._replace(hidden=hidden, head=head))
            return jnp.sum(loss(values, inputs.coefficients)), values

        return jax.value_and_grad(total, (0, 1), has_aux=True)(inputs.hidden, inputs.head)

    return run


def _loss_with_gradient(inputs: Inputs):
    def total(hidden: Array, head: Array) -> Array:
        return token_loss(
            hidden,
            head,
            inputs.targets,
            loss,
            inputs.coefficients,
            reference=Reference(inputs.hidden_ref, inputs.head_ref),
            statistics=NAMES,
        )[0]

    return jax.value_and_grad(total, (0, 1))(inputs.hidden, inputs.head)


def product_by_blocks(inputs: Inputs) -> Array:
    """One product of the hidden states with the head, block by block and kept nowhere: the ceiling of the sweeps."""
    rows, vocabulary = inputs.hidden.shape[0], inputs.head.shape[1]
    size = block_size(rows, vocabulary, 4, jax.default_backend())

    def body(carry: Array, index: Array) -> tuple[Array, None]:
        block = lax.dynamic_slice_in_dim(inputs.head, index * size, size, axis=1)
        precision = lax.Precision.HIGHEST if inputs.head.dtype == jnp.float32 else lax.Precision.DEFAULT
        z = jnp.matmul(inputs.hidden, block, precision=precision, preferred_element_type=jnp.float32)
        return carry + z[:, :1], None

    return lax.scan(body, jnp.zeros((rows, 1)), jnp.arange(vocabulary // size))[0]


PROGRAMS: dict[str, Callable[[Inputs], object]] = {
    "product": product_by_blocks,
    "forward/naive": naive_statistics,
    "forward/token_statistics": op_statistics,
    "gradient/naive": _with_gradient(naive_statistics),
    "gradient/token_statistics": _with_gradient(op_statistics),
    "gradient/token_loss": _loss_with_gradient,
}
"""Programs of one shape, by name; those of one group before the slash are compared with its naive member."""

PRODUCTS = {
    "product": 1,
    "forward/naive": 2,
    "forward/token_statistics": 2,
    "gradient/naive": 4,
    "gradient/token_statistics": 6,
    "gradient/token_loss": 4,
}
"""Matrix products of one head that each program executes."""
