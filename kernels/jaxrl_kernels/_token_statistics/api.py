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
from jaxrl_kernels._token_statistics import across_devices
from jaxrl_kernels._token_statistics import checks
from jaxrl_kernels._token_statistics import pallas_mosaic_gpu
from jaxrl_kernels._token_statistics import pallas_tpu
from jaxrl_kernels._token_statistics import reference as plain
from jaxrl_kernels._token_statistics import vjp
from jaxrl_kernels._token_statistics import xla
from jaxrl_kernels._token_statistics import xla_loss
from jaxrl_kernels._token_statistics.blocks import Layout
from jaxrl_kernels._token_statistics.blocks import Logits
from jaxrl_kernels._token_statistics.blocks import accumulator
from jaxrl_kernels._token_statistics.blocks import vary_together
from jaxrl_kernels._token_statistics.types import WITH_REFERENCE
from jaxrl_kernels._token_statistics.types import Reference
from jaxrl_kernels._token_statistics.types import ReferenceLogits
from jaxrl_kernels._token_statistics.types import TokenStatistics

ENGINES = {"xla": xla.ENGINE, "pallas_tpu": pallas_tpu.ENGINE, "pallas_mosaic_gpu": pallas_mosaic_gpu.ENGINE}
IMPLEMENTATIONS = ("reference", *ENGINES)


