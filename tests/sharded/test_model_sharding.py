"""A mesh changes where arrays live, never what is computed."""

import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec

from jaxrl_llm.models import trainable
from jaxrl_llm.models.attention import Visibility
from jaxrl_llm.models.attention import attend
from jaxrl_llm.models.config import tiny
from jaxrl_llm.models.sharding import RULES
from jaxrl_llm.models.sharding import constrain
from jaxrl_llm.models.sharding import make_mesh
from jaxrl_llm.models.sharding import parse_mesh
from jaxrl_llm.models.sharding import partition_specs
from jaxrl_llm.models.sharding import shard
from jaxrl_llm.models.sharding import shardings
from jaxrl_llm.models.transformer import Transformer
from jaxrl_llm.models.vocabulary import crop_vocabulary
from jaxrl_llm.training import OptimizerSettings
from jaxrl_llm.training import make_optimizer

MESHES = {
    "data": ({"data": 8}, False),
    "fsdp": ({"fsdp": 8}, False),
    "fsdp, remat": ({"fsdp": 8}, True),
    "all": ({"data": 2, "fsdp": 2, "tensor": 2}, False),
}


@pytest.fixture(scope="module")
def model() -> Transformer:
    return Transformer(tiny(), rngs=nnx.Rngs(0))


@pytest.fixture(scope="module")
def batch() -> tuple[jax.Array, jax.Array]:
    tokens = jax.random.randint(jax.random.key(1), (8, 6), 0, 64)
    return tokens, jnp.arange(6) >= jnp.arange(8)[:, None] % 5


def test_there_are_eight_devices():
    assert jax.device_count() == 8


def value_and_gradient(graphdef: nnx.GraphDef, remat: bool = False):
    def loss(state, tokens, token_mask):
        model = nnx.merge(graphdef, state)
        logits = model.logits(model(tokens, token_mask, remat=remat))
        return -jnp.mean(jax.nn.log_softmax(logits)[..., 3], where=token_mask)

    return jax.jit(jax.value_and_grad(loss))


@pytest.mark.parametrize(("sizes", "remat"), MESHES.values(), ids=MESHES)
def test_loss_and_gradient_are_those_of_one_device(model, batch, sizes: dict[str, int], remat: bool):
    graphdef, state = nnx.split(model)
    expected, gradient = value_and_gradient(graphdef)(state, *batch)
    mesh = make_mesh(**sizes)
    placed = shard(state, mesh)
    rows = jax.NamedSharding(mesh, PartitionSpec(("data", "fsdp")))
    with jax.set_mesh(mesh):
        got, sharded_gradient = value_and_gradient(graphdef, remat)(placed, *jax.device_put(batch, rows))
    np.testing.assert_allclose(got, expected, rtol=1e-6)
    chex.assert_trees_all_close(jax.device_get(sharded_gradient), jax.device_get(gradient), rtol=1e-4, atol=1e-6)
    assert max(float(jnp.max(jnp.abs(leaf))) for leaf in jax.tree.leaves(gradient)) > 1e-3


def test_parameters_are_split_by_the_rules(model):
    mesh = make_mesh(fsdp=4, tensor=2)
    specs = partition_specs(nnx.state(model), mesh)
    block = specs["layers"][0]
    assert specs["embedding"].get_value() == PartitionSpec(("tensor",), ("fsdp",))
    assert block["attention"]["query"]["kernel"].get_value() == PartitionSpec(("fsdp",), ("tensor",))
    assert block["mlp"]["down"]["kernel"].get_value() == PartitionSpec(("tensor",), ("fsdp",))
    assert block["mlp_norm"]["scale"].get_value() == PartitionSpec(None)
    kernel = shard(nnx.state(model), mesh)["layers"][0]["mlp"]["up"]["kernel"].get_value()
    assert {piece.data.shape for piece in kernel.addressable_shards} == {(8, 32)}


def test_each_device_holds_its_share(model):
    state = nnx.state(model)
    placed = shard(state, make_mesh(fsdp=8))
    device = jax.devices()[3]
    held = sum(
        piece.data.nbytes
        for leaf in jax.tree.leaves(placed)
        for piece in leaf.addressable_shards
        if piece.device == device
    )
    total = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
    norms = sum(leaf.nbytes for leaf in jax.tree.leaves(state) if leaf.ndim == 1)
    assert held == (total - norms) // 8 + norms


def test_an_axis_that_does_not_divide_stays_whole():
    model = Transformer(tiny(vocab_size=61, num_layers=1), rngs=nnx.Rngs(0))
    specs = partition_specs(nnx.state(model), make_mesh(fsdp=4, tensor=2))
    assert specs["embedding"].get_value() == PartitionSpec(None, ("fsdp",))


