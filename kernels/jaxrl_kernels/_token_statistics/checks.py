"""What the public functions ask of their arguments; each error names the argument, what it was and what it must be."""

import math
from collections.abc import Callable
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array

from jaxrl_kernels._token_statistics.types import ALWAYS
from jaxrl_kernels._token_statistics.types import WITH_REFERENCE
from jaxrl_kernels._token_statistics.types import WITH_TOP_K
from jaxrl_kernels._token_statistics.types import Reference
from jaxrl_kernels._token_statistics.types import ReferenceLogits
from jaxrl_kernels._token_statistics.types import TokenStatistics


def loss(op: str, per_token_loss: Callable[..., Array]) -> Callable[..., Array]:
    """per_token_loss, with an error if it does not return one loss per row."""

    def checked(statistics: TokenStatistics, *side_arrays: Array) -> Array:
        losses = per_token_loss(statistics, *side_arrays)
        rows = next(value for value in statistics if value is not None).shape
        if losses.shape != rows:
            raise ValueError(
                f"{op}: per_token_loss returned shape {losses.shape}; it must return one loss per row, {rows} here."
            )
        return losses

    return checked


def shapes(
    op: str,
    hidden: Array,
    head: Array,
    targets: Array,
    vocabulary_axis: int,
    reference: Reference | ReferenceLogits | None,
) -> int:
    """Raise if shapes do not fit; return the size of the vocabulary."""
    if vocabulary_axis not in (0, 1):
        raise ValueError(f"{op}: vocabulary_axis must be 1 for a head [D, V] or 0 for [V, D], not {vocabulary_axis!r}.")
    if hidden.ndim != 2 or head.ndim != 2:
        raise ValueError(
            f"{op}: hidden must be [N, D] and head a matrix, not of shapes {hidden.shape} and "
            f"{head.shape}; flatten [B, T, D] to [B*T, D] first."
        )
    wording = "[D, V]" if vocabulary_axis == 1 else "[V, D]"
    if head.shape[1 - vocabulary_axis] != hidden.shape[1]:
        raise ValueError(
            f"{op}: head has shape {head.shape}, read as {wording} "
            f"(vocabulary_axis={vocabulary_axis}), but hidden has width D = {hidden.shape[1]}."
        )
    if targets.shape != hidden.shape[:1]:
        raise ValueError(
            f"{op}: targets has shape {targets.shape}; it must be [N] = {hidden.shape[:1]}, one per row of hidden."
        )
    if not jnp.issubdtype(targets.dtype, jnp.integer):
        raise TypeError(f"{op}: targets must be integers, not {targets.dtype}.")
    vocabulary = head.shape[vocabulary_axis]
    if vocabulary == 0:
        raise ValueError(f"{op}: head has shape {head.shape}; the vocabulary must not be empty.")
    if reference is not None:
        _reference(op, hidden, reference, vocabulary, vocabulary_axis)
    return vocabulary


def rows(op: str, mask: Array | None, count: int) -> None:
    """Raise if the mask is not one entry per row."""
    if mask is not None and mask.shape != (count,):
        raise ValueError(
            f"{op}: mask has shape {mask.shape}; it must be [N] = ({count},), one entry per row of hidden."
        )
    if mask is not None and mask.dtype != bool:
        raise TypeError(f"{op}: mask must be boolean, not {mask.dtype}.")


def tokens(targets: Array | np.ndarray, mask: Array | None) -> Array:
    """The targets in integers that hold every token's number; 0 in masked rows."""
    if isinstance(targets, np.ndarray) and targets.dtype.itemsize > 4:
        # jax would keep the lower half of each: 2^32 + 1 is not token 1.
        ends = np.iinfo(np.int32)
        lowest = 0 if targets.dtype.kind == "u" else -1
        targets = np.maximum(np.minimum(targets, ends.max), lowest).astype(np.int32)
    targets = jnp.asarray(targets)
    if targets.dtype.itemsize < jnp.dtype(jnp.int32).itemsize:
        targets = targets.astype(jnp.int32)
    return targets if mask is None else jnp.where(mask, targets, jnp.zeros((), targets.dtype))


def target_range(op: str, targets: Array, vocabulary: int) -> None:
    """With jax_enable_checks on, raise on targets outside the vocabulary: at once where they are known, else when the
    program runs."""
    if not jax.config.jax_enable_checks or targets.size == 0:  # pyright: ignore[reportAttributeAccessIssue]
        return

    def check(low: Array, high: Array) -> None:
        if low < 0 or high >= vocabulary:
            raise ValueError(f"{op}: targets lie in [{low}, {high}]; they must lie in [0, {vocabulary - 1}].")

    low, high = jnp.min(targets), jnp.max(targets)
    if isinstance(targets, jax.core.Tracer):  # pyright: ignore[reportAttributeAccessIssue]
        jax.debug.callback(check, low, high)
    else:
        check(low, high)


