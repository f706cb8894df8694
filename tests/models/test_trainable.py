import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from jaxrl_llm.models import trainable
from jaxrl_llm.models.config import tiny
from jaxrl_llm.models.trainable import Trainable
from jaxrl_llm.models.transformer import Transformer

LAYERS = 3
CHOICES = {
    "full": (trainable.full(), 0),
    "top 1": (trainable.top_layers(1), 2),
    "top 3": (trainable.top_layers(3), 0),
    "lora": (trainable.lora(2), 0),
    "lora on the top 2": (trainable.lora(2, projections=("query", "down"), top=2), 1),
}


@pytest.fixture(scope="module")
def model(random_transformer) -> Transformer:
    return random_transformer(tiny(num_layers=LAYERS))


@pytest.fixture(scope="module")
def tokens() -> jax.Array:
    return jax.random.randint(jax.random.key(1), (2, 7), 0, 64)


@pytest.fixture(scope="module")
def token_mask() -> jax.Array:
    return jnp.arange(7) >= jnp.array([[0], [3]])


@pytest.mark.parametrize(("choice", "first"), CHOICES.values(), ids=CHOICES)
def test_a_split_state_combines_to_what_it_was(model, choice: Trainable, first: int):
    graphdef, state = nnx.split(choice.prepare(model, rngs=nnx.Rngs(0)))
    learned, frozen = choice.partition(state)
    chex.assert_trees_all_equal(trainable.combine(learned, frozen), state)
    assert len(jax.tree.leaves(learned)) + len(jax.tree.leaves(frozen)) == len(jax.tree.leaves(state))
    assert trainable.first_trained_layer(learned, LAYERS) == first == choice.first_layer(LAYERS)
    nnx.merge(graphdef, learned, frozen)


def test_what_each_choice_trains(model):
    def paths(choice: Trainable) -> set[str]:
        learned, _ = choice.partition(nnx.state(choice.prepare(model, rngs=nnx.Rngs(0))))
        return {"/".join(map(str, path)) for path, _ in nnx.to_flat_state(learned)}

    block = 9
    assert len(paths(trainable.full())) == 2 + LAYERS * block
    top = paths(trainable.top_layers(1))
    assert len(top) == 1 + block
    assert all(path.startswith(("layers/2/", "final_norm/")) for path in top)
    assert paths(trainable.lora(2, projections=("key",), top=1)) == {
        f"layers/2/attention/key/low_rank/{factor}" for factor in "ab"
    }
    assert len(paths(trainable.lora(2))) == LAYERS * 7 * 2


def test_a_layer_number_is_a_number():
    """Layer 10 comes after layer 9."""
    state = nnx.state(nnx.eval_shape(lambda: Transformer(tiny(num_layers=11), rngs=nnx.Rngs(0))))
    learned, _ = trainable.top_layers(2).partition(state)
    assert sorted(learned["layers"]) == [9, 10]
    assert trainable.first_trained_layer(learned, 11) == 9


def test_only_the_final_norm_needs_no_layer(model):
    learned, _ = nnx.split_state(nnx.state(model), lambda path, _: path[0] == "final_norm", ...)
    assert trainable.first_trained_layer(learned, LAYERS) == LAYERS


def test_a_trained_embedding_leaves_nothing_to_keep(model):
    learned, _ = nnx.split_state(nnx.state(model), lambda path, _: path[0] == "embedding" or 2 in path, ...)
    assert sorted(learned["layers"]) == [2]
    assert trainable.first_trained_layer(learned, LAYERS) == 0


@pytest.mark.parametrize(
    ("choice", "remat"),
    [
        (trainable.full(), False),
        (trainable.top_layers(1), True),
        (trainable.top_layers(2), False),
        (trainable.lora(2, projections=("query", "down"), top=2), True),
    ],
    ids=["full", "top 1, remat", "top 2", "lora on the top 2, remat"],
)
def test_a_kept_trunk_gives_the_same_gradient(model, tokens, token_mask, choice: Trainable, remat: bool):
    graphdef, state = nnx.split(choice.prepare(model, rngs=nnx.Rngs(0)))
    learned, frozen = choice.partition(state)
    first = trainable.first_trained_layer(learned, LAYERS)
    weights = jax.random.normal(jax.random.key(3), (32,)) / 32

    def value(hidden):
        return jnp.sum(jnp.square(hidden @ weights + 1), where=token_mask)

    def whole(learned):
        return value(nnx.merge(graphdef, learned, frozen)(tokens, token_mask))

    trunk = jax.jit(lambda: model.trunk(tokens, token_mask, stop=first))()

    def kept(learned):
        model = nnx.merge(graphdef, learned, frozen)
        x = trunk if first else model.embed(tokens)
        return value(model.from_trunk(x, token_mask, start=first, remat=remat))

    expected, gradient = jax.jit(jax.value_and_grad(whole))(learned)
    got, kept_gradient = jax.jit(jax.value_and_grad(kept))(learned)
    np.testing.assert_allclose(got, expected, rtol=1e-5)
    for (path, a), (_, b) in zip(nnx.to_flat_state(kept_gradient), nnx.to_flat_state(gradient), strict=True):
        # Relative to the largest entry: small entries carry the rounding of the large ones.
        largest = float(jnp.max(jnp.abs(b[...])))
        np.testing.assert_allclose(a[...], b[...], rtol=0, atol=2e-5 * largest, err_msg=str(path))
        assert (largest > 1e-5) == (choice.adapters is None or path[-1] == "b"), path


def test_an_optimiser_step_moves_the_chosen_part_only(model, tokens):
    choice = trainable.top_layers(1)
    graphdef, state = nnx.split(model)
    learned, frozen = choice.partition(state)
    optimizer = optax.adam(1e-2)
    opt_state = optimizer.init(learned)

    def loss(learned):
        return jnp.mean(jnp.square(nnx.merge(graphdef, learned, frozen)(tokens) - 1))

    @jax.jit
    def step(learned, opt_state):
        value, gradient = jax.value_and_grad(loss)(learned)
        updates, opt_state = optimizer.update(gradient, opt_state, learned)
        return optax.apply_updates(learned, updates), opt_state, value

    losses = []
    for _ in range(5):
        learned, opt_state, value = step(learned, opt_state)
        losses.append(float(value))
    assert losses[-1] < losses[0]
    after = nnx.to_flat_state(trainable.combine(learned, frozen))
    for (path, now), (_, before) in zip(after, nnx.to_flat_state(state), strict=True):
        moved = bool(jnp.any(now[...] != before[...]))
        assert moved == (path[0] == "final_norm" or path[:2] == ("layers", 2)), path


def test_impossible_choices_are_refused(model):
    with pytest.raises(ValueError, match="the number of top layers must be at least 1, got 0"):
        trainable.top_layers(0)
    with pytest.raises(ValueError, match="the number of top layers must be at most 3, all there are, got 4"):
        trainable.top_layers(4).partition(nnx.state(model))
    with pytest.raises(ValueError, match="the state has no low-rank adapters to train; make them with prepare"):
        trainable.lora(2).partition(nnx.state(model))