def test_optimiser_state_and_adapters_follow_their_parameters(model):
    choice = trainable.lora(4)
    learned, _ = choice.partition(nnx.state(choice.prepare(model, rngs=nnx.Rngs(0))))
    mesh = make_mesh(fsdp=4, tensor=2)
    specs = partition_specs(optax.adam(1e-3).init(learned), mesh)[0]
    assert specs.count == PartitionSpec()
    low_rank = specs.mu["layers"][1]["mlp"]["up"]["low_rank"]
    assert low_rank["a"].get_value() == PartitionSpec(("fsdp",), None)
    assert low_rank["b"].get_value() == PartitionSpec(None, ("tensor",))


def test_muon_on_a_mesh_is_muon_on_one_device(model):
    settings = OptimizerSettings(learning_rate=0.1, optimizer="muon", weight_decay=0.1)
    optimizer, params = make_optimizer(settings, 10), nnx.state(model)
    gradient = jax.tree.map(
        lambda leaf: jnp.cos(jnp.arange(leaf.size, dtype=leaf.dtype) ** 2).reshape(leaf.shape), params
    )
    state = jax.jit(optimizer.init)(params)
    mesh = make_mesh(fsdp=4, tensor=2)
    layout = shardings((params, state), mesh)
    update = jax.jit(optimizer.update, in_shardings=(layout[0], layout[1], layout[0]), out_shardings=layout)
    on_mesh = update(*(shard(tree, mesh) for tree in (gradient, state, params)))
    expected = jax.jit(optimizer.update)(gradient, state, params)
    chex.assert_trees_all_close(jax.device_get(on_mesh), jax.device_get(expected), atol=1e-5)
    moved = on_mesh[1][1].inner_states["muon"].inner_state[0].mu["layers"][1]["mlp"]["up"]["kernel"]
    assert moved.get_value().sharding.spec == PartitionSpec(("fsdp",), ("tensor",))


def test_a_jitted_step_takes_the_shardings_and_keeps_them(model, batch):
    graphdef, state = nnx.split(model)
    mesh = make_mesh(data=2, fsdp=4)
    layout = shardings(state, mesh)

    def step(state, tokens, token_mask):
        gradient = jax.grad(lambda s: jnp.sum(jnp.square(nnx.merge(graphdef, s)(tokens, token_mask))))(state)
        return jax.tree.map(lambda p, g: p - 1e-3 * g, state, gradient)

    with jax.set_mesh(mesh):
        after = jax.jit(step, in_shardings=(layout, None, None), out_shardings=layout)(shard(state, mesh), *batch)
    chex.assert_trees_all_close(jax.device_get(after), jax.device_get(jax.jit(step)(state, *batch)), atol=1e-5)
    jax.tree.map(lambda leaf, sharding: chex.assert_equal(leaf.sharding, sharding), after, layout)


def test_a_group_decodes_on_a_mesh(model, batch):
    tokens, token_mask = batch
    mesh = make_mesh(data=4, tensor=2)
    graphdef, state = nnx.split(model)

    @jax.jit
    def continued(state, tokens, token_mask):
        model = nnx.merge(graphdef, state)
        _, cache = model.prefill(tokens, token_mask)
        return model.extend(jnp.arange(32, dtype=jnp.int32).reshape(16, 2), cache.repeat(2).grow(8))[0]

    expected = continued(state, tokens, token_mask)
    with jax.set_mesh(mesh):
        got = continued(shard(state, mesh), tokens, token_mask)
    np.testing.assert_allclose(jax.device_get(got), jax.device_get(expected), atol=5e-6)


def test_activations_are_constrained_only_where_a_mesh_is_set():
    x = jnp.zeros((8, 6, 32))
    axes = ("batch", "sequence", "activation")

    def primitives() -> list[str]:
        return [equation.primitive.name for equation in jax.make_jaxpr(lambda x: constrain(x, axes))(x).eqns]

    assert constrain(x, axes) is x
    assert primitives() == []
    with jax.set_mesh(make_mesh(data=4, fsdp=2)):
        assert primitives() == ["sharding_constraint"]


def test_impossible_layouts_are_refused(model):
    with pytest.raises(
        ValueError, match="a mesh of data=4 x fsdp=4 x expert=1 x tensor=1 needs 16 devices, there are 8"
    ):
        make_mesh(data=4, fsdp=4)
    rules = {name: rule for name, rule in RULES.items() if name != "heads"}
    with pytest.raises(ValueError, match="logical axis 'heads' has no sharding rule; the rules name activation, batch"):
        partition_specs(nnx.state(model), make_mesh(data=8), rules)