def supported(op: str, chosen: str, soft_cap: float | None, top_k: int | None, mesh_axis: str | None) -> None:
    """Raise on what an implementation cannot do, and on a soft cap that is none."""
    if soft_cap is not None and not (isinstance(soft_cap, int | float) and 0 < soft_cap < math.inf):
        raise ValueError(f"{op}: soft_cap must be a positive number (or None), not {soft_cap!r}.")
    lacking = {
        "reference": {"vocabulary_mesh_axis"},
        "pallas_tpu": {"top_k", "vocabulary_mesh_axis"},
        "pallas_mosaic_gpu": {"top_k", "vocabulary_mesh_axis"},
    }.get(chosen, set())
    options = {"soft_cap": soft_cap, "top_k": top_k, "vocabulary_mesh_axis": mesh_axis}
    given = {name for name, value in options.items() if value is not None}
    if lacking & given:
        name = sorted(lacking & given)[0]
        raise NotImplementedError(f"{op}: implementation {chosen!r} does not do {name}; choose 'xla'.")
    if mesh_axis is not None:
        try:
            lax.axis_size(mesh_axis)
        except NameError:
            raise ValueError(
                f"{op}: vocabulary_mesh_axis is {mesh_axis!r}, which is no axis of a surrounding shard_map."
            ) from None


def _reference(op: str, hidden: Array, reference: Reference | ReferenceLogits, vocabulary: int, axis: int) -> None:
    if isinstance(reference, ReferenceLogits):
        wanted = (hidden.shape[0], vocabulary)
        if reference.logits.shape != wanted:
            raise ValueError(
                f"{op}: reference.logits has shape {reference.logits.shape}; it must be [N, V] = {wanted}."
            )
        return
    if reference.hidden.ndim != 2 or reference.hidden.shape[0] != hidden.shape[0]:
        raise ValueError(
            f"{op}: reference.hidden has shape {reference.hidden.shape}; it must be [N, D'] with N = "
            f"{hidden.shape[0]}, as hidden."
        )
    if reference.head.ndim != 2 or reference.head.shape[1 - axis] != reference.hidden.shape[1]:
        raise ValueError(
            f"{op}: reference.head has shape {reference.head.shape}; axis {1 - axis} must be D' = "
            f"{reference.hidden.shape[-1]}, "
            f"the width of reference.hidden."
        )
    if reference.head.shape[axis] != vocabulary:
        raise ValueError(
            f"{op}: reference.head has {reference.head.shape[axis]} tokens, head has {vocabulary}; "
            f"the vocabularies must be the same."
        )


def wanted(
    op: str,
    statistics: Sequence[str] | None,
    with_reference: bool,
    pruned: bool,
    top_k: int | None,
    vocabulary: int,
) -> tuple[str, ...]:
    """Names of the statistics to compute; `vocabulary` is the size over all devices."""
    if top_k is not None and not 1 <= top_k <= vocabulary:
        raise ValueError(f"{op}: top_k is {top_k}; it must lie between 1 and the vocabulary size {vocabulary}.")
    possible = ALWAYS + (() if top_k is None else WITH_TOP_K)
    if with_reference:
        possible += tuple(name for name in WITH_REFERENCE if not (pruned and name == "kl_reverse"))
    if statistics is not None:
        if isinstance(statistics, str) or not statistics:
            raise ValueError(
                f"{op}: statistics must be a non-empty sequence of names such as ('log_prob', "
                f"'entropy'), not {statistics!r}."
            )
        known = ALWAYS + WITH_TOP_K + WITH_REFERENCE
        unknown = [name for name in statistics if name not in known]
        if unknown:
            raise ValueError(f"{op}: statistics names {unknown[0]!r}; it must be among {', '.join(known)}.")
        if "top_k_mass" in statistics and top_k is None:
            raise ValueError(f"{op}: statistics names 'top_k_mass', which needs top_k, the number of tokens to count.")
        absent = [name for name in statistics if name not in possible]
        if absent and not with_reference:
            raise ValueError(
                f"{op}: statistics names {absent[0]!r}, which needs a reference; pass "
                f"reference=Reference(hidden, head)."
            )
        if absent:
            raise ValueError(
                f"{op}: kl_reverse is infinite once log_min_p removes a token; ask for it without log_min_p."
            )
        possible = tuple(name for name in possible if name in statistics)
    return possible + (("kept_mass", "target_kept") if pruned else ())


def inverse_temperature(op: str, temperature, rows: int, dtype: jnp.dtype) -> Array | None:
    """1 / temperature as [N, 1] or [1, 1]; None for 1."""
    if isinstance(temperature, int | float):
        if not 0 < temperature < math.inf:
            raise ValueError(f"{op}: temperature must be positive and finite, not {temperature!r}.")
        if temperature == 1:
            return None
    value = jnp.asarray(temperature, dtype)
    if value.shape not in ((), (rows,)):
        raise ValueError(f"{op}: temperature has shape {value.shape}; it must be a scalar or one per row, ({rows},).")
    return jax.lax.stop_gradient(1 / value).reshape(-1, 1)


def log_min_p(op: str, log_min_p, dtype: jnp.dtype) -> Array | None:
    """The threshold of the safe set as a scalar array."""
    if log_min_p is None:
        return None
    if isinstance(log_min_p, int | float) and not log_min_p <= 0:
        raise ValueError(
            f"{op}: log_min_p is a log-probability relative to the largest one, so it must be <= 0, not {log_min_p!r}."
        )
    value = jnp.asarray(log_min_p, dtype)
    if value.shape != ():
        raise ValueError(f"{op}: log_min_p has shape {value.shape}; it must be a scalar.")
    return jax.lax.stop_gradient(value)
