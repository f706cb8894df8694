"""Speculative decoding of a small GLM: plain greedy's tokens, the plain sampler's law, the model's log-probs."""

import functools
import itertools
from collections.abc import Callable
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from scipy import stats

from jaxrl_kernels import Reference
from jaxrl_kernels import token_statistics
from jaxrl_llm.models.config import ExpertsConfig
from jaxrl_llm.models.config import tiny
from jaxrl_llm.models.transformer import Transformer
from jaxrl_llm.rollouts import Rollout
from jaxrl_llm.rollouts import SamplingSettings
from jaxrl_llm.rollouts import make_generate
from jaxrl_llm.rollouts.sampling import drawing_log_probs
from jaxrl_llm.rollouts.speculative import SpeculativeRollout
from jaxrl_llm.rollouts.speculative import WithDraft
from jaxrl_llm.rollouts.speculative import make_speculative_generate
from jaxrl_llm.rollouts.speculative import measured_acceptance
from jaxrl_llm.rollouts.speculative import tokens_per_step

VOCABULARY, END, PAD = 6, 5, 0
WIDTH, NEW, GROUP, MANY = 4, 9, 8, 2000
EXPERTS = ExpertsConfig(count=4, chosen=2, width=16, shared=1, dense_layers=1)
CONFIG = tiny(vocab_size=VOCABULARY, qkv_bias=True, qk_norm=True, rotary_fraction=0.5, experts=EXPERTS)
GREEDY = SamplingSettings(temperature=0)
WARM = SamplingSettings(temperature=0.8, top_p=0.95)
PROMPTS = (np.array([[1, 2, 3, 4], [0, 0, 0, 3]], np.int32), np.array([[1, 1, 1, 1], [0, 0, 0, 1]], bool))


def sharp(config, seed: int) -> Transformer:
    """A model that prefers some tokens, as its draft does; as initialised all would be about equally likely."""
    model = Transformer(config, rngs=nnx.Rngs(seed))
    for norm in (model.final_norm, *(layer.final_norm for layer in model.further)):
        norm.scale[...] = 10 * norm.scale[...]
    return model


@pytest.fixture(scope="module")
def model() -> Transformer:
    return sharp(replace(CONFIG, mtp_layers=1), 0)


sampler = functools.cache(make_speculative_generate)
plain = functools.cache(make_generate)


def run(
    make: Callable,
    model: nnx.Module,
    settings: SamplingSettings,
    *,
    prompts=PROMPTS,
    index=None,
    samples=None,
    **options,
):
    graphdef, state = nnx.split(model)
    options = {"max_new_tokens": NEW, "group_size": GROUP, "eos_id": END, "pad_id": PAD} | options
    index = jnp.arange(len(prompts[0])) if index is None else index
    return make(graphdef, sampling=settings, **options)(state, *prompts, jax.random.key(7), 3, index, samples)


@pytest.fixture(scope="module")
def rollout(model) -> SpeculativeRollout:
    return run(sampler, model, WARM, drafts=2, group_size=MANY)


@functools.partial(nnx.jit, static_argnames="settings")
def laws(model: Transformer, tokens, token_mask, settings: SamplingSettings) -> jax.Array:
    """Log-probs of every token at every place of the responses, [B, R, V], from full forward passes."""
    logits = model.logits(model(tokens, token_mask))[:, WIDTH - 1 : -1]
    return drawing_log_probs(logits.reshape(-1, VOCABULARY).T, settings).T.reshape(logits.shape)


@nnx.jit
def overlaps(model: Transformer, tokens, token_mask) -> jax.Array:
    """1 - TV of the model and of its further layer at every place of the responses but the first, [B, R - 1]."""
    hidden = model(tokens, token_mask)
    further = model.hidden_further(hidden, tokens, token_mask)[:, WIDTH - 1 : -1]
    head, axis = model.head()
    flat, further = (x.reshape(-1, x.shape[-1]) for x in (hidden[:, WIDTH:-1], further))
    targets = tokens[:, WIDTH + 1 :].reshape(-1)
    found = token_statistics(flat, head, targets, vocabulary_axis=axis, reference=Reference(further, head))
    return 1 - found.total_variation.reshape(len(tokens), -1)


