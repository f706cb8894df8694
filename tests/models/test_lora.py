import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxrl_llm.models.config import tiny
from jaxrl_llm.models.lora import PROJECTIONS
from jaxrl_llm.models.lora import LoraSettings
from jaxrl_llm.models.lora import add_lora
from jaxrl_llm.models.lora import merge_lora
from jaxrl_llm.models.trainable import lora
from jaxrl_llm.models.transformer import Transformer


@pytest.fixture(scope="module")
def model(random_transformer) -> Transformer:
    return random_transformer(tiny(qkv_bias=True))


@pytest.fixture(scope="module")
def tokens() -> jax.Array:
    return jax.random.randint(jax.random.key(1), (2, 7), 0, 64)


@jax.jit
def forward(model: Transformer, tokens: jax.Array) -> jax.Array:
    return model(tokens)


def with_learned_adapters(model: Transformer, settings: LoraSettings) -> Transformer:
    """Adapters as after some training: the second factor is no longer zero."""
    graphdef, state = nnx.split(add_lora(model, settings, rngs=nnx.Rngs(1)))
    adapters, rest = lora().partition(state)
    adapters = jax.tree.map(lambda x: x + 0.1 * jax.random.normal(jax.random.key(x.size), x.shape), adapters)
    return nnx.merge(graphdef, adapters, rest)


def test_fresh_adapters_leave_the_outputs_unchanged(model, tokens):
    adapted = add_lora(model, LoraSettings(rank=4), rngs=nnx.Rngs(1))
    np.testing.assert_array_equal(forward(adapted, tokens), forward(model, tokens))
    assert adapted.embedding.get_value() is model.embedding.get_value()
    assert all(linear.low_rank is None for linear in (model.layers[0].attention.query, model.layers[1].mlp.up))


def test_an_adapter_adds_alpha_over_rank_times_its_product(model):
    settings = LoraSettings(rank=4, alpha=6.0, projections=("up",))
    adapted = with_learned_adapters(model, settings).layers[1].mlp.up
    x = jax.random.normal(jax.random.key(2), (5, 32))
    a, b = np.float64(adapted.low_rank.a[...]), np.float64(adapted.low_rank.b[...])
    expected = np.float64(x) @ (np.float64(adapted.kernel[...]) + 6.0 / 4 * a @ b)
    np.testing.assert_allclose(adapted(x), expected, atol=1e-5)
    assert a.shape == (32, 4)
    assert b.shape == (4, 64)


@pytest.mark.parametrize("projections", [PROJECTIONS, ("query", "value")])
def test_merged_equals_unmerged(model, tokens, projections):
    adapted = with_learned_adapters(model, LoraSettings(rank=3, projections=projections))
    graphdef, state = nnx.split(adapted)
    merged_state = jax.jit(lambda state: nnx.state(merge_lora(nnx.merge(graphdef, state))))(state)
    merged = nnx.merge(nnx.graphdef(model), merged_state)
    np.testing.assert_allclose(forward(merged, tokens), forward(adapted, tokens), atol=2e-5)
    assert jnp.max(jnp.abs(forward(merged, tokens) - forward(model, tokens))) > 0.01
    # Merging made new arrays; the adapted model is as it was.
    assert adapted.layers[0].attention.query.low_rank is not None


def test_gradients_are_those_of_the_adapters_alone(model, tokens):
    adapted = with_learned_adapters(model, LoraSettings(rank=2))
    graphdef, state = nnx.split(adapted)
    learned, frozen = lora().partition(state)

    @jax.jit
    def gradient(learned, frozen):
        return jax.grad(lambda part: jnp.sum(jnp.sin(nnx.merge(graphdef, part, frozen)(tokens))))(learned)

    got = nnx.to_flat_state(gradient(learned, frozen))
    assert len(got) == 2 * 7 * 2
    assert {path[-2:] for path, _ in got} == {("low_rank", "a"), ("low_rank", "b")}
    for path, value in got:
        assert jnp.max(jnp.abs(value[...])) > 1e-6, path


