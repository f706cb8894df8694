"""The public functions: arguments are checked here, at trace time, and handed to the implementation."""

from functools import partial
from types import ModuleType

import jax
import jax.numpy as jnp
from jaxtyping import Array
from jaxtyping import Float
from jaxtyping import Int

from jaxrl_kernels import _dispatch
from jaxrl_kernels._dense_gradient import pallas_mosaic_gpu
from jaxrl_kernels._dense_gradient import pallas_tpu
from jaxrl_kernels._dense_gradient import reference as plain
from jaxrl_kernels._dense_gradient import streaming
from jaxrl_kernels._dense_gradient import xla
from jaxrl_kernels._dense_gradient.types import DenseGradient
from jaxrl_kernels._token_statistics.blocks import accumulator
from jaxrl_kernels._token_statistics.blocks import vary_together

ENGINES: dict[str, ModuleType] = {"xla": xla, "pallas_tpu": pallas_tpu, "pallas_mosaic_gpu": pallas_mosaic_gpu}
IMPLEMENTATIONS = ("reference", *ENGINES)


def dense_kl(
    logits: Float[Array, "N V"],
    logits_ref: Float[Array, "N V"],
    *,
    top_k: int | None = None,
    implementation: str | None = None,
) -> Float[Array, " N"]:
    """KL(p || q) of each row, with the closed form p (l - KL) as its gradient.

    p = softmax(logits), q = softmax(logits_ref), l = log p - log q, KL = sum_k p_k l_k as a sum of terms that are never
    negative, so it is accurate however close p and q are. Reverse-mode gradients flow into `logits` only; there is no
    forward mode and no second derivative. The backward pass keeps three numbers per row and reads the logits again.

    A row with NaN or +inf in it, or without any logit above -inf, gives NaN in that row alone; a logit of -inf is a
    probability of 0, and so is one that far below the row's largest that exp underflows. KL is +inf, and has no
    gradient (zeros), where some p_k > 0 = q_k. A row whose cotangent is zero has a zero gradient whatever it holds.

    Args:
        logits: [N, V] of the policy; float16, bfloat16, float32 or float64.
        logits_ref: [N, V] of the reference, a constant to the gradient.
        top_k: if given, KL between the two renormalised on the policy's top_k most likely tokens of each row. It says
            nothing about the mass outside them; the choice carries no gradient.
        implementation: "reference" (plain jax.numpy and autodiff), "xla", "pallas_tpu", "pallas_mosaic_gpu", or None:
            "pallas_mosaic_gpu" on one Hopper GPU for bfloat16 whose V is a multiple of 64 and N of 8, else "xla". The
            Pallas ones run on their own platform, and elsewhere only interpreted
            (`pltpu.force_tpu_interpret_mode`, `plgpu.force_gpu_interpret_mode`).

    Returns:
        [N] KL [nats] in the wider of float32 and the inputs' dtype.

    Raises:
        ValueError: shapes, numbers or names that do not fit. TypeError: logits that are not floating.

    Source: derivation in kernels/README.md.
    """
    op = "dense_kl"
    _check(op, logits, logits_ref, top_k)
    chosen = _chosen(op, implementation, logits, logits_ref, top_k)
    with jax.named_scope(f"{op}.{chosen}"):
        if top_k is not None:
            index = _top(logits, top_k)
            logits, logits_ref = _gather(logits, index), _gather(logits_ref, index)
        if logits.shape[0] == 0:
            return jnp.zeros((0,), _dtype(logits, logits_ref))
        if chosen == "reference":
            dtype = _dtype(logits, logits_ref)
            return plain.kl_of_rows(logits.astype(dtype), logits_ref.astype(dtype))
        return _kl(chosen, *vary_together((logits, logits_ref)))


