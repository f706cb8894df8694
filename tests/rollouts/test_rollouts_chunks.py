"""Chunks of several tokens against steps of one: the same states and the same cache, each row at its own place."""

import jax
import numpy as np
import pytest
from flax import nnx

from jaxrl_llm.models.config import ExpertsConfig
from jaxrl_llm.models.config import tiny
from jaxrl_llm.models.transformer import Transformer
from jaxrl_llm.rollouts.chunks import LARGEST_CHUNK
from jaxrl_llm.rollouts.chunks import SMALLEST_CHUNK
from jaxrl_llm.rollouts.chunks import chunk_width
from jaxrl_llm.rollouts.chunks import read_chunk
from jaxrl_llm.rollouts.decode import DecodeWeights
from jaxrl_llm.rollouts.decode import PromptCache
from jaxrl_llm.rollouts.decode import ResponseCache
from jaxrl_llm.rollouts.decode import decode_step

ROWS, LENGTH = 4, 6


def test_a_chunk_is_as_many_steps_and_rows_may_differ() -> None:
    """Two prompts, one of them padded, two rows each; then rows of 6, 4, 1 and 0 tokens, in two chunks."""
    experts = ExpertsConfig(count=4, chosen=2, width=16, shared=1, dense_layers=1)
    model = Transformer(tiny(qk_norm=True, qkv_bias=True, rotary_fraction=0.5, experts=experts), rngs=nnx.Rngs(0))
    mask = np.array([[False, False, True, True, True], [True] * 5])
    weights = DecodeWeights.of(model)
    prompt = PromptCache.of(jax.jit(model.prefill)(np.arange(10).reshape(2, 5), mask)[1], weights.dtype)
    empty = ResponseCache.empty(model.config, ROWS, LENGTH, weights.dtype)
    tokens = np.random.default_rng(1).integers(0, 64, (ROWS, LENGTH), np.int32)

    step = jax.jit(lambda tokens, slot, cache: decode_step(weights, tokens, slot, prompt, cache))
    expected, slots = [], empty
    for slot in range(LENGTH):
        hidden, slots = step(tokens[:, slot], slot, slots)
        expected.append(hidden)

    read = jax.jit(lambda *given: read_chunk(weights, *given[:3], prompt, given[3]))
    lengths, first = np.array([6, 4, 1, 0]), np.array([3, 1, 1, 0])
    _, found = read(tokens[:, :4], first, np.zeros(ROWS, int), empty)
    rest = np.stack([np.roll(row, -count)[:4] for row, count in zip(tokens, first, strict=True)])
    hidden, found = read(rest, lengths - first, first, found)
    for row in (0, 1):
        np.testing.assert_allclose(hidden[row], expected[lengths[row] - 1][row], atol=1e-5)
    for row, count in enumerate(lengths):
        for mine, one_by_one, axis in ((found.keys, slots.keys, 2), (found.values, slots.values, 1)):
            for x, y in zip(mine, one_by_one, strict=True):
                x, y = (np.moveaxis(np.asarray(array[row]), axis, 0) for array in (x, y))
                np.testing.assert_allclose(x[:count], y[:count], atol=1e-5)
                assert not x[count:].any()


@pytest.mark.parametrize("longest", [1, 16, 17, 100, 128, 1000])
def test_widths_are_few_and_hold_what_they_must(longest: int) -> None:
    width = chunk_width(longest)
    assert min(longest, LARGEST_CHUNK) <= width <= max(SMALLEST_CHUNK, 2 * longest - 1)
    assert width in (16, 32, 64, 128)
