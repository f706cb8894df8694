"""Muon against its iteration written out, the size of its updates, and which parameters it takes."""

import dataclasses
import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import AbstractMesh
from jax.sharding import PartitionSpec

from jaxrl_llm.models import trainable
from jaxrl_llm.models.config import tiny
from jaxrl_llm.models.sharding import RULES
from jaxrl_llm.models.sharding import partition_specs
from jaxrl_llm.models.transformer import Transformer
from jaxrl_llm.training import Checkpoints
from jaxrl_llm.training import OptimizerSettings
from jaxrl_llm.training import Progress
from jaxrl_llm.training import TrainState
from jaxrl_llm.training import make_optimizer
from jaxrl_llm.training import state_hash
from jaxrl_llm.training.run.muon import muon_labels
from jaxrl_llm.training.run.state import named_leaves

SETTINGS = OptimizerSettings(
    learning_rate=0.1,
    schedule="linear",
    optimizer="muon",
    weight_decay=0.3,
    max_grad_norm=0.5,
    momentum=0.8,
)
STEPS = 4

# Name -> shape and axes, of kinds that the tiny model has not.
ARRAYS = {
    "query": ((24, 60), ("hidden", "heads")),
    "key": ((24, 60), ("hidden", "heads")),
    "output": ((60, 24), ("heads", "hidden")),
    "square": ((32, 32), ("hidden", "hidden")),
    "experts": ((3, 24, 40), ("experts", "hidden", "intermediate")),
    "router": ((24, 8), ("hidden", "experts")),
    "expert_bias": ((3, 40), ("experts", "intermediate")),
    "correction": ((8,), ("experts",)),
    "embedding": ((50, 24), ("vocabulary", "hidden")),
    "head": ((24, 50), ("hidden", "vocabulary")),
    "adapter": ((24, 4), ("hidden", "rank")),
    "norm": ((24,), ("norm",)),
}
MATRICES = ("query", "key", "output", "square", "experts", "router")
VECTORS = ("norm", "correction", "expert_bias")
"""What is not decayed."""


def arrays(seed: int, names=tuple(ARRAYS), dtype=jnp.float32) -> nnx.State:
    rng = np.random.default_rng(seed)
    values = {name: rng.normal(size=ARRAYS[name][0]) for name in names}
    return nnx.State(
        {name: nnx.Param(jnp.asarray(x, dtype), logical_axes=ARRAYS[name][1]) for name, x in values.items()}
    )


def wide(tree: nnx.State) -> dict[str, np.ndarray]:
    leaves = zip(sorted(ARRAYS), jax.tree.leaves(tree), strict=True)
    return {name: np.asarray(leaf, np.float64) for name, leaf in leaves}


def newton_schulz(x: np.ndarray) -> np.ndarray:
    if x.ndim == 3:
        return np.stack([newton_schulz(part) for part in x])
    x = x / np.sqrt((x**2).sum())
    for _ in range(5):
        square = x @ x.T
        x = 3.4445 * x + (-4.7750 * square + 2.0315 * square @ square) @ x
    return x


def by_hand(params, gradients):
    """Clipping, then Muon for matrices and AdamW for the rest, in float64."""
    mean, square = ({name: np.zeros_like(value) for name, value in params.items()} for _ in range(2))
    for count, gradient in enumerate(gradients, start=1):
        norm = math.sqrt(sum((g**2).sum() for g in gradient.values()))
        rate = 0.1 * (1 - (count - 1) / STEPS)
        for name, value in params.items():
            g, m = 0.5 / norm * gradient[name], 0.8 if name in MATRICES else 0.9
            mean[name] = m * mean[name] + (1 - m) * g
            square[name] = 0.999 * square[name] + 0.001 * g**2
            if name in MATRICES:
                ahead = m * mean[name] / (1 - m ** (count + 1)) + (1 - m) * g / (1 - m**count)
                step = 0.2 * math.sqrt(max(value.shape[-2:])) * newton_schulz(ahead)
            else:
                step = mean[name] / (1 - m**count) / (np.sqrt(square[name] / (1 - 0.999**count)) + 1e-8)
            decay = 0.0 if name in VECTORS else 0.3 * value
            params[name] = value - rate * (step + decay)
    return params


