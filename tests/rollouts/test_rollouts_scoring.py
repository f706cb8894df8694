"""Scoring sampled tokens: the same numbers as the sampler recorded, aligned to the tokens."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxrl_kernels import Reference
from jaxrl_llm import categorical
from jaxrl_llm.models.config import tiny
from jaxrl_llm.models.transformer import Transformer
from jaxrl_llm.rollouts.generate import make_generate
from jaxrl_llm.rollouts.sampling import SamplingSettings
from jaxrl_llm.rollouts.scoring import align
from jaxrl_llm.rollouts.scoring import predicting
from jaxrl_llm.rollouts.scoring import score
from jaxrl_llm.rollouts.scoring import score_hidden

WIDTH, NEW = 5, 6
END = 63


def build(seed: int, **options) -> Transformer:
    model = Transformer(tiny(**options), rngs=nnx.Rngs(seed))
    model.final_norm.scale[...] = 8 * model.final_norm.scale[...]
    return model


@pytest.fixture(scope="module")
def model() -> Transformer:
    return build(0)


def rollout_of(model, settings):
    graphdef, state = nnx.split(model)
    generate = make_generate(
        graphdef, max_new_tokens=NEW, group_size=3, sampling=settings, eos_id=tuple(range(1, 64, 9)), pad_id=0
    )
    tokens = jax.random.randint(jax.random.key(1), (2, WIDTH), 1, END)
    mask = jnp.arange(WIDTH) >= jnp.array([[0], [2]])
    return generate(state, tokens, mask, jax.random.key(2), 0, jnp.arange(2))


@pytest.mark.parametrize("options", [{"temperature": 1.0}, {"temperature": 0.7, "min_p": 0.05}], ids=str)
def test_scoring_repeats_what_the_sampler_recorded(model, options):
    rollout = rollout_of(model, SamplingSettings(**options))
    min_p = options.get("min_p")
    statistics = score(
        model,
        rollout.tokens,
        rollout.token_mask,
        response_width=NEW,
        temperature=options["temperature"],
        log_min_p=None if min_p is None else float(np.log(min_p)),
    )
    assert statistics.log_prob is not None
    assert statistics.log_prob.shape == (6, NEW)
    scored = jnp.where(rollout.response_mask, align(statistics.log_prob, WIDTH + NEW), 0)
    np.testing.assert_allclose(scored, rollout.log_prob_behaviour, atol=1e-4)
    assert not rollout.response_mask[:, WIDTH:].all()
    assert jnp.abs(rollout.log_prob_behaviour).max() > 0.5


@pytest.mark.parametrize("reference_options", [{}, {"tie_embeddings": False, "hidden_size": 24}], ids=str)
def test_comparison_with_a_reference_model(model, reference_options):
    rollout = rollout_of(model, SamplingSettings())
    reference = build(7, **reference_options)
    arguments = (rollout.tokens, rollout.token_mask)
    statistics = score(model, *arguments, response_width=NEW, reference=reference)
    logits, logits_ref = (m.logits(m(*arguments))[:, WIDTH - 1 : -1] for m in (model, reference))
    mask = np.asarray(rollout.response_mask[:, WIDTH:])
    for name, expected in {
        "log_prob": categorical.log_prob(logits, rollout.tokens[:, WIDTH:]),
        "entropy": categorical.entropy(logits),
        "kl": categorical.kl(logits, logits_ref),
        "kl_reverse": categorical.kl(logits_ref, logits),
        "total_variation": categorical.total_variation(logits, logits_ref),
    }.items():
        np.testing.assert_allclose(getattr(statistics, name)[mask], expected[mask], atol=2e-4, err_msg=name)
    assert jnp.min(statistics.kl[mask]) > 1e-3


def test_hidden_states_score_as_the_model_does(model):
    rollout = rollout_of(model, SamplingSettings())
    hidden = predicting(model(rollout.tokens, rollout.token_mask), NEW)
    head, axis = model.head()
    arguments = {"vocabulary_axis": axis, "reference": Reference(hidden[..., ::-1], head)}
    targets = rollout.tokens[:, WIDTH:]
    whole = score_hidden(hidden, head, targets, **arguments)
    flat = {"vocabulary_axis": axis, "reference": Reference(hidden[..., ::-1].reshape(-1, 32), head)}
    part = score_hidden(hidden.reshape(-1, 32), head, targets.reshape(-1), **flat)
    plain = score(model, rollout.tokens, rollout.token_mask, response_width=NEW)
    np.testing.assert_array_equal(whole.kl, part.kl.reshape(targets.shape))
    np.testing.assert_allclose(whole.log_prob, plain.log_prob, atol=1e-5)
    only = score_hidden(hidden, head, targets, vocabulary_axis=axis, statistics=("entropy",))
    assert only.log_prob is None
    np.testing.assert_allclose(only.entropy, plain.entropy, atol=1e-5)


def test_alignment():
    np.testing.assert_array_equal(align(jnp.ones((2, 3)), 5), [[0, 0, 1, 1, 1]] * 2)
    hidden = jnp.arange(6.0).reshape(1, 6, 1)
    np.testing.assert_array_equal(predicting(hidden, 2)[0, :, 0], [3, 4])


def test_impossible_widths_are_refused_by_name(model):
    rollout = rollout_of(model, SamplingSettings())
    for width in (0, WIDTH + NEW):
        with pytest.raises(ValueError, match=f"response_width must leave .* 1 .. 10 of 11, got {width}"):
            score(model, rollout.tokens, rollout.token_mask, response_width=width)
    hidden = jnp.zeros((6, NEW, 32))
    with pytest.raises(ValueError, match=r"targets has shape \(6, 3\); it must be \(6, 6\)"):
        score_hidden(hidden, model.head()[0], rollout.tokens[:, :3], vocabulary_axis=0)


def test_tokens_that_are_none_and_prompts_that_are_not_left_padded_are_refused(model):
    rollout = rollout_of(model, SamplingSettings())
    tokens, mask = rollout.tokens, rollout.token_mask
    size = model.config.vocab_size
    plain = score(model, tokens, mask, response_width=NEW, statistics=("log_prob",)).log_prob
    for token in (-1, -100, size, 2**30):
        for column in (WIDTH - 1, WIDTH):
            bad = tokens.at[1, column].set(token)
            with pytest.raises(ValueError, match=rf"tokens\[1, {column}\] is {token}; it must be a token of the vocab"):
                score(model, bad, mask, response_width=NEW)
        # At padding any number may stand.
        padded = score(model, jnp.where(mask, tokens, token), mask, response_width=NEW, statistics=("log_prob",))
        real = mask[:, WIDTH:]
        np.testing.assert_array_equal(padded.log_prob[real], plain[real])
    right = jnp.roll(mask[:, :WIDTH], -1, axis=1)
    right = jnp.concatenate([right.at[:, -1].set(False), mask[:, WIDTH:]], axis=1)
    with pytest.raises(
        ValueError, match=r"token_mask\[0\] has padding after a real token; a prompt must be left-padded"
    ):
        score(model, tokens, right, response_width=NEW)
    gap = mask.at[1, WIDTH - 2].set(False).at[1, WIDTH - 3].set(True)
    with pytest.raises(ValueError, match=r"token_mask\[1\] has padding after a real token"):
        score(model, tokens, gap, response_width=NEW)
    empty_row = mask.at[2].set(False)
    score(model, tokens, empty_row, response_width=NEW, statistics=("log_prob",))


def test_a_target_that_is_no_token_is_nan_inside_jit(model):
    rollout = rollout_of(model, SamplingSettings())
    found = jax.jit(
        lambda x: score(model, x, rollout.token_mask, response_width=NEW, statistics=("log_prob",)).log_prob
    )
    bad = found(rollout.tokens.at[1, WIDTH].set(-100))
    assert np.isnan(bad[1, 0])
    assert np.isfinite(bad[0]).all()


def test_no_texts_and_masks_of_other_numbers_are_refused_by_name(model):
    rollout = rollout_of(model, SamplingSettings())
    with pytest.raises(ValueError, match=r"tokens has shape \(0, 11\); it must hold a text"):
        score(model, rollout.tokens[:0], rollout.token_mask[:0], response_width=NEW)
    numbers = rollout.token_mask.astype(jnp.float32).at[1, 2].set(0.5)
    with pytest.raises(ValueError, match=r"token_mask\[1, 2\] is 0.5; a mask must be true or false, or 1 or 0"):
        score(model, rollout.tokens, numbers, response_width=NEW)


def test_lists_and_truth_values_are_no_texts_and_no_widths(model):
    tokens, mask = np.ones((2, 5), np.int32), np.ones((2, 5), bool)
    with pytest.raises(TypeError, match="tokens is a list; it must be an array"):
        score(model, tokens.tolist(), mask, response_width=2)
    with pytest.raises(TypeError, match="token_mask is a list; it must be an array"):
        score(model, tokens, mask.tolist(), response_width=2)
    with pytest.raises(ValueError, match="tokens has dtype bool; it must be integers"):
        score(model, mask, mask, response_width=2)
    with pytest.raises(TypeError, match="response_width is True; it must be an integer"):
        score(model, tokens, mask, response_width=True)
