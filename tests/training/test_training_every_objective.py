"""Every recipe, every other objective and a callable: gradients against whole distributions, sums that add, resumes."""

import dataclasses
import json
import os
import signal

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_llm import categorical
from jaxrl_llm.models.tokenizers import ByteTokenizer
from jaxrl_llm.objectives import RECIPES
from jaxrl_llm.objectives import get_recipe
from jaxrl_llm.rollouts.collect import DemonstrationCollector
from jaxrl_llm.rollouts.collect import PreferenceCollector
from jaxrl_llm.testing import Batch
from jaxrl_llm.training import Quiet
from jaxrl_llm.training import UpdateSettings
from jaxrl_llm.training import state_hash
from jaxrl_llm.training import train
from jaxrl_llm.training.text.layout import Packed
from jaxrl_llm.training.text.objective import OBJECTIVES
from jaxrl_llm.training.text.objective import Extras
from jaxrl_llm.trajectory import Actions
from tests.glossary import unexplained


def my_loss(batch: Batch):
    """A loss of a user: REINFORCE with an entropy bonus and a pull towards the sampler."""
    losses = -batch.log_prob * batch.advantages[:, None] - 0.1 * batch.entropy + 0.3 * batch.kl_t
    return jnp.where(batch.response_mask, losses, 0.0).sum(), batch.response_mask.sum()


NAMES = (*RECIPES, *OBJECTIVES, "callable")
QUICK = ("ppo", "hybrid", "trm", "dpo", "distil_forward", "callable")
"""Those whose gradients are in every `make test`; the others are slow together."""

QUICK_RUNS = ("ppo", "dpo", "callable")
"""Those that are trained there, three times each: with a critic, on pairs, with a loss of one's own."""


