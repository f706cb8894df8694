import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_llm.objectives import aggregation

LOSS = np.array([[1.0, 2.0, 4.0, 9.0], [3.0, 9.0, 9.0, 9.0], [9.0, 9.0, 9.0, 9.0], [5.0, -1.0, 9.0, 9.0]], np.float32)
MASK = np.array([[1, 1, 1, 0], [1, 0, 0, 0], [0, 0, 0, 0], [1, 1, 0, 0]], bool)
DIRTY = jnp.where(jnp.array(MASK), LOSS, jnp.nan)
RULE = {"length_normaliser": 8.0}

EXPECTED = {
    "token-mean": 14 / 6,
    "token-sum": 14.0,
    "seq-mean-token-sum": 14 / 3,
    "seq-mean-token-sum-norm": 14 / 3 / 8,
    "seq-mean-token-mean": (7 / 3 + 3 + 2) / 3,
}


@pytest.mark.parametrize("mode", aggregation.AGGREGATIONS)
def test_the_five_names(mode):
    total, count = aggregation.aggregate(DIRTY, jnp.array(MASK), mode=mode, **RULE)
    np.testing.assert_allclose(total / count, EXPECTED[mode], rtol=1e-6)
    assert len({round(v, 4) for v in EXPECTED.values()}) == 5  # no two rules agree on this batch


@pytest.mark.parametrize("mode", aggregation.AGGREGATIONS)
@pytest.mark.parametrize("cuts", [(1, 3), (2, 2), (1, 1, 2)])
def test_micro_batches_combine_exactly(mode, cuts):
    parts, start = [], 0
    for size in cuts:
        rows = slice(start, start + size)
        start += size
        parts.append(
            aggregation.aggregate(DIRTY[rows], jnp.array(MASK[rows]), mode=mode, batch_fraction=size / 4, **RULE)
        )
    total, count = sum(p[0] for p in parts), sum(p[1] for p in parts)
    np.testing.assert_allclose(total / count, EXPECTED[mode], rtol=1e-6)


@pytest.mark.parametrize("mode", aggregation.AGGREGATIONS)
def test_weights_say_the_same(mode):
    weights, count = aggregation.token_weights(jnp.array(MASK), mode=mode, **RULE)
    np.testing.assert_allclose(np.sum(np.asarray(weights) * LOSS) / count, EXPECTED[mode], rtol=1e-6)
    gradient = jax.grad(lambda x: aggregation.aggregate(x, jnp.array(MASK), mode=mode, **RULE)[0])(DIRTY)
    np.testing.assert_allclose(gradient, weights, rtol=1e-6)


def test_a_token_weighs_what_the_rule_says():
    # Lengths 2 and 8: token-mean gives every token 1/10; the sequence mean 1/4 and 1/16.
    mask = jnp.arange(8)[None, :] < jnp.array([2, 8])[:, None]
    for mode, expected in (("token-mean", (0.1, 0.1)), ("seq-mean-token-mean", (1 / 4, 1 / 16))):
        weights, count = aggregation.token_weights(mask, mode=mode)
        np.testing.assert_allclose((weights / count)[:, 0], expected, rtol=1e-6)


def test_rejected_sequences_stay_in_the_denominator_unless_asked():
    accepted = jnp.array([True, False, True, False])
    masked_loss = jnp.where(accepted[:, None], DIRTY, 0.0)
    total, count = aggregation.seq_mean_token_sum(masked_loss, jnp.array(MASK))
    np.testing.assert_allclose((total, count), (7.0, 3.0))
    total, count = aggregation.aggregate_accepted(DIRTY, jnp.array(MASK), accepted, mode="seq-mean-token-sum")
    np.testing.assert_allclose((total, count), (7.0, 1.0))
    total, count = aggregation.aggregate_accepted(DIRTY, jnp.array(MASK), accepted, mode="token-mean")
    np.testing.assert_allclose((total, count), (7.0, 3.0))
    none = aggregation.aggregate_accepted(DIRTY, jnp.array(MASK), ~accepted & False, mode="seq-mean-token-mean")
    np.testing.assert_array_equal(none, (0.0, 0.0))


def test_the_empty_batch_is_zero_over_zero_sequences():
    empty = jnp.zeros((2, 3), bool)
    for mode in ("token-mean", "seq-mean-token-sum", "seq-mean-token-mean"):
        np.testing.assert_array_equal(aggregation.aggregate(jnp.full((2, 3), jnp.nan), empty, mode=mode), (0.0, 0.0))


def test_bad_input_is_a_sentence(without_type_hook):
    with pytest.raises(ValueError, match=r"mode is 'token_mean'; it must be one of .* Did you mean 'token-mean'"):
        aggregation.aggregate(DIRTY, jnp.array(MASK), mode="token_mean")
    with pytest.raises(ValueError, match="length_normaliser is None"):
        aggregation.aggregate(DIRTY, jnp.array(MASK), mode="seq-mean-token-sum-norm")
    with pytest.raises(ValueError, match=r"loss_t is float32\[4\]; it must have 2 axes"):
        aggregation.token_mean(DIRTY[0], jnp.array(MASK))


@pytest.mark.parametrize("mode", aggregation.AGGREGATIONS)
def test_nothing_accepted_has_sum_zero_and_the_count_of_its_rule(mode):
    loss, mask = jnp.ones((2, 3)), jnp.ones((2, 3), bool)
    rule = {"mode": mode, "length_normaliser": 3.0, "batch_fraction": 0.25}
    total, count = aggregation.aggregate_accepted(loss, mask, jnp.zeros(2, bool), **rule)
    assert total == 0
    assert count == (0.25 if mode == "token-sum" else 0)
    # Four micro-batches, of which one has nothing accepted: the sum over the batch is divided by 1, not by 3/4.
    parts = [
        aggregation.aggregate_accepted(loss, mask, jnp.full(2, some), **rule) for some in (True, True, True, False)
    ]
    if mode == "token-sum":
        assert sum(x for x, _ in parts) / sum(n for _, n in parts) == 18
