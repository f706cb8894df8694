"""What is timed on logits that exist already: KL to a reference with its gradient, and the copy that bounds it."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array

from jaxrl_kernels import dense_gradient
from jaxrl_kernels import dense_kl
from jaxrl_kernels.bench.cases import Shape


class DenseInputs(NamedTuple):
    """Logits of policy and reference, and the weight of each row's KL."""

    logits: Array
    logits_ref: Array
    weights: Array


def make_inputs(shape: Shape) -> DenseInputs:
    """Gaussian logits of standard deviation 2; the reference differs by a tenth of it."""
    keys = jax.random.split(jax.random.key(0), 3)
    size = (shape.rows, shape.vocabulary)
    logits = 2 * jax.random.normal(keys[0], size)
    logits_ref = logits + 0.2 * jax.random.normal(keys[1], size)
    dtype = jnp.dtype(shape.dtype)
    return DenseInputs(logits.astype(dtype), logits_ref.astype(dtype), jax.random.normal(keys[2], (shape.rows,)))


def naive_kl(logits: Array, logits_ref: Array) -> Array:
    """The textbook sum, differentiated by autodiff."""
    log_p = jax.nn.log_softmax(logits.astype(jnp.float32))
    log_q = jax.nn.log_softmax(lax.stop_gradient(logits_ref).astype(jnp.float32))
    return jnp.sum(jnp.exp(log_p) * (log_p - log_q), axis=-1)


def _loss_and_gradient(kl: Callable[[Array, Array], Array]) -> Callable[[DenseInputs], object]:
    def run(inputs: DenseInputs):
        return jax.value_and_grad(lambda z: jnp.sum(inputs.weights * kl(z, inputs.logits_ref)))(inputs.logits)

    return run


def both(inputs: DenseInputs):
    """KL and gradient by the op, in one visit to the logits."""
    return dense_gradient(inputs.logits, inputs.logits_ref, weights=inputs.weights)


def copy(inputs: DenseInputs) -> Array:
    """Two arrays read and one written with hardly any arithmetic: the ceiling of the dense ops."""
    return inputs.logits + inputs.logits_ref


PROGRAMS: dict[str, Callable[[DenseInputs], object]] = {
    "copy": copy,
    "dense/naive": _loss_and_gradient(naive_kl),
    "dense/dense_gradient": both,
    "dense/dense_kl": _loss_and_gradient(dense_kl),
}
"""Programs of one shape, by name."""


def minimal_bytes(shape: Shape) -> int:
    """Bytes that loss and gradient must move: both arrays read, the gradient written."""
    return 3 * shape.rows * shape.vocabulary * jnp.dtype(shape.dtype).itemsize


def errors(inputs: DenseInputs, kl: Array, gradient: Array) -> dict[str, float]:
    """Largest errors over the first rows against float64, relative to the largest value."""
    rows = min(32, inputs.logits.shape[0])
    with jax.enable_x64(True):
        z, z_ref, weights = (jnp.asarray(np.asarray(x[:rows].astype(jnp.float32)), jnp.float64) for x in inputs)
        log_p, log_q = jax.nn.log_softmax(z), jax.nn.log_softmax(z_ref)
        right = jnp.sum(jnp.exp(log_p) * (log_p - log_q), axis=-1)
        slope = weights[:, None] * jnp.exp(log_p) * (log_p - log_q - right[:, None])
        right, slope = np.asarray(right), np.asarray(slope)

    def relative(value: Array, wanted: np.ndarray) -> float:
        found = np.asarray(value[:rows].astype(jnp.float32), np.float64)
        return float(f"{np.abs(found - wanted).max() / np.abs(wanted).max():.2g}")

    return {"kl": relative(kl, right), "gradient": relative(gradient, slope)}