@pytest.mark.parametrize(
    ("text", "sizes"),
    [
        ("data=2,fsdp=4,tensor=1", {"data": 2, "fsdp": 4, "expert": 1, "tensor": 1}),
        ("tensor=2, data=2", {"data": 2, "fsdp": 1, "expert": 1, "tensor": 2}),
        ("fsdp=8", {"data": 1, "fsdp": 8, "expert": 1, "tensor": 1}),
    ],
)
def test_a_mesh_by_name(text, sizes):
    mesh = parse_mesh(text, tiny())
    assert dict(mesh.shape) == sizes
    assert mesh == make_mesh(**sizes)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("rows=2", "the part 'rows=2'; a part must be one of data, fsdp, expert, tensor with its size"),
        ("data", "the part 'data'; a part must be"),
        ("", "the part ''; a part must be"),
        ("data=2,", "the part ''; a part must be"),
        ("data=2,data=4", "names data twice"),
        ("data=0", "data of size '0'; it must be an integer of at least 1"),
        ("fsdp=-2", "fsdp of size '-2'; it must be an integer of at least 1"),
        ("fsdp=2.0", "fsdp of size '2.0'"),
        ("data=3", "a product of 3; it must be the number of devices, 8, or divide it"),
        ("data=4,fsdp=4", "a product of 16; it must be the number of devices, 8, or divide it"),
        ("tensor=8", "tensor is 8; it must divide num_heads, which is 4"),
        ("tensor=4", "tensor is 4; it must divide num_kv_heads, which is 2"),
    ],
)
def test_a_mesh_that_cannot_be_is_refused_in_a_sentence(text, sentence):
    with pytest.raises(ValueError, match=re.escape(sentence)):
        parse_mesh(text, tiny())


def test_tensor_divides_the_inner_width():
    with pytest.raises(ValueError, match="must divide intermediate_size, which is 63"):
        parse_mesh("tensor=2", tiny(intermediate_size=63))
    assert parse_mesh("tensor=8").shape["tensor"] == 8


def test_attention_in_blocks_on_a_mesh_is_that_of_one_device():
    model = Transformer(tiny(num_kv_heads=4), rngs=nnx.Rngs(0), attention="xla")
    graphdef, state = nnx.split(model)
    tokens = jax.random.randint(jax.random.key(0), (4, 24), 0, 64)

    def loss(state, tokens):
        return jnp.sum(jnp.sin(nnx.merge(graphdef, state)(tokens)))

    expected = jax.jit(jax.grad(loss))(state, tokens)
    mesh = parse_mesh("data=2,tensor=4", model.config)
    with jax.set_mesh(mesh):
        got = jax.jit(jax.grad(loss))(shard(state, mesh), tokens)
    for ours, theirs in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-5 * max(1.0, float(jnp.abs(theirs).max())))


@pytest.mark.parametrize("name", ["reference", "xla"])
def test_attention_sends_nothing(name):
    """Blocks are cut along the tokens, so rows and heads stay where the mesh has them, forward and backward."""
    mesh = parse_mesh("data=2,tensor=4")

    def array(shape, dtype, *axes):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, PartitionSpec(*axes)))

    def loss(query, keys, values, see):
        return jnp.sum(jnp.sin(attend(query, keys, values, see, implementation=name)))

    query = array((4, 100, 8, 16), jnp.float32, "data", None, "tensor")
    keys = array((4, 4, 100, 16), jnp.float32, "data", "tensor")
    with jax.set_mesh(mesh):
        step = jax.jit(jax.grad(loss, (0, 1, 2)))
        text = step.lower(query, keys, keys, Visibility(array((4, 100), bool, "data"))).compile().as_text()
    assert not re.search(r" (all-gather|all-reduce|collective-permute|all-to-all)(-start)?\(", text)


@pytest.mark.parametrize(("size", "axes"), [(60, ("tensor",)), (59, None)])
def test_a_cropped_vocabulary_lies_as_the_rules_say(model: Transformer, size: int, axes: tuple | None) -> None:
    mesh = make_mesh(data=2, fsdp=2, tensor=2)
    graphdef, state = nnx.split(model)
    cropped = crop_vocabulary(nnx.merge(graphdef, shard(state, mesh)), size)
    table = cropped.embedding.get_value()
    assert table.sharding.spec == PartitionSpec(axes, ("fsdp",))
    np.testing.assert_array_equal(table, model.embedding.get_value()[:size])
