"""The decode loop against full forward passes of the same model."""

import functools
import re
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxrl_llm.models.config import RopeScaling
from jaxrl_llm.models.config import tiny
from jaxrl_llm.models.lora import LoraSettings
from jaxrl_llm.models.lora import add_lora
from jaxrl_llm.models.transformer import Transformer
from jaxrl_llm.rollouts import responses
from jaxrl_llm.rollouts.decode import SLOT_MULTIPLE
from jaxrl_llm.rollouts.generate import make_generate
from jaxrl_llm.rollouts.sampling import SamplingSettings

VOCABULARY = 300
NO_END = VOCABULARY - 1
PAD = 0
PROMPTS, WIDTH, NEW, GROUP = 3, 7, 9, 4


def sharpened(model: Transformer) -> Transformer:
    """The model with a larger final norm: at random initialisation all tokens would be about equally likely."""
    model.final_norm.scale[...] = 8 * model.final_norm.scale[...]
    return model


@pytest.fixture(scope="module")
def model() -> Transformer:
    return sharpened(Transformer(tiny(vocab_size=VOCABULARY), rngs=nnx.Rngs(0)))


@pytest.fixture(scope="module")
def prompts() -> tuple[jax.Array, jax.Array]:
    tokens = jax.random.randint(jax.random.key(1), (PROMPTS, WIDTH), 1, NO_END)
    mask = jnp.arange(WIDTH) >= jnp.array([[0], [3], [6]])
    return jnp.where(mask, tokens, PAD), mask


# Compiling is nearly all of the time these tests take, so equal samplers are made once.
sampler = functools.cache(make_generate)
AT_ONE = SamplingSettings()
GREEDY = SamplingSettings(temperature=0)


def run(model, prompts, settings=AT_ONE, *, step=0, index=None, samples=None, group=GROUP, eos=NO_END, **options):
    graphdef, state = nnx.split(model)
    options = {"max_new_tokens": NEW, "pad_id": PAD} | options
    generate = sampler(graphdef, group_size=group, sampling=settings, eos_id=eos, **options)
    index = jnp.arange(len(prompts[0])) if index is None else index
    return generate(state, *prompts, jax.random.key(5), step, index, samples)


def full_log_probs(model, rollout, temperature=1.0):
    """log softmax of the model's own logits at the position before each response token, [B, R, V]."""
    logits = model.logits(model(rollout.tokens, rollout.token_mask))
    return jax.nn.log_softmax(logits[:, WIDTH - 1 : -1] / temperature, axis=-1)


def taken(log_probs, rollout):
    return jnp.take_along_axis(log_probs, rollout.tokens[:, WIDTH:, None], axis=2)[..., 0]


