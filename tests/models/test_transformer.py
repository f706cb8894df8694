from collections.abc import Iterator
from dataclasses import replace

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxrl_llm.models.architectures import glm45
from jaxrl_llm.models.architectures import glm45_air
from jaxrl_llm.models.attention import Visibility
from jaxrl_llm.models.attention import grouped_query_attention
from jaxrl_llm.models.blueprint import active_parameters
from jaxrl_llm.models.blueprint import num_parameters
from jaxrl_llm.models.config import ExpertsConfig
from jaxrl_llm.models.config import RopeScaling
from jaxrl_llm.models.config import TransformerConfig
from jaxrl_llm.models.config import smollm2_135m
from jaxrl_llm.models.config import tiny
from jaxrl_llm.models.layers import rotary_frequencies
from jaxrl_llm.models.transformer import Transformer
from jaxrl_llm.models.transformer import positions_of

BATCH, LENGTH = 3, 9


@jax.jit
def forward(model: Transformer, tokens: jax.Array, token_mask: jax.Array | None = None) -> jax.Array:
    return model(tokens, token_mask)


@pytest.fixture(scope="module")
def model(random_transformer) -> Transformer:
    return random_transformer(tiny())


@pytest.fixture
def wide(random_transformer) -> Iterator[Transformer]:
    """The model in float64, where two orders of summing differ by less than 1e-12."""
    with jax.enable_x64(True):
        yield random_transformer(tiny(), param_dtype=jnp.float64, compute_dtype=jnp.float64)


@pytest.fixture(scope="module")
def tokens() -> jax.Array:
    return jax.random.randint(jax.random.key(1), (BATCH, LENGTH), 0, 64)


@pytest.fixture(scope="module")
def token_mask() -> jax.Array:
    return jnp.arange(LENGTH) >= jnp.array([[0], [2], [5]])


def transcription(model: Transformer, tokens: np.ndarray) -> np.ndarray:
    """The decoder of one text, one token and one head at a time in float64; rotary pairs as complex numbers."""
    config, experts = model.config, model.config.experts
    state = {"/".join(map(str, path)): np.float64(value[...]) for path, value in nnx.to_flat_state(nnx.state(model))}
    half = config.rotary_dim // 2

    def norm(x, name):
        return x / np.sqrt(np.mean(x**2) + config.norm_eps) * state[f"{name}/scale"]

    def project(x, name):
        return x @ state[f"{name}/kernel"] + state.get(f"{name}/bias", 0.0)

    def heads(x, name, position, turned=True):
        rows = project(x, f"{name}").reshape(-1, config.head_dim)
        if turned and config.qk_norm:
            rows = np.stack([norm(row, f"{name}_norm") for row in rows])
        if not turned:
            return rows
        angles = position * np.array([config.rope_theta ** (-2 * i / config.rotary_dim) for i in range(half)])
        pairs = (rows[:, :half] + 1j * rows[:, half : 2 * half]) * np.exp(1j * angles)
        return np.concatenate([pairs.real, pairs.imag, rows[:, 2 * half :]], axis=1)

    def feed_forward(x, name, expert=()):
        gate, up = x @ state[f"{name}/gate/kernel"][expert], x @ state[f"{name}/up/kernel"][expert]
        return (gate / (1 + np.exp(-gate)) * up) @ state[f"{name}/down/kernel"][expert]

    def mixture(x, name):
        scores = 1 / (1 + np.exp(-x @ state[f"{name}/router/kernel"]))
        chosen = np.argsort(-(scores + state[f"{name}/router/bias"]))[: experts.chosen]
        parts = [scores[one] / scores[chosen].sum() * feed_forward(x, name, (one,)) for one in chosen]
        return experts.scale * sum(parts) + feed_forward(x, f"{name}/shared")

    xs = [state["embedding"][token] for token in tokens]
    for layer in range(config.num_layers):
        at = f"layers/{layer}/attention"
        normed = [norm(x, f"layers/{layer}/attention_norm") for x in xs]
        queries = [heads(x, f"{at}/query", t) for t, x in enumerate(normed)]
        keys = [heads(x, f"{at}/key", t) for t, x in enumerate(normed)]
        values = [heads(x, f"{at}/value", t, turned=False) for t, x in enumerate(normed)]
        for t in range(len(xs)):
            mixed = []
            for head in range(config.num_heads):
                shared = head * config.num_kv_heads // config.num_heads
                scores = np.array([queries[t][head] @ keys[s][shared] for s in range(t + 1)])
                weights = np.exp(scores / np.sqrt(config.head_dim))
                mixed.append(sum(w * values[s][shared] for s, w in enumerate(weights)) / weights.sum())
            xs[t] = xs[t] + project(np.concatenate(mixed), f"{at}/output")
        for t, x in enumerate(xs):
            part = mixture if config.is_sparse(layer) else feed_forward
            xs[t] = x + part(norm(x, f"layers/{layer}/mlp_norm"), f"layers/{layer}/mlp")
    return np.stack([norm(x, "final_norm") for x in xs])