class Compiled:
    """An optimiser whose start and whose step, with the parameters after it, are one program each."""

    def __init__(self, settings: OptimizerSettings, *, scan: bool = False) -> None:
        self.plain = make_optimizer(settings, STEPS, scan=scan)
        self.init = jax.jit(self.plain.init)
        self.step = jax.jit(self._step)

    def _step(self, gradient, state, params):
        updates, state = self.plain.update(gradient, state, params)
        return updates, state, optax.apply_updates(params, updates)


@pytest.fixture(scope="module")
def optimizer():
    return Compiled(SETTINGS)


@pytest.mark.parametrize("scan", [False, True])
def test_two_steps_equal_the_iteration_written_out(optimizer, scan):
    optimizer = Compiled(SETTINGS, scan=True) if scan else optimizer
    params, gradients = arrays(0), [arrays(1), arrays(2)]
    state = optimizer.init(params)
    for gradient in gradients:
        _, state, params = optimizer.step(gradient, state, params)
    expected = by_hand(wide(arrays(0)), [wide(gradient) for gradient in gradients])
    for name, got in wide(params).items():
        np.testing.assert_allclose(got, expected[name], atol=2e-5, err_msg=name)


@pytest.mark.parametrize("scale", [1e-3, 1e3])
def test_the_update_of_a_matrix_has_a_root_mean_square_of_a_fifth(optimizer, scale):
    # Of any shape, each expert by itself, whatever the size of its gradient.
    gradient = arrays(3)
    gradient["experts"] = gradient["experts"].replace(gradient["experts"][...].at[1].multiply(scale))
    still = jax.tree.map(lambda leaf: jnp.asarray(np.zeros(leaf.shape, np.float32)), gradient)
    updates, _, _ = optimizer.step(gradient, optimizer.init(still), still)
    for name in MATRICES:
        sizes = np.sqrt(np.mean(np.square(np.asarray(updates[name][...])), axis=(-2, -1))) / 0.1
        assert np.all((sizes > 0.15) & (sizes < 0.22)), (name, sizes)
        values = np.linalg.svd(np.asarray(updates[name][...]), compute_uv=False) / 0.1
        values = values / (0.2 * math.sqrt(max(updates[name].shape[-2:])))
        assert np.all((values > 0.3) & (values < 1.25)), (name, values)
    assert np.mean(np.abs(np.asarray(updates["head"][...]))) == pytest.approx(0.1, rel=1e-2)


def test_small_singular_values_grow_by_a_power_and_the_others_go_near_one(optimizer):
    rng, sizes = np.random.default_rng(4), np.geomspace(1e-5, 1, 32)
    sizes /= math.sqrt((sizes**2).sum())
    left, right = (np.linalg.qr(rng.normal(size=(32, 32)))[0] for _ in range(2))
    gradient = arrays(3)
    gradient["square"] = gradient["square"].replace(jnp.asarray(left * sizes @ right, jnp.float32))
    still = jax.tree.map(lambda leaf: jnp.asarray(np.zeros(leaf.shape, np.float32)), gradient)
    update = optimizer.step(gradient, optimizer.init(still), still)[0]["square"][...]
    # Of the update, each at the place of the one that it comes from.
    found = np.diag(left.T @ np.asarray(update, np.float64) @ right.T) / (-0.1 * 0.2 * math.sqrt(32))
    assert np.all((found[sizes > 1e-2] > 0.68) & (found[sizes > 1e-2] < 1.14))
    small = sizes < 1e-2
    assert np.all((found[small] < 1.21) & (found[small] < 485 * sizes[small]))
    np.testing.assert_allclose(found[:8], 3.4445**5 * sizes[:8], rtol=0.02)