ONE_LAYER = tiny(vocab_size=VOCABULARY, num_layers=1)
VARIANTS = {
    "two layers": tiny(vocab_size=VOCABULARY),
    "untied": replace(ONE_LAYER, tie_embeddings=False),
    "biases": replace(ONE_LAYER, qkv_bias=True),
    "normed heads": replace(ONE_LAYER, qk_norm=True),
    "one key-value head": replace(ONE_LAYER, num_kv_heads=1),
    "stretched positions": replace(ONE_LAYER, rope_scaling=RopeScaling(factor=4.0, original_max_positions=8)),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_greedy_is_the_argmax_of_the_full_forward_pass(variant, prompts):
    model = Transformer(VARIANTS[variant], rngs=nnx.Rngs(1))
    for path, parameter in nnx.to_flat_state(nnx.state(model)):
        if path[-1] in ("bias", "scale"):  # zeros and ones at the start would hide that they are used
            parameter[...] = parameter[...] + 0.5 * jax.random.normal(jax.random.key(len(path)), parameter.shape)
    rollout = run(sharpened(model), prompts, GREEDY, group=2)
    mask = rollout.response_mask[:, WIDTH:]
    best = jnp.argmax(full_log_probs(model, rollout), axis=-1)
    np.testing.assert_array_equal(rollout.tokens[:, WIDTH:][mask], best[mask])
    assert len(np.unique(best[mask])) > 3
    np.testing.assert_array_equal(rollout.log_prob_behaviour, 0)


def test_greedy_decodes_with_the_adapters(model, prompts):
    adapted = add_lora(model, LoraSettings(rank=2), rngs=nnx.Rngs(3))
    for path, parameter in nnx.to_flat_state(nnx.state(adapted)):
        if path[-1] == "b":
            parameter[...] = 0.1 * jax.random.normal(jax.random.key(len(path)), parameter.shape)
    rollout = run(adapted, prompts, GREEDY)
    np.testing.assert_array_equal(rollout.tokens[:, WIDTH:], jnp.argmax(full_log_probs(adapted, rollout), axis=-1))
    assert not np.array_equal(rollout.tokens, run(model, prompts, GREEDY).tokens)


def test_recorded_log_probs_are_those_of_the_model(model, prompts):
    rollout = run(model, prompts)
    np.testing.assert_allclose(
        rollout.log_prob_behaviour[:, WIDTH:], taken(full_log_probs(model, rollout), rollout), atol=1e-5
    )
    np.testing.assert_array_equal(rollout.log_prob_behaviour[:, :WIDTH], 0)
    assert jnp.std(rollout.log_prob_behaviour[:, WIDTH:]) > 0.3


def test_recorded_log_probs_are_those_of_the_truncated_policy(model, prompts):
    settings = SamplingSettings(temperature=0.7, top_p=0.8, min_p=0.05)
    rollout = run(model, prompts, settings)
    log_p = np.asarray(full_log_probs(model, rollout, settings.temperature), np.float64)
    ordered = -np.sort(-np.exp(log_p), axis=-1)
    needed = np.argmax(np.cumsum(ordered, axis=-1) >= settings.top_p, axis=-1)
    edge = np.take_along_axis(ordered, needed[..., None], axis=-1) * (1 - 1e-5)
    keep = (np.exp(log_p) >= edge) & (np.exp(log_p) >= settings.min_p * ordered[..., :1])
    mass = np.sum(np.where(keep, np.exp(log_p), 0), axis=-1)
    np.testing.assert_allclose(
        rollout.log_prob_behaviour[:, WIDTH:], np.asarray(taken(log_p, rollout)) - np.log(mass), atol=1e-4
    )
    assert mass.max() < 0.99


@pytest.mark.parametrize("rows", [1, PROMPTS * GROUP])
def test_bfloat16_decoding_records_what_it_sampled_from(model, prompts, rows):
    # The policy that samples is the rounded one: near the model's, not equal to it.
    if rows == 1:
        rollout = run(model, tuple(array[:1] for array in prompts), group=1, decode_dtype=jnp.bfloat16)
    else:
        rollout = run(model, prompts, decode_dtype=jnp.bfloat16)
    difference = jnp.abs(rollout.log_prob_behaviour[:, WIDTH:] - taken(full_log_probs(model, rollout), rollout))
    assert 1e-4 < difference[:, 1:].max() < 0.3
    assert difference[:, 0].max() < 1e-5  # the first token comes from the prompt pass, in the model's own precision


def test_responses_end_at_the_end_token(model, prompts):
    ends = tuple(range(1, VOCABULARY, 6))
    rollout = run(model, prompts, eos=ends)
    response, mask = np.asarray(rollout.tokens[:, WIDTH:]), np.asarray(rollout.response_mask[:, WIDTH:])
    ended = np.isin(response, ends)
    lengths = np.where(ended.any(axis=1), ended.argmax(axis=1) + 1, NEW)
    assert len(set(lengths)) > 2
    np.testing.assert_array_equal(mask, np.arange(NEW) < lengths[:, None])
    np.testing.assert_array_equal(response[~mask], PAD)
    np.testing.assert_array_equal(np.asarray(rollout.log_prob_behaviour[:, WIDTH:])[~mask], 0)
    expected = taken(full_log_probs(model, rollout), rollout)
    np.testing.assert_allclose(
        np.where(mask, rollout.log_prob_behaviour[:, WIDTH:], 0), np.where(mask, expected, 0), atol=1e-5
    )


def test_rows_are_prompts_times_samples(model, prompts):
    rollout = run(model, prompts)
    np.testing.assert_array_equal(rollout.group_ids, np.repeat(np.arange(PROMPTS), GROUP))
    np.testing.assert_array_equal(rollout.tokens[:, :WIDTH], np.repeat(prompts[0], GROUP, axis=0))
    np.testing.assert_array_equal(rollout.token_mask[:, :WIDTH], np.repeat(prompts[1], GROUP, axis=0))
    assert rollout.tokens.shape == (PROMPTS * GROUP, WIDTH + NEW)
    assert not rollout.response_mask[:, :WIDTH].any()
    assert len({tuple(row) for row in np.asarray(rollout.tokens)}) == PROMPTS * GROUP


def test_the_loop_stops_when_all_rows_have_ended(model, prompts, monkeypatch):
    slots = []
    real = responses.decode_routed

    def counting(weights, tokens, slot, *rest):
        jax.debug.callback(lambda slot: slots.append(int(slot)), slot)
        return real(weights, tokens, slot, *rest)

    monkeypatch.setattr(responses, "decode_routed", counting)
    sampler.cache_clear()
    run(model, prompts)
    jax.effects_barrier()
    assert sorted(slots) == list(range(NEW - 1))  # nothing is computed after the last token
    slots.clear()
    rollout = run(model, prompts, eos=tuple(range(1, VOCABULARY, 2)))
    jax.effects_barrier()
    longest = int(jnp.sum(rollout.response_mask, axis=1).max())
    assert longest < NEW
    assert sorted(slots) == list(range(longest - 1))
    slots.clear()
    run(model, prompts, eos=tuple(range(VOCABULARY)))
    jax.effects_barrier()
    assert slots == []
    sampler.cache_clear()


@pytest.mark.parametrize(("prompt", "sample"), [(0, 0), (2, 3), (1, 2)])
def test_one_rollout_is_regenerated_alone(model, prompts, prompt, sample):
    index = jnp.array([40, 7, 123])
    together = run(model, prompts, SamplingSettings(temperature=0.9, min_p=0.01), step=6, index=index)
    alone = run(
        model,
        (prompts[0][prompt : prompt + 1], prompts[1][prompt : prompt + 1]),
        SamplingSettings(temperature=0.9, min_p=0.01),
        step=6,
        index=index[prompt : prompt + 1],
        samples=jnp.array([sample]),
        group=1,
    )
    row = prompt * GROUP + sample
    np.testing.assert_array_equal(alone.tokens[0], together.tokens[row])
    np.testing.assert_allclose(alone.log_prob_behaviour[0], together.log_prob_behaviour[row], atol=1e-5)


def test_a_rollout_does_not_depend_on_its_batch_mates_or_on_padding(model, prompts):
    tokens, mask = prompts
    together = run(model, prompts, index=jnp.array([40, 7, 123]))
    order = jnp.array([2, 1, 0])
    wider = [jnp.pad(array[order], ((0, 0), (4, 0))) for array in (tokens.at[0].set(5), mask)]
    other = run(model, wider, index=jnp.array([123, 7, 1]))
    for there, here in ((2, 0), (1, 1)):
        np.testing.assert_array_equal(
            other.tokens[here * GROUP : (here + 1) * GROUP, -NEW:],
            together.tokens[there * GROUP : (there + 1) * GROUP, -NEW:],
        )


def test_step_and_prompt_index_change_the_draws(model, prompts):
    first = run(model, prompts)
    np.testing.assert_array_equal(first.tokens, run(model, prompts).tokens)
    assert not np.array_equal(first.tokens, run(model, prompts, step=1).tokens)
    assert not np.array_equal(first.tokens, run(model, prompts, index=jnp.arange(3) + 1).tokens)


def test_a_single_new_token(model, prompts):
    rollout = run(model, prompts, max_new_tokens=1)
    np.testing.assert_array_equal(rollout.tokens[:, -1], run(model, prompts).tokens[:, WIDTH])


@pytest.mark.parametrize("platform", ["cpu", "cuda", "tpu"])
def test_it_lowers_for_every_platform(model, prompts, platform):
    graphdef, state = nnx.split(model)
    settings = SamplingSettings(temperature=0.7, top_p=0.9, min_p=0.1)
    generate = make_generate(
        graphdef, max_new_tokens=NEW, group_size=GROUP, sampling=settings, eos_id=NO_END, pad_id=PAD
    )
    traced = jax.jit(generate).trace(state, *prompts, jax.random.key(0), 0, jnp.arange(PROMPTS))
    assert "while" in traced.lower(lowering_platforms=(platform,)).as_text()


def test_the_loop_does_not_copy_its_caches(model, prompts):
    graphdef, state = nnx.split(model)
    generate = make_generate(
        graphdef, max_new_tokens=NEW, group_size=GROUP, sampling=SamplingSettings(), eos_id=NO_END, pad_id=PAD
    )
    arguments = (state, *prompts, jax.random.key(0), 0, jnp.arange(PROMPTS))
    program = jax.jit(generate).lower(*arguments).compile().as_text()
    bodies = re.findall(r"^%\S*region\S* \(.*?^}", program, flags=re.MULTILINE | re.DOTALL)
    looping = [body for body in bodies if "dynamic-update-slice" in body]
    assert looping
    config = model.config
    shape = (PROMPTS * GROUP, config.num_kv_heads, config.head_dim, SLOT_MULTIPLE)
    for text in (shape, (*shape[:2], shape[3], shape[2])):
        cache = re.escape("[" + ",".join(map(str, text)) + "]")
        assert re.search(cache, "".join(looping))
        assert not re.findall(rf"= \S*{cache}\S* (?:copy|transpose)\(", "".join(looping))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens must be at least 1, got 0"),
        ({"group": 0}, "group_size must be at least 1, got 0"),
        ({"pad_id": VOCABULARY}, f"pad_id must be a token .*{VOCABULARY - 1}, got {VOCABULARY}"),
        ({"eos": (1, -3)}, "eos_id must be a token .* got -3"),
        ({"index": jnp.arange(2)}, r"prompt_index must be integers of shape \(3,\), got .*\(2,\)"),
        ({"samples": jnp.arange(2)}, r"sample_index must be integers of shape \(4,\), got .*\(2,\)"),
        ({"max_new_tokens": 250}, "prompt_tokens has 7 columns; .*257, more than max_positions=256"),
    ],
)
def test_impossible_arguments_are_refused_by_name(model, prompts, change, message):
    with pytest.raises(ValueError, match=message):
        run(model, prompts, **change)