VARIANTS = {
    "llama": tiny(),
    "no sharing, odd sizes": tiny(num_heads=3, num_kv_heads=3, hidden_size=20, head_dim=6, vocab_size=61),
    "one shared head": tiny(num_heads=4, num_kv_heads=1, num_layers=1),
    "qwen2: biases": tiny(qkv_bias=True),
    "qwen3: query and key norms, own head": tiny(qk_norm=True, tie_embeddings=False),
    "glm: experts, half of a head turns": tiny(
        qkv_bias=True,
        rotary_fraction=0.5,
        experts=ExpertsConfig(count=6, chosen=2, width=16, shared=1, dense_layers=1, scale=1.5),
    ),
}


@pytest.mark.parametrize("config", VARIANTS.values(), ids=VARIANTS)
def test_hidden_states_and_logits_equal_a_transcription(random_transformer, config: TransformerConfig):
    model = random_transformer(config)
    tokens = np.random.default_rng(0).integers(0, config.vocab_size, LENGTH)
    expected = transcription(model, tokens)
    hidden = forward(model, jnp.asarray(tokens)[None])[0]
    np.testing.assert_allclose(hidden, expected, atol=2e-5)
    head = model.embedding[...].T if config.tie_embeddings else model.unembedding[...]
    np.testing.assert_allclose(model.logits(hidden), expected @ np.float64(head), atol=5e-5)


def test_llama3_scaling_stretches_long_wavelengths_only():
    scaling = RopeScaling(factor=8.0, low_frequency_factor=1.0, high_frequency_factor=4.0, original_max_positions=256)
    config = TransformerConfig(**{**vars(tiny(head_dim=32)), "rope_scaling": scaling})
    expected = []
    for i in range(16):
        frequency = config.rope_theta ** (-2 * i / 32)
        wavelength = 2 * np.pi / frequency
        if wavelength < 256 / 4.0:
            expected.append(frequency)
        elif wavelength > 256 / 1.0:
            expected.append(frequency / 8.0)
        else:
            smooth = (256 / wavelength - 1.0) / (4.0 - 1.0)
            expected.append((1 - smooth) * frequency / 8.0 + smooth * frequency)
    np.testing.assert_allclose(rotary_frequencies(config), expected, rtol=1e-5)
    plain = rotary_frequencies(tiny(head_dim=32))
    assert expected[0] == pytest.approx(float(plain[0]))
    assert expected[-1] == pytest.approx(float(plain[-1]) / 8)
    assert sum(not np.isclose(a, b) and not np.isclose(a, b / 8) for a, b in zip(expected, plain, strict=True)) >= 2


def test_a_token_does_not_see_the_future(model, tokens):
    hidden = forward(model, tokens)
    changed = forward(model, tokens.at[:, 5].add(1) % 64)
    np.testing.assert_array_equal(changed[:, :5], hidden[:, :5])
    assert jnp.all(jnp.any(jnp.abs(changed[:, 5:] - hidden[:, 5:]) > 1e-4, axis=-1))


def test_left_padding_changes_nothing_at_real_tokens(wide, tokens):
    hidden = forward(wide, tokens)
    for padding in (1, 4):
        padded = jnp.pad(tokens, ((0, 0), (padding, 0)), constant_values=3)
        mask = jnp.broadcast_to(jnp.arange(LENGTH + padding) >= padding, padded.shape)
        np.testing.assert_allclose(forward(wide, padded, mask)[:, padding:], hidden, rtol=0, atol=1e-12)


def test_padding_content_changes_nothing_at_real_tokens(model, tokens, token_mask):
    hidden = forward(model, tokens, token_mask)
    other = forward(model, jnp.where(token_mask, tokens, 63 - tokens), token_mask)
    np.testing.assert_array_equal(hidden[token_mask], other[token_mask])


def test_right_padding_changes_nothing_at_real_tokens(wide, tokens):
    mask = jnp.broadcast_to(jnp.arange(LENGTH) < 6, tokens.shape)
    np.testing.assert_allclose(forward(wide, tokens, mask)[:, :6], forward(wide, tokens[:, :6]), rtol=0, atol=1e-12)


