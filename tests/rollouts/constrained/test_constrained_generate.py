"""The constrained sampler against full forward passes of the same model, renormalised over what the grammar allows."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxrl_llm.models.config import tiny
from jaxrl_llm.models.tokenizers import ByteTokenizer
from jaxrl_llm.models.transformer import Transformer
from jaxrl_llm.rollouts import Rollout
from jaxrl_llm.rollouts import SamplingSettings
from jaxrl_llm.rollouts import make_generate
from jaxrl_llm.rollouts.constrained import Grammar
from jaxrl_llm.rollouts.constrained import TokenMasker
from jaxrl_llm.rollouts.constrained import make_constrained_generate
from jaxrl_llm.rollouts.constrained import score_constrained
from jaxrl_llm.rollouts.constrained import unpack_mask

TOKENIZER = ByteTokenizer()
VOCABULARY = 270
MASKER = TokenMasker(TOKENIZER, VOCABULARY)
WORDS = Grammar.from_regex("(a|bc|c[ad]){1,3}")
NEW, GROUP, TEMPERATURE = 6, 256, 0.7


@pytest.fixture(scope="module")
def model() -> Transformer:
    model = Transformer(tiny(vocab_size=VOCABULARY, num_layers=1), rngs=nnx.Rngs(0))
    model.final_norm.scale[...] = 8 * model.final_norm.scale[...]
    return model


@pytest.fixture(scope="module")
def prompts() -> tuple[np.ndarray, np.ndarray]:
    return TOKENIZER.encode_batch(["why", "a"])


@pytest.fixture(scope="module")
def rollout(model: Transformer, prompts: tuple[np.ndarray, np.ndarray]) -> Rollout:
    graphdef, state = nnx.split(model)
    settings = SamplingSettings(temperature=TEMPERATURE)
    options = {"max_new_tokens": NEW, "group_size": GROUP, "sampling": settings, "pad_id": TOKENIZER.pad_id}
    generate = make_constrained_generate(graphdef, MASKER, **options)
    sampled = generate(state, *map(jnp.asarray, prompts), jax.random.key(0), 0, jnp.arange(2), grammars=[WORDS, None])
    free = make_generate(graphdef, eos_id=MASKER.end_ids, **options)
    without = free(state, *map(jnp.asarray, prompts), jax.random.key(0), 0, jnp.arange(2))
    # Without a grammar it is the other sampler, draw by draw.
    np.testing.assert_array_equal(sampled.tokens[GROUP:], without.tokens[GROUP:])
    np.testing.assert_array_equal(sampled.response_mask[GROUP:], without.response_mask[GROUP:])
    np.testing.assert_allclose(sampled.log_prob_behaviour[GROUP:], without.log_prob_behaviour[GROUP:], atol=1e-5)
    return jax.device_get(sampled)


def responses(rollout: Rollout) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    width = rollout.tokens.shape[1] - NEW
    return (
        rollout.tokens[:GROUP, width:],
        rollout.response_mask[:GROUP, width:],
        rollout.log_prob_behaviour[:GROUP, width:],
    )


def test_texts_are_of_the_grammar(rollout: Rollout) -> None:
    tokens, real, _ = responses(rollout)
    texts = TOKENIZER.decode_batch(tokens, real)
    ended = [TOKENIZER.eos_id in row[keep] for row, keep in zip(tokens, real, strict=True)]
    assert sum(ended) > GROUP / 2
    assert len({*texts}) > 10
    for text, whole in zip(texts, ended, strict=True):
        assert re.fullmatch("(a|bc|c[ad]){1,3}" if whole else "(a|bc|c[ad])*[bc]?", text), text


def renormalised(model: Transformer, rollout: Rollout) -> tuple[np.ndarray, np.ndarray]:
    """log p^A of the whole vocabulary in float64 [B, R, V], and what is allowed, worked out by hand."""
    tokens, real, _ = responses(rollout)
    logits = model.logits(model(jnp.asarray(rollout.tokens[:GROUP]), jnp.asarray(rollout.token_mask[:GROUP])))
    z = np.asarray(logits[:, -NEW - 1 : -1], np.float64) / TEMPERATURE
    allowed = np.zeros(z.shape, bool)
    for row, column in zip(*np.nonzero(real), strict=True):
        text = TOKENIZER.decode(tokens[row, :column])
        words = len([*re.finditer("a|bc|c[ad]", text)])
        inside = text.endswith("b") or (text.endswith("c") and not text.endswith("bc"))
        state = text[-1:] if inside else ""
        letters = {"b": "c", "c": "ad"}[state] if inside else ("abc" if words < 3 else "") + ("$" if words else "")
        allowed[row, column, [TOKENIZER.eos_id if letter == "$" else ord(letter) for letter in letters]] = True
    masked = np.where(allowed, z, -np.inf)
    with np.errstate(all="ignore"):  # at padding nothing is allowed here
        return masked - np.log(np.sum(np.exp(masked), axis=-1, keepdims=True)), allowed


def test_recorded_log_probs_are_renormalised_over_what_is_allowed(model: Transformer, rollout: Rollout) -> None:
    tokens, real, recorded = responses(rollout)
    log_probs, allowed = renormalised(model, rollout)
    taken = np.take_along_axis(log_probs, tokens[..., None], axis=2)[..., 0]
    np.testing.assert_allclose(recorded[real], taken[real], atol=2e-5)
    assert np.all(recorded[~real] == 0)
    forced = real & (allowed.sum(axis=2) == 1)
    assert forced.any()
    np.testing.assert_array_equal(recorded[forced], 0)
    # The masks that a trainer replays are those worked out by hand.
    masks = MASKER.replay([WORDS] * GROUP, tokens, real)
    np.testing.assert_array_equal(np.asarray(unpack_mask(masks, VOCABULARY))[real], allowed[real])


def test_draws_have_the_renormalised_distribution(model: Transformer, rollout: Rollout) -> None:
    """Each letter's number among the draws of one context is within four standard deviations of what p^A says."""
    tokens, real, _ = responses(rollout)
    log_probs, _ = renormalised(model, rollout)
    for column, context in ((0, ()), (1, (97,)), (1, (99,))):
        rows = real[:, column] & (tokens[:, :column] == np.array(context)).all(axis=1)
        p = np.exp(log_probs[rows][0, column])
        counts = np.bincount(tokens[rows, column], minlength=VOCABULARY)
        deviation = np.sqrt(rows.sum() * p * (1 - p))
        assert np.all(np.abs(counts - rows.sum() * p) <= 4 * deviation)
        assert rows.sum() > 20


