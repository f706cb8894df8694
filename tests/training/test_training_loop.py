"""The loop: it learns, resumes bit for bit, skips what carries no signal, and stops with one sentence."""

import dataclasses
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx

from jaxrl_llm.environments import Curriculum
from jaxrl_llm.environments import Problem
from jaxrl_llm.environments import Score
from jaxrl_llm.models import trainable
from jaxrl_llm.models.config import tiny
from jaxrl_llm.models.transformer import Transformer
from jaxrl_llm.objectives import get_recipe
from jaxrl_llm.training import ChangedSettingsError
from jaxrl_llm.training import NonFiniteError
from jaxrl_llm.training import OptimizerSettings
from jaxrl_llm.training import Quiet
from jaxrl_llm.training import StorageError
from jaxrl_llm.training import TrainingError
from jaxrl_llm.training import UpdateSettings
from jaxrl_llm.training import state_hash
from jaxrl_llm.training import train
from tests.glossary import unexplained

FILES = ("metrics.jsonl", "samples.jsonl")
"""What must be equal byte for byte between an interrupted and an uninterrupted run."""


def read(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def contents(folder: Path) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in FILES}


class Interrupting(Quiet):
    """Sends this process a signal in the given phase of the given step."""

    def __init__(self, step: int, phase: str, number: signal.Signals) -> None:
        self.where, self.number, self.step, self.said = (step, phase), number, 1, []

    def begin(self, *, first_step: int, steps: int) -> None:
        self.step = first_step + 1

    def phase(self, name: str) -> None:
        if (self.step, name) == self.where:
            os.kill(os.getpid(), self.number)

    def finish_step(self, step: int, metrics: Mapping[str, float], seconds: Mapping[str, float]) -> None:
        self.step = step + 1

    def say(self, message: str) -> None:
        self.said.append(message)


@pytest.fixture(scope="module")
def uninterrupted(tiny_run, tmp_path_factory) -> tuple[Path, str]:
    folder = tmp_path_factory.mktemp("uninterrupted")
    outcome = train(tiny_run.make_parts(), tiny_run.SETTINGS, folder)
    assert outcome.finished
    assert not unexplained(folder)
    return folder, state_hash(outcome.state)


def test_the_reward_rises_and_the_numbers_are_there(tiny_run, tmp_path):
    settings = dataclasses.replace(tiny_run.SETTINGS, steps=60, checkpoint_every=100, evaluate_every=25)
    seen = []
    recipe = dataclasses.replace(get_recipe("trm"), mask_maximum=0.5, mask_average=0.5)
    outcome = train(
        tiny_run.make_parts(recipe=recipe),
        settings,
        tmp_path,
        evaluate=lambda step, state: {"held_out/steps": seen.append(step) or step},
    )
    assert outcome.finished
    rows = read(tmp_path)
    assert seen == [0, 25, 50, 60]
    assert [row["step"] for row in rows if "held_out/steps" in row] == seen
    rewards = [row["critic/rewards/mean"] for row in rows[1:]]
    assert np.mean(rewards[:3]) < 0.3
    assert np.mean(rewards[-10:]) > 0.8
    last = rows[5]
    # One token of response: nothing comes after it, so the surrogate is exact and every bound that sees that is zero.
    assert last["bounds/error"] == 0.0
    assert last["bounds/sharp/adaptive"] == 0.0
    assert last["shift/kl_max"] >= last["shift/kl_mean"] > 0
    assert last["shift/tv_max"] <= 1
    assert last["bounds/printed/linear"] == pytest.approx(4 * last["bounds/sharp/linear"])
    assert 0 <= last["actor/acceptance"] <= 1
    assert abs(last["rollout_corr/kl"]) < 1e-4
    assert last["actor/entropy"] > 0
    assert last["groups/total"] == settings.prompts
    assert not any("timing" in name or "second" in name for name in last)
    timing = json.loads((tmp_path / "timings.jsonl").read_text().splitlines()[-1])
    parts = sum(timing[name] for name in ("rollout", "score", "update", "bounds", "other", "evaluate"))
    assert parts == pytest.approx(timing["total"])


def test_rewards_that_are_all_equal_make_no_update(tiny_run, tmp_path):
    class Never(tiny_run.SayTheDigit):
        def score(self, problem: Problem, text: str) -> Score:
            return Score(reward=0.0, lenient=False, strict=False)

    settings = dataclasses.replace(tiny_run.SETTINGS, steps=1)
    outcome = train(tiny_run.make_parts(task=Never()), settings, tmp_path)
    row = read(tmp_path)[0]
    assert (row["groups/equal_rewards"], row["groups/used"], row["actor/optimizer_steps"]) == (8, 0, 0)
    assert int(outcome.state.updates) == 0
    assert row["shift/kl_max"] == pytest.approx(0, abs=1e-9)


