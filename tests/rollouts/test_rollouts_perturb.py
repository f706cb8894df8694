"""Perturbations against independent definitions; a perturbed sampler records the log-probs of a policy that scoring
finds again.
"""

import functools

import gguf
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx

from jaxrl_llm import categorical
from jaxrl_llm.models.config import tiny
from jaxrl_llm.models.lora import LoraSettings
from jaxrl_llm.models.lora import add_lora
from jaxrl_llm.models.transformer import Transformer
from jaxrl_llm.rollouts import SamplingSettings
from jaxrl_llm.rollouts import make_generate
from jaxrl_llm.rollouts import perturb
from jaxrl_llm.rollouts.perturb import Perturbation

VOCABULARY, WIDTH, NEW, GROUP = 40, 5, 6, 4
KEY = jax.random.key(11)


@pytest.fixture(scope="module")
def values() -> np.ndarray:
    generator = np.random.default_rng(0)
    return (generator.normal(size=(6, 64)) * np.geomspace(1e-3, 30, 6)[:, None]).astype(np.float32)


@pytest.fixture(scope="module")
def model() -> Transformer:
    model = Transformer(tiny(vocab_size=VOCABULARY, hidden_size=16, num_layers=1, num_heads=2), rngs=nnx.Rngs(0))
    # At random initialisation all tokens would be about equally likely, and quantisation would not be seen.
    model.final_norm.scale[...] = 12 * model.final_norm.scale[...]
    return model


@pytest.fixture(scope="module")
def prompts() -> tuple[jax.Array, jax.Array]:
    tokens = jax.random.randint(jax.random.key(1), (2, WIDTH), 1, VOCABULARY)
    mask = jnp.arange(WIDTH) >= jnp.array([[0], [3]])
    return jnp.where(mask, tokens, 0), mask


# Formats


def test_bf16_is_that_of_ml_dtypes(values):
    expected = values.astype(ml_dtypes.bfloat16).astype(np.float32)
    # Under jit, where a pair of casts might be dropped.
    np.testing.assert_array_equal(jax.jit(perturb.round_to_bf16)(values), expected)


def test_e4m3_is_that_of_ml_dtypes():
    every = np.arange(256, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float32)
    finite = np.sort(every[np.isfinite(every)])
    halves = (finite[1:] + finite[:-1]) / 2
    given = np.concatenate([finite, halves, halves * (1 + 1e-6), np.linspace(-448, 448, 999, dtype=np.float32), [600]])
    given = given.astype(np.float32)
    expected = np.clip(given, -448, 448).astype(ml_dtypes.float8_e4m3fn).astype(np.float32)
    np.testing.assert_array_equal(jax.jit(perturb.round_to_e4m3)(given), expected)


def test_int8_has_the_integers_of_ggml(values):
    stored = gguf.quantize(values, gguf.GGMLQuantizationType.Q8_0).reshape(6, 2, 34)
    integers = stored[..., 2:].view(np.int8).astype(np.float32)
    scale = np.abs(values.reshape(6, 2, 32)).max(-1, keepdims=True) / 127
    result = np.asarray(perturb.quantise_int8(values)).reshape(6, 2, 32)
    np.testing.assert_allclose(result, integers * scale, rtol=1e-6)
    assert np.abs(result - values.reshape(6, 2, 32)).max() > 0


def test_fp8_scales_each_block_to_the_largest_number(values):
    blocks = values.reshape(6, 4, 16)
    scale = np.abs(blocks).max(-1, keepdims=True) / np.float32(448)
    expected = (blocks / scale).astype(ml_dtypes.float8_e4m3fn).astype(np.float32) * scale
    np.testing.assert_allclose(perturb.quantise_fp8(values, block=16), expected.reshape(6, 64), rtol=1e-6)


def test_a_short_last_block_and_zeros(values):
    whole, part = perturb.quantise_int8(values, block=48), perturb.quantise_int8(values[:, 48:], block=48)
    np.testing.assert_array_equal(whole[:, 48:], part)
    np.testing.assert_array_equal(perturb.quantise_fp8(np.zeros((2, 8), np.float32)), np.zeros((2, 8)))
    with pytest.raises(ValueError, match="block must be at least 1"):
        perturb.quantise_int8(values, block=0)


# Weights


def test_quantised_weights_have_blocks_along_the_summed_axis(model):
    state = nnx.split(model)[1]
    quantised = perturb.int8_weights(state, block=8)
    kernel, embedding = state["layers"][0]["mlp"]["down"]["kernel"][...], state["embedding"][...]
    expected = perturb.quantise_int8(kernel.T, block=8).T
    np.testing.assert_array_equal(quantised["layers"][0]["mlp"]["down"]["kernel"][...], expected)
    assert np.any(expected != perturb.quantise_int8(kernel, block=8))
    np.testing.assert_array_equal(quantised["embedding"][...], perturb.quantise_int8(embedding, block=8))
    np.testing.assert_array_equal(quantised["final_norm"]["scale"][...], state["final_norm"]["scale"][...])


