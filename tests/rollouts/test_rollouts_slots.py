"""Slots against the plain sampler and against scoring: each text is what it would be alone, whatever the others do."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxrl_llm import categorical
from jaxrl_llm.models.config import ExpertsConfig
from jaxrl_llm.models.config import tiny
from jaxrl_llm.models.transformer import Transformer
from jaxrl_llm.rollouts import SamplingSettings
from jaxrl_llm.rollouts import make_generate
from jaxrl_llm.rollouts import slot_decoder
from jaxrl_llm.rollouts.sampling import sample_rows
from jaxrl_llm.rollouts.sampling import sample_tokens
from jaxrl_llm.rollouts.sampling import token_uniforms
from jaxrl_llm.rollouts.slot_decoder import Draw
from jaxrl_llm.rollouts.slot_decoder import SlotDecoder

VOCABULARY, CONTEXT = 64, 96
EXPERTS = ExpertsConfig(count=4, chosen=2, width=16, shared=1, dense_layers=1)


def made(**fields) -> Transformer:
    return Transformer(tiny(qk_norm=True, rotary_fraction=0.5, **fields), rngs=nnx.Rngs(0))


@pytest.fixture(scope="module", params=[None, EXPERTS], ids=["dense", "experts"])
def model(request) -> Transformer:
    model = made(experts=request.param)
    # Larger logits, so that a wrong context is seen.
    model.embedding[...] *= 20
    return model


@pytest.fixture(scope="module")
def decoder(model) -> SlotDecoder:
    return SlotDecoder(model, slots=3, context=CONTEXT)


@pytest.fixture(scope="module")
def whole(model):
    """Log-probs of every next token of a text, by the pass over whole rows."""
    graphdef, state = nnx.split(model)

    @jax.jit
    def distributions(tokens, mask):
        model = nnx.merge(graphdef, state)
        return categorical.log_probs(model.logits(model(tokens, mask)))

    def of(text: list[int]) -> np.ndarray:
        row = np.zeros((1, CONTEXT), np.int32)
        row[0, CONTEXT - len(text) :] = text
        return np.asarray(distributions(row, np.arange(CONTEXT)[None] >= CONTEXT - len(text)))[0, CONTEXT - len(text) :]

    return of


def seed(number: int) -> np.ndarray:
    return np.asarray(jax.random.key_data(jax.random.key(number)))


def prompt(length: int, number: int = 0) -> list[int]:
    return np.random.default_rng(number).integers(0, VOCABULARY, length).tolist()


def decode(decoder: SlotDecoder, slot: int, new: int, **how) -> list:
    while decoder.unread(slot):
        decoder.read(slot)
    return [decoder.step({slot: Draw(seed(7), count, **how)})[slot] for count in range(new)]


def forget(decoder: SlotDecoder) -> None:
    for slot in range(decoder.count):
        if not decoder.is_free(slot):
            decoder.close(slot)
    decoder._held = [[] for _ in range(decoder.count)]


def test_tokens_and_log_probs_are_those_of_whole_rows_whatever_the_others_do(decoder, whole):
    """Three texts of mixed lengths begin at different times; one ends, and another takes its slot."""
    forget(decoder)
    texts, waiting = {}, [prompt(40, 1), prompt(1, 2), prompt(23, 3), prompt(9, 4)]
    found, ended = [], []
    while waiting or texts:
        if waiting and any(decoder.is_free(slot) for slot in range(decoder.count)):
            text = waiting.pop(0)
            texts[decoder.open(text)] = (text, [])
        # One chunk at a time: the others draw in between.
        for slot in texts:
            if decoder.unread(slot):
                decoder.read(slot)
                break
        ready = {slot: Draw(seed(slot), len(drawn)) for slot, (_, drawn) in texts.items() if not decoder.unread(slot)}
        for slot, one in decoder.step(ready).items():
            texts[slot][1].append(one)
        for slot in [slot for slot, (text, drawn) in texts.items() if len(drawn) == 5 + len(text) // 8]:
            decoder.close(slot)
            ended.append(slot)
            found.append(texts.pop(slot))
    assert len(set(ended)) < len(ended) == 4
    for text, drawn in found:
        tokens = [one.token for one in drawn]
        expected = whole([*text, *tokens])
        for place, one in enumerate(drawn, len(text) - 1):
            np.testing.assert_allclose(one.log_prob, expected[place, one.token], atol=2e-5)
            np.testing.assert_allclose(one.log_prob_behaviour, one.log_prob, atol=2e-5)
    assert len({one.token for _, drawn in found for one in drawn}) > 3


def test_a_greedy_text_is_that_of_the_plain_sampler(model, decoder):
    forget(decoder)
    graphdef, state = nnx.split(model)
    sampling = SamplingSettings(temperature=0)
    generate = make_generate(graphdef, max_new_tokens=12, group_size=1, sampling=sampling, eos_id=(), pad_id=0)
    text = prompt(21)
    rollout = generate(state, jnp.asarray([text]), jnp.ones((1, 21), bool), jax.random.key(0), 0, jnp.arange(1))
    drawn = decode(decoder, decoder.open(text), 12, temperature=0.0)
    assert [one.token for one in drawn] == np.asarray(rollout.tokens)[0, 21:].tolist()
    assert {one.log_prob_behaviour for one in drawn} == {0.0}
    forget(decoder)


def test_a_prefix_that_a_slot_holds_is_not_read_again(decoder, whole):
    """What a closed slot kept, and what another slot at work holds, to the same log-probs."""
    forget(decoder)
    text = prompt(40, 5)
    first = decoder.open(text)
    expected = decode(decoder, first, 3)
    decoder.close(first)
    other = [*text[:30], *prompt(8, 6)]
    slot = decoder.open(other)
    assert slot == first
    assert decoder.read(slot) == 7  # 38 - 30 - the last, which the step reads
    drawn = decode(decoder, slot, 2)
    np.testing.assert_allclose(drawn[0].log_prob, whole(other)[-1, drawn[0].token], atol=2e-5)
    again = decoder.open(other)
    assert again != slot
    assert (decoder.read(again), decoder.unread(again)) == (0, 0)
    np.testing.assert_allclose(
        [one.log_prob for one in decode(decoder, decoder.open(text), 3)],
        [one.log_prob for one in expected],
        atol=2e-5,
    )
    forget(decoder)


def test_scores_of_a_prompt_are_those_of_whole_rows(decoder, whole):
    forget(decoder)
    text = prompt(60, 8)
    slot = decoder.open(text)
    scores = decoder.score(slot)
    expected = whole(text)
    np.testing.assert_allclose(scores, [expected[place, token] for place, token in enumerate(text[1:])], atol=2e-5)
    drawn = decode(decoder, slot, 1)[0]
    np.testing.assert_allclose(drawn.log_prob, expected[-1, drawn.token], atol=2e-5)
    forget(decoder)


def test_each_slot_has_its_temperature_nucleus_mask_and_list(decoder, whole):
    forget(decoder)
    texts = [prompt(20, number) for number in (9, 10, 11)]
    slots = [decoder.open(text) for text in texts]
    for slot in slots:
        decoder.read(slot)
    only = np.array([0b1011 << 4, 1 << 31], np.uint32)  # tokens 4, 5, 7 and 63
    how = [{"temperature": 0.5, "listed": True}, {"top_p": 0.3}, {"temperature": 2.0, "allowed": only}]
    drawn = decoder.step({slot: Draw(seed(slot), 0, **one) for slot, one in zip(slots, how, strict=True)})
    rows = [whole(text)[-1].astype(np.float64) for text in texts]

    def normalised(values, temperature=1.0):
        values = values / temperature
        return values - np.log(np.exp(values).sum())

    first, second, third = (drawn[slot] for slot in slots)
    np.testing.assert_allclose(first.log_prob, rows[0][first.token], atol=2e-5)
    np.testing.assert_allclose(first.log_prob_behaviour, normalised(rows[0], 0.5)[first.token], atol=4e-5)
    assert first.top_tokens.tolist() == np.argsort(-rows[0], kind="stable")[:20].tolist()
    np.testing.assert_allclose(first.top_log_prob, np.sort(rows[0])[::-1][:20], atol=2e-5)
    order = np.argsort(-rows[1], kind="stable")
    kept = order[: int(np.searchsorted(np.cumsum(np.exp(rows[1])[order]), 0.3)) + 1]
    assert second.token in kept
    inside = second.log_prob - np.log(np.exp(rows[1][kept]).sum())
    np.testing.assert_allclose(second.log_prob_behaviour, inside, atol=2e-5)
    allowed = [4, 5, 7, 63]
    assert third.token in allowed
    masked = rows[2][allowed]
    at = allowed.index(third.token)
    np.testing.assert_allclose(third.log_prob, normalised(masked)[at], atol=2e-5)
    np.testing.assert_allclose(third.log_prob_behaviour, normalised(masked, 2.0)[at], atol=2e-5)
    forget(decoder)


def test_a_mask_that_allows_nothing_is_seen(decoder):
    forget(decoder)
    one = decode(decoder, decoder.open([1, 2]), 1, allowed=np.zeros(2, np.uint32))[0]
    assert np.isnan(one.log_prob)
    assert np.isnan(one.log_prob_behaviour)
    forget(decoder)


def test_a_long_text_grows_the_cache_and_a_short_one_shrinks_it(monkeypatch, model, whole):
    monkeypatch.setattr(slot_decoder, "SMALLEST_CAPACITY", 16)
    monkeypatch.setattr(slot_decoder, "PATIENCE", 3)
    decoder = SlotDecoder(model, slots=2, context=48)
    short, long = prompt(5, 12), prompt(30, 13)
    first = decoder.open(short)
    before = decode(decoder, first, 2)
    assert decoder.capacity == 16
    second = decoder.open(long)
    drawn = decode(decoder, second, 18)
    assert decoder.capacity == 48
    with pytest.raises(ValueError, match="reached the context of 48 tokens"):
        decoder.step({second: Draw(seed(0), 18)})
    expected = whole([*long, *(one.token for one in drawn)])
    for place, one in enumerate(drawn, len(long) - 1):
        np.testing.assert_allclose(one.log_prob, expected[place, one.token], atol=2e-5)
    decoder.close(second)
    after = [decoder.step({first: Draw(seed(7), count)})[first] for count in range(2, 6)]
    assert decoder.capacity == 16
    expected = whole([*short, *(one.token for one in [*before, *after])])
    for place, one in enumerate([*before, *after], len(short) - 1):
        np.testing.assert_allclose(one.log_prob, expected[place, one.token], atol=2e-5)


def test_other_weights_are_used_from_the_next_step_on_as_if_all_had_been_read_with_them(whole):
    first, second = made(), Transformer(tiny(qk_norm=True, rotary_fraction=0.5), rngs=nnx.Rngs(1))
    decoder, expected = SlotDecoder(first, slots=3, context=CONTEXT), SlotDecoder(second, slots=3, context=CONTEXT)
    text = prompt(20, 14)
    slot = decoder.open(text)
    begun = decode(decoder, slot, 2)
    decoder.load(second)
    assert decoder.unread(slot) == 21
    drawn = decode(decoder, slot, 1)[0]
    alone = decode(expected, expected.open([*text, *(one.token for one in begun)]), 1)[0]
    np.testing.assert_allclose(drawn.log_prob, alone.log_prob, atol=2e-5)
    with pytest.raises(ValueError, match="the model has the configuration"):
        decoder.load(made(experts=EXPERTS))


@pytest.mark.parametrize("drawn_from", [True, False])
def test_a_slot_keeps_no_nan_for_the_texts_after_it(drawn_from):
    """Neither those that were drawn from nor those that were closed before: 0 * NaN is NaN behind a shorter text."""
    good, broken = made(), made()
    broken.embedding[5] *= np.nan
    decoder = SlotDecoder(good, slots=2, context=CONTEXT)
    expected = decode(decoder, decoder.open([1] * 3), 1)[0].log_prob
    forget(decoder)
    decoder.load(broken)
    slot = decoder.open([*[5] * 3, *prompt(20)])
    decoder.read(slot)
    if drawn_from:
        assert np.isnan(decode(decoder, slot, 1)[0].log_prob)
    decoder.close(slot)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(decoder._cache))
    slot = decoder.open([*[5] * 3, *prompt(20)])
    decoder.read(slot)
    decoder.load(good)  # with the text at work
    for _ in range(2):
        assert np.isfinite(decode(decoder, slot, 1)[0].log_prob)
        decoder.close(slot)
        slot = decoder.open([1] * 3)
    np.testing.assert_allclose(decode(decoder, slot, 1)[0].log_prob, expected, atol=1e-6)


def test_what_is_copied_ends_where_the_texts_part():
    decoder = SlotDecoder(made(), slots=2, context=CONTEXT)
    text = prompt(40)
    first = decoder.open(text)
    decode(decoder, first, 1)
    second = decoder.open([*text[:20], 1, 1])
    decoder.read(second)
    for keys, values in zip(decoder._cache.keys, decoder._cache.values, strict=True):
        assert not np.asarray(keys)[second, :, :, 21:].any()
        assert not np.asarray(values)[second, :, 21:].any()
        np.testing.assert_array_equal(keys[first, :, :, :20], keys[second, :, :, :20])


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ([], "has 0 tokens; expected 1 .. 95"),
        ([1] * 96, "has 96 tokens; expected 1 .. 95"),
        ([1, 64], "tokens 1 .. 64; the model's are 0 .. 63"),
        ([-1], "tokens -1 .. -1"),
    ],
)
def test_what_no_slot_can_take_is_refused(decoder, text, sentence):
    with pytest.raises(ValueError, match=sentence):
        decoder.open(text)


def test_full_slots_and_sizes_that_cannot_be_are_refused(decoder, model):
    forget(decoder)
    for _ in range(3):
        slot = decoder.open(prompt(20))
    with pytest.raises(ValueError, match="all 3 slots are taken"):
        decoder.open([1])
    with pytest.raises(ValueError, match="has tokens to read before it can draw"):
        decoder.step({slot: Draw(seed(0), 0)})
    forget(decoder)
    with pytest.raises(ValueError, match="slots must be at least 1, got 0"):
        SlotDecoder(model, slots=0, context=CONTEXT)
    with pytest.raises(ValueError, match=r"context must lie in 2 .. 256"):
        SlotDecoder(model, slots=1, context=257)


def test_rows_of_their_own_settings_are_columns_of_one_setting():
    """The draw of a column with its temperature and nucleus is that of all columns with them, to the bit."""
    logits = 3 * jax.random.normal(jax.random.key(1), (300, 4))
    uniforms = token_uniforms(jax.random.split(jax.random.key(2), 4), jnp.arange(4))
    temperature, top_p = np.array([0, 0.7, 1, 1.5], np.float32), np.array([1, 1, 0.6, 0.9], np.float32)
    tokens, log_probs = jax.jit(sample_rows)(logits, uniforms, temperature, top_p)
    for row in range(4):
        settings = SamplingSettings(
            temperature=float(temperature[row]), top_p=None if top_p[row] == 1 else float(top_p[row])
        )
        token, log_prob = sample_tokens(logits[:, row : row + 1], uniforms[row : row + 1], settings)
        assert token[0] == tokens[row]
        np.testing.assert_allclose(log_prob[0], log_probs[row], atol=1e-6)
    alone = token_uniforms(jax.random.split(jax.random.key(2), 4)[2:3], 2)
    np.testing.assert_array_equal(alone, uniforms[2:3])
