"""Router replay: the trainer sends tokens where the sampler sent them, with the weights of its own scores."""

import dataclasses
import functools
from pathlib import Path
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_llm.models import trainable
from jaxrl_llm.models.attention import Visibility
from jaxrl_llm.models.config import ExpertsConfig
from jaxrl_llm.models.experts import given_selections
from jaxrl_llm.models.transformer import positions_of
from jaxrl_llm.rollouts.perturb import perturbation
from jaxrl_llm.training import Trainer
from jaxrl_llm.training import TrainSettings
from jaxrl_llm.training import make_collector
from jaxrl_llm.training.text.layout import Packed
from jaxrl_llm.training.text.measuring import step_metrics
from jaxrl_llm.training.text.prepared import Prepared
from jaxrl_llm.training.text.routers import flip_metrics
from jaxrl_llm.trajectory import Actions
from tests.training.tiny_run import SETTINGS
from tests.training.tiny_run import collected
from tests.training.tiny_run import make_parts
from tests.training.tiny_run import make_trainer

EXPERTS = ExpertsConfig(count=8, chosen=2, width=16, shared=1, dense_layers=1)


def settings_of(routes: Literal["off", "measure", "on"], **changes) -> TrainSettings:
    update = dataclasses.replace(SETTINGS.update, minibatches=1, skip_equal_groups=False, router_replay=routes)
    return dataclasses.replace(SETTINGS, response_length=6, prompts=4, group_size=4, update=update, **changes)


@functools.cache
def trained(replay: Literal["measure", "on"], mismatch: str = "none") -> tuple[Trainer, Prepared, dict[str, float]]:
    """A batch ready to be learned, and what is measured of it."""
    parts = make_parts(layers=3, experts=EXPERTS, perturbation=perturbation(mismatch, None))
    trainer, collector = make_trainer(parts, settings_of(replay))
    state = trainer.initial_state()
    experience = collected(trainer, collector, state)
    prepared = trainer.prepare(state, 0, experience)
    return trainer, prepared, step_metrics(experience, prepared, [], 0)


def test_the_sampler_of_the_same_weights_chose_what_the_trainer_chooses() -> None:
    _, prepared, metrics = trained("on")
    assert metrics["rollout_corr/router_flips"] == metrics["rollout_corr/router_flipped_tokens"] == 0
    assert prepared.batch.rows.selections is not None
    counted = np.asarray(prepared.counted)
    apart = np.abs(np.asarray(prepared.batch.log_prob_old) - np.asarray(prepared.batch.log_prob_behaviour))[counted]
    assert apart.max() < 1e-5


def test_replay_brings_the_trainer_nearer_to_a_sampler_whose_routers_flip() -> None:
    _, measured, without = trained("measure", "int8_weights")
    _, replayed, metrics = trained("on", "int8_weights")
    assert measured.batch.rows.selections is None
    assert without["rollout_corr/router_flipped_tokens"] > without["rollout_corr/router_flips"] > 0.005
    assert metrics["rollout_corr/router_flips"] > 0
    assert metrics["rollout_corr/k3_kl"] < 0.7 * without["rollout_corr/k3_kl"]
    np.testing.assert_array_equal(replayed.batch.rows.tokens, measured.batch.rows.tokens)


def test_tokens_go_where_they_are_told_and_weights_follow_live_scores() -> None:
    """Selections drawn at random: every layer follows them, recomputed or not, and its router gets a gradient."""
    trainer, prepared, _ = trained("on")
    rows, params = prepared.batch.rows, trainer.initial_state().params
    order = np.random.default_rng(0).random((*rows.tokens.shape, 2, EXPERTS.count))
    told = np.argsort(order, axis=-1)[..., : EXPERTS.chosen]
    rows = dataclasses.replace(rows, selections=jnp.asarray(told, jnp.uint8))

    def total(params, remat: bool):
        model = trainer.policy.model(params, trainer.frozen)
        hidden, _, routes = trainer.policy.forward(model, rows, None, remat=remat)
        return jnp.sum(jnp.sin(hidden)), [sent.selection for sent in routes if sent is not None]

    call = jax.jit(jax.grad(total, has_aux=True), static_argnums=1)
    (slopes, sent), (again, _) = call(params, False), call(params, True)
    np.testing.assert_array_equal(np.stack(sent, axis=2), told)
    for one, other in zip(*map(jax.tree.leaves, (slopes, again)), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5 * max(1.0, float(jnp.abs(one).max())))
    kernel = slopes["layers"][1]["mlp"]["router"]["kernel"].get_value()
    assert float(jnp.abs(kernel).max()) > 1e-4