def test_weights_compose_in_the_order_given(model):
    state = nnx.split(model)[1]
    chained = perturb.chain_weights(perturb.bf16_weights, perturb.fp8_weights)(state)
    for got, expected in zip(
        jax.tree.leaves(chained), jax.tree.leaves(perturb.fp8_weights(perturb.bf16_weights(state))), strict=True
    ):
        np.testing.assert_array_equal(got, expected)
    assert perturb.chain_weights()(state) is state


def test_unmerged_adapters_are_refused(model):
    adapted = add_lora(model, LoraSettings(rank=2), rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="merge it first with merge_lora"):
        perturb.int8_weights(nnx.split(adapted)[1])


def test_stale_weights_are_those_of_lag_steps_ago():
    states = [{"w": jnp.full((2,), float(step))} for step in range(5)]
    history, seen = perturb.start_history(states[0], lag=2), []
    for state in states[1:]:
        history = perturb.push(history, state)
        seen.append(float(perturb.stale_weights(history)["w"][0]))
    assert seen == [0.0, 0.0, 1.0, 2.0]
    assert float(perturb.stale_weights(perturb.push(perturb.start_history(states[0], lag=0), states[3]))["w"][0]) == 3
    with pytest.raises(ValueError, match="lag must be at least 0"):
        perturb.start_history(states[0], lag=-1)


# Logits


@pytest.fixture(scope="module")
def logits() -> jax.Array:
    return 2 * jax.random.normal(jax.random.key(2), (3, 50))


@pytest.fixture(scope="module")
def keys() -> jax.Array:
    return jax.random.split(jax.random.key(3), 3)


def test_the_key_of_a_context_is_its_tokens_folded_in():
    tokens = jnp.array([[0, 7, 3, 5], [7, 3, 5, 9]])
    mask = jnp.array([[False, True, True, True], [True, True, True, True]])
    made = perturb.context_keys(KEY, tokens, mask)
    by_hand = jax.random.fold_in(jax.random.fold_in(KEY, 7), 3)
    for row, column in ((0, 3), (1, 2)):  # the same context, with and without padding
        assert jnp.all(jax.random.key_data(made[row, column]) == jax.random.key_data(by_hand))
    swapped = perturb.context_keys(KEY, jnp.array([[3, 7, 5, 5]]))
    assert jnp.any(jax.random.key_data(swapped[0, 2]) != jax.random.key_data(by_hand))


@pytest.mark.parametrize("name", ["gaussian_noise", "bounded_noise", "relative_noise"])
def test_noise_is_that_of_its_key_and_seed(name, logits, keys):
    act = functools.partial(getattr(perturb, name), scale=0.3)
    once = act(logits, keys)
    np.testing.assert_array_equal(once, act(logits, keys))
    np.testing.assert_array_equal(once[1:], act(logits[1:], keys[1:]))  # whatever else is in the batch
    assert np.all(once != act(logits, keys, seed=1))
    assert np.all(once != act(logits, keys[::-1])) or np.any(once[0] != act(logits, keys[::-1])[0])
    np.testing.assert_array_equal(act(logits, keys, scale=0.0), logits)
    with pytest.raises(ValueError, match="scale must be finite and not negative"):
        act(logits, keys, scale=-1.0)


def test_noise_has_the_law_it_names():
    zeros, keys = jnp.zeros((200, 300)), jax.random.split(jax.random.key(0), 200)
    normal = np.asarray(perturb.gaussian_noise(zeros, keys, scale=0.5)).ravel()
    assert abs(normal.std() / 0.5 - 1) < 0.01
    assert abs(normal.mean()) < 0.01
    assert np.abs(normal).max() > 1.5
    bounded = np.asarray(perturb.bounded_noise(zeros, keys, scale=0.5)).ravel()
    assert 0.499 < np.abs(bounded).max() <= 0.5
    assert abs(bounded.std() * 3**0.5 / 0.5 - 1) < 0.01
    relative = np.asarray(perturb.relative_noise(zeros - 8, keys, scale=0.25)).ravel() + 8
    assert 1.99 < np.abs(relative).max() <= 2
    assert np.abs(perturb.relative_noise(zeros, keys)).max() == 0


def test_slips_have_the_laws_they_name(logits, keys):
    np.testing.assert_allclose(perturb.temperature_slip(logits, keys, temperature=1.25), logits * 0.8, rtol=1e-6)
    top = np.asarray(perturb.top_k_slip(logits, keys, top_k=7))
    np.testing.assert_array_equal(np.isfinite(top).sum(-1), 7)
    law, kept = np.exp(categorical.log_probs(logits)), np.isfinite(perturb.top_p_slip(logits, keys, top_p=0.8))
    for p, inside in zip(law, kept, strict=True):
        mass = p[inside].sum()
        assert mass >= 0.8 > mass - p[inside].min()
        assert p[inside].min() > p[~inside].max()
    np.testing.assert_array_equal(perturb.top_p_slip(logits, keys, top_p=1.0), logits)
    np.testing.assert_array_equal(
        perturb.bf16_logits(logits, keys), np.asarray(logits).astype(ml_dtypes.bfloat16).astype(np.float32)
    )