def test_positions_count_real_tokens(token_mask):
    expected = [[0, 1, 2, 3, 4, 5, 6, 7, 8], [0, 0, 0, 1, 2, 3, 4, 5, 6], [0, 0, 0, 0, 0, 0, 1, 2, 3]]
    np.testing.assert_array_equal(positions_of(token_mask), expected)


def test_rows_do_not_see_each_other(wide, tokens, token_mask):
    order = jnp.array([2, 0, 1])
    permuted = forward(wide, tokens[order], token_mask[order])
    np.testing.assert_allclose(forward(wide, tokens, token_mask)[order], permuted, rtol=0, atol=1e-12)


def test_a_row_of_padding_is_finite_and_so_is_its_gradient(model, tokens):
    graphdef, state = nnx.split(model)
    mask = jnp.ones(tokens.shape, bool).at[1].set(False).at[2, :4].set(False)

    def loss(state):
        return jnp.sum(jnp.square(nnx.merge(graphdef, state)(tokens, mask)))

    value, gradient = jax.jit(jax.value_and_grad(loss))(state)
    chex.assert_tree_all_finite((value, gradient))


def test_one_segment_is_the_default_and_two_are_two_texts(wide, tokens, token_mask):
    positions = positions_of(token_mask)
    x = wide.embed(tokens)
    blocks = jax.jit(lambda x, positions, sight: wide.blocks(x, positions, token_mask, visibility=sight))
    causal = Visibility(token_mask, jnp.zeros((BATCH, LENGTH), jnp.int32))
    np.testing.assert_allclose(blocks(x, positions, causal), blocks(x, positions, None), rtol=0, atol=1e-12)
    # Texts of 4 and 5 tokens packed into one row, blind to each other, are as each alone.
    texts = jnp.broadcast_to(jnp.array([0] * 4 + [1] * 5), (BATCH, LENGTH))
    apart = Visibility(jnp.ones((BATCH, LENGTH), bool), texts)
    packed = blocks(x, jnp.array([[0, 1, 2, 3, 0, 1, 2, 3, 4]]), apart)
    alone = wide.final_norm(packed[:, 4:])
    expected = forward(wide, tokens[:, 4:])
    np.testing.assert_allclose(alone, expected, rtol=0, atol=1e-12)


def test_layers_in_two_parts_equal_the_whole(model, tokens, token_mask):
    trunk = model.trunk(tokens, token_mask, stop=1)
    np.testing.assert_array_equal(model.from_trunk(trunk, token_mask, start=1), model(tokens, token_mask))
    np.testing.assert_array_equal(model.trunk(tokens, stop=0), model.embed(tokens))


def test_remat_keeps_less_and_gives_the_same_gradient(model, tokens, token_mask):
    graphdef, state = nnx.split(model)

    def loss(state, remat):
        return jnp.sum(jnp.square(nnx.merge(graphdef, state)(tokens, token_mask, remat=remat)[..., :5]))

    gradients = jax.jit(lambda state: [jax.value_and_grad(loss)(state, remat) for remat in (False, True)])(state)
    chex.assert_trees_all_close(*gradients, rtol=1e-5, atol=1e-6)
    kept = [
        jax.eval_shape(lambda state, r=remat: jax.vjp(lambda s: loss(s, r), state)[1], state) for remat in (False, True)
    ]
    sizes = [sum(leaf.size for leaf in jax.tree.leaves(vjp)) for vjp in kept]
    parameters = num_parameters(model.config)
    assert sizes[1] - parameters < 0.5 * (sizes[0] - parameters)


def test_tied_head_is_the_embedding_itself(random_transformer, model):
    matrix, vocabulary_axis = model.head()
    assert matrix is model.embedding.get_value()
    assert (matrix.shape, vocabulary_axis) == ((64, 32), 0)
    untied, vocabulary_axis = random_transformer(tiny(tie_embeddings=False)).head()
    assert (untied.shape, vocabulary_axis) == ((32, 64), 1)