def token_statistics(
    hidden: Float[Array, "N D"],
    head: Float[Array, "_ _"],
    targets: Int[Array, " N"],
    *,
    vocabulary_axis: int = 1,
    reference: Reference | ReferenceLogits | None = None,
    temperature: ScalarLike | Float[Array, " N"] = 1.0,
    soft_cap: float | None = None,
    log_min_p: ScalarLike | None = None,
    top_k: int | None = None,
    mask: Bool[Array, " N"] | None = None,
    statistics: Sequence[str] | None = None,
    vocabulary_mesh_axis: str | None = None,
    implementation: str | None = None,
    block: int | None = None,
) -> TokenStatistics:
    """Per-token statistics of softmax(hidden @ head / temperature), without holding the logits.

    With z = hidden @ head / temperature (or cap tanh(hidden @ head / cap) / temperature), p = softmax(z), and q the
    same of the reference: log p_a, entropy, collision, KL(p || q) and so on, as `TokenStatistics` lists them.
    Reverse-mode gradients flow into `hidden` and `head`, by the closed form

        dz = g_logp (e_a - p) - g_H p (log p + H) + 2 g_C p (p - C) + g_KL p (l - KL) + g_KLr (p - q) + (1/2) g_TV p
        (sign l - E_p[sign l]),

    times 1 - tanh(.)^2 under a soft cap, with logits computed again in the backward pass. There is no gradient for
    max_log_prob, chi_square, top_k_mass, kept_mass and target_kept (they count as constants), nor into targets, the
    reference, temperature and log_min_p; there is no forward mode and no second derivative. Where the head is not
    differentiated (frozen), its cotangent is not computed.

    A row with NaN or inf in it, in its hidden states or in the reference that it is compared with, has NaN for all its
    statistics, so a loss that counts it is not finite; its gradient is zero in `hidden` and left out of `head`'s, so
    the batch is not poisoned. Other rows do not notice. In other rows, too, a statistic that is not finite has no
    gradient, whatever its cotangent: log_prob of a target that is pruned or outside the vocabulary, kl against a
    reference without mass where the policy has some. The row's other statistics keep theirs.

    Args:
        hidden: [N, D] float16, bfloat16, float32 or float64. Everything accumulates in the wider of float32 and the
            inputs' dtypes.
        head: [D, V], or [V, D] with vocabulary_axis=0 (a tied embedding, read and differentiated in that layout without
            a copy).
        targets: [N] token ids in [0, V). One outside gives NaN for log_prob in its row (ValueError where the ids are
            known while tracing and jax_enable_checks is on).
        vocabulary_axis: axis of `head`, and of the reference's, that runs over the vocabulary.
        reference: hidden states and head of the distribution q to compare with, or its logits.
        temperature: divides the logits of policy and reference alike; a number, a scalar array or one per row.
        soft_cap: if given, logits that a head makes become soft_cap * tanh(logits / soft_cap) before the temperature
            (Gemma 2, arXiv 2408.00118).
        top_k: how many tokens top_k_mass counts; it takes part once this is given.
        mask: [N] rows that count; None means all. The others have zeros for statistics and no gradient, and may hold
            anything, NaN included.
        log_min_p: if given, the policy is renormalised on its safe set {k : log p_k >= max_j log p_j + log_min_p}
            [nats, <= 0] (dynamic vocabulary pruning, arXiv 2512.23087) and all statistics are those of the renormalised
            policy: log_prob is -inf with zero gradient for a target outside. The reference stays whole; kl_reverse
            would be infinite and is left out. The set carries no gradient.
        statistics: names to compute; None means all that apply. total_variation costs a second sweep over the
            vocabulary, log_min_p another.
        vocabulary_mesh_axis: inside a shard_map, the mesh axis over which the vocabulary is split: `head` (and the
            reference's head or logits) are this device's equal part of it, in the order of the devices, and targets
            count from the first token of all. Statistics are those of the whole vocabulary, the same on every device
            of the axis; hidden states that are the same there get the sum of the devices' cotangents. "xla" only.
        implementation: "reference" (plain jax.numpy and autodiff, [N, V] in memory), "xla" (blocks), "pallas_tpu" or
            "pallas_mosaic_gpu" (Mosaic kernels for TPU and for Hopper GPUs; bfloat16 or float32), or None:
            "pallas_mosaic_gpu" on one Hopper GPU for bfloat16 heads whose second axis is a multiple of 64 and the first
            of 8, else "xla". A named one is never replaced by another: where it cannot run, that is an error.
        block: columns per block of "xla" (None: tuned for the device, else 2 MiB of logits on CPU and 256 MiB
            elsewhere), per tile of "pallas_tpu" (a multiple of 128; None: what fits into vector memory), or per block
            of the backward pass of "pallas_mosaic_gpu" (a multiple of 64; None: 256 MiB).

    Returns:
        TokenStatistics of [N] arrays; what was not computed is None.

    Raises:
        ValueError: shapes, names or numbers that do not fit. TypeError: targets that are not integers.
        NotImplementedError: what the named implementation cannot do.

    Source: derivation in kernels/README.md; the pruning in arXiv 2512.23087.
    """
    op = "token_statistics"
    vocabulary = checks.shapes(op, hidden, head, targets, vocabulary_axis, reference)
    checks.rows(op, mask, hidden.shape[0])
    targets = checks.tokens(targets, mask)
    free = implementation is None and top_k is None and vocabulary_mesh_axis is None
    if free and _dispatch.one_hopper() and pallas_mosaic_gpu.preferred(Logits(hidden, head, reference, None)):
        implementation = "pallas_mosaic_gpu"
    chosen = _dispatch.resolve(op, implementation, IMPLEMENTATIONS)
    checks.supported(op, chosen, soft_cap, top_k, vocabulary_mesh_axis)
    whole = across_devices.whole_vocabulary(vocabulary, vocabulary_mesh_axis)
    wanted = checks.wanted(op, statistics, reference is not None, log_min_p is not None, top_k, whole)
    checks.target_range(op, targets, whole)
    dtypes = _dtypes(hidden, head, reference)
    dtype = accumulator(*dtypes)
    inverse = checks.inverse_temperature(op, temperature, hidden.shape[0], dtype)
    pruning = checks.log_min_p(op, log_min_p, dtype)
    if not set(wanted) & set(WITH_REFERENCE):
        reference = None
    with jax.named_scope(f"{op}.{chosen}"):
        if chosen == "reference":
            values = plain.statistics(
                *_without_masked_rows(mask, hidden, head, targets, reference),
                inverse,
                pruning,
                vocabulary_axis=vocabulary_axis,
                wanted=wanted,
                soft_cap=soft_cap,
                top_k=top_k,
            )
        else:
            engine = ENGINES[chosen]
            size = engine.columns(op, block, *hidden.shape, vocabulary, dtypes)
            plan = vjp.Plan(Layout(vocabulary_axis, vocabulary, size), wanted, soft_cap, top_k, vocabulary_mesh_axis)
            by_row = (targets, inverse, pruning)
            heads, _ = vary_together(((hidden, head, reference), by_row))
            (targets, inverse, pruning), _ = vary_together((by_row, heads), besides=vocabulary_mesh_axis)
            values = vjp.statistics(engine, plan, *heads[:2], targets, heads[2], inverse, pruning)
        if mask is None:
            return values  # pyright: ignore[reportReturnType]
        return jax.tree.map(lambda x: jnp.where(mask, x, jnp.zeros((), x.dtype)), values)


def _without_masked_rows(mask: Array | None, hidden, head, targets, reference):
    """Zeros instead of masked rows, for autodiff: it multiplies zero cotangents with what such rows hold."""
    if mask is None:
        return hidden, head, targets, reference

    def clean(x: Array) -> Array:
        return jnp.where(mask[:, None], x, jnp.zeros((), x.dtype))

    if reference is not None:
        name = reference._fields[0]
        reference = reference._replace(**{name: clean(getattr(reference, name))})
    return clean(hidden), head, targets, reference