def test_excluded_tokens_stay_excluded(logits, keys):
    pruned = logits.at[:, 4].set(-jnp.inf)
    act = perturb.chain_logits(
        functools.partial(perturb.relative_noise, scale=0.1),
        functools.partial(perturb.bounded_noise, scale=0.1),
        functools.partial(perturb.temperature_slip, temperature=0.5),
        functools.partial(perturb.top_p_slip, top_p=0.9),
        perturb.bf16_logits,
    )
    result = np.asarray(act(pruned, keys))
    assert np.isneginf(result[:, 4]).all()
    assert not np.isnan(result).any()


@pytest.mark.parametrize(
    ("act", "message"),
    [
        (functools.partial(perturb.temperature_slip, temperature=0.0), "temperature must be positive"),
        (functools.partial(perturb.top_p_slip, top_p=0.0), r"top_p must lie in \(0, 1\]"),
        (functools.partial(perturb.top_k_slip, top_k=0), "top_k must be at least 1"),
    ],
)
def test_impossible_slips_are_refused(act, message, logits, keys):
    with pytest.raises(ValueError, match=message):
        act(logits, keys)


def test_names(logits, keys):
    strong = perturb.perturbation("gaussian_noise", 0.7).logits
    np.testing.assert_array_equal(strong(logits, keys), perturb.gaussian_noise(logits, keys, scale=0.7))
    assert perturb.perturbation("none") == Perturbation()
    with pytest.raises(ValueError, match="Did you mean 'gaussian_noise'"):
        perturb.perturbation("gausian_noise")
    with pytest.raises(ValueError, match="'fp8_weights' has none"):
        perturb.perturbation("fp8_weights", 2.0)


def test_two_noises_of_a_chain_are_independent(keys):
    noise, nothing = perturb.perturbation("gaussian_noise", 1.0), jnp.zeros((*keys.shape, 4000))
    both = np.asarray(perturb.combine(noise, noise).logits(nothing, keys))
    # The same noise twice would have a standard deviation of 2.
    np.testing.assert_allclose(both.std(), 2**0.5, rtol=0.05)


def test_combined_perturbations_act_in_order(logits, keys):
    first, second = perturb.perturbation("bounded_noise", 0.4), perturb.perturbation("top_k", 5)
    both = perturb.combine(first, second, perturb.perturbation("int8_cache"))
    np.testing.assert_array_equal(both.logits(logits, keys), second.logits(first.logits(logits, keys), keys))
    assert both.weights is None
    assert both.cache is not None


# Sampler against scoring

ENGINES = {
    "everything": perturb.combine(
        perturb.perturbation("int8_weights"),
        perturb.perturbation("fp8_cache"),
        perturb.perturbation("gaussian_noise", 0.3),
        perturb.perturbation("temperature", 1.2),
        perturb.perturbation("top_p", 0.9),
    ),
    "fp8_cache": perturb.perturbation("fp8_cache"),
}


@pytest.mark.parametrize("name", ENGINES)
def test_the_perturbed_sampler_is_a_policy(name, model, prompts):
    """Scoring the sampled texts gives the recorded log-probs; the unperturbed model does not."""
    engine = ENGINES[name]
    graphdef, state = nnx.split(model)
    generate = make_generate(
        graphdef,
        max_new_tokens=NEW,
        group_size=GROUP,
        sampling=SamplingSettings(),
        eos_id=VOCABULARY - 1,
        pad_id=0,
        perturb_logits=engine.logits,
        cache_rounding=engine.cache,
    )
    state = state if engine.weights is None else engine.weights(state)
    rollout = generate(state, *prompts, jax.random.key(5), 0, jnp.arange(2), noise_key=KEY)
    mask = np.asarray(rollout.response_mask)[:, WIDTH:]
    recorded = np.asarray(rollout.log_prob_behaviour)[:, WIDTH:][mask]

    def scored(engine: Perturbation, key: jax.Array = KEY) -> np.ndarray:
        texts = rollout.tokens, rollout.token_mask
        logits = perturb.perturbed_logits(model, *texts, engine, response_width=NEW, key=key)
        return np.asarray(categorical.log_prob(logits, rollout.tokens[:, WIDTH:]))[mask]

    np.testing.assert_allclose(recorded, scored(engine), atol=3e-5)
    assert np.abs(recorded - scored(Perturbation())).mean() > 3e-3
    if engine.logits is not None:
        assert np.abs(recorded - scored(engine, jax.random.key(12))).max() > 0.05