def test_at_the_start_only_the_second_factor_moves(model, tokens):
    graphdef, state = nnx.split(add_lora(model, LoraSettings(rank=2), rngs=nnx.Rngs(1)))
    learned, frozen = lora().partition(state)
    loss = jax.jit(jax.grad(lambda part: jnp.sum(jnp.sin(nnx.merge(graphdef, part, frozen)(tokens)))))
    for path, value in nnx.to_flat_state(loss(learned)):
        moves = bool(jnp.any(value[...] != 0))
        assert moves == (path[-1] == "b"), path


def test_adapters_of_a_narrow_model_stay_in_float32(model, tokens):
    narrow = with_learned_adapters(
        model.astype(param_dtype=jnp.bfloat16, compute_dtype=jnp.bfloat16), LoraSettings(rank=4)
    )
    learned, frozen = lora().partition(nnx.state(narrow))
    assert {leaf.dtype for leaf in jax.tree.leaves(learned)} == {jnp.dtype(jnp.float32)}
    assert forward(narrow, tokens).dtype == jnp.bfloat16
    merged = merge_lora(narrow)
    assert {leaf.dtype for leaf in jax.tree.leaves(nnx.state(merged))} == {jnp.dtype(jnp.bfloat16)}
    chex.assert_trees_all_equal_shapes_and_dtypes(nnx.state(merged), frozen)


def test_adapters_are_drawn_apart(model):
    learned, _ = lora().partition(nnx.state(add_lora(model, LoraSettings(rank=4), rngs=nnx.Rngs(1))))
    drawn = [np.asarray(value[...]) for path, value in nnx.to_flat_state(learned) if path[-1] == "a"]
    assert len({array.tobytes() for array in drawn}) == len(drawn) == 14
    assert np.std(learned["layers"][0]["mlp"]["down"]["low_rank"]["a"][...]) == pytest.approx(64**-0.5, rel=0.1)


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"rank": 0}, "rank must be at least 1, got 0"),
        ({"alpha": -1.0}, r"alpha must be positive, got -1\.0"),
        (
            {"projections": ("query", "wide")},
            r"projections must be some of query, key, .* down, got \('query', 'wide'\)",
        ),
        ({"projections": ()}, "projections must be some of"),
    ],
)
def test_impossible_settings_are_refused(settings, sentence):
    with pytest.raises(ValueError, match=sentence):
        LoraSettings(**settings)


def test_impossible_adapters_are_refused(model):
    with pytest.raises(ValueError, match="rank must be at most 16 for key, got 17"):
        add_lora(model, LoraSettings(rank=17, projections=("key",)), rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="first_layer must be one of the 2 layers, got 2"):
        add_lora(model, LoraSettings(), rngs=nnx.Rngs(0), first_layer=2)
    adapted = add_lora(model, LoraSettings(rank=2), rngs=nnx.Rngs(0), first_layer=1)
    with pytest.raises(ValueError, match="query of layer 1 has an adapter already; merge it first with merge_lora"):
        add_lora(adapted, LoraSettings(rank=2), rngs=nnx.Rngs(0), first_layer=1)


def test_merging_outside_jit_leaves_the_given_model_alone() -> None:
    base = Transformer(tiny(), rngs=nnx.Rngs(0))
    adapted = add_lora(base, LoraSettings(rank=2), rngs=nnx.Rngs(1))
    for path, leaf in nnx.to_flat_state(nnx.state(adapted)):
        if path[-1] == "b":
            leaf[...] = jnp.ones_like(leaf[...])
    before = [jax.tree.map(jnp.copy, nnx.state(model)) for model in (base, adapted)]
    merged = merge_lora(adapted)
    for state, model in zip(before, (base, adapted), strict=True):
        chex.assert_trees_all_equal(state, nnx.state(model))
    tokens = jnp.arange(6)[None]
    assert float(jnp.abs(adapted(tokens) - base(tokens)).max()) > 1e-3, "the adapter must do something here"
    chex.assert_trees_all_close(merged(tokens), adapted(tokens), atol=1e-5)
