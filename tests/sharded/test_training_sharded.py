"""Training on eight devices is training on one: same loss, gradient and parameters, however they are laid out."""

import dataclasses
import importlib.util
import math
import sys
from pathlib import Path
from types import ModuleType

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding

from jaxrl_llm.models import trainable
from jaxrl_llm.models.config import ExpertsConfig
from jaxrl_llm.models.config import tiny
from jaxrl_llm.models.sharding import make_mesh
from jaxrl_llm.models.sharding import shardings
from jaxrl_llm.models.tokenizers import ByteTokenizer
from jaxrl_llm.models.transformer import Transformer
from jaxrl_llm.training import state_hash
from jaxrl_llm.training import train
from jaxrl_llm.training.text.routers import router_biases

EXPERTS = ExpertsConfig(count=4, chosen=2, width=16, shared=1)
MESHES = {"data": {"data": 8}, "fsdp": {"fsdp": 8}, "both": {"data": 2, "fsdp": 4}}


@pytest.fixture(scope="module")
def tiny_run() -> ModuleType:
    path = Path(__file__).parents[1] / "training" / "tiny_run.py"
    spec = importlib.util.spec_from_file_location("tiny_run", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["tiny_run"] = module
    spec.loader.exec_module(module)
    return module


def one_batch(tiny_run, mesh, experience=None, experts=None):
    """Gradient, loss, parameters after one step, and comparison with the policy before, on a given rollout."""
    settings = dataclasses.replace(tiny_run.SETTINGS, response_length=3)
    parts = tiny_run.make_parts("trm_max", mesh=mesh, experts=experts)
    trainer, collector = tiny_run.make_trainer(parts, settings)
    with trainer.devices():
        state = trainer.initial_state()
        if experience is None:
            rewards = np.linspace(0, 1, settings.prompts * settings.group_size, dtype=np.float32) ** 2
            experience = tiny_run.with_outcomes(tiny_run.collected(trainer, collector, state), rewards)
        prepared = trainer.prepare(state, 0, experience)
        everything = jnp.arange(prepared.batch.rows.tokens.shape[0], dtype=jnp.int32)[None]
        arguments = (state.params, trainer.frozen, prepared.batch, prepared.heads, everything, 1)
        gradient, terms = jax.jit(trainer.update.gradient)(*arguments)
        state, _ = trainer.improve(state, prepared)
        shift = trainer.compare(state, prepared)
    return experience, gradient, terms.loss, state, shift, trainer.update.traces


@pytest.fixture(scope="module")
def on_one_device(tiny_run):
    return one_batch(tiny_run, None)


@pytest.mark.parametrize("shape", MESHES)
def test_loss_gradient_and_updated_parameters_equal_those_of_one_device(tiny_run, on_one_device, shape):
    experience, gradient, loss, state, shift, _ = on_one_device
    mesh = make_mesh(**MESHES[shape])
    _, got_gradient, got_loss, got_state, got_shift, traces = one_batch(tiny_run, mesh, experience)
    # Advantages are normalised, so what is averaged has size 1 and cancels to 0.015: two roundings of 1.
    np.testing.assert_allclose(got_loss[0] / got_loss[1], loss[0] / loss[1], rtol=0, atol=2 * np.finfo(np.float32).eps)

    def close(got, expected, tolerance):
        got, expected = np.asarray(got), np.asarray(expected)
        np.testing.assert_allclose(got, expected, rtol=0, atol=tolerance * np.abs(expected).max() + 1e-9)

    jax.tree.map(lambda got, expected: close(got, expected, 2e-5), got_gradient, gradient)
    # Adam divides by the size of the gradient, so an entry that is zero up to rounding moves by its rounding.
    moved = [
        np.abs(np.asarray(a) - np.asarray(b))
        for a, b in zip(*map(jax.tree.leaves, (got_state.params, state.params)), strict=True)
    ]
    assert np.mean(np.concatenate([entry.ravel() for entry in moved]) < 1e-4) > 0.99
    close(got_shift.kl, shift.kl, 2e-2)
    assert traces == 1, "each step must leave its state as the next one takes it"
    for tree in (got_state.params, got_state.opt_state):
        for leaf, layout in zip(jax.tree.leaves(tree), jax.tree.leaves(shardings(tree, mesh)), strict=True):
            assert isinstance(layout, NamedSharding)
            assert leaf.sharding.is_equivalent_to(layout, leaf.ndim)
    if shape == "fsdp":
        kernel = got_state.params["layers"][0]["mlp"]["gate"]["kernel"][...]
        assert kernel.addressable_shards[0].data.size * 8 == kernel.size


@pytest.fixture(scope="module")
def experts_on_one_device(tiny_run):
    return one_batch(tiny_run, None, experts=EXPERTS)


@pytest.mark.parametrize("shape", [{"data": 2, "fsdp": 2, "tensor": 2}, {"fsdp": 2, "expert": 4}], ids="x".join)
def test_experts_on_a_mesh_have_the_gradient_and_the_loads_of_one_device(tiny_run, experts_on_one_device, shape):
    experience, gradient, loss, *_ = experts_on_one_device
    mesh = make_mesh(**shape)
    _, got_gradient, got_loss, state, *_ = one_batch(tiny_run, mesh, experience, EXPERTS)
    np.testing.assert_array_equal(got_loss[1], loss[1])
    [loads], [got] = router_biases(gradient), router_biases(got_gradient)
    np.testing.assert_allclose(got, loads, rtol=1e-6)
    for one, other in zip(jax.tree.leaves(got_gradient), jax.tree.leaves(gradient), strict=True):
        one, other = np.asarray(one), np.asarray(other)
        np.testing.assert_allclose(one, other, rtol=0, atol=2e-5 * np.abs(other).max() + 1e-9)
    kernel = state.params["layers"][0]["mlp"]["gate"]["kernel"][...]
    # The width over fsdp, and the inner width over tensor or the experts over theirs.
    assert kernel.addressable_shards[0].data.size * math.prod(shape.values()) == kernel.size * shape.get("data", 1)


def test_a_run_on_a_mesh_is_interrupted_and_resumed_bit_for_bit(tiny_run, tmp_path):
    mesh = make_mesh(data=2, fsdp=4)

    def parts():
        return tiny_run.make_parts(choice=trainable.top_layers(1), layers=2, mesh=mesh)

    settings = dataclasses.replace(tiny_run.SETTINGS, steps=3, checkpoint_every=1)
    whole = train(parts(), settings, tmp_path / "whole")
    train(parts(), dataclasses.replace(settings, steps=2), tmp_path / "parts")
    rest = train(parts(), settings, tmp_path / "parts", allow_changed_settings=True)
    assert state_hash(rest.state) == state_hash(whole.state)
    assert (tmp_path / "parts/metrics.jsonl").read_bytes() == (tmp_path / "whole/metrics.jsonl").read_bytes()


def test_a_teacher_is_laid_out_as_the_policy_is(tiny_run):
    mesh, said, experience = make_mesh(fsdp=8), [], None
    for placed in (None, mesh):
        teacher = Transformer(tiny(vocab_size=ByteTokenizer().vocab_size, num_layers=2), rngs=nnx.Rngs(5))
        parts = tiny_run.make_parts("hybrid", mesh=placed, teacher=teacher)
        trainer, collector = tiny_run.make_trainer(parts, tiny_run.SETTINGS)
        with trainer.devices():
            state = trainer.initial_state()
            experience = experience or tiny_run.collected(trainer, collector, state)
            said.append(np.asarray(trainer.prepare(state, 0, experience).batch.log_prob_ref))
    np.testing.assert_allclose(said[1], said[0], rtol=0, atol=1e-5)
    kernel = trainer.reference.params["layers"][0]["mlp"]["gate"]["kernel"][...]
    assert kernel.addressable_shards[0].data.size * 8 == kernel.size, "each device holds its part of the teacher"
