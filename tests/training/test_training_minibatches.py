"""Every kept prompt is used once per epoch, in a keyed order, in minibatches of one shape."""

import jax
import numpy as np
import pytest

from jaxrl_llm.training.text.minibatches import UpdateSettings
from jaxrl_llm.training.text.minibatches import plan_minibatches


@pytest.mark.parametrize("micro_batch", [0, 1, 2, 3])
@pytest.mark.parametrize("left_out", [0, 1, 6, 10, 11])
def test_each_kept_row_is_used_once_per_epoch(micro_batch, left_out):
    kept = np.ones(11, bool)
    kept[:left_out] = False
    settings = UpdateSettings(minibatches=4, epochs=2, micro_batch=micro_batch)
    plan = plan_minibatches(jax.random.key(0), kept, rows_per_prompt=2, settings=settings)
    assert len({part.rows.shape for part in plan}) <= 1
    expected = [row for prompt in np.flatnonzero(kept) for row in (2 * prompt, 2 * prompt + 1)]
    per_epoch = min(4, int(kept.sum()))
    assert len(plan) == 2 * per_epoch
    for epoch in range(2):
        parts = plan[epoch * per_epoch : (epoch + 1) * per_epoch]
        # What is used lies in the first micro-batches; the rest is padding.
        used = [row for part in parts for row in part.rows[: part.used].ravel() if row >= 0]
        assert sorted(used) == expected
        assert all((part.rows[part.used :] == -1).all() for part in parts)
        sizes = [int((part.rows >= 0).sum()) for part in parts]
        assert max(sizes, default=0) - min(sizes, default=0) <= 2


def test_the_order_is_the_keys_and_changes_with_the_epoch():
    kept = np.ones(32, bool)
    settings = UpdateSettings(minibatches=1, epochs=2)
    first, again, other = (
        plan_minibatches(jax.random.key(seed), kept, rows_per_prompt=1, settings=settings) for seed in (0, 0, 1)
    )
    assert all((a.rows == b.rows).all() for a, b in zip(first, again, strict=True))
    assert (first[0].rows != first[1].rows).any()
    assert (first[0].rows != other[0].rows).any()


@pytest.mark.parametrize(("field", "value"), [("minibatches", 0), ("micro_batch", -1), ("stop_after_skipped", 0)])
def test_impossible_numbers_are_refused_by_name(field, value):
    with pytest.raises(ValueError, match=f"{field} is {value}"):
        UpdateSettings(**{field: value})
