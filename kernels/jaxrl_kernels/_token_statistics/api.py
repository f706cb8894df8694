"""The public functions: arguments are checked here, at trace time, and handed to the implementation."""

from collections.abc import Callable
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array
from jaxtyping import Bool
from jaxtyping import Float
from jaxtyping import Int
from jaxtyping import ScalarLike

from jaxrl_kernels import _dispatch
from jaxrl_kernels._token_statistics import pallas_mosaic_gpu
from jaxrl_kernels._token_statistics import pallas_tpu
from jaxrl_kernels._token_statistics import reference as plain
from jaxrl_kernels._token_statistics import vjp
from jaxrl_kernels._token_statistics import xla
from jaxrl_kernels._token_statistics import xla_loss
from jaxrl_kernels._token_statistics.blocks import Layout
from jaxrl_kernels._token_statistics.blocks import accumulator
from jaxrl_kernels._token_statistics.blocks import vary_together
from jaxrl_kernels._token_statistics.types import ALWAYS
from jaxrl_kernels._token_statistics.types import WITH_REFERENCE
from jaxrl_kernels._token_statistics.types import Reference
from jaxrl_kernels._token_statistics.types import TokenStatistics

ENGINES = {"xla": xla.ENGINE, "pallas_tpu": pallas_tpu.ENGINE, "pallas_mosaic_gpu": pallas_mosaic_gpu.ENGINE}
IMPLEMENTATIONS = ("reference", *ENGINES)


def token_statistics(
    hidden: Float[Array, "N D"],
    head: Float[Array, "_ _"],
    targets: Int[Array, " N"],
    *,
    vocabulary_axis: int = 1,
    reference: Reference | None = None,
    temperature: ScalarLike | Float[Array, " N"] = 1.0,
    log_min_p: ScalarLike | None = None,
    statistics: Sequence[str] | None = None,
    implementation: str | None = None,
    block: int | None = None,
) -> TokenStatistics:
    """Per-token statistics of softmax(hidden @ head / temperature), without holding the logits.

    With z = hidden @ head / temperature, p = softmax(z), and q the same of the reference: log p_a, entropy, collision,
    KL(p || q) and so on, as `TokenStatistics` lists them. Reverse-mode gradients flow into `hidden` and `head`, by the
    closed form

        dz = g_logp (e_a - p) - g_H p (log p + H) + 2 g_C p (p - C) + g_KL p (l - KL) + g_KLr (p - q) + (1/2) g_TV p
        (sign l - E_p[sign l]),

    with logits computed again in the backward pass. There is no gradient for max_log_prob, chi_square, kept_mass,
    target_kept, nor into targets, the reference, temperature and log_min_p; there is no forward mode and no second
    derivative. Where the head is not differentiated (frozen), its cotangent is not computed.

    A row with NaN or inf in it has NaN or inf statistics; other rows do not notice, and a row whose cotangents are all
    zero adds nothing to the gradient whatever it holds.

    Args:
        hidden: [N, D] float16, bfloat16, float32 or float64. Everything accumulates in the wider of float32 and the
            inputs' dtypes.
        head: [D, V], or [V, D] with vocabulary_axis=0 (a tied embedding, read and differentiated in that layout without
            a copy).
        targets: [N] token ids in [0, V). One outside gives NaN for log_prob in its row (ValueError where the ids are
            known while tracing and jax_enable_checks is on).
        vocabulary_axis: axis of `head`, and of the reference's, that runs over the vocabulary.
        reference: hidden states and head of the distribution q to compare with.
        temperature: divides the logits of policy and reference alike; a number, a scalar array or one per row.
        log_min_p: if given, the policy is renormalised on its safe set {k : log p_k >= max_j log p_j + log_min_p}
            [nats, <= 0] (dynamic vocabulary pruning, arXiv 2512.23087) and all statistics are those of the renormalised
            policy: log_prob is -inf with zero gradient for a target outside. The reference stays whole; kl_reverse
            would be infinite and is left out. The set carries no gradient.
        statistics: names to compute; None means all that apply. total_variation costs a second sweep over the
            vocabulary, log_min_p another.
        implementation: "reference" (plain jax.numpy and autodiff, [N, V] in memory), "xla" (blocks), "pallas_tpu" or
            "pallas_mosaic_gpu" (Mosaic kernels for TPU and for Hopper GPUs; bfloat16 or float32), or None: the
            platform's default. A named one is never replaced by another: where it cannot run, that is an error.
        block: columns per block of "xla" (None: about 8 MB of logits) or per tile of "pallas_tpu" (a multiple of 128;
            None: what fits into vector memory).

    Returns:
        TokenStatistics of [N] arrays; what was not computed is None.

    Raises:
        ValueError: shapes, names or numbers that do not fit. TypeError: targets that are not integers.
        NotImplementedError: what the named implementation cannot do.

    Source: derivation in kernels/README.md; the pruning in arXiv 2512.23087.
    """
    op = "token_statistics"
    vocabulary = _check(op, hidden, head, targets, vocabulary_axis, reference)
    wanted = _wanted(op, statistics, reference is not None, log_min_p is not None)
    chosen = _dispatch.resolve(op, implementation, IMPLEMENTATIONS, jax.default_backend())
    dtype = accumulator(*_dtypes(hidden, head, reference))
    inverse = _inverse_temperature(op, temperature, hidden.shape[0], dtype)
    pruning = _log_min_p(op, log_min_p, dtype)
    with jax.named_scope(f"{op}.{chosen}"):
        if chosen == "reference":
            return plain.statistics(
                hidden, head, targets, reference, inverse, pruning, vocabulary_axis=vocabulary_axis, wanted=wanted
            )
        engine = ENGINES[chosen]
        size = engine.columns(op, block, hidden.shape[0], vocabulary, _dtypes(hidden, head, reference))
        plan = vjp.Plan(Layout(vocabulary_axis, vocabulary, size), wanted)
        arguments = vary_together((hidden, head, targets, reference, inverse, pruning))
        return vjp.statistics(engine, plan, *arguments)