def marked(names, quick=QUICK):
    return [name if name in quick else pytest.param(name, marks=pytest.mark.slow) for name in names]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("files")
    digits = [str(digit) for digit in range(8)]
    demonstrations = [{"prompt": f"{d}>", "response": d * (1 + int(d) % 3)} for d in digits]
    pairs = [{"prompt": f"{d}>", "chosen": d, "rejected": d * 3} for d in digits]
    for name, rows in (("demonstrations", demonstrations), ("pairs", pairs)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def made(tiny_run, files, name: str):
    """Parts and settings for an objective, with answers of up to three tokens."""
    settings = dataclasses.replace(
        tiny_run.SETTINGS,
        steps=3,
        prompts=4,
        group_size=4,
        prompt_length=24,
        response_length=3,
        update=UpdateSettings(minibatches=2, micro_batch=1),
        checkpoint_every=1,
    )
    tokenizer, changes = ByteTokenizer(), {}
    if name == "callable":
        changes["objective"] = my_loss
    elif name in OBJECTIVES:
        changes["objective"] = name
    if name in ("dpo", "ipo"):
        changes["collector"] = PreferenceCollector(files / "pairs.jsonl", tokenizer, pairs=4, width=7)
    elif name in OBJECTIVES:
        changes["collector"] = DemonstrationCollector(files / "demonstrations.jsonl", tokenizer, rows=8, width=7)
    recipe = get_recipe(name if name in RECIPES else "dapo")
    if recipe.log_min_p is not None:
        recipe = dataclasses.replace(recipe, log_min_p=-0.3)
    # So that policies that were moved a little are accepted in part.
    recipe = dataclasses.replace(recipe, mask_maximum=0.05, mask_average=0.02)
    return tiny_run.make_parts(recipe, layers=2, **changes), settings


def whole(trainer, experience, prepared, params, old_params) -> tuple[Batch, jax.Array | None]:
    """The batch as the objective should see it, from logits of one sequence a row: nothing packed, nothing shared."""
    t = experience.trajectories
    actions = Actions.of(t, width=trainer.shape.actions)
    tokens, real = jnp.asarray(t.tokens), jnp.asarray(t.token_mask)
    before = np.maximum(actions.columns - 1, 0)
    targets, mask = actions.take(t.tokens), jnp.asarray(prepared.mask)

    def logits(params):
        model = trainer.policy.model(params, trainer.frozen)
        states = model(tokens, real)
        return model.logits(jnp.take_along_axis(states, jnp.asarray(before)[:, :, None], axis=1))

    new, old, kept = logits(params), logits(old_params), None
    if trainer.objective.log_min_p is not None:
        keep = [categorical.safe_set(z, log_min_p=trainer.objective.log_min_p) for z in (new, old)]
        kept = jnp.take_along_axis(keep[0], jnp.asarray(targets)[:, :, None], axis=2)[..., 0]
        new, old = (categorical.restrict(z, k) for z, k in zip((new, old), keep, strict=True))
    log_prob_old = categorical.log_prob(old, jnp.asarray(targets))
    behaviour = None if t.log_prob_behaviour is None else jnp.asarray(actions.take(t.log_prob_behaviour))
    log_prob = categorical.log_prob(new, jnp.asarray(targets))
    pruned = kept is not None
    fields = {
        "tokens": jnp.asarray(targets),
        "response_mask": mask,
        "group_ids": jnp.asarray(t.group_ids),
        "rewards": jnp.asarray(t.returns, jnp.float32),
        "advantages": jnp.asarray(prepared.advantages[:, 0] if trainer.objective.per_sequence else prepared.advantages),
        "logits": None,
        "logits_old": None,
        "logits_behaviour": None,
        "logits_ref": None,
        "log_prob": jnp.where(kept, log_prob, 0.0) if pruned else log_prob,
        "log_prob_old": log_prob_old,
        "log_prob_behaviour": behaviour,
        "log_prob_ref": log_prob_old,
        "entropy": categorical.entropy(new),
        "kl_t": None if pruned else categorical.kl(old, new),
        "kl_ref_t": None if pruned else categorical.kl(new, old),
        "kl_from_ref_t": None if pruned else categorical.kl(old, new),
        "step_ids": jnp.asarray(actions.take(t.step_ids, fill=-1)),
    }
    return Batch(**fields), kept


@pytest.mark.parametrize("name", marked(NAMES))
def test_the_gradient_is_that_of_whole_distributions_and_adds_up(name, tiny_run, files):
    parts, settings = made(tiny_run, files, name)
    trainer, collector = tiny_run.make_trainer(parts, settings)
    state = trainer.initial_state()
    experience = tiny_run.collected(trainer, collector, state)
    if name not in OBJECTIVES:
        rewards = np.random.default_rng(0).uniform(0, 1, len(experience.trajectories.group_ids)).astype(np.float32)
        experience = tiny_run.with_outcomes(experience, rewards)
    prepared = trainer.prepare(state, 0, experience)
    assert trainer.objective.per_sequence == (name == "callable")
    assert isinstance(prepared.batch.rows.layout, Packed), "the short prompts here must be packed"
    old = state.params
    moved = jax.tree.map(lambda leaf: leaf + 0.02 * jax.random.normal(jax.random.key(leaf.size), leaf.shape), old)

    def loss(params):
        batch, kept = whole(trainer, experience, prepared, params, old)
        total, count = trainer.objective.loss(batch, Extras(1.0, kept)).loss
        return total / count

    expected = jax.jit(jax.grad(loss))(moved)
    rows = len(prepared.batch.rows.tokens)
    gradient = jax.jit(trainer.update.gradient)
    arguments = (moved, trainer.frozen, prepared.batch, prepared.heads)
    got, terms = gradient(*arguments, jnp.arange(rows)[None], 1)
    largest = max(float(jnp.max(jnp.abs(leaf))) for leaf in jax.tree.leaves(expected))
    assert largest > 1e-4

    def close(got, expected):
        for one, other in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
            np.testing.assert_allclose(one, other, rtol=0, atol=5e-5 * largest)

    close(got, expected)
    with pytest.raises(AssertionError):
        close(jax.tree.map(jnp.negative, got), expected)
    # Whatever is done in several micro-batches, the sums and counts are those of the whole.
    split = np.full((2, rows), -1, np.int32)
    split[0, : rows // 2], split[1, : rows - rows // 2] = np.arange(rows // 2), np.arange(rows // 2, rows)
    parts_got, parts_terms = gradient(*arguments, jnp.asarray(split), 2)
    close(parts_got, got)
    np.testing.assert_allclose(parts_terms.loss, terms.loss, rtol=2e-5, atol=1e-6)


class StopsAfter(Quiet):
    """Asks the run to stop once a step is done."""

    def __init__(self, step: int) -> None:
        self._step = step

    def finish_step(self, step, metrics, seconds) -> None:
        if step == self._step:
            os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.parametrize("name", marked(NAMES, QUICK_RUNS))
def test_three_steps_learn_something_and_go_on_where_they_stopped(name, tiny_run, files, tmp_path):
    def run(folder, **options):
        parts, settings = made(tiny_run, files, name)
        return train(parts, settings, folder, **options)

    whole_run = run(tmp_path / "whole")
    assert whole_run.finished
    assert int(whole_run.state.updates) > 0
    stopped = run(tmp_path / "parts", reporter=StopsAfter(1))
    assert not stopped.finished
    again = run(tmp_path / "parts")
    assert state_hash(again.state) == state_hash(whole_run.state)
    for file in ("metrics.jsonl", "samples.jsonl"):
        assert (tmp_path / "parts" / file).read_bytes() == (tmp_path / "whole" / file).read_bytes()
    assert not unexplained(tmp_path / "whole")
    rows = [json.loads(line) for line in (tmp_path / "whole/metrics.jsonl").read_text().splitlines()]
    assert all(np.isfinite(row["actor/loss"]) for row in rows if "actor/loss" in row)
    if trainer_has_critic(name):
        assert all("critic/explained_variance" in row for row in rows)


def trainer_has_critic(name: str) -> bool:
    return name in ("ppo", "divergence_augmented")