def test_prompts_that_do_not_fit_are_refused_by_name(model, prompts):
    tokens, mask = prompts
    with pytest.raises(ValueError, match=r"prompt_mask must have the shape \(3, 7\)"):
        run(model, (tokens, mask[:, 1:]))
    with pytest.raises(ValueError, match=r"prompt_tokens must be integers of shape \[N, P\], got float32"):
        run(model, (tokens.astype(jnp.float32), mask))


def test_lists_are_no_prompts(model, prompts):
    tokens, mask = prompts
    with pytest.raises(TypeError, match="prompt_tokens is a list; it must be an array"):
        run(model, (tokens.tolist(), mask))
    with pytest.raises(TypeError, match="prompt_mask is a list; it must be an array"):
        run(model, (tokens, mask.tolist()))


def test_prompts_that_are_none_are_refused_before_anything_is_compiled(model, prompts):
    tokens, mask = prompts
    for token in (-1, -100, VOCABULARY):
        with pytest.raises(
            ValueError, match=rf"prompt_tokens\[1, 5\] is {token}; it must be a token of the vocabulary"
        ):
            run(model, (tokens.at[1, 5].set(token), mask))
    with pytest.raises(
        ValueError, match=r"prompt_mask\[1\] has padding after a real token; a prompt must be left-padded"
    ):
        run(model, (tokens, mask[:, ::-1]))
    with pytest.raises(ValueError, match=r"prompt_mask\[2\] is empty; a prompt must be left-padded"):
        run(model, (tokens, mask.at[2].set(False)))
    rollout = run(model, (jnp.where(mask, tokens, -100), mask))
    np.testing.assert_array_equal(rollout.tokens[:, WIDTH:], run(model, prompts).tokens[:, WIDTH:])


