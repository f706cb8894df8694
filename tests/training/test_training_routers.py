"""Routers in training: their bias moves by the loads of the whole minibatch, once a step, and nothing else feels it."""

import dataclasses
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from jaxrl_llm.models import trainable
from jaxrl_llm.models.config import ExpertsConfig
from jaxrl_llm.models.experts import RouterBias
from jaxrl_llm.objectives import LossTerms
from jaxrl_llm.objectives import balance
from jaxrl_llm.training import Trainer
from jaxrl_llm.training import state_hash
from jaxrl_llm.training import train
from jaxrl_llm.training.run.reporting import Quiet
from jaxrl_llm.training.text.prepared import Prepared
from jaxrl_llm.training.text.routers import gradient_norm
from jaxrl_llm.training.text.routers import router_biases
from jaxrl_llm.typing import PyTree
from tests.training.tiny_run import SETTINGS
from tests.training.tiny_run import collected
from tests.training.tiny_run import make_parts
from tests.training.tiny_run import make_trainer

RATE, WEIGHT = 0.25, 0.5
EXPERTS = ExpertsConfig(count=6, chosen=2, width=16, shared=1, dense_layers=1)


def settings_of(**update):
    fixed = {"minibatches": 1, "skip_equal_groups": False, "share_prompts": False}  # so that there are several rows
    changed = dataclasses.replace(SETTINGS.update, **fixed, **update)
    return dataclasses.replace(SETTINGS, steps=2, update=changed, checkpoint_every=1)


def trainer_of(**update) -> Trainer:
    return make_trainer(make_parts(layers=2, experts=EXPERTS), settings_of(**update))[0]


class World(NamedTuple):
    """A batch as the update reads it, and the loads of its real tokens."""

    trainer: Trainer
    prepared: Prepared
    loads: np.ndarray
    balance: float
    gradient: PyTree
    terms: LossTerms


def gradient_of(trainer: Trainer, prepared: Prepared) -> tuple[PyTree, LossTerms]:
    """Gradient of a batch, and its sums."""
    rows, used = prepared.plan[0]
    params = trainer.initial_state().params
    call = jax.jit(trainer.update.gradient)
    return call(params, trainer.frozen, prepared.batch, prepared.heads, jnp.asarray(rows), used)


@pytest.fixture(scope="module")
def world() -> World:
    parts = make_parts(layers=2, experts=EXPERTS)
    trainer, collector = make_trainer(parts, settings_of(micro_batch=3))
    state = trainer.initial_state()
    prepared = trainer.prepare(state, 0, collected(trainer, collector, state))
    rows = prepared.batch.rows
    routes = trainer.policy.forward(trainer.policy.model(state.params, trainer.frozen), rows, None).routes
    mask = np.asarray(rows.token_mask)
    sent = routes[1]
    assert routes[0] is None
    assert sent is not None
    loads = np.bincount(np.asarray(sent.selection)[mask].reshape(-1), minlength=EXPERTS.count)
    total, count = balance.sequence_balance_loss(sent.scores, sent.selection, rows.token_mask)
    assert prepared.plan[0].used > 1
    return World(trainer, prepared, loads, float(total / count), *gradient_of(trainer, prepared))


def test_loads_of_micro_batches_add_up_to_those_of_the_batch(world: World) -> None:
    """Three prompts at a time: the last micro-batch is filled up with rows that must not count."""
    [found] = router_biases(world.gradient)
    np.testing.assert_array_equal(found, world.loads)
    total, rows = world.terms.metrics["router_balance_loss"]
    assert rows == len(world.prepared.batch.rows.tokens)
    assert float(total / rows) == pytest.approx(world.balance, rel=1e-5)


