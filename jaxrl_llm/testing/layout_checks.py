"""Checks of masks, padding and batching: the loss of the same tokens may not depend on how they are laid out.

Each check yields one sentence per thing that is wrong and nothing if all is well.
"""

from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np

from jaxrl_llm.testing.batch import CONSTANT_FIELDS
from jaxrl_llm.testing.batch import POLICY_FIELDS
from jaxrl_llm.testing.batch import Batch
from jaxrl_llm.testing.batch import example_batch
from jaxrl_llm.testing.case import QUICK
from jaxrl_llm.testing.case import Case
from jaxrl_llm.testing.case import NotApplicable
from jaxrl_llm.testing.case import as_pair
from jaxrl_llm.testing.case import number

PADDED_COLUMNS = 2
"""Empty columns at the right end of the example batch."""


def _columns(batch: Batch, function) -> Batch:
    """Apply `function` to every array that has a token axis."""
    two = {name: function(x) for name, x in batch._asdict().items() if x.ndim >= 2}
    return batch._replace(**two)


def _rows(batch: Batch, index) -> Batch:
    return jax.tree.map(lambda x: x[index], batch)


def _halves(case: Case) -> list[np.ndarray]:
    ids = np.asarray(case.batch.group_ids)
    return [np.flatnonzero(ids == own) for own in np.unique(ids)]


def finite(case: Case) -> Iterator[str]:
    """The value and the gradient are finite and the gradient is not zero everywhere."""
    if not np.isfinite(case.base.value):
        yield f"The loss is {case.base.value} on an ordinary batch."
    elif not np.isfinite(case.base.gradient).all():
        yield "The gradient holds NaN or inf on an ordinary batch, though the loss is finite."
    elif case.scale == 0:
        yield "The gradient is zero everywhere: no field of the policy reaches the loss."


def mask_values(case: Case) -> Iterator[str]:
    """What stands under the mask cannot matter, whether it is a number or NaN."""
    outside = ~np.asarray(case.batch.response_mask)

    def under_mask(change, names):
        def one(x):
            where = outside.reshape(outside.shape + (1,) * (x.ndim - 2))
            return jnp.where(where, change(x), x)

        return case.batch._replace(
            **{n: one(getattr(case.batch, n)) for n in names if getattr(case.batch, n).ndim >= 2}
        )

    fields = ("logits", *POLICY_FIELDS, *CONSTANT_FIELDS)
    other = case.run(under_mask(lambda x: 2 * x - 1, fields))
    if case.differ(other.value, case.base.value):
        yield (
            f"The loss changes from {number(case.base.value)} to {number(other.value)} when only numbers under the "
            "mask change: something reads tokens outside response_mask."
        )
    moved = next((n for n in (*POLICY_FIELDS, "logits") if np.any(other.fields[n][outside] != 0)), None)
    if moved:
        yield f"The gradient with respect to {moved} is not zero at tokens outside response_mask."
    broken = case.run(under_mask(lambda x: jnp.full_like(x, jnp.nan), fields))
    if np.isnan(broken.value):
        yield (
            "NaN under the mask makes the loss NaN: replace masked entries by jnp.where before any arithmetic instead "
            "of multiplying by the mask."
        )
    elif not all(np.isfinite(broken.fields[n]).all() for n in (*POLICY_FIELDS, "logits")):
        yield (
            "NaN under the mask makes the gradient NaN, though the loss is finite: the mask comes after the "
            "arithmetic, as a factor or in a jnp.where; clean the inputs instead."
        )


def padding_columns(case: Case) -> Iterator[str]:
    """Cutting off columns that are all padding changes nothing: the mask is a slice."""
    cut = case.run(_columns(case.batch, lambda x: x[:, :-PADDED_COLUMNS]))
    if case.differ(cut.value, case.base.value):
        yield (
            f"The loss is {number(case.base.value)}, and {number(cut.value)} without the {PADDED_COLUMNS} columns that "
            "are all padding: a mean is taken over columns instead of response tokens."
        )


def columns(case: Case) -> Iterator[str]:
    """Moving the responses by one column changes nothing."""
    moved = case.run(_columns(case.batch, lambda x: jnp.roll(x, 1, axis=1)))
    if case.differ(moved.value, case.base.value):
        yield (
            f"The loss changes from {number(case.base.value)} to {number(moved.value)} when all responses move by one "
            "column: tokens are read by their column, or next to tokens that are not theirs."
        )


