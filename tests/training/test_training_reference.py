"""Teachers of another shape: what they say is what their whole distributions say, and pupils come nearer to them."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxrl_llm import categorical
from jaxrl_llm.models.config import tiny
from jaxrl_llm.models.tokenizers import ByteTokenizer
from jaxrl_llm.models.transformer import Transformer
from jaxrl_llm.objectives import get_recipe
from jaxrl_llm.rollouts.collect import DemonstrationCollector
from jaxrl_llm.training import UpdateSettings
from jaxrl_llm.training import train
from jaxrl_llm.trajectory import Actions

VOCABULARY = ByteTokenizer().vocab_size


def teacher_of(seed: int = 5, **changes) -> Transformer:
    """Random weights whose distributions are not nearly uniform."""
    options = {"vocab_size": VOCABULARY, "num_layers": 2} | changes
    model = Transformer(tiny(**options), rngs=nnx.Rngs(seed))
    model.final_norm.scale[...] = 8 * model.final_norm.scale[...]
    return model


def made(tiny_run, teacher, recipe="dapo", **changes):
    settings = dataclasses.replace(
        tiny_run.SETTINGS,
        steps=8,
        prompts=4,
        group_size=4,
        response_length=2,
        update=UpdateSettings(minibatches=2, bounds_every=0),
        checkpoint_every=8,
    )
    return tiny_run.make_parts(recipe, teacher=teacher, **changes), settings


@pytest.mark.parametrize(
    "shape", [{}, {"hidden_size": 24, "num_heads": 2, "num_kv_heads": 1}, {"tie_embeddings": False}], ids=str
)
def test_divergences_are_those_of_whole_distributions(shape, tiny_run) -> None:
    def mine(x):
        return x.kl_ref_t + x.log_prob_ref

    teacher = teacher_of(**shape)
    parts, settings = made(tiny_run, teacher, signal=mine)
    trainer, collector = tiny_run.make_trainer(parts, settings)
    state = trainer.initial_state()
    experience = tiny_run.collected(trainer, collector, state)
    prepared = trainer.prepare(state, 0, experience)
    t, actions = experience.trajectories, Actions.of(experience.trajectories, width=2)
    before = jnp.asarray(np.maximum(actions.columns - 1, 0))[:, :, None]

    def logits(model):
        states = model(jnp.asarray(t.tokens), jnp.asarray(t.token_mask))
        return model.logits(jnp.take_along_axis(states, before, axis=1))

    policy, other = logits(trainer.policy.model(state.params, trainer.frozen)), logits(teacher)
    targets, mask = jnp.asarray(actions.take(t.tokens)), actions.mask
    found = prepared.gather(prepared.batch.log_prob_ref)
    np.testing.assert_allclose(found[mask], categorical.log_prob(other, targets)[mask], atol=1e-4)
    both = categorical.kl(policy, other) + categorical.log_prob(other, targets)
    np.testing.assert_allclose(prepared.advantages[mask], both[mask], atol=2e-4)
    assert np.abs(np.asarray(categorical.kl(policy, other) - categorical.kl(other, policy))[mask]).max() > 0.01


def run(parts, settings, folder) -> list[dict]:
    train(parts, settings, folder)
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("name", ["distil_reverse", "distil_forward"])
def test_a_pupil_comes_nearer_to_its_teacher(name, tiny_run, tmp_path) -> None:
    file = tmp_path / "texts.jsonl"
    file.write_text("".join(json.dumps({"prompt": f"{d}>", "response": f"{d}{d}"}) + "\n" for d in range(8)))
    teacher = teacher_of(hidden_size=24, num_heads=2, num_kv_heads=1)
    collector = DemonstrationCollector(file, ByteTokenizer(), rows=8, width=6)
    rows = run(*made(tiny_run, teacher, objective=name, collector=collector), tmp_path / "run")
    losses = [row["actor/loss"] for row in rows]
    assert losses[-1] < 0.9 * losses[0]
    assert min(losses) > 0, "a divergence"


def test_hybrid_imitates_a_teacher_of_its_own(tiny_run, tmp_path) -> None:
    """The advantage of a token is what the teacher would rather say, and another teacher makes another update."""
    recipe = dataclasses.replace(get_recipe("hybrid"), reward_weight=1e-6)
    gaps = []
    for seed in (5, 6):
        trainer, collector = tiny_run.make_trainer(*made(tiny_run, teacher_of(seed), recipe))
        state = trainer.initial_state()
        prepared = trainer.prepare(state, 0, tiny_run.collected(trainer, collector, state))
        gap = prepared.gather(prepared.batch.log_prob_old) - prepared.gather(prepared.batch.log_prob_ref)
        # The divergence that comes after a token is its cost; at the last one there is none (2512.23097).
        both = prepared.mask.all(axis=1)
        assert both.any()
        np.testing.assert_allclose(prepared.advantages[both, 0], -gap[both, 1], atol=1e-4)
        np.testing.assert_allclose(prepared.advantages[both, 1], 0, atol=1e-4)
        gaps.append(prepared.advantages)
    assert np.abs(gaps[0] - gaps[1]).max() > 0.1
    rows = run(*made(tiny_run, teacher_of(), recipe), tmp_path)
    assert all(np.isfinite(row["actor/loss"]) for row in rows)


def test_a_teacher_that_cannot_be_compared_is_refused(tiny_run) -> None:
    with pytest.raises(ValueError, match=r"the teacher has a vocabulary of 300 tokens and the policy one of \d+"):
        tiny_run.make_trainer(*made(tiny_run, teacher_of(vocab_size=300), "hybrid"))
    with pytest.raises(ValueError, match="the teacher reads 5 positions and a row has up to 6"):
        tiny_run.make_trainer(*made(tiny_run, teacher_of(max_positions=5), "hybrid"))


def test_a_teacher_that_nobody_asks_costs_nothing(tiny_run) -> None:
    trainer, _ = tiny_run.make_trainer(*made(tiny_run, teacher_of(vocab_size=300)))
    assert trainer.reference is None
    assert len(jax.tree.leaves(trainer.identity())) == 0
