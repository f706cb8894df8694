"""A world of two turns, a collector from outside: what it makes is accepted, learned and gone on with."""

import dataclasses
import importlib.util
import json
import os
import signal
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_llm import categorical
from jaxrl_llm.training import Quiet
from jaxrl_llm.training import Trainer
from jaxrl_llm.training import UpdateSettings
from jaxrl_llm.training import state_hash
from jaxrl_llm.training import train
from jaxrl_llm.trajectory import Actions
from jaxrl_llm.trajectory import check_trajectory


@pytest.fixture(scope="module")
def two_turns():
    spec = importlib.util.spec_from_file_location("two_turns", Path(__file__).with_name("two_turns.py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def made(tiny_run, two_turns, recipe: str):
    parts = tiny_run.make_parts(recipe, task=None)
    parts = dataclasses.replace(parts, collector=two_turns.TwoTurns(parts, prompts=4, group_size=4))
    update = UpdateSettings(minibatches=2, micro_batch=1)
    return parts, dataclasses.replace(tiny_run.SETTINGS, steps=3, prompts=4, group_size=4, update=update)


@pytest.fixture(scope="module")
def collected(tiny_run, two_turns):
    """Trainer, state and experience of one step of DAPO."""
    parts, settings = made(tiny_run, two_turns, "dapo")
    trainer = Trainer(parts, settings, parts.collector.shape)
    state = trainer.initial_state()
    return trainer, state, parts.collector.collect(trainer.snapshot(state), state.key, 0, {})


def test_what_it_makes_keeps_every_rule(collected) -> None:
    trainer, _, experience = collected
    t = experience.trajectories
    check_trajectory(t, vocab_size=trainer.parts.model.config.vocab_size)
    actions = Actions.of(t)
    np.testing.assert_array_equal(actions.columns, np.broadcast_to([2, 3, 6, 7], (16, 4)))
    np.testing.assert_array_equal(actions.take(t.step_ids), np.broadcast_to([0, 0, 1, 1], (16, 4)))
    earned = (np.asarray(t.rewards) != 0).sum(axis=0)
    assert np.flatnonzero(earned).tolist() == [3, 7], "a reward at the end of each step"
    # The log-probs of both turns are those that the trainer finds in one pass over the row.
    model = trainer.policy.model(collected[1].params, trainer.frozen)
    logits = model.logits(model(jnp.asarray(t.tokens), jnp.asarray(t.token_mask)))[:, :-1]
    found = np.asarray(categorical.log_prob(logits, jnp.asarray(t.tokens)[:, 1:]))
    expected = np.take_along_axis(found, actions.columns - 1, axis=1)
    np.testing.assert_allclose(actions.take(t.log_prob_behaviour), expected, atol=1e-4)


def test_the_worlds_tokens_are_not_learned(collected) -> None:
    trainer, state, experience = collected
    t, prepared = experience.trajectories, trainer.prepare(state, 0, experience)
    tokens = jnp.asarray(t.tokens)
    # DAPO gives a row one advantage.
    advantages = jnp.asarray(prepared.advantages[:, 0])

    def loss(params, learned):
        model = trainer.policy.model(params, trainer.frozen)
        log_prob = categorical.log_prob(model.logits(model(tokens, jnp.asarray(t.token_mask)))[:, :-1], tokens[:, 1:])
        return -jnp.sum(log_prob * advantages[:, None] * learned[:, 1:]) / learned.sum()

    rows = len(prepared.batch.rows.tokens)
    got, _ = trainer.update.gradient(
        state.params, trainer.frozen, prepared.batch, prepared.heads, jnp.arange(rows)[None], 1
    )
    gradient = jax.jit(jax.grad(loss))
    chosen = jnp.asarray(t.action_mask, jnp.float32)
    expected = gradient(state.params, chosen)
    largest = max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(expected))
    assert largest > 1e-4
    for one, other in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(one, other, atol=2e-5 * largest)
    # Had the world's tokens been learned too, it would be another one.
    wrong = gradient(state.params, chosen.at[:, 4:6].set(1))
    gaps = [float(jnp.abs(one - other).max()) for one, other in zip(*map(jax.tree.leaves, (got, wrong)), strict=True)]
    assert max(gaps) > 0.05 * largest


class StopsAfter(Quiet):
    """Asks the run to stop once a step is done."""

    def finish_step(self, step, metrics, seconds) -> None:
        if step == 1:
            os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.parametrize("recipe", ["empg", "ppo", "dapo"])
def test_it_trains_and_goes_on_bit_for_bit(recipe, tiny_run, two_turns, tmp_path) -> None:
    def run(folder, **options):
        return train(*made(tiny_run, two_turns, recipe), folder, **options)

    whole = run(tmp_path / "whole")
    assert whole.finished
    assert int(whole.state.updates) > 0
    assert not run(tmp_path / "parts", reporter=StopsAfter()).finished
    again = run(tmp_path / "parts")
    assert state_hash(again.state) == state_hash(whole.state)
    first, second = ((tmp_path / name / "metrics.jsonl").read_bytes() for name in ("parts", "whole"))
    assert first == second
    rows = [json.loads(line) for line in first.splitlines()]
    assert [row["rollout/staleness"] for row in rows] == [0, 0, 0]
    # Nobody's law: whole distributions of the sampler are not claimed.
    assert not any(name.startswith("bounds/") for name in rows[0])
    if recipe == "empg":
        # Two steps of a row have advantages of their own.
        assert rows[0]["critic/advantages/max"] > 0