def test_greedy_is_plain_greedy_whoever_drafts(model) -> None:
    """Rows of many lengths; the drafts are right at some places and wrong at others."""
    prompts = np.random.default_rng(0).integers(0, END, (40, WIDTH), np.int32), np.ones((40, WIDTH), bool)
    expected = run(plain, model, GREEDY, prompts=prompts, group_size=1)
    smaller = sharp(tiny(vocab_size=VOCABULARY, num_layers=1, hidden_size=16), 5)
    for drafting, drafts in ((model, 3), (WithDraft(model, smaller), 2)):
        found = run(sampler, drafting, GREEDY, prompts=prompts, group_size=1, drafts=drafts)
        for name in ("tokens", "token_mask", "response_mask", "log_prob_behaviour", "group_ids"):
            np.testing.assert_array_equal(getattr(found, name), getattr(expected, name), err_msg=name)
        np.testing.assert_array_equal(found.overlaps, found.kept)
        assert 0 < found.kept[:, 0].sum() < found.reached[:, 0].sum()
        assert len(set(np.asarray(found.response_mask.sum(axis=1)))) > 2


def test_a_model_that_drafts_for_itself_is_always_right(model) -> None:
    """It makes k + 1 tokens a round."""
    itself = run(sampler, WithDraft(model, model), SamplingSettings(), drafts=2, eos_id=())
    np.testing.assert_array_equal(itself.steps, -(-(NEW - 1) // 3))
    np.testing.assert_array_equal(itself.kept, itself.reached)
    np.testing.assert_allclose(itself.overlaps, itself.reached, atol=1e-4)
    assert measured_acceptance(itself).tokens_per_step == (NEW - 1) / itself.steps[0]


def chi_square(rollout: Rollout, truth: np.ndarray, rows: slice) -> float:
    """How likely counts of three tokens are that far from a law [prob]; rare triples together."""
    first, second, third = np.asarray(rollout.tokens[rows, WIDTH : WIDTH + 3]).T
    counts, law = np.bincount(36 * first + 6 * second + third, minlength=216), truth.ravel() / truth.sum()
    assert counts[law == 0].sum() == 0
    expected = law * counts.sum()
    order = np.argsort(-expected)
    bins = np.minimum(np.arange(216), np.sum(expected >= 8))
    observed, expected = (np.bincount(bins, x[order]) for x in (counts, expected))
    return stats.chisquare(observed[expected > 0], expected[expected > 0]).pvalue


@pytest.mark.timeout(900)
def test_the_first_three_tokens_have_the_plain_law(model, rollout) -> None:
    """All 216 beginnings of two prompts, many samples of each, tempered and truncated; the first round may make two."""
    assert 0.2 < rollout.kept.sum() / rollout.reached.sum() < 0.9
    three = np.array(list(itertools.product(range(VOCABULARY), repeat=3)), np.int32)
    seen = three.copy()  # nothing but padding is behind an end
    seen[three[:, 0] == END, 1:] = PAD
    seen[three[:, 1] == END, 2] = PAD
    for prompt in (0, 1):
        tokens, mask = (np.repeat(array[prompt : prompt + 1], 216, axis=0) for array in PROMPTS)
        texts = (np.concatenate([tokens, three], axis=1), np.pad(mask, ((0, 0), (0, 3)), constant_values=True))
        log_p = np.take_along_axis(np.asarray(laws(model, *texts, WARM)), three[..., None], axis=2)[..., 0]
        truth, warmer = np.zeros((6, 6, 6)), np.zeros((6, 6, 6))
        np.add.at(truth, tuple(seen.T), np.exp(log_p.astype(np.float64).sum(axis=1)))
        np.add.at(warmer, tuple(seen.T), np.exp(0.8 * log_p.astype(np.float64).sum(axis=1)))
        rows = slice(prompt * MANY, (prompt + 1) * MANY)
        assert chi_square(rollout, truth, rows) > 0.01
        assert chi_square(rollout, warmer, rows) < 1e-6  # another law would have been found out


def test_log_probs_and_ends_are_the_models(model, rollout) -> None:
    """Whatever the draft was: the recorded log-probs are those of the truncated policy, up to the first end token."""
    rows = slice(MANY - GROUP, MANY + GROUP)
    mask, tokens = (np.asarray(array[rows, WIDTH:]) for array in (rollout.response_mask, rollout.tokens))
    expected = laws(model, rollout.tokens[rows], rollout.token_mask[rows], WARM)
    expected = np.take_along_axis(np.asarray(expected), tokens[..., None], axis=2)[..., 0]
    log_probs = np.asarray(rollout.log_prob_behaviour[rows, WIDTH:])
    np.testing.assert_allclose(log_probs[mask], expected[mask], atol=1e-4)
    ended = tokens == END
    lengths = np.where(ended.any(axis=1), ended.argmax(axis=1) + 1, NEW)
    assert len(set(lengths)) > 3
    np.testing.assert_array_equal(mask, np.arange(NEW) < lengths[:, None])
    np.testing.assert_array_equal(tokens[~mask], PAD)
    np.testing.assert_array_equal(log_probs[~mask], 0)
    np.testing.assert_array_equal(rollout.token_mask[:, :WIDTH], np.repeat(PROMPTS[1], MANY, axis=0))
    # A round makes as many tokens as it kept, and one: less where the last round ends behind a kept draft.
    spare = np.asarray((rollout.kept.sum(axis=1) + rollout.steps)[rows]) - (lengths - 1)
    assert set(spare) == {0, 1}


def test_the_first_token_is_the_plain_samplers_and_a_rollout_is_made_again_alone(model, rollout) -> None:
    there = run(plain, model, WARM, group_size=GROUP).tokens[:, WIDTH].reshape(2, GROUP)
    np.testing.assert_array_equal(rollout.tokens[:, WIDTH].reshape(2, MANY)[:, :GROUP], there)
    prompts, index, samples = tuple(array[1:] for array in PROMPTS), jnp.array([1]), jnp.array([5])
    alone = run(sampler, model, WARM, drafts=2, prompts=prompts, index=index, samples=samples, group_size=1)
    np.testing.assert_array_equal(alone.tokens[0], rollout.tokens[MANY + 5])
    np.testing.assert_array_equal(alone.steps[0], rollout.steps[MANY + 5])


def test_acceptance_is_one_minus_total_variation(model) -> None:
    """Of the model and its layer over whole texts, by `token_statistics`: so the draft's cache was warm.

    Kept drafts minus overlaps is a sum of martingale differences; the other rates follow from the counts.
    """
    found = run(sampler, model, SamplingSettings(), drafts=1, eos_id=(), group_size=300, max_new_tokens=3)
    first, second = np.asarray(overlaps(model, found.tokens, found.token_mask)).T
    # The first round judges a draft of token 1. Where it was kept, token 2 came with it; else a second round was made.
    np.testing.assert_allclose(found.overlaps[:, 0], first + np.where(found.steps == 2, second, 0), atol=1e-4)
    assert np.ptp(first) > 0.1
    kept, reached, expected = (float(np.sum(x)) for x in (found.kept, found.reached, found.overlaps))
    deviation = np.sqrt(reached * 0.25)
    assert abs(kept - expected) < 3 * deviation < 0.1 * reached
    assert 0.2 < kept / reached < 0.8
    measured = measured_acceptance(found)
    np.testing.assert_allclose(measured.kept, [kept / reached], rtol=1e-5)
    np.testing.assert_allclose(measured.expected, [expected / reached], rtol=1e-5)
    np.testing.assert_allclose(measured.tokens_per_step, 600 * 2 / np.sum(found.steps), rtol=1e-5)
    np.testing.assert_allclose(measured.independent, tokens_per_step(kept / reached, 1), rtol=1e-5)


def test_bfloat16_decoding_records_what_it_sampled_from(model) -> None:
    found = run(sampler, model, SamplingSettings(), drafts=2, decode_dtype=jnp.bfloat16)
    mask, tokens = np.asarray(found.response_mask[:, WIDTH:]), np.asarray(found.tokens[:, WIDTH:])
    expected = laws(model, found.tokens, found.token_mask, SamplingSettings())
    expected = np.take_along_axis(np.asarray(expected), tokens[..., None], axis=2)[..., 0]
    difference = np.where(mask, abs(np.asarray(found.log_prob_behaviour[:, WIDTH:]) - expected), 0)
    assert 1e-4 < difference[:, 1:].max() < 0.5
    assert difference[:, 0].max() < 1e-4


def test_what_cannot_be_is_refused(model) -> None:
    with pytest.raises(ValueError, match="drafts is 0; it must be at least 1"):
        run(make_speculative_generate, model, GREEDY, drafts=0)
    with pytest.raises(ValueError, match="group_size must be at least 1, got 0"):
        run(make_speculative_generate, model, GREEDY, group_size=0)
    with pytest.raises(ValueError, match="no layer that predicts further tokens to draft with; its mtp_layers is 0"):
        run(make_speculative_generate, sharp(CONFIG, 0), GREEDY)
    with pytest.raises(ValueError, match="draft has a vocabulary of 64 tokens; it must be that of the model, 6"):
        WithDraft(model, Transformer(tiny(), rngs=nnx.Rngs(0)))