def test_stopping_in_any_phase_and_going_on_gives_the_same_run(tiny_run, tmp_path, uninterrupted):
    folder, expected = uninterrupted
    stops = [(1, "rollout", signal.SIGTERM), (3, "update", signal.SIGINT), (3 + 2, "bounds", signal.SIGTERM)]
    for step, phase, number in stops:
        reporter = Interrupting(step, phase, number)
        outcome = train(tiny_run.make_parts(), tiny_run.SETTINGS, tmp_path, reporter=reporter)
        # A rollout that was not used yet is thrown away; an update that began is finished.
        done = step - 1 if phase == "rollout" else step
        assert not outcome.finished
        assert int(outcome.state.step) == done
        name = {signal.SIGTERM: "SIGTERM", signal.SIGINT: "Ctrl-C"}[number]
        saved = f"everything up to step {done} of 6 is saved in {tmp_path / 'checkpoints' / str(done)}"
        kept = saved if done else "no step was finished yet"
        assert outcome.message == f"Stopped by {name}: {kept}. Run the same command again to go on."
        assert reporter.said[-1] == outcome.message
    outcome = train(tiny_run.make_parts(), tiny_run.SETTINGS, tmp_path)
    assert outcome.finished
    assert state_hash(outcome.state) == expected
    assert contents(tmp_path) == contents(folder)
    again = train(tiny_run.make_parts(), tiny_run.SETTINGS, tmp_path)
    assert again.finished
    assert state_hash(again.state) == expected
    assert contents(tmp_path) == contents(folder)


def test_ctrl_c_twice_interrupts_at_once(tiny_run, tmp_path):
    class Twice(Interrupting):
        def phase(self, name: str) -> None:
            super().phase(name)
            super().phase(name)

    with pytest.raises(KeyboardInterrupt):
        train(tiny_run.make_parts(), tiny_run.SETTINGS, tmp_path, reporter=Twice(2, "update", signal.SIGINT))
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_kill_9_at_random_moments_and_the_same_command_give_the_same_run(tmp_path, uninterrupted):
    """In processes of their own; one of the moments may fall into start-up, before anything was saved."""
    folder, expected = uninterrupted
    command = [sys.executable, str(Path(__file__).with_name("tiny_run.py")), str(tmp_path)]
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    progress = tmp_path / "metrics.jsonl"
    for lines in sorted(random.sample([1, 2, 3, 4], 3)):
        victim = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL)
        while victim.poll() is None and not (progress.exists() and progress.read_bytes().count(b"\n") >= lines):
            time.sleep(0.002)
        time.sleep(random.random() * 0.15)
        victim.kill()
        assert victim.wait() == -signal.SIGKILL, "it was done before it could be killed"
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.split()[-1] == expected
    assert contents(tmp_path) == contents(folder)


def test_changed_settings_are_refused_unless_allowed(tiny_run, tmp_path):
    settings = dataclasses.replace(tiny_run.SETTINGS, steps=2)
    train(tiny_run.make_parts(), settings, tmp_path)
    longer = dataclasses.replace(settings, steps=3, optimizer=OptimizerSettings(learning_rate=0.1))
    with pytest.raises(ChangedSettingsError) as error:
        train(tiny_run.make_parts("grpo"), longer, tmp_path)
    assert "train.steps: 2 -> 3" in str(error.value)
    assert "train.optimizer.learning_rate: 0.003 -> 0.1" in str(error.value)
    assert "recipe.name: 'dapo' -> 'grpo'" in str(error.value)
    with pytest.raises(StorageError, match="already holds a run"):
        train(tiny_run.make_parts(), settings, tmp_path, resume=False)
    before = (tmp_path / "metrics.jsonl").read_bytes()
    outcome = train(tiny_run.make_parts(), longer, tmp_path, allow_changed_settings=True)
    assert int(outcome.state.step) == 3
    assert (tmp_path / "metrics.jsonl").read_bytes().startswith(before)


def test_other_frozen_weights_are_refused(tiny_run, tmp_path):
    settings = dataclasses.replace(tiny_run.SETTINGS, steps=1)
    train(tiny_run.make_parts(choice=trainable.top_layers(1), layers=2), settings, tmp_path)
    parts = tiny_run.make_parts(choice=trainable.top_layers(1), layers=2)
    other = dataclasses.replace(parts, model=parts.model.astype(param_dtype=jax.numpy.bfloat16))
    with pytest.raises(TrainingError):
        train(other, dataclasses.replace(settings), tmp_path)
    parts.model.embedding[...] = parts.model.embedding[...].at[0, 0].add(1.0)
    with pytest.raises(TrainingError, match="parameters that are not trained differ"):
        train(parts, settings, tmp_path)