def test_its_products_are_asked_for_in_full_precision(optimizer):
    params = arrays(0)
    text = str(jax.make_jaxpr(optimizer.plain.update)(params, jax.eval_shape(optimizer.init, params), params))
    assert text.count("dot_general[") == text.count("precision=(Precision.HIGHEST, Precision.HIGHEST)") > 0


def test_which_parameters_it_takes():
    labels = dict(zip(sorted(ARRAYS), jax.tree.leaves(muon_labels(arrays(0))), strict=True))
    assert {name for name, label in labels.items() if label == "muon"} == set(MATRICES)
    config = dataclasses.replace(tiny(), tie_embeddings=False, qkv_bias=True, qk_norm=True)
    state = nnx.state(Transformer(config, rngs=nnx.Rngs(0)))
    taken = {name for name, label in named_leaves(muon_labels(state)).items() if label == "muon"}
    assert taken == {name.removesuffix(".value") for name in named_leaves(state) if name.endswith(".kernel.value")}
    assert len(taken) == 7 * config.num_layers


def test_adapters_alone_and_arrays_without_axes_are_refused():
    choice = trainable.lora(2)
    model = choice.prepare(Transformer(tiny(), rngs=nnx.Rngs(0)), rngs=nnx.Rngs(1))
    learned, _ = choice.partition(nnx.state(model))
    for params in (learned, {"matrix": jnp.ones((2, 2))}):
        with pytest.raises(ValueError, match="optimizer is 'muon', and none of the parameters that learn is a matrix"):
            make_optimizer(SETTINGS, STEPS).init(params)


def test_its_state_lies_on_a_mesh_as_the_parameters_do(optimizer):
    state = jax.eval_shape(optimizer.init, arrays(0))
    mesh = AbstractMesh((2, 2, 2), ("data", "fsdp", "tensor"))
    specs = named_leaves(partition_specs(state, mesh, {**RULES, "experts": None}))
    muon = {name.split(".mu.")[1]: spec for name, spec in specs.items() if ".muon." in name and ".mu." in name}
    assert set(muon) == {f"{name}.value" for name in MATRICES}
    assert muon["query.value"] == PartitionSpec(("fsdp",), ("tensor",))
    assert muon["experts.value"] == PartitionSpec(None, ("fsdp",), ("tensor",))
    assert sum(".nu." in name for name in specs) == len(ARRAYS) - len(MATRICES)


def test_narrow_parameters_have_a_wide_state_and_small_gradients_add_up():
    optimizer = Compiled(dataclasses.replace(SETTINGS, momentum=0.999, max_grad_norm=0.0))
    names = ("experts", "norm")
    params, gradient = (arrays(seed, names, jnp.bfloat16) for seed in (0, 1))
    state = before = optimizer.init(params)
    for _ in range(2):
        updates, state, after = optimizer.step(gradient, state, params)
    chex.assert_trees_all_equal_shapes_and_dtypes(before, state)
    assert {leaf.dtype.name for leaf in jax.tree.leaves((updates, state))} == {"float32", "int32"}
    assert {leaf.dtype.name for leaf in jax.tree.leaves(after)} == {"bfloat16"}
    (mean,) = (leaf for name, leaf in named_leaves(state).items() if ".mu.experts" in name)
    # bfloat16 has three digits, and would round the second addition.
    np.testing.assert_allclose(mean, (1 - 0.999**2) * np.asarray(gradient["experts"][...], np.float32), rtol=1e-5)


def test_a_checkpoint_holds_it_bit_for_bit(optimizer, tmp_path):
    def moved(state: TrainState, seed: int) -> TrainState:
        _, opt_state, params = optimizer.step(arrays(seed), state.opt_state, state.params)
        return dataclasses.replace(state, params=params, opt_state=opt_state)

    start = TrainState.create(arrays(0), optimizer.plain, seed=0)
    once = moved(start, 1)
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(once, Progress(step=1, settings={}, frozen_hash="", file_bytes={}))
    found = checkpoints.restore(start)
    checkpoints.close()
    assert found is not None
    assert state_hash(found[0]) == state_hash(once)
    assert state_hash(moved(found[0], 2)) == state_hash(moved(once, 2))
