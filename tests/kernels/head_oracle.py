"""The definitions written out in float64 with everything in memory, their autodiff gradients, and inputs whose logits
are exact in float32."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxrl_kernels import Reference
from jaxrl_kernels import TokenStatistics

WITH_GRADIENT = ("log_prob", "entropy", "collision", "kl", "kl_reverse", "total_variation")
NUMBERS = (*WITH_GRADIENT, "max_log_prob", "chi_square")


class Inputs(NamedTuple):
    hidden: np.ndarray
    head: np.ndarray
    targets: np.ndarray
    hidden_ref: np.ndarray
    head_ref: np.ndarray
    axis: int

    def arrays(self, dtype=jnp.float32):
        return tuple(jnp.asarray(x, dtype) for x in (self.hidden, self.head, self.hidden_ref, self.head_ref))

    @property
    def tokens(self) -> jax.Array:
        return jnp.asarray(self.targets)


def make_inputs(
    *,
    rows: int = 7,
    width: int = 12,
    vocabulary: int = 301,
    scale: float = 1.0,
    near: float | None = None,
    axis: int = 1,
    seed: int = 0,
) -> Inputs:
    """Random inputs on a grid of binary fractions: products and sums are exact in float32, so a test sees the
    statistics' own error.

    `near`: standard deviation of the reference logits' difference from the policy's; None draws an unrelated reference.
    """
    rng = np.random.default_rng([seed, rows, vocabulary])

    def grid(shape, size, step):
        return np.round(rng.standard_normal(shape) * size / step) * step

    hidden = grid((rows, width), 1.0, 0.25)
    head = grid((width, vocabulary), scale / width**0.5, 2.0**-9)
    if near is None:
        hidden_ref, head_ref = grid((rows, width), 1.0, 0.25), grid((width, vocabulary), scale / width**0.5, 2.0**-9)
    else:
        hidden_ref, head_ref = hidden, head + grid(head.shape, near / width**0.5, 2.0**-9 if near > 0.02 else 2.0**-16)
    if axis == 0:
        head, head_ref = head.T.copy(), head_ref.T.copy()
    return Inputs(hidden, head, rng.integers(0, vocabulary, rows).astype(np.int32), hidden_ref, head_ref, axis)


def definitions(z, z_ref, targets, log_min_p=None) -> TokenStatistics:
    """Each statistic by its definition, on [N, V] logits of the policy and (optionally) of the reference."""
    p = jax.nn.softmax(z, axis=-1)
    kept_mass = target_kept = None
    if log_min_p is not None:
        kept = jax.lax.stop_gradient(z >= jnp.max(z, axis=-1, keepdims=True) + log_min_p)
        p = jnp.where(kept, p, 0.0)
        kept_mass = jnp.sum(p, axis=-1)
        p = p / kept_mass[:, None]
        target_kept = jnp.take_along_axis(kept, targets[:, None], axis=1)[:, 0]
    positive = p > 0
    log_p = jnp.where(positive, jnp.log(jnp.where(positive, p, 1.0)), -jnp.inf)
    finite = jnp.where(positive, log_p, 0.0)
    values = {
        "log_prob": jnp.take_along_axis(log_p, targets[:, None], axis=1)[:, 0],
        "entropy": -jnp.sum(p * finite, axis=-1),
        "collision": jnp.sum(p * p, axis=-1),
        "max_log_prob": jnp.max(log_p, axis=-1),
        "kept_mass": kept_mass,
        "target_kept": target_kept,
    }
    if z_ref is not None:
        q = jax.nn.softmax(z_ref, axis=-1)
        log_q = jnp.log(q)
        values["kl"] = jnp.sum(jnp.where(positive, p * (finite - log_q), 0.0), axis=-1)
        values["total_variation"] = 0.5 * jnp.sum(jnp.abs(p - q), axis=-1)
        values["chi_square"] = jnp.sum(p * p / q, axis=-1) - 1
        if log_min_p is None:
            values["kl_reverse"] = jnp.sum(q * (log_q - log_p), axis=-1)
    return TokenStatistics(**values)


def expected(inputs: Inputs, temperature=1.0, log_min_p=None, soft_cap=None) -> TokenStatistics:
    """The definitions in float64, as NumPy arrays."""
    with jax.enable_x64(True):
        values = definitions(*_logits(inputs, temperature, soft_cap), jnp.asarray(inputs.targets), log_min_p)
        return jax.tree.map(np.asarray, values)


def flipped(inputs: Inputs) -> TokenStatistics:
    """The definitions with one sign wrong in each, in float64: no test's measure may take these for right."""
    with jax.enable_x64(True):
        z, z_ref = (np.asarray(x) for x in _logits(inputs, 1.0))
    log_z, log_z_ref = (np.logaddexp.reduce(x, axis=1) for x in (z, z_ref))
    log_p, log_q = z - log_z[:, None], z_ref - log_z_ref[:, None]
    p, q = np.exp(log_p), np.exp(log_q)
    shift = (z - z_ref) + (log_z - log_z_ref)[:, None]
    return TokenStatistics(
        log_prob=np.take_along_axis(z, inputs.targets[:, None], axis=1)[:, 0] + log_z,
        entropy=log_z + (p * z).sum(1),
        collision=np.exp(log_p + z + log_z[:, None]).sum(1),
        max_log_prob=z.max(1) + log_z,
        kl=(p * shift).sum(1),
        kl_reverse=-(q * shift).sum(1),
        total_variation=np.maximum(p + q, 0).sum(1),
        chi_square=np.exp(2 * log_p + log_q).sum(1) - 1,
    )  # fmt: skip


