import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxrl_llm.models.cache import KVCache
from jaxrl_llm.models.config import tiny
from jaxrl_llm.models.transformer import Transformer

BATCH, PROMPT, TOTAL = 3, 5, 9


@pytest.fixture(scope="module")
def model(random_transformer) -> Transformer:
    return random_transformer(tiny(qk_norm=True))


@pytest.fixture(scope="module")
def tokens() -> jax.Array:
    return jax.random.randint(jax.random.key(1), (BATCH, TOTAL), 0, 64)


@pytest.fixture(scope="module")
def token_mask() -> jax.Array:
    """No padding, some, and all but one token of the prompt."""
    return jnp.arange(TOTAL) >= jnp.array([[0], [2], [PROMPT - 1]])


@jax.jit
def extend(model: Transformer, tokens, cache, token_mask=None):
    return model.extend(tokens, cache, token_mask)


def prefilled(model: Transformer, tokens, token_mask, capacity=TOTAL):
    return jax.jit(lambda t, m: model.prefill(t, m, capacity=capacity))(tokens[:, :PROMPT], token_mask[:, :PROMPT])


@pytest.mark.parametrize("steps", [(1, 1, 1, 1), (4,), (3, 1)])
def test_reading_in_parts_equals_reading_at_once(model, tokens, token_mask, steps):
    expected = jax.jit(lambda: model(tokens, token_mask))()
    hidden, cache = prefilled(model, tokens, token_mask)
    parts, at = [hidden], PROMPT
    for step in steps:
        hidden, cache = extend(model, tokens[:, at : at + step], cache)
        parts.append(hidden)
        at += step
    np.testing.assert_allclose(jnp.concatenate(parts, 1)[token_mask], expected[token_mask], atol=5e-6)
    assert (int(cache.length), cache.capacity, cache.batch) == (TOTAL, TOTAL, BATCH)
    np.testing.assert_array_equal(cache.slot_mask, token_mask)


def test_room_left_over_changes_nothing(model, tokens, token_mask):
    tight, _ = extend(model, tokens[:, 5:6], prefilled(model, tokens, token_mask, PROMPT + 1)[1])
    roomy, _ = extend(model, tokens[:, 5:6], prefilled(model, tokens, token_mask, 4 * TOTAL)[1])
    np.testing.assert_allclose(tight, roomy, atol=2e-6)


def test_masked_tokens_in_between_are_skipped(model, tokens, token_mask):
    """Rows that ended go on being fed; what they are fed is neither counted nor attended to."""
    _, cache = prefilled(model, tokens, token_mask)
    _, padded = extend(model, tokens[:, 8:9], cache, jnp.zeros((BATCH, 1), bool))
    expected, _ = extend(model, tokens[:, 5:6], cache)
    hidden, after = extend(model, tokens[:, 5:6], padded)
    np.testing.assert_allclose(hidden, expected, atol=2e-6)
    np.testing.assert_array_equal(after.slot_mask[:, PROMPT:], [[False, True, False, False]] * BATCH)


def test_a_group_shares_the_prompt_that_was_read_once(model, tokens, token_mask):
    group = 2
    _, cache = prefilled(model, tokens, token_mask, PROMPT)
    cache = cache.repeat(group).grow(TOTAL)
    samples = jax.random.randint(jax.random.key(2), (BATCH * group, 4), 0, 64)
    hidden, _ = extend(model, samples, cache)
    texts = jnp.concatenate([jnp.repeat(tokens[:, :PROMPT], group, 0), samples], 1)
    expected = jax.jit(lambda: model(texts, jnp.repeat(token_mask, group, 0)))()
    np.testing.assert_allclose(hidden, expected[:, PROMPT:], atol=5e-6)


def test_positions_go_on_where_the_row_stopped(model, tokens, token_mask):
    _, cache = prefilled(model, tokens, token_mask)
    new = jnp.array([[True, True], [False, True], [True, False]])
    np.testing.assert_array_equal(cache.next_positions(new), [[5, 6], [2, 3], [1, 1]])
    empty = KVCache.empty(model.config, 1, 3)
    np.testing.assert_array_equal(empty.next_positions(jnp.array([[False, True, True]])), [[0, 0, 1]])


def test_a_row_of_padding_is_finite(model, tokens):
    mask = jnp.zeros((BATCH, TOTAL), bool)
    hidden, cache = prefilled(model, tokens, mask)
    chex.assert_tree_all_finite((hidden, extend(model, tokens[:, :1], cache, mask[:, :1])))


def test_the_cache_has_the_dtype_of_the_products(model, tokens, token_mask):
    narrow = model.astype(compute_dtype=jnp.bfloat16)
    expected = jax.jit(lambda: narrow(tokens, token_mask))()
    _, cache = prefilled(narrow, tokens, token_mask)
    hidden, cache = extend(narrow, tokens[:, PROMPT:], cache)
    assert {leaf.dtype for leaf in (*cache.keys, *cache.values)} == {jnp.dtype(jnp.bfloat16)}
    error = jnp.abs(hidden.astype(jnp.float32) - expected[:, PROMPT:].astype(jnp.float32))
    assert jnp.mean(error) < 2**-6


def test_a_decode_loop_compiles_once_and_updates_in_place(model, tokens, token_mask):
    graphdef, state = nnx.split(model)
    _, cache = prefilled(model, tokens, token_mask)

    @chex.assert_max_traces(n=1)
    def step(state, tokens, cache):
        return nnx.merge(graphdef, state).extend(tokens, cache)

    compiled = jax.jit(step, donate_argnums=2)
    for at in range(PROMPT, TOTAL):
        before = [leaf.unsafe_buffer_pointer() for leaf in (*cache.keys, *cache.values)]
        _, cache = compiled(state, tokens[:, at : at + 1], cache)
        assert [leaf.unsafe_buffer_pointer() for leaf in (*cache.keys, *cache.values)] == before


def test_impossible_uses_are_refused(model, tokens, token_mask):
    _, cache = prefilled(model, tokens, token_mask)
    with pytest.raises(ValueError, match="capacity must be at least the present 9, got 8"):
        cache.grow(8)
    with pytest.raises(ValueError, match="count must be at least 1, got 0"):
        cache.repeat(0)
    with pytest.raises(ValueError, match="10 new tokens do not fit into a cache of capacity 9"):
        model.extend(jnp.zeros((BATCH, 10), jnp.int32), cache)
    with pytest.raises(ValueError, match="tokens has 2 rows, the cache has 3; they must be equal"):
        model.extend(tokens[:2, :1], cache)
    with pytest.raises(ValueError, match="batch and capacity must be at least 1, got 1 and 0"):
        KVCache.empty(model.config, 1, 0)