def test_a_step_moves_the_bias_by_the_rule_and_nothing_else(world: World) -> None:
    after = {}
    for rate in (0.0, RATE):
        trainer = trainer_of(micro_batch=3, router_bias_rate=rate)
        state, [metrics] = trainer.improve(trainer.initial_state(), world.prepared)
        after[rate] = state.params
        share = world.loads / world.loads.sum()
        expected = {"violation": EXPERTS.count * share.max() - 1, "dead": float((share == 0).sum())}
        for name, value in expected.items():
            total, count = metrics[f"router_{name}"]
            assert float(total / count) == pytest.approx(value, abs=1e-4)
        norm = float(gradient_norm(world.gradient))
        assert float(metrics["grad_norm"][0]) == pytest.approx(norm, rel=1e-4)
        assert norm < 0.999 * float(optax.tree.norm(world.gradient))
    assert not np.asarray(router_biases(after[0.0])[0]).any()
    moved = RATE * np.sign(world.loads.mean() - world.loads)
    np.testing.assert_allclose(router_biases(after[RATE])[0], moved - moved.mean(), atol=1e-6)
    others = [jax.tree.leaves(tree, is_leaf=lambda leaf: isinstance(leaf, nnx.Variable)) for tree in after.values()]
    for one, other in zip(*others, strict=True):
        if not isinstance(one, RouterBias):
            np.testing.assert_array_equal(one.get_value(), other.get_value())


def test_the_loss_for_even_loads_is_added_with_its_weight(world: World) -> None:
    """Gradient = that without it + weight times its own, which is a mean over all rows of all micro-batches."""
    weighted, _ = gradient_of(trainer_of(micro_batch=3, router_balance=WEIGHT), world.prepared)
    policy, rows = world.trainer.policy, world.prepared.batch.rows

    def own(params):
        routes = policy.forward(policy.model(params, world.trainer.frozen), rows, None).routes
        total, count = balance.sequence_balance_loss(routes[1].scores, routes[1].selection, rows.token_mask)
        return total / count

    slope = jax.jit(jax.grad(own))(world.trainer.initial_state().params)
    largest = max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(slope))
    assert largest > 1e-3
    for got, before, added in zip(*map(jax.tree.leaves, (weighted, world.gradient, slope)), strict=True):
        np.testing.assert_allclose(got, before + WEIGHT * added, atol=1e-4 * largest + 1e-6 * float(jnp.abs(got).max()))


@pytest.mark.parametrize(
    ("parts", "update", "sentence"),
    [
        ({}, {"router_bias_rate": 0.1}, r"router_bias_rate is 0\.1, and no layer that learns has correction biases"),
        ({}, {"router_balance": 0.1}, r"router_balance is 0\.1, and no layer that learns has routers; it must be 0"),
        ({"experts": EXPERTS, "choice": trainable.lora(2)}, {"router_bias_rate": 0.1}, "has correction biases"),
        ({"experts": EXPERTS, "choice": trainable.lora(2)}, {"router_balance": 0.1}, "has routers"),
    ],
)
def test_models_without_routers_that_learn_are_refused(parts, update, sentence) -> None:
    with pytest.raises(ValueError, match=sentence):
        make_trainer(make_parts(layers=2, **parts), settings_of(**update))


def test_a_negative_rate_is_refused() -> None:
    with pytest.raises(ValueError, match=r"router_bias_rate is -0\.1; it must be at least 0"):
        settings_of(router_bias_rate=-0.1)


def test_a_run_goes_on_with_its_biases(tmp_path: Path) -> None:
    """Two steps at once, and two with a stop in the second one: the same state bit for bit."""
    settings = dataclasses.replace(settings_of(router_bias_rate=RATE, router_balance=WEIGHT), checkpoint_every=1)

    class Stopping(Quiet):
        def begin(self, *, first_step: int, steps: int) -> None:
            self.steps = 0

        def phase(self, name: str) -> None:
            self.steps += name == "rollout"
            if self.steps == 2:
                raise RuntimeError("stopped in the second step")

    once = train(make_parts(layers=2, experts=EXPERTS), settings, tmp_path / "once")
    with pytest.raises(RuntimeError, match="second step"):
        train(make_parts(layers=2, experts=EXPERTS), settings, tmp_path / "twice", reporter=Stopping())
    twice = train(make_parts(layers=2, experts=EXPERTS), settings, tmp_path / "twice")
    assert state_hash(once.state.params) == state_hash(twice.state.params)
    assert np.abs(np.asarray(router_biases(once.state.params)[0])).max() > 0
