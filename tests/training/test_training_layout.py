"""A packed row gives every response token the state and the gradient that the plain layout gives it."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxrl_llm.models.config import tiny
from jaxrl_llm.models.transformer import Transformer
from jaxrl_llm.training.text.layout import Grid
from jaxrl_llm.training.text.layout import choose_slots
from jaxrl_llm.training.text.layout import chosen_states
from jaxrl_llm.training.text.layout import pack
from jaxrl_llm.training.text.layout import through_layers
from jaxrl_llm.training.text.layout import visibility

PROMPT, RESPONSE, GROUP = 5, 4, 6


@pytest.fixture(scope="module")
def batch() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Two prompts of different lengths, six answers each that end at different places."""
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, 64, (2 * GROUP, PROMPT + RESPONSE)).astype(np.int32)
    mask = np.ones_like(tokens, bool)
    for group, padding in enumerate((0, 3)):
        rows = slice(group * GROUP, (group + 1) * GROUP)
        tokens[rows, :PROMPT] = tokens[rows.start, :PROMPT]
        mask[rows, :padding] = False
    for row, length in enumerate(rng.integers(1, RESPONSE + 1, 2 * GROUP)):
        mask[row, PROMPT + length :] = False
    return tokens, mask, np.repeat(np.array([7, 3]), GROUP)


def states(model: Transformer, batch, slots: int) -> jax.Array:
    layout = Grid(PROMPT, slots, RESPONSE)
    packed = jax.tree.map(jnp.asarray, pack(*batch, layout))
    x = through_layers(model, model.embed(packed.tokens), packed, start=0).x
    return chosen_states(model.final_norm(x), packed).reshape(2 * GROUP, RESPONSE, -1)


def close(got, expected):
    # Relative to the largest entry of the parameter: entries near zero carry the rounding of the large ones.
    np.testing.assert_allclose(got, expected, rtol=0, atol=2e-5 * float(jnp.max(jnp.abs(expected))))


@pytest.mark.parametrize("slots", [1, 2, 3, 6])
def test_states_and_gradients_equal_the_plain_forward_pass(batch, slots):
    model = Transformer(tiny(), rngs=nnx.Rngs(0))
    graphdef, params = nnx.split(model)
    tokens, mask, _ = batch
    weights = jax.random.normal(jax.random.key(1), (2 * GROUP, RESPONSE, 32))
    weights = weights * mask[:, PROMPT:, None]

    def plain(params):
        hidden = nnx.merge(graphdef, params)(jnp.asarray(tokens), jnp.asarray(mask))[:, PROMPT - 1 : -1]
        return jnp.sum(weights * hidden), hidden

    def packed(params):
        hidden = states(nnx.merge(graphdef, params), batch, slots)
        return jnp.sum(weights * hidden), hidden

    (_, expected), expected_gradient = jax.jit(jax.value_and_grad(plain, has_aux=True))(params)
    (_, got), gradient = jax.jit(jax.value_and_grad(packed, has_aux=True))(params)
    real = mask[:, PROMPT:]
    np.testing.assert_allclose(np.asarray(got)[real], np.asarray(expected)[real], atol=2e-5)

    jax.tree.map(close, gradient, expected_gradient)


def test_an_answer_sees_its_prompt_and_itself_only(batch):
    layout = Grid(PROMPT, 2, RESPONSE)
    packed = jax.tree.map(jnp.asarray, pack(*batch, layout))
    mask = np.asarray(visibility(dataclasses.replace(packed, token_mask=jnp.ones_like(packed.token_mask))).dense())[0]
    first, second = PROMPT, PROMPT + RESPONSE - 1
    assert mask[second, :PROMPT].all()
    assert not mask[second, first:second].any()
    assert mask[first + 1, first]
    assert not mask[first, first + 1]
    assert not mask[:PROMPT, PROMPT:].any()


def test_one_token_answers_leave_the_prompt_alone(batch):
    tokens, mask, ids = batch
    packed = pack(tokens[:, : PROMPT + 1], mask[:, : PROMPT + 1], ids, Grid(PROMPT, GROUP, 1))
    assert packed.tokens.shape == (2, PROMPT)
    assert chosen_states(jnp.ones((2, PROMPT, 8)), packed).shape == (2, GROUP, 8)


def test_short_answers_share_a_row_and_long_ones_do_not():
    config = tiny(hidden_size=64, intermediate_size=128)
    assert choose_slots(config, 24, 6, 8) == 8
    assert choose_slots(config, 24, 2048, 8) == 1


def test_wrong_widths_and_mixed_groups_are_refused(batch):
    tokens, mask, ids = batch
    with pytest.raises(ValueError, match=r"tokens has 9 columns; it must have 6 \(prompt\) \+ 4"):
        pack(tokens, mask, ids, Grid(6, 1, 4))
    with pytest.raises(ValueError, match="runs of 4 equal ids"):
        pack(tokens, mask, ids, Grid(PROMPT, 4, RESPONSE))
    with pytest.raises(ValueError, match="slots is 0"):
        Grid(4, 0, 4)
