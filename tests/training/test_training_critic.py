"""The critic: it learns a known value, its sums add, it goes on, and its loss never reaches the policy."""

import dataclasses
import json
import os
import signal

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_llm.environments import Score
from jaxrl_llm.objectives import get_recipe
from jaxrl_llm.training import CriticSettings
from jaxrl_llm.training import OptimizerSettings
from jaxrl_llm.training import Quiet
from jaxrl_llm.training import UpdateSettings
from jaxrl_llm.training import state_hash
from jaxrl_llm.training import train


def made(tiny_run, kind: str = "head", *, signal=None, task=None, **changes):
    """PPO on the tiny run."""
    settings = dataclasses.replace(
        tiny_run.SETTINGS,
        steps=3,
        prompts=4,
        group_size=4,
        update=UpdateSettings(minibatches=2, micro_batch=1, bounds_every=0),
        critic=CriticSettings(critic=kind, critic_learning_rate=3e-2 if kind == "head" else 3e-3),
        checkpoint_every=1,
    )
    parts = tiny_run.make_parts("ppo", signal=signal)
    return parts if task is None else dataclasses.replace(parts, task=task), dataclasses.replace(settings, **changes)


@pytest.fixture(scope="module", params=["head", "model"])
def prepared(request, tiny_run):
    """A trainer with either critic, its state, and a batch whose rewards are drawn."""
    parts, settings = made(tiny_run, request.param)
    trainer, collector = tiny_run.make_trainer(parts, settings)
    state = trainer.initial_state()
    experience = tiny_run.collected(trainer, collector, state)
    rewards = np.random.default_rng(0).uniform(0, 1, 16).astype(np.float32)
    return trainer, state, trainer.prepare(state, 0, tiny_run.with_outcomes(experience, rewards)), rewards


def gradients(trainer, trained, batch, heads, rows):
    found = jax.jit(trainer.update._gradients)(trained, trainer.frozen, batch, heads, jnp.asarray(rows), len(rows))
    (policy, critic), sums = found
    return policy, critic, sums


def test_its_gradient_is_that_of_its_own_loss_and_stays_out_of_the_policy(prepared) -> None:
    trainer, state, ready, rewards = prepared
    count = len(ready.batch.rows.tokens)
    assert not np.asarray(ready.batch.values_old).any(), "the critic starts at 0"
    np.testing.assert_allclose(
        ready.gather(ready.batch.value_targets)[:, 0],
        rewards,
        rtol=1e-6,
        err_msg="of one token the value is the reward",
    )
    policy, critic, sums = gradients(
        trainer, (state.params, state.critic), ready.batch, ready.heads, np.arange(count)[None]
    )
    # Other targets are another loss of the critic, and the same policy gradient to the bit.
    other = dataclasses.replace(ready.batch, value_targets=1 - ready.batch.value_targets)
    policy_too, critic_too, _ = gradients(
        trainer, (state.params, state.critic), other, ready.heads, np.arange(count)[None]
    )
    for one, same in zip(jax.tree.leaves(policy), jax.tree.leaves(policy_too), strict=True):
        np.testing.assert_array_equal(one, same)
    # At value 0 the gradient of the bias is minus the mean target.
    assert float(critic["bias"]) == pytest.approx(-rewards.mean(), rel=1e-5)
    assert float(critic_too["bias"]) == pytest.approx(-(1 - rewards).mean(), rel=1e-5)
    value = float(sums.value[0] / sums.value[1])
    assert value == pytest.approx((rewards**2).mean() / 2, rel=1e-5)


def test_its_sums_add_up_over_micro_batches(prepared) -> None:
    trainer, state, ready, _ = prepared
    count = len(ready.batch.rows.tokens)
    moved = jax.tree.map(lambda x: x + 0.05 * jax.random.normal(jax.random.key(x.size), x.shape, x.dtype), state.critic)
    trained = (state.params, moved)
    split = np.full((2, count), -1, np.int32)
    split[0, : count // 2], split[1, : count - count // 2] = np.arange(count // 2), np.arange(count // 2, count)
    _, whole, sums = gradients(trainer, trained, ready.batch, ready.heads, np.arange(count)[None])
    _, parts, sums_too = gradients(trainer, trained, ready.batch, ready.heads, split)
    largest = max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(whole))
    assert largest > 1e-3
    for one, other in zip(jax.tree.leaves(whole), jax.tree.leaves(parts), strict=True):
        np.testing.assert_allclose(one, other, atol=2e-5 * largest)
    np.testing.assert_allclose(sums.value, sums_too.value, rtol=2e-5)