def dense_gradient(
    logits: Float[Array, "N V"],
    logits_ref: Float[Array, "N V"],
    *,
    weights: Float[Array, " N"] | None = None,
    top_k: int | None = None,
    implementation: str | None = None,
) -> DenseGradient:
    """KL(p || q) of each row and weight * p (l - KL), its gradient with respect to the logits, together.

    For losses whose row weights are known beforehand: sum_n weight_n KL_n and its gradient in one visit to the logits.
    The components of a gradient row sum to zero. Neither result carries a gradient itself; where the weight comes
    later, use `dense_kl`, whose backward pass is the same formula.

    Args:
        logits, logits_ref, implementation: as for `dense_kl`, as are non-finite rows.
        weights: [N] factor of each gradient row; None means 1. It does not multiply the KL.
        top_k: as for `dense_kl`; the gradient is zero outside the policy's top_k most likely tokens.

    Returns:
        DenseGradient: kl [N] [nats] in the wider of float32 and the inputs' dtype, gradient [N, V] in that of logits.

    Raises:
        ValueError, TypeError: as `dense_kl`; also weights that are not [N].

    Source: derivation in kernels/README.md.
    """
    op = "dense_gradient"
    _check(op, logits, logits_ref, top_k)
    chosen = _chosen(op, implementation, logits, logits_ref, top_k)
    dtype = _dtype(logits, logits_ref)
    rows = logits.shape[0]
    if weights is None:
        weights = jnp.ones((rows,), dtype)
    elif weights.shape != (rows,):
        raise ValueError(f"{op}: weights has shape {weights.shape}; it must be [N] = ({rows},), one per row of logits.")
    arguments = vary_together(jax.lax.stop_gradient((logits, logits_ref, weights.astype(dtype))))
    with jax.named_scope(f"{op}.{chosen}"):
        if rows == 0:
            return DenseGradient(jnp.zeros((0,), dtype), jnp.zeros_like(logits))
        if top_k is None:
            return _both(chosen, *arguments)
        index = _top(logits, top_k)
        kl, part = _both(chosen, *(_gather(x, index) for x in arguments[:2]), arguments[2])  # pyright: ignore[reportCallIssue]
        whole = jnp.put_along_axis(jnp.zeros_like(arguments[0]), index, part, axis=1, inplace=False)
        return DenseGradient(kl, whole)


def _chosen(op: str, implementation: str | None, logits: Array, logits_ref: Array, top_k: int | None) -> str:
    free = implementation is None and top_k is None
    if free and _dispatch.one_hopper() and pallas_mosaic_gpu.preferred(logits, logits_ref):
        return "pallas_mosaic_gpu"
    return _dispatch.resolve(op, implementation, IMPLEMENTATIONS)


def _both(chosen: str, logits: Array, logits_ref: Array, weights: Array) -> DenseGradient:
    dtype = weights.dtype
    if chosen == "reference":
        kl, gradient = plain.kl_and_gradient(logits.astype(dtype), logits_ref.astype(dtype), weights)
        return DenseGradient(kl, gradient.astype(logits.dtype))
    if chosen == "xla":
        return DenseGradient(*xla.kl_and_gradient(logits, logits_ref, weights))
    sums = ENGINES[chosen].state(logits, logits_ref, dtype)
    gradient = ENGINES[chosen].gradient(
        logits, logits_ref, sums.maximum, streaming.factor(weights, sums.total, sums.centre), sums.centre
    )
    return DenseGradient(streaming.divergence(sums), gradient)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _kl(chosen: str, logits: Array, logits_ref: Array) -> Array:
    return streaming.divergence(ENGINES[chosen].state(logits, logits_ref, _dtype(logits, logits_ref)))


def _forward_rule(chosen: str, logits: Array, logits_ref: Array):
    sums = ENGINES[chosen].state(logits, logits_ref, _dtype(logits, logits_ref))
    return streaming.divergence(sums), (logits, logits_ref, sums.maximum, sums.total, sums.centre)


def _backward_rule(chosen: str, residuals, cotangent: Array):
    logits, logits_ref, maximum, total, centre = residuals
    return ENGINES[chosen].gradient(
        logits, logits_ref, maximum, streaming.factor(cotangent, total, centre), centre
    ), None


_kl.defvjp(_forward_rule, _backward_rule)


def _dtype(*arrays: Array) -> jnp.dtype:
    return accumulator(*(x.dtype for x in arrays))


def _top(logits: Array, top_k: int) -> Int[Array, "N k"]:
    return jax.lax.top_k(jax.lax.stop_gradient(logits), top_k)[1]


def _gather(x: Array, index: Array) -> Array:
    return jnp.take_along_axis(x, index, axis=1)


def _check(op: str, logits: Array, logits_ref: Array, top_k: int | None) -> None:
    if logits.ndim != 2 or logits.shape[1] == 0:
        raise ValueError(
            f"{op}: logits has shape {logits.shape}; it must be [N, V] with V >= 1 (flatten [B, T, V] first)."
        )
    if logits_ref.shape != logits.shape:
        raise ValueError(f"{op}: logits_ref has shape {logits_ref.shape}; it must be {logits.shape}, as logits.")
    for name, array in (("logits", logits), ("logits_ref", logits_ref)):
        if not jnp.issubdtype(array.dtype, jnp.floating):
            raise TypeError(f"{op}: {name} must be floating, not {array.dtype}.")
    if top_k is not None and not 1 <= top_k <= logits.shape[1]:
        raise ValueError(f"{op}: top_k is {top_k}; it must lie between 1 and the vocabulary size {logits.shape[1]}.")