@pytest.mark.parametrize("param_dtype", [jnp.float32, jnp.bfloat16])
def test_bfloat16_is_close_to_float32(model, tokens, token_mask, param_dtype):
    narrow = model.astype(param_dtype=param_dtype, compute_dtype=jnp.bfloat16)
    hidden, expected = forward(narrow, tokens, token_mask), forward(model, tokens, token_mask)
    assert hidden.dtype == jnp.bfloat16
    assert {leaf.dtype for leaf in jax.tree.leaves(nnx.state(narrow))} == {jnp.dtype(param_dtype)}
    error = jnp.abs(hidden.astype(jnp.float32) - expected)[token_mask]
    scale = jnp.std(expected[token_mask])
    # 2^-8 is the spacing of bfloat16 below 1; a few of them over two layers, never none.
    assert 2**-10 * scale < jnp.mean(error) < 2**-5 * scale
    assert narrow.logits(hidden).dtype == jnp.float32
    assert model(tokens).dtype == jnp.float32


def test_astype_agrees_with_a_model_made_so(random_transformer, model):
    made = random_transformer(tiny(), param_dtype=jnp.bfloat16, compute_dtype=jnp.bfloat16)
    cast = model.astype(param_dtype=jnp.bfloat16, compute_dtype=jnp.bfloat16)
    assert nnx.graphdef(made) == nnx.graphdef(cast)
    assert nnx.graphdef(made) != nnx.graphdef(model)


def test_vmap_agrees_with_the_batch_and_a_step_compiles_once(model, tokens, token_mask):
    graphdef, state = nnx.split(model)

    @jax.jit
    @chex.assert_max_traces(n=1)
    def compiled(state, tokens, mask):
        return nnx.merge(graphdef, state)(tokens, mask)

    expected = forward(model, tokens, token_mask)
    np.testing.assert_allclose(compiled(state, tokens, token_mask), expected, atol=2e-6)
    other = compiled(jax.tree.map(lambda x: 0.5 * x, state), tokens + 1, ~token_mask)
    assert jnp.any(other != expected)
    rows = jax.jit(jax.vmap(lambda t, m: model(t[None], m[None])[0]))(tokens, token_mask)
    np.testing.assert_allclose(rows, expected, atol=2e-6)


def test_gradient_reaches_every_parameter(random_transformer, tokens, token_mask):
    model = random_transformer(tiny(qkv_bias=True, qk_norm=True, tie_embeddings=False))
    graphdef, state = nnx.split(model)
    weights = jax.random.normal(jax.random.key(2), (64,))

    def loss(state):
        model = nnx.merge(graphdef, state)
        return jnp.sum(jnp.sin(model.logits(model(tokens, token_mask)) @ weights), where=token_mask)

    gradient = jax.jit(jax.grad(loss))(state)
    chex.assert_tree_all_finite(gradient)
    for path, value in nnx.to_flat_state(gradient):
        assert jnp.max(jnp.abs(value[...])) > 1e-6, path


def test_attention_to_equal_keys_is_the_mean_of_allowed_values():
    values = jax.random.normal(jax.random.key(0), (1, 1, 4, 2))
    mask = jnp.array([[[True, False, True, False], [False, False, False, False]]])
    mixed = grouped_query_attention(jnp.ones((1, 2, 3, 2)), jnp.ones((1, 1, 4, 2)), values, mask)
    np.testing.assert_allclose(mixed[0, 0], jnp.tile(values[0, 0, ::2].mean(0), (3, 1)), rtol=1e-6)
    np.testing.assert_allclose(mixed[0, 1], jnp.tile(values[0, 0].mean(0), (3, 1)), rtol=1e-6)


@pytest.mark.parametrize(
    ("config", "whole", "further", "active"),
    [
        (glm45(), 352_797_829_024, 3_988_069_792, 32_080_373_664),
        (glm45_air(), 106_852_251_264, 2_375_059_584, 12_182_615_680),
    ],
)
def test_glm_has_its_published_number_of_parameters(config, whole, further, active):
    """355 and 106 billion, 32 and 12 of them active (Table 1 of the report), to the digit by its configuration."""
    main = replace(config, mtp_layers=0)
    assert num_parameters(main) == whole
    assert num_parameters(config) - whole == further
    assert active_parameters(main) == active


def test_padding_changes_nothing_for_further_tokens(random_transformer):
    model = random_transformer(replace(tiny(), mtp_layers=1), param_dtype=jnp.float32)
    tokens = jnp.array([[5, 6, 7, 8, 9]])
    padded, mask = jnp.pad(tokens, ((0, 0), (3, 0)), constant_values=1), jnp.arange(8)[None] >= 3
    plain = model.hidden_further(model(tokens), tokens)
    found = model.hidden_further(model(padded, mask), padded, mask)
    np.testing.assert_allclose(found[:, 3:], plain, atol=2e-5)
    with pytest.raises(ValueError, match=r"two columns or more, a token and the next one, got \(1, 1\)"):
        model.hidden_further(model(tokens[:, :1]), tokens[:, :1])