def test_updates_that_are_never_finite_stop_the_run_and_name_the_last_good_checkpoint(tiny_run, tmp_path):
    settings = dataclasses.replace(tiny_run.SETTINGS, steps=2, checkpoint_every=1)
    train(tiny_run.make_parts(), settings, tmp_path)
    wild = dataclasses.replace(
        settings,
        steps=20,
        optimizer=OptimizerSettings(learning_rate=1e30),
        update=UpdateSettings(minibatches=4, stop_after_skipped=3),
    )
    with pytest.raises(
        NonFiniteError, match=r"in 3 updates in a row, the last of them in step [3-5]; the last good check"
    ):
        train(tiny_run.make_parts(), wild, tmp_path, allow_changed_settings=True)


def test_a_curriculum_moves_up_and_goes_on_where_it_was(tiny_run, tmp_path):
    class Easy(tiny_run.SayTheDigit):
        def score(self, problem: Problem, text: str) -> Score:
            return Score(reward=float(len(text) % 2), lenient=True, strict=True)

    curriculum = Curriculum((Easy(), tiny_run.SayTheDigit()), promote_at=0.9, window=100)
    settings = dataclasses.replace(tiny_run.SETTINGS, steps=2, checkpoint_every=1)
    train(tiny_run.make_parts(task=curriculum), settings, tmp_path)
    longer = dataclasses.replace(settings, steps=3)
    train(tiny_run.make_parts(task=curriculum), longer, tmp_path, allow_changed_settings=True)
    assert not unexplained(tmp_path)
    assert [row["curriculum/level"] for row in read(tmp_path)] == [0, 1, 1]


def test_replaced_generator_keys_are_in_the_checkpoint(tiny_run, tmp_path):
    class Slow(tiny_run.SayTheDigit):
        def train(self, seed: int, step: int, count: int) -> list[Problem]:
            problems = super().train(seed, step, count)
            late = Problem("1>", "1", "1", metadata={"key": 5, "replaced_keys": (3, 4)})
            return [late, *problems[1:]] if step == 1 else problems

    settings = dataclasses.replace(tiny_run.SETTINGS, steps=3, checkpoint_every=3)
    outcome = train(tiny_run.make_parts(task=Slow()), settings, tmp_path)
    assert outcome.checkpoint is not None
    progress = json.loads((outcome.checkpoint / "progress" / "metadata").read_text())
    expected = [{"step": 2, "index": 0, "key": key, "replaced_by": 5} for key in (3, 4)]
    assert progress["cursor"]["replaced"] == expected


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"prompt_length": 1}, r"prompt_length is 1, which does not do: texts\[0\] has 2 tokens"),
        ({"reward_high": 0.01}, r"gave '.*' for '.>' the reward 0\.\d+; it must lie in \[0\.0, 0\.01\]"),
    ],
)
def test_what_does_not_fit_is_said_in_a_sentence(tiny_run, tmp_path, changes, sentence):
    settings = dataclasses.replace(tiny_run.SETTINGS, steps=1, **changes)
    with pytest.raises((ValueError, TrainingError), match=sentence):
        train(tiny_run.make_parts(), settings, tmp_path)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"steps": 0}, "steps is 0; it must be at least 1"),
        ({"prompts": 2}, "update.minibatches is 4, but a batch has 2 prompts"),
        ({"reward_low": 2.0}, "reward_low is 2.0; it must be below reward_high, 1.0"),
    ],
)
def test_impossible_settings_are_refused(tiny_run, changes, sentence):
    with pytest.raises(ValueError, match=sentence):
        dataclasses.replace(tiny_run.SETTINGS, **changes)


def test_a_recipe_without_advantages_of_its_own_is_refused(tiny_run, tmp_path):
    given = dataclasses.replace(get_recipe("dapo"), advantage="given")
    with pytest.raises(ValueError, match="'dapo' takes advantages as given; pass a signal"):
        train(tiny_run.make_parts(given), tiny_run.SETTINGS, tmp_path)


def test_a_model_that_can_sample_ids_without_a_text_is_refused_before_anything_is_computed(tiny_run, tmp_path):
    padded = nnx.eval_shape(lambda: Transformer(tiny(vocab_size=320, num_layers=1), rngs=nnx.Rngs(0)))
    with pytest.raises(ValueError, match=r"Take them away: crop_vocabulary\(model, 259\)"):
        train(tiny_run.make_parts(model=padded), tiny_run.SETTINGS, tmp_path)
    assert not any(tmp_path.iterdir())