@pytest.mark.parametrize("packed", [False, True])
def test_recorded_selections_reach_their_tokens_in_rows_of_every_form(packed: bool) -> None:
    """Drawn at random text by text, below a frozen layer: states equal those of texts that are read one by one."""
    parts = make_parts(layers=3, experts=EXPERTS, choice=trainable.top_layers(1))
    trainer, collector = make_trainer(parts, settings_of("on"))
    state = trainer.initial_state()
    experience = collected(trainer, collector, state)
    texts = experience.trajectories
    order = np.random.default_rng(1).random((*texts.tokens.shape, 2, EXPERTS.count))
    told = np.argsort(order, axis=-1)[..., : EXPERTS.chosen].astype(np.uint8)
    prompt = settings_of("on").prompt_length
    told[:, :prompt] = np.repeat(told[::4, :prompt], 4, axis=0)  # answers share what their prompt was told
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("jaxrl_llm.training.text.layout.WORTH_PACKING", 1e9 if packed else 0.0)
        prepared = trainer.prepare(state, 0, dataclasses.replace(experience, selections=told))
    assert isinstance(prepared.batch.rows.layout, Packed) == packed
    model = trainer.policy.model(state.params, trainer.frozen)
    tokens, mask = jnp.asarray(texts.tokens), jnp.asarray(texts.token_mask)
    given = given_selections(model.config, jnp.asarray(told))
    passed = model.rows(model.embed(tokens), positions_of(mask), Visibility(mask), selections=given)
    logits = model.logits(model.final_norm(passed.x))[:, :-1]
    each = np.asarray(jnp.take_along_axis(jax.nn.log_softmax(logits), tokens[:, 1:, None], axis=2)[..., 0])
    chosen = Actions.of(texts, width=trainer.shape.actions)
    expected = chosen.take(np.pad(each, ((0, 0), (1, 0))))
    found = prepared.gather(prepared.batch.log_prob_old)
    np.testing.assert_allclose(found[chosen.mask], expected[chosen.mask], atol=2e-5)


def test_flips_are_other_sets_not_other_orders() -> None:
    recorded = np.array([[[[0, 1], [2, 3]], [[4, 5], [6, 7]], [[0, 1], [0, 1]]]], np.uint8)
    own = np.array([[[[1, 0], [2, 4]], [[4, 5], [7, 6]], [[2, 3], [2, 3]]]])
    found = flip_metrics(recorded, own, np.array([[True, True, False]]))
    assert found == {"rollout_corr/router_flips": 0.25, "rollout_corr/router_flipped_tokens": 0.5}
    last = flip_metrics(recorded, own[:, :, 1:], np.array([[True, True, False]]))
    assert last["rollout_corr/router_flips"] == 0.5


@pytest.mark.parametrize(
    ("experts", "changes", "sentence"),
    [
        (None, {}, r'router_replay is "on", and the model has no experts'),
        (EXPERTS, {"replay": 2}, r"router_replay needs batches that are learned once; set replay to 1"),
    ],
)
def test_what_cannot_be_replayed_is_refused(experts, changes, sentence) -> None:
    with pytest.raises(ValueError, match=sentence):
        make_collector(make_parts(layers=2, experts=experts), settings_of("on", **changes), Path("nowhere"))


def test_another_word_is_refused() -> None:
    with pytest.raises(ValueError, match=r"router_replay is 'yes'; it must be one of off, measure, on"):
        settings_of("yes")  # pyright: ignore[reportArgumentType]
