"""Routers and experts against loops over tokens in float64, what a correction bias may change, and given selections."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxrl_llm.models.config import ExpertsConfig
from jaxrl_llm.models.config import tiny
from jaxrl_llm.models.experts import Experts
from jaxrl_llm.models.experts import RouterBias
from jaxrl_llm.models.experts import choose_experts
from jaxrl_llm.models.experts import expert_weights
from jaxrl_llm.models.lora import LoraSettings
from jaxrl_llm.models.lora import add_lora
from jaxrl_llm.models.lora import merge_lora
from jaxrl_llm.models.numerics import Numerics
from jaxrl_llm.models.transformer import Transformer
from jaxrl_llm.rollouts.decode import DecodeWeights

TOKENS, EXPERTS = 200, 8
SETTINGS = ExpertsConfig(count=6, chosen=2, width=16, shared=1, dense_layers=1)


def scores_and_bias() -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(0)
    return random.uniform(0, 1, (TOKENS, EXPERTS)).astype(np.float32), random.uniform(-1, 1, EXPERTS).astype(np.float32)


@pytest.mark.parametrize(("groups", "chosen_groups"), [(1, 1), (4, 2), (2, 1)])
def test_experts_are_the_best_of_the_best_groups(groups: int, chosen_groups: int) -> None:
    scores, bias = scores_and_bias()
    settings = ExpertsConfig(count=EXPERTS, chosen=3, width=4, groups=groups, chosen_groups=chosen_groups)
    found = np.sort(choose_experts(jnp.asarray(scores), jnp.asarray(bias), settings))
    for row, chosen in zip(scores, found, strict=True):
        ranked = row + bias
        by_group = ranked.reshape(groups, -1)
        kept = sorted(range(groups), key=lambda group: -np.sort(by_group[group])[-2:].sum())[:chosen_groups]
        there = [expert for expert in range(EXPERTS) if expert // (EXPERTS // groups) in kept]
        assert sorted(sorted(there, key=lambda expert: -ranked[expert])[:3]) == chosen.tolist()


def test_the_bias_chooses_and_weighs_nothing() -> None:
    scores, bias = (jnp.asarray(array) for array in scores_and_bias())
    settings = ExpertsConfig(count=EXPERTS, chosen=3, width=4, scale=2.5)
    plain, biased = choose_experts(scores, None, settings), choose_experts(scores, bias, settings)
    assert 0.2 < np.mean(np.sort(plain) != np.sort(biased)) < 0.9
    weights = expert_weights(scores, biased, settings)
    chosen = np.take_along_axis(np.float64(scores), np.asarray(biased), axis=1)
    np.testing.assert_allclose(weights, 2.5 * chosen / chosen.sum(1, keepdims=True), rtol=1e-5)
    # The same shift of every expert changes nothing at all.
    np.testing.assert_array_equal(choose_experts(scores, bias + 0.25, settings), biased)


@pytest.fixture(scope="module")
def model() -> Transformer:
    made = Transformer(tiny(experts=SETTINGS), rngs=nnx.Rngs(0))
    router = made.layers[1].mlp.router
    router.bias[...] = jnp.linspace(-0.2, 0.2, SETTINGS.count)
    return made


@jax.jit
def hidden_of(model: Transformer, tokens: jax.Array) -> jax.Array:
    return model(tokens)


def test_gradients_of_experts_equal_those_of_a_loop_over_them(model: Transformer) -> None:
    """Dropless, whatever the balance: an expert that no token chose gets exactly zero."""
    experts = model.layers[1].mlp
    assert isinstance(experts, Experts)
    graphdef, state = nnx.split(experts)
    x = jax.random.normal(jax.random.key(1), (1, 5, 32))
    selection = np.array([[[0, 1], [1, 0], [0, 3], [3, 1], [1, 0]]])  # 2, 4 and 5 get nothing

    def grouped(state, x):
        return jnp.sum(jnp.square(nnx.merge(graphdef, state)(x, jnp.asarray(selection))[0]))

    def looped(state, x):
        layer = nnx.merge(graphdef, state)
        _, weights = layer.router(x, jnp.asarray(selection))
        out = layer.shared(x)
        for token in range(5):
            for place in range(2):
                expert = int(selection[0, token, place])
                gate, up, down = (part.kernel[...][expert] for part in (layer.gate, layer.up, layer.down))
                y = (jax.nn.silu(x[0, token] @ gate) * (x[0, token] @ up)) @ down
                out = out.at[0, token].add(weights[0, token, place] * y)
        return jnp.sum(jnp.square(out))

    found = jax.jit(jax.value_and_grad(grouped, argnums=(0, 1)))(state, x)
    expected = jax.jit(jax.value_and_grad(looped, argnums=(0, 1)))(state, x)
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(one, other, atol=2e-5 * max(1.0, float(np.abs(other).max())))
    slope = found[1][0]
    assert not np.asarray(slope["gate"]["kernel"][...])[[2, 4, 5]].any()
    assert np.abs(np.asarray(slope["router"]["kernel"][...])).max() > 1e-3
    assert not np.asarray(slope["router"]["bias"][...]).any()


def test_its_own_selection_given_back_changes_nothing_and_another_one_does(model: Transformer) -> None:
    experts = model.layers[1].mlp
    x = jax.random.normal(jax.random.key(2), (2, 7, 32))
    out, routes = experts(x)
    again, _ = experts(x, routes.selection)
    np.testing.assert_array_equal(out, again)
    other, _ = experts(x, (routes.selection + 1) % SETTINGS.count)
    assert np.abs(np.asarray(other - out)).max() > 1e-2


def test_routers_stay_in_float32(model: Transformer) -> None:
    """The bias as it is kept, and its sum with the scores: in bfloat16 near ties would choose other experts."""
    narrow = model.astype(param_dtype=jnp.bfloat16, compute_dtype=jnp.bfloat16)
    router = narrow.layers[1].mlp.router
    assert isinstance(router.bias, RouterBias)
    assert router.bias[...].dtype == jnp.float32
    assert router.kernel[...].dtype == jnp.bfloat16
    routes, weights = router(jnp.ones((1, 3, 32), jnp.bfloat16), None)
    assert routes.scores.dtype == weights.dtype == jnp.float32
    decoding = DecodeWeights.of(model, jnp.bfloat16).model.layers[1].mlp
    assert decoding.router.kernel[...].dtype == jnp.float32
    assert decoding.gate.kernel[...].dtype == jnp.bfloat16


def test_adapters_of_experts_are_zero_at_first_and_can_be_merged(model: Transformer) -> None:
    tokens = jnp.arange(12).reshape(2, 6)
    adapted = add_lora(model, LoraSettings(rank=2, projections=("gate", "down")), rngs=nnx.Rngs(1))
    experts = adapted.layers[1].mlp
    assert experts.gate.low_rank.a.shape == (6, 32, 2)
    assert experts.shared.down.low_rank is not None
    np.testing.assert_array_equal(hidden_of(adapted, tokens), hidden_of(model, tokens))
    for part in (experts.gate, experts.down):
        part.low_rank.b[...] = 0.3 * jax.random.normal(jax.random.key(3), part.low_rank.b.shape)
    changed = hidden_of(adapted, tokens)
    assert np.abs(np.asarray(changed - hidden_of(model, tokens))).max() > 1e-2
    np.testing.assert_allclose(hidden_of(merge_lora(adapted), tokens), changed, atol=1e-4)


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"count": 0}, "experts.count must be a positive integer, got 0"),
        ({"chosen": 9}, "experts.chosen must be at most the 8 to choose from, got 9"),
        ({"groups": 3}, "groups must divide experts.count into groups of two or more, got 3 groups of 8"),
        ({"groups": 8}, "groups must divide experts.count into groups of two or more, got 8 groups of 8"),
        ({"groups": 4, "chosen_groups": 5}, "chosen_groups must be at most experts.groups, got 5 of 4"),
        ({"groups": 4, "chosen_groups": 1, "chosen": 3}, "must be at most the 2 to choose from, got 3"),
        ({"scores": "relu"}, "experts.scores must be 'sigmoid' or 'softmax', got 'relu'"),
        ({"scale": float("nan")}, "experts.scale must be positive, got nan"),
        ({"shared": -1}, "experts.shared must be a positive integer, got -1"),
    ],
)
def test_impossible_experts_are_refused(settings: dict[str, object], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        ExpertsConfig(**{"count": 8, "chosen": 2, "width": 4, **settings})


def test_impossible_places_of_experts_and_rotations_are_refused() -> None:
    with pytest.raises(ValueError, match=r"experts\.dense_layers must be below num_layers, got 2 of 2"):
        tiny(experts=ExpertsConfig(count=4, chosen=2, width=4, dense_layers=2))
    with pytest.raises(ValueError, match=r"even number of elements that turn, got 0\.4 of 8"):
        tiny(rotary_fraction=0.4)


def test_experts_need_no_shared_one_and_no_bias() -> None:
    settings = ExpertsConfig(count=4, chosen=2, width=8, scores="softmax", bias=False)
    layer = Experts(tiny(experts=settings), settings, Numerics(), nnx.Rngs(0))
    assert layer.shared is None
    assert layer.router.bias is None
    _, routes = layer(jnp.ones((1, 2, 32)))
    np.testing.assert_allclose(np.sum(routes.scores, axis=-1), 1, rtol=1e-6)