def test_prompts_in_a_narrow_type_do_not_narrow_what_is_sampled(model, prompts):
    tokens, mask = prompts
    short = jnp.minimum(tokens, 127)
    wide = run(model, (short, mask))
    assert wide.tokens.max() > 127
    np.testing.assert_array_equal(run(model, (short.astype(jnp.int8), mask)).tokens, wide.tokens)


@pytest.mark.parametrize("value", [0.5, np.nan, -1e9, 2.0])
def test_a_mask_of_other_numbers_than_0_and_1_is_refused(model, prompts, value):
    tokens, mask = prompts
    numbers = mask.astype(jnp.float32)
    with pytest.raises(ValueError, match=r"prompt_mask\[1, 0\] is .*; a mask must be true or false, or 1 or 0"):
        run(model, (tokens, numbers.at[1, 0].set(value)))
    np.testing.assert_array_equal(run(model, (tokens, numbers)).tokens, run(model, prompts).tokens)


def test_no_prompts_and_ends_and_steps_that_are_no_integers_are_refused_by_name(model, prompts):
    tokens, mask = prompts
    for none in ((tokens[:, :0], mask[:, :0]), (tokens[:0], mask[:0])):
        with pytest.raises(ValueError, match="prompt_tokens must hold a prompt"):
            run(model, none)
    with pytest.raises(ValueError, match="step must be an integer, got float32"):
        run(model, prompts, step=1.5)
    with pytest.raises(TypeError, match="integer"):
        run(model, prompts, eos=(3.5,))
    np.testing.assert_array_equal(run(model, prompts, eos=np.int32(NO_END)).tokens, run(model, prompts).tokens)
