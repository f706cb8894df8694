"""Routers in training: the bias moves by the loads of the whole minibatch, once a step, and nothing else feels it."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxrl_llm.models import trainable
from jaxrl_llm.models.config import ExpertsConfig
from jaxrl_llm.models.experts import RouterBias
from jaxrl_llm.objectives import balance
from jaxrl_llm.training import Trainer
from jaxrl_llm.training.text.routers import gradient_norm
from jaxrl_llm.training.text.routers import router_biases
from tests.training.tiny_run import SETTINGS
from tests.training.tiny_run import collected
from tests.training.tiny_run import make_parts
from tests.training.tiny_run import make_trainer

RATE, EXPERTS = 0.25, ExpertsConfig(count=6, chosen=2, width=16, shared=1, dense_layers=1)


def trainer_of(*, micro_batch: int = 0, **update) -> tuple[Trainer, object]:
    settings = dataclasses.replace(SETTINGS.update, minibatches=1, micro_batch=micro_batch, **update)
    parts = make_parts(layers=2, experts=EXPERTS)
    return make_trainer(parts, dataclasses.replace(SETTINGS, update=settings))


def one_step(trainer: Trainer, experience) -> tuple[list[np.ndarray], dict]:
    """Biases of the state after one optimiser step on the whole batch, and its metrics."""
    state = trainer.new_state()
    prepared = trainer.prepare(state, experience, {})
    minibatches = trainer.minibatches(state, prepared)
    state, metrics = trainer.step(state, prepared, minibatches[0])
    return [np.asarray(bias) for bias in router_biases(state.params)], metrics


@pytest.fixture(scope="module")
def experience():
    trainer, collector = trainer_of()
    return collected(trainer, collector, trainer.new_state())