def padding_rows(case: Case) -> Iterator[str]:
    """Rows without any response token (the padding of a batch) are not counted and break nothing."""
    if case.promises.advantages == "batch":
        raise NotApplicable("its advantages compare the rewards of all rows, empty ones included")
    real, empty = _halves(case)
    mask = np.asarray(case.batch.response_mask).copy()
    mask[empty] = False
    padded = case.run(case.batch._replace(response_mask=jnp.asarray(mask)))
    alone = case.run(_rows(case.batch, real))
    if not np.isfinite(padded.value):
        yield (
            "A row without response tokens makes the loss "
            f"{padded.value}: its own mean divides by a count of 0; guard the denominator by the count."
        )
    elif not np.isfinite(padded.gradient).all():
        yield "A row without response tokens makes the gradient NaN: guard the denominator before dividing."
    elif case.differ(padded.value, alone.value):
        yield (
            f"The loss is {number(alone.value)}, and {number(padded.value)} with {len(empty)} rows more that have no "
            "response token: empty rows are counted as sequences."
        )


def empty_mask(case: Case) -> Iterator[str]:
    """A batch without any response token gives sum 0, no NaN and no gradient."""
    nothing = case.run(case.batch._replace(response_mask=jnp.zeros_like(case.batch.response_mask)))
    if not (np.isfinite(nothing.total) and np.isfinite(nothing.count)):
        yield (
            f"With an empty mask the loss is {nothing.total} over a count of {nothing.count}: guard the denominator "
            "by the count, and return 0."
        )
    elif nothing.total != 0:
        yield f"With an empty mask the loss is {number(nothing.total)}; without a token it must be 0."
    if not all(np.isfinite(nothing.fields[n]).all() for n in POLICY_FIELDS):
        yield "With an empty mask the gradient is NaN or inf; it must be 0."
    elif any(np.any(nothing.fields[n] != 0) for n in POLICY_FIELDS):
        yield "With an empty mask the gradient is not 0."


def permutation(case: Case) -> Iterator[str]:
    """The order of the sequences does not matter, and groups are known by their ids alone."""
    order = np.random.default_rng(1).permutation(case.batch.rewards.shape[0])
    mixed = case.run(_rows(case.batch, order))
    if case.differ(mixed.value, case.base.value) or case.differ(mixed.gradient, case.base.gradient[order]):
        yield (
            f"The loss is {number(case.base.value)}, and {number(mixed.value)} or with another gradient when the "
            "sequences change places: groups or positions are read from the order of the rows."
        )


def micro_batches(case: Case) -> Iterator[str]:
    """Two micro-batches combine to the batch: sums and counts add up."""
    if case.promises.advantages == "batch":
        raise NotApplicable("its advantages need the whole batch; compute them before it is cut")
    halves = _halves(case)
    parts = [case.run(_rows(case.batch, rows)) for rows in halves]
    total = sum(part.total for part in parts)
    count = sum(part.count for part in parts)
    if case.promises.aggregation == "token-sum":
        count = np.ones_like(count)
    if count == 0:
        yield "The counts of two micro-batches add to 0."
        return
    value = total / count
    if not case.differ(value, case.base.value):
        return
    if all(part.count == 1 for part in (*parts, case.base)):
        yield (
            f"The loss of the batch is {number(case.base.value)}; the mean over its two micro-batches is "
            f"{number(value)}, because their responses have different lengths. Return (sum, count), and divide after "
            "adding."
        )
    else:
        yield (
            f"The loss of the batch is {number(case.base.value)}; sums and counts of two micro-batches give "
            f"{number(value)}: sum or count is not a sum over sequences."
        )


def vmap(case: Case) -> Iterator[str]:
    """vmap over batches equals a loop over them."""
    batches = [case.batch, example_batch(1, advantages=case.promises.advantages)]
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *batches)
    try:
        mapped = jax.vmap(lambda b: as_pair(case.run.loss_fn(b)))
        totals, counts = jax.jit(mapped, compiler_options=QUICK)(stacked)
    except Exception as error:  # whatever a user's function raises is the finding
        yield f"vmap over batches fails with {type(error).__name__}: {str(error).splitlines()[0]}"
        return
    for batch, total, count in zip(batches, totals, counts, strict=True):
        one = case.run(batch)
        if case.differ(total, one.total) or case.differ(count, one.count):
            yield (
                f"Under vmap the loss of a batch is {number(total)} over {number(count)}, and {number(one.total)} "
                f"over {number(one.count)} alone: something sums over the mapped axis."
            )
            return