def test_routes_that_are_given_back_change_nothing(random_transformer):
    config = VARIANTS["glm: experts, half of a head turns"]
    model = random_transformer(config)
    tokens, mask = jnp.arange(12).reshape(2, 6), jnp.ones((2, 6), bool)

    def through(selections=None):
        return model.rows(model.embed(tokens), positions_of(mask), Visibility(mask), selections=selections)

    free = through()
    chosen = [None if routes is None else routes.selection for routes in free.routes]
    assert [one is None for one in chosen] == [True, False]
    np.testing.assert_array_equal(through(chosen).x, free.x)
    others = [None, (chosen[1] + 1) % config.experts.count]
    assert jnp.abs(through(others).x - free.x).max() > 1e-3
    with pytest.raises(ValueError, match="selections has 1 entries; it must have one for each of 2 layers"):
        through([None])


def test_smollm2_has_its_published_number_of_parameters():
    abstract = nnx.eval_shape(lambda: Transformer(smollm2_135m(), rngs=nnx.Rngs(0)))
    sizes = [leaf.size for leaf in jax.tree.leaves(nnx.state(abstract))]
    assert sum(sizes) == num_parameters(smollm2_135m()) == 134_515_008


@pytest.mark.parametrize("config", VARIANTS.values(), ids=VARIANTS)
def test_num_parameters_counts_the_state(random_transformer, config: TransformerConfig):
    state = nnx.state(random_transformer(config))
    assert sum(leaf.size for leaf in jax.tree.leaves(state)) == num_parameters(config)


def test_fresh_parameters_have_the_scale_of_their_fan_in():
    state = nnx.state(Transformer(tiny(hidden_size=128, intermediate_size=512, vocab_size=512), rngs=nnx.Rngs(0)))
    block = state["layers"][0]
    expected = {
        128**-0.5: block["mlp"]["gate"]["kernel"],
        512**-0.5 / 2: block["mlp"]["down"]["kernel"],
        32**-0.5 / 2: block["attention"]["output"]["kernel"],
        0.02: state["embedding"],
    }
    for scale, kernel in expected.items():
        assert jnp.std(kernel[...]) == pytest.approx(scale, rel=0.03)
    assert jnp.all(block["mlp_norm"]["scale"][...] == 1)
    assert not jnp.any(block["mlp"]["gate"]["kernel"][...] == block["mlp"]["up"]["kernel"][...])


@pytest.mark.parametrize(
    ("field", "value", "sentence"),
    [
        ("num_kv_heads", 3, "num_heads must be a multiple of num_kv_heads, got 4 query heads for 3 key-value heads"),
        ("head_dim", 7, "head_dim must be even because rotary positions turn pairs, got 7"),
        ("num_layers", 0, "num_layers must be a positive integer, got 0"),
        ("vocab_size", 10.5, "vocab_size must be a positive integer, got 10.5"),
        ("rope_theta", -1.0, "rope_theta must be positive, got -1.0"),
        ("norm_eps", float("nan"), "norm_eps must be positive, got nan"),
    ],
)
def test_impossible_sizes_are_refused(field, value, sentence):
    with pytest.raises(ValueError, match=sentence):
        TransformerConfig(**{**vars(tiny()), field: value})


def test_impossible_scalings_are_refused():
    with pytest.raises(ValueError, match=r"factor stretches the wavelengths and must be at least 1, got 0\.5"):
        RopeScaling(factor=0.5)
    with pytest.raises(ValueError, match="low_frequency_factor must be positive and below high_frequency_factor"):
        RopeScaling(low_frequency_factor=4.0, high_frequency_factor=4.0)


def test_impossible_calls_are_refused(model, tokens, token_mask):
    with pytest.raises(ValueError, match=r"tokens must be integers of shape \[B, T\], got float32 of shape \(3, 9\)"):
        model(tokens.astype(jnp.float32))
    with pytest.raises(ValueError, match=r"token_mask must have the shape of tokens, \(3, 9\), got \(3, 8\)"):
        model(tokens, token_mask[:, 1:])
    with pytest.raises(ValueError, match="tokens must have at most max_positions=256 columns, got 257"):
        model(jnp.zeros((1, 257), jnp.int32))
    with pytest.raises(ValueError, match="start and stop must satisfy 0 <= start <= stop <= 2, got 1 and 3"):
        model.blocks(model.embed(tokens), positions_of(token_mask), token_mask, start=1, stop=3)
