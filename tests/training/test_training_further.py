"""Multi-token prediction in training: its loss in rows of every form, what it moves, and that it counts by itself."""

import dataclasses
import functools
from typing import Any
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxrl_llm.models import trainable
from jaxrl_llm.models.config import ExpertsConfig
from jaxrl_llm.objectives import LossTerms
from jaxrl_llm.training import Trainer
from jaxrl_llm.training.run.state import named_leaves
from jaxrl_llm.training.text.layout import Packed
from jaxrl_llm.training.text.layout import predecessors
from jaxrl_llm.training.text.prepared import Prepared
from jaxrl_llm.training.text.routers import router_biases
from jaxrl_llm.typing import PyTree
from tests.training.tiny_run import SETTINGS
from tests.training.tiny_run import collected
from tests.training.tiny_run import make_parts
from tests.training.tiny_run import make_trainer

WEIGHT = 0.25
EXPERTS = ExpertsConfig(count=4, chosen=2, width=16, shared=1, dense_layers=1)
CHANGES: tuple[dict[str, Any], ...] = ({}, {"mtp_detached": False}, {"mtp_weight": 2 * WEIGHT, "micro_batch": 3})
FORMS = ("shared prompts", "a text a row", "packed")


def trainer_of(form: str = "shared prompts", *, experts: ExpertsConfig | None = None, **update) -> Trainer:
    fixed = {"minibatches": 1, "skip_equal_groups": False, "share_prompts": form == "shared prompts"}
    changed = dataclasses.replace(SETTINGS.update, **(fixed | {"mtp_weight": WEIGHT} | update))
    settings = dataclasses.replace(SETTINGS, response_length=5, prompts=4, group_size=4, update=changed)
    choice = trainable.full(further=changed.mtp_weight > 0)
    layers = 1 if experts is None else 2
    trainer, _ = make_trainer(make_parts(layers=layers, experts=experts, choice=choice), settings)
    return trainer


class World(NamedTuple):
    """A batch as the update reads it, and its loss text by text, by the model's own function."""

    trainer: Trainer
    prepared: Prepared
    loss: float
    count: int


@functools.cache
def world_of(form: str) -> World:
    trainer = trainer_of(form)
    _, collector = make_trainer(trainer.parts, trainer.settings)
    state = trainer.initial_state()
    experience = collected(trainer, collector, state)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("jaxrl_llm.training.text.layout.WORTH_PACKING", 1e9 if form == "packed" else 0.0)
        prepared = trainer.prepare(state, 0, experience)
    texts, model = experience.trajectories, trainer.policy.model(state.params, trainer.frozen)
    tokens, mask = jnp.asarray(texts.tokens), jnp.asarray(texts.token_mask)
    logits = model.logits(model.hidden_further(model(tokens, mask), tokens, mask))[:, :-1]
    each = jnp.take_along_axis(jax.nn.log_softmax(logits), tokens[:, 2:, None], axis=2)[..., 0]
    counts = np.asarray(texts.action_mask)[:, 2:]
    return World(trainer, prepared, -float(jnp.sum(jnp.where(counts, each, 0))), int(counts.sum()))


def gradient_of(trainer: Trainer, prepared: Prepared) -> tuple[dict[str, np.ndarray], LossTerms, PyTree]:
    rows, used = prepared.plan[0]
    call = jax.jit(trainer.update.gradient)
    params = trainer.initial_state().params
    found, terms = call(params, trainer.frozen, prepared.batch, prepared.heads, jnp.asarray(rows), used)
    return {name: np.asarray(leaf) for name, leaf in named_leaves(found).items()}, terms, found


@pytest.mark.parametrize("form", FORMS)
def test_rows_of_every_form_give_the_loss_of_their_texts(form: str) -> None:
    """Three prompts at a time: the last micro-batch is filled up with rows that must not count."""
    world = world_of(form)
    assert isinstance(world.prepared.batch.rows.layout, Packed) == (form == "packed")
    trainer = trainer_of(form, micro_batch=3)
    _, terms, _ = gradient_of(trainer, world.prepared)
    total, count = terms.metrics["mtp_loss"]
    assert int(count) == world.count
    assert float(total) == pytest.approx(world.loss, rel=1e-5)


def test_the_loss_is_added_with_its_weight_and_its_own_count() -> None:
    """Detached, its gradient is that of its layer alone; else the rest of the model feels it as well."""
    world = world_of("shared prompts")
    found, attached, twice = (gradient_of(trainer_of(**update), world.prepared)[0] for update in CHANGES)
    without = gradient_of(trainer_of(mtp_weight=0.0), world.prepared)[0]
    own = {name for name in found if name.startswith("further")}
    assert own == set(found) - set(without)
    moved = 0.0
    for name, before in without.items():
        np.testing.assert_allclose(found[name], before, atol=1e-6)
        moved = max(moved, float(np.abs(attached[name] - before).max()))
    assert moved > 1e-3
    for name in own:
        np.testing.assert_allclose(twice[name], 2 * found[name], atol=1e-6)
        np.testing.assert_allclose(attached[name], found[name], atol=1e-6)

    # Along the gradient the mean over chosen tokens falls by its square, over the weight.
    trainer, step = world.trainer, 0.5
    rows, used = world.prepared.plan[0]
    given = trainer.frozen, world.prepared.batch, world.prepared.heads, jnp.asarray(rows), used
    call = jax.jit(trainer.update.gradient)
    params = trainer.initial_state().params
    gradient, losses = call(params, *given)[0], []
    for size in (-step, step):
        moved = jax.tree.map(lambda leaf, slope, size=size: leaf - size * slope, params, gradient)
        moved = nnx.State({**params, "further": moved["further"]})
        total, count = call(moved, *given)[1].metrics["mtp_loss"]
        losses.append(float(total / count))
    square = sum(float((found[name] ** 2).sum()) for name in own)
    assert (losses[0] - losses[1]) / (2 * step) == pytest.approx(square / WEIGHT, rel=0.02)


def test_its_router_counts_its_own_tokens() -> None:
    """A text's first token, which has no state before it, is in no load of the layer for further tokens."""
    world = world_of("a text a row")
    trainer = trainer_of("a text a row", experts=EXPERTS)
    found, _, gradient = gradient_of(trainer, world.prepared)
    read = int(predecessors(world.prepared.batch.rows)[1].sum())
    real = int(world.prepared.batch.rows.token_mask.sum())
    assert read == real - len(world.prepared.batch.rows.tokens)
    assert {int(loads.sum()) for loads in router_biases(gradient)} == {2 * read, 2 * real}
    [own] = [name for name in found if name.startswith("further") and name.endswith(".router.bias.value")]
    assert found[own].sum() == 2 * read


@pytest.mark.parametrize(
    ("further", "weight", "sentence"),
    [
        (False, 0.3, r"mtp_weight is 0\.3, and no layer for further tokens learns"),
        (True, 0.0, r"the layer for further tokens learns .* is 0; it must be above 0"),
    ],
)
def test_a_weight_without_a_layer_that_learns_is_refused(further: bool, weight: float, sentence: str) -> None:
    settings = dataclasses.replace(SETTINGS, update=dataclasses.replace(SETTINGS.update, mtp_weight=weight))
    with pytest.raises(ValueError, match=sentence):
        make_trainer(make_parts(choice=trainable.full(further=further)), settings)