class DigitIsWorth:
    """Whatever is answered, a digit is worth a tenth of itself: the value of a prompt is known."""

    def __init__(self, tiny_run) -> None:
        task = tiny_run.SayTheDigit()
        self.name, self.stop, self.train, self.held_out = "digit_is_worth", "", task.train, task.held_out

    def score(self, problem, text: str) -> Score:
        return Score(int(problem.answer) / 10, lenient=True, strict=True)


@pytest.mark.parametrize("kind", ["head", "model"])
def test_it_learns_a_known_value(kind, tiny_run, tmp_path) -> None:
    """All answers of a group earn the same: nothing compares them, and the critic learns all the same."""
    still = OptimizerSettings(learning_rate=1e-9)
    steps = 25
    parts, settings = made(
        tiny_run, kind, task=DigitIsWorth(tiny_run), steps=steps, optimizer=still, checkpoint_every=steps
    )
    train(parts, dataclasses.replace(settings, prompts=8, group_size=2), tmp_path)
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    explained = [row["critic/explained_variance"] for row in rows]
    assert explained[0] < 0.3
    assert np.mean(explained[-5:]) > 0.6
    assert rows[-1]["critic/value_loss"] < 0.3 * rows[0]["critic/value_loss"]
    assert all(row["groups/used"] == 8 for row in rows)


def test_a_value_is_not_moved_further_than_the_clip(tiny_run) -> None:
    """With a value that is already clip away from the old one and nearer to the target, nothing is left to learn."""
    parts, settings = made(tiny_run, critic=CriticSettings(value_clip=0.1))
    trainer, collector = tiny_run.make_trainer(parts, settings)
    state = trainer.initial_state()
    experience = tiny_run.with_outcomes(tiny_run.collected(trainer, collector, state), np.full(16, 1.0, np.float32))
    ready = trainer.prepare(state, 0, experience)
    rows = np.arange(len(ready.batch.rows.tokens))[None]
    near, far = ({**state.critic, "bias": jnp.asarray(bias)} for bias in (0.05, 0.5))
    _, moving, _ = gradients(trainer, (state.params, near), ready.batch, ready.heads, rows)
    _, clipped, _ = gradients(trainer, (state.params, far), ready.batch, ready.heads, rows)
    assert float(moving["bias"]) == pytest.approx(-0.95, rel=1e-5)
    assert float(clipped["bias"]) == 0
    with pytest.raises(ValueError, match=r"value_clip is 0\.0; it must be positive and finite"):
        CriticSettings(value_clip=0.0)


class StopsAfter(Quiet):
    """Asks the run to stop once a step is done."""

    def finish_step(self, step, metrics, seconds) -> None:
        if step == 1:
            os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.parametrize("kind", ["head", "model"])
def test_a_run_goes_on_with_its_critic(kind, tiny_run, tmp_path) -> None:
    whole = train(*made(tiny_run, kind), tmp_path / "whole")
    assert not train(*made(tiny_run, kind), tmp_path / "parts", reporter=StopsAfter()).finished
    again = train(*made(tiny_run, kind), tmp_path / "parts")
    assert state_hash(again.state) == state_hash(whole.state)
    for one, other in zip(jax.tree.leaves(again.state.critic), jax.tree.leaves(whole.state.critic), strict=True):
        np.testing.assert_array_equal(one, other)
    assert any(np.asarray(leaf).any() for leaf in jax.tree.leaves(whole.state.critic_opt_state))


def test_a_signal_of_yours_gets_the_same_critic(tiny_run) -> None:
    def mine(x):
        return x.rewards_t - x.values

    parts, settings = made(tiny_run, signal=mine)
    trainer, collector = tiny_run.make_trainer(parts, settings)
    state = trainer.initial_state()
    ready = trainer.prepare(state, 0, tiny_run.collected(trainer, collector, state))
    assert ready.batch.value_targets is not None
    assert get_recipe("ppo").advantage.startswith("gae")