def token_loss(
    hidden: Float[Array, "N D"],
    head: Float[Array, "_ _"],
    targets: Int[Array, " N"],
    per_token_loss: Callable[..., Array],
    *side_arrays: Array,
    vocabulary_axis: int = 1,
    reference: Reference | None = None,
    temperature: ScalarLike | Float[Array, " N"] = 1.0,
    mask: Bool[Array, " N"] | None = None,
    statistics: Sequence[str] | None = None,
    implementation: str | None = None,
    block: int | None = None,
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """(sum, count) of a loss that each token's own statistics decide, its gradient made in the forward sweep.

    sum = sum over rows in `mask` of per_token_loss(statistics of the row, side arrays of the row), count = number of
    those rows; divide once, after micro-batches and shards were added. The same value and gradient as
    `token_statistics` followed by `per_token_loss`, with four matrix products instead of six when a reference is given,
    because no logit is computed twice.

    Gradients flow into `hidden` and `head` through the statistics that have one. Side arrays, the reference and the
    temperature get none (they count as constants, whatever their origin); nor does anything that per_token_loss closes
    over.

    Args:
        hidden, head, targets, vocabulary_axis, reference, temperature, block: as for `token_statistics`.
        per_token_loss: (TokenStatistics of [rows] arrays, side arrays of the same rows) -> [rows] losses. It is called
            on tiles of rows in any order, so it must treat each row alone.
        side_arrays: arrays with a leading axis N: advantages, old log-probs, weights.
        mask: [N] rows that count; None means all. Rows outside may hold anything, NaN included.
        statistics: names that per_token_loss reads; None means all that apply. The others are None, and cost nothing.
        implementation: as for `token_statistics`. A Pallas one runs the kernels of `token_statistics` and makes the
            gradient in the backward pass: six matrix products.

    Returns:
        (sum, count), scalars in the wider of float32 and the inputs' dtypes.

    Raises:
        ValueError, TypeError, NotImplementedError: as `token_statistics`; also if per_token_loss does not return one
        loss per row.
    """
    op = "token_loss"
    vocabulary = _check(op, hidden, head, targets, vocabulary_axis, reference)
    wanted = _wanted(op, statistics, reference is not None, False)
    chosen = _dispatch.resolve(op, implementation, IMPLEMENTATIONS, jax.default_backend())
    rows = hidden.shape[0]
    dtype = accumulator(*_dtypes(hidden, head, reference))
    inverse = _inverse_temperature(op, temperature, rows, dtype)
    if mask is None:
        mask = jnp.ones((rows,), bool)
    elif mask.shape != (rows,):
        raise ValueError(f"{op}: mask has shape {mask.shape}; it must be [N] = ({rows},), one entry per row of hidden.")
    for position, side in enumerate(side_arrays):
        if side.ndim == 0 or side.shape[0] != rows:
            raise ValueError(
                f"{op}: side array {position} has shape {side.shape}; its first axis must be N = {rows}, as hidden's."
            )
    checked = _checked_loss(op, per_token_loss)
    with jax.named_scope(f"{op}.{chosen}"):
        count = jnp.sum(mask, dtype=dtype)
        if chosen == "reference":
            total = plain.loss(
                hidden,
                head,
                targets,
                reference,
                inverse,
                mask,
                side_arrays,
                vocabulary_axis=vocabulary_axis,
                wanted=wanted,
                per_token_loss=checked,
            )
            return total.astype(dtype), count
        if rows == 0:
            return jnp.zeros((), dtype), count
        engine = ENGINES[chosen]
        tile = xla_loss.tile_rows(rows) if chosen == "xla" else rows
        size = engine.columns(op, block, tile, vocabulary, _dtypes(hidden, head, reference))
        plan = xla_loss.LossPlan(Layout(vocabulary_axis, vocabulary, size), wanted, tile, checked)
        arguments = vary_together((hidden, head, targets, reference, inverse, mask, side_arrays))
        if chosen == "xla":
            total = xla_loss.loss(plan, *arguments)
        else:
            total = xla_loss.loss_of_statistics(engine, plan, *arguments)
        return total.astype(dtype), count  # pyright: ignore[reportAttributeAccessIssue]


def _checked_loss(op: str, per_token_loss: Callable[..., Array]) -> Callable[..., Array]:
    def checked(statistics: TokenStatistics, *side_arrays: Array) -> Array:
        losses = per_token_loss(statistics, *side_arrays)
        rows = next(value for value in statistics if value is not None).shape
        if losses.shape != rows:
            raise ValueError(
                f"{op}: per_token_loss returned shape {losses.shape}; it must return one loss per row, {rows} here."
            )
        return losses

    return checked


def _dtypes(hidden: Array, head: Array, reference: Reference | None) -> tuple[jnp.dtype, ...]:
    return tuple(x.dtype for x in jax.tree.leaves((hidden, head, reference)))


def _check(
    op: str, hidden: Array, head: Array, targets: Array, vocabulary_axis: int, reference: Reference | None
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
        _check_reference(op, hidden, reference, vocabulary, vocabulary_axis)
    if jax.config.jax_enable_checks and not isinstance(targets, jax.core.Tracer) and targets.size:  # pyright: ignore
        low, high = int(targets.min()), int(targets.max())
        if low < 0 or high >= vocabulary:
            raise ValueError(f"{op}: targets lie in [{low}, {high}]; they must lie in [0, {vocabulary - 1}].")
    return vocabulary


def _check_reference(op: str, hidden: Array, reference: Reference, vocabulary: int, axis: int) -> None:
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


def _wanted(op: str, statistics: Sequence[str] | None, with_reference: bool, pruned: bool) -> tuple[str, ...]:
    possible = ALWAYS
    if with_reference:
        possible += tuple(name for name in WITH_REFERENCE if not (pruned and name == "kl_reverse"))
    if statistics is not None:
        if isinstance(statistics, str) or not statistics:
            raise ValueError(
                f"{op}: statistics must be a non-empty sequence of names such as ('log_prob', "
                f"'entropy'), not {statistics!r}."
            )
        unknown = [name for name in statistics if name not in ALWAYS + WITH_REFERENCE]
        if unknown:
            raise ValueError(
                f"{op}: statistics names {unknown[0]!r}; it must be among {', '.join(ALWAYS + WITH_REFERENCE)}."
            )
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


def _inverse_temperature(op: str, temperature, rows: int, dtype: jnp.dtype) -> Array | None:
    if isinstance(temperature, int | float):
        if not temperature > 0:
            raise ValueError(f"{op}: temperature must be positive, not {temperature!r}.")
        if temperature == 1:
            return None
    value = jnp.asarray(temperature, dtype)
    if value.shape not in ((), (rows,)):
        raise ValueError(f"{op}: temperature has shape {value.shape}; it must be a scalar or one per row, ({rows},).")
    return jax.lax.stop_gradient(1 / value).reshape(-1, 1)


def _log_min_p(op: str, log_min_p, dtype: jnp.dtype) -> Array | None:
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