def token_loss(
    hidden: Float[Array, "N D"],
    head: Float[Array, "_ _"],
    targets: Int[Array, " N"],
    per_token_loss: Callable[..., Array],
    *side_arrays: Array,
    vocabulary_axis: int = 1,
    reference: Reference | ReferenceLogits | None = None,
    temperature: ScalarLike | Float[Array, " N"] = 1.0,
    soft_cap: float | None = None,
    log_min_p: ScalarLike | None = None,
    top_k: int | None = None,
    mask: Bool[Array, " N"] | None = None,
    statistics: Sequence[str] | None = None,
    vocabulary_mesh_axis: str | None = None,
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
        hidden, head, targets, vocabulary_axis, reference, temperature, soft_cap, log_min_p, top_k,
            vocabulary_mesh_axis, block: as for `token_statistics`.
        per_token_loss: (TokenStatistics of [rows] arrays, side arrays of the same rows) -> [rows] losses. It is called
            on tiles of rows in any order, so it must treat each row alone.
        side_arrays: arrays with a leading axis N: advantages, old log-probs, weights.
        mask: [N] rows that count; None means all. Rows outside may hold anything, NaN included.
        statistics: names that per_token_loss reads; None means all that apply. The others are None, and cost nothing.
        implementation: as for `token_statistics`, but None is always "xla". A Pallas one runs the kernels of
            `token_statistics` and makes the gradient in the backward pass: six matrix products.

    Returns:
        (sum, count), scalars in the wider of float32 and the inputs' dtypes.

    Raises:
        ValueError, TypeError, NotImplementedError: as `token_statistics`; also if per_token_loss does not return one
        loss per row.
    """
    op = "token_loss"
    vocabulary = checks.shapes(op, hidden, head, targets, vocabulary_axis, reference)
    rows = hidden.shape[0]
    checks.rows(op, mask, rows)
    mask = jnp.ones((rows,), bool) if mask is None else mask
    targets = checks.tokens(targets, mask)
    chosen = _dispatch.resolve(op, implementation, IMPLEMENTATIONS)
    checks.supported(op, chosen, soft_cap, top_k, vocabulary_mesh_axis)
    whole = across_devices.whole_vocabulary(vocabulary, vocabulary_mesh_axis)
    wanted = checks.wanted(op, statistics, reference is not None, log_min_p is not None, top_k, whole)
    checks.target_range(op, targets, whole)
    dtypes = _dtypes(hidden, head, reference)
    dtype = accumulator(*dtypes)
    inverse = checks.inverse_temperature(op, temperature, rows, dtype)
    pruning = checks.log_min_p(op, log_min_p, dtype)
    if not set(wanted) & set(WITH_REFERENCE):
        reference = None
    for position, side in enumerate(side_arrays):
        if side.ndim == 0 or side.shape[0] != rows:
            raise ValueError(
                f"{op}: side array {position} has shape {side.shape}; its first axis must be N = {rows}, as hidden's."
            )
    checked = checks.loss(op, per_token_loss)
    with jax.named_scope(f"{op}.{chosen}"):
        count = jnp.sum(mask, dtype=dtype)
        if chosen == "reference":
            total = plain.loss(
                hidden,
                head,
                targets,
                reference,
                inverse,
                pruning,
                mask,
                side_arrays,
                vocabulary_axis=vocabulary_axis,
                wanted=wanted,
                soft_cap=soft_cap,
                top_k=top_k,
                per_token_loss=checked,
            )
            return total.astype(dtype), count
        if rows == 0:
            return jnp.zeros((), dtype), count
        engine = ENGINES[chosen]
        tile = xla_loss.tile_rows(rows, vocabulary, jax.default_backend()) if chosen == "xla" else rows
        size = engine.columns(op, block, tile, hidden.shape[1], vocabulary, dtypes)
        layout = Layout(vocabulary_axis, vocabulary, size)
        plan = xla_loss.LossPlan(layout, wanted, tile, checked, soft_cap, top_k, vocabulary_mesh_axis)
        by_row = (targets, inverse, pruning, mask, side_arrays)
        (hidden, head, reference), _ = vary_together(((hidden, head, reference), by_row))
        (targets, *rest), _ = vary_together((by_row, (hidden, head, reference)), besides=vocabulary_mesh_axis)
        arguments = (hidden, head, targets, reference, *rest)
        if chosen == "xla":
            total = xla_loss.loss(plan, *arguments)
        else:
            total = xla_loss.loss_of_statistics(engine, plan, *arguments)
        return total.astype(dtype), count  # pyright: ignore[reportAttributeAccessIssue]


def _dtypes(hidden: Array, head: Array, reference: Reference | ReferenceLogits | None) -> tuple[jnp.dtype, ...]:
    return tuple(x.dtype for x in jax.tree.leaves((hidden, head, reference)))