def test_the_trainer_computes_the_recorded_log_probs_again(model: Transformer, rollout: Rollout) -> None:
    tokens, real, recorded = responses(rollout)
    masks = MASKER.replay([WORDS] * GROUP, tokens, real)
    texts = jnp.asarray(rollout.tokens[:GROUP]), jnp.asarray(rollout.token_mask[:GROUP])
    found = np.asarray(score_constrained(model, *texts, jnp.asarray(masks), temperature=TEMPERATURE))
    np.testing.assert_allclose(found[real], recorded[real], atol=2e-5)
    off = np.asarray(score_constrained(model, *texts, jnp.asarray(masks), temperature=1.0))
    assert np.abs(off[real] - recorded[real]).max() > 1e-2


def test_a_token_that_the_grammar_does_not_allow_cannot_be_replayed() -> None:
    tokens = np.array([[97, 120]])
    with pytest.raises(ValueError, match="row 0 does not allow token 120"):
        MASKER.replay([WORDS], tokens, np.ones((1, 2), bool))
    assert MASKER.replay([WORDS], tokens, np.array([[True, False]])).shape == (1, 2, 9)


def test_arguments_that_cannot_be(model: Transformer, prompts: tuple[np.ndarray, np.ndarray]) -> None:
    graphdef, state = nnx.split(model)
    options = {"group_size": 1, "sampling": SamplingSettings(), "pad_id": 0}
    with pytest.raises(ValueError, match="max_new_tokens must be at least 1"):
        make_constrained_generate(graphdef, MASKER, max_new_tokens=0, **options)
    arguments = (state, *map(jnp.asarray, prompts), jax.random.key(0), 0, jnp.arange(2))
    generate = make_constrained_generate(graphdef, MASKER, max_new_tokens=2, **options)
    with pytest.raises(ValueError, match="grammars has 1 entries; it must have 2"):
        generate(*arguments, grammars=[WORDS])
    other = make_constrained_generate(graphdef, TokenMasker(TOKENIZER, 300), max_new_tokens=2, **options)
    with pytest.raises(ValueError, match="masker is for 300 tokens; the model has 270"):
        other(*arguments, grammars=[WORDS, WORDS])