def _logits(inputs: Inputs, temperature, soft_cap=None):
    hidden, head, hidden_ref, head_ref = inputs.arrays(jnp.float64)
    if inputs.axis == 0:
        head, head_ref = head.T, head_ref.T
    divisor = jnp.broadcast_to(jnp.asarray(temperature, jnp.float64), hidden.shape[:1])[:, None]
    z, z_ref = hidden @ head, hidden_ref @ head_ref
    if soft_cap is not None:
        z, z_ref = (soft_cap * jnp.tanh(x / soft_cap) for x in (z, z_ref))
    return z / divisor, z_ref / divisor


def most_likely(inputs: Inputs) -> np.ndarray:
    """The token of largest logit in each row."""
    with jax.enable_x64(True):
        return np.asarray(jnp.argmax(_logits(inputs, 1.0)[0], axis=-1))


def expected_gradient(
    inputs: Inputs, cotangents: dict[str, np.ndarray], temperature=1.0, log_min_p=None, soft_cap=None
):
    """(d hidden, d head) of sum_x <cotangent_x, statistic_x>, by float64 autodiff of the definitions."""
    with jax.enable_x64(True):

        def total(hidden, head):
            moved = inputs._replace(hidden=hidden, head=head)
            values = definitions(*_logits(moved, temperature, soft_cap), jnp.asarray(inputs.targets), log_min_p)
            return weighted(values, {name: jnp.asarray(value, jnp.float64) for name, value in cotangents.items()})

        hidden, head = inputs.arrays(jnp.float64)[:2]
        return jax.tree.map(np.asarray, jax.grad(total, (0, 1))(hidden, head))


def weighted(values: TokenStatistics, cotangents) -> jax.Array:
    """sum_x <cotangent_x, statistic_x>; rows whose statistic is infinite (a pruned target) are left out."""
    terms = []
    for name, cotangent in cotangents.items():
        value = getattr(values, name)
        finite = jnp.isfinite(value)
        terms.append(jnp.sum(jnp.where(finite, cotangent.astype(value.dtype) * jnp.where(finite, value, 0.0), 0.0)))
    return sum(terms[1:], terms[0])


def draw_cotangents(rows: int, names=WITH_GRADIENT, seed: int = 1) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {name: np.round(rng.standard_normal(rows) * 16) / 16 for name in names}


def reference(arrays) -> Reference:
    return Reference(arrays[2], arrays[3])


def error(actual, wanted) -> float:
    """Largest difference, relative to the largest expected value: zeros score 1, a flipped sign 2."""
    actual, wanted = np.asarray(actual, np.float64), np.asarray(wanted, np.float64)
    same = actual == wanted
    if same.all():
        return 0.0
    scale = np.max(np.abs(np.where(np.isfinite(wanted), wanted, 0.0)))
    with np.errstate(invalid="ignore"):
        return float(np.max(np.where(same, 0.0, np.abs(actual - wanted))) / scale)
