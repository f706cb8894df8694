"""The training loop: collect, signal, update, compare, write down, save; it stops after a number of steps.

`_Run.step` is the page to read first: what it calls is the way of the data (docs/training.md).
"""

import contextlib
import dataclasses
from collections.abc import Callable
from collections.abc import Mapping
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx

from jaxrl_llm.rollouts.collect import CollectError
from jaxrl_llm.rollouts.collect import Experience
from jaxrl_llm.rollouts.collect import check_experience
from jaxrl_llm.rollouts.engines import EngineError
from jaxrl_llm.training.run.checkpoints import Checkpoints
from jaxrl_llm.training.run.checkpoints import Progress
from jaxrl_llm.training.run.checkpoints import flatten_settings
from jaxrl_llm.training.run.checkpoints import refuse_changed_settings
from jaxrl_llm.training.run.checkpoints import settings_difference
from jaxrl_llm.training.run.errors import NonFiniteError
from jaxrl_llm.training.run.errors import StorageError
from jaxrl_llm.training.run.errors import TrainingError
from jaxrl_llm.training.run.interrupts import StopRequests
from jaxrl_llm.training.run.lock import only_process
from jaxrl_llm.training.run.reporting import Quiet
from jaxrl_llm.training.run.reporting import Reporter
from jaxrl_llm.training.run.standing import find_standing
from jaxrl_llm.training.run.standing import write_newest
from jaxrl_llm.training.run.state import TrainState
from jaxrl_llm.training.run.state import state_hash
from jaxrl_llm.training.text.collection import make_collector
from jaxrl_llm.training.text.finite import finite_arrays
from jaxrl_llm.training.text.finite import finite_at
from jaxrl_llm.training.text.measuring import bound_metrics
from jaxrl_llm.training.text.measuring import step_metrics
from jaxrl_llm.training.text.policy import describe_model
from jaxrl_llm.training.text.record import FILES
from jaxrl_llm.training.text.record import OpenWriters
from jaxrl_llm.training.text.record import Record
from jaxrl_llm.training.text.settings import Parts
from jaxrl_llm.training.text.settings import TrainSettings
from jaxrl_llm.training.text.trainer import Prepared
from jaxrl_llm.training.text.trainer import Trainer
from jaxrl_llm.typing import SumCount

Evaluate = Callable[[int, nnx.State], Mapping[str, float]]
"""(finished steps, all parameters of the policy) -> what was measured."""


@dataclasses.dataclass(frozen=True)
class Outcome:
    """How a run ended.

    Attributes:
        state: the policy and the optimiser as they are now.
        model_state: all parameters as one state, for `nnx.merge(graphdef, model_state)`.
        finished: whether all steps were taken.
        message: one sentence for a person.
        checkpoint: the newest checkpoint; None if there is none.
    """

    state: TrainState
    model_state: nnx.State
    finished: bool
    message: str
    checkpoint: Path | None


def train(
    parts: Parts,
    settings: TrainSettings,
    folder: Path,
    *,
    evaluate: Evaluate | None = None,
    reporter: Reporter | None = None,
    open_writers: OpenWriters | None = None,
    description: Mapping[str, Any] | None = None,
    resume: bool = True,
    allow_changed_settings: bool = False,
    how_to_resume: str = "Run the same command again to go on.",
) -> Outcome:
    """Train a policy, or go on with a run that was interrupted: the result is the same, bit for bit.

    Args:
        parts: model, task, objective.
        settings: the numbers.
        folder: where the files of the run go: metrics.jsonl, samples.jsonl, timings.jsonl and checkpoints/.
        evaluate: called before the first step, every `settings.evaluate_every` steps and after the last one.
        reporter: told what happens.
        open_writers: given the number of steps already done, opens further places for the metrics (TensorBoard).
        description: more settings to save and compare on resuming: names of model and task, for example.
        resume: go on from the newest checkpoint in `folder`. False refuses a folder that holds a run.
        allow_changed_settings: go on even if settings differ from those the run was started with.
        how_to_resume: sentence that ends the message of an interrupted run.

    Raises:
        StorageError: a file or folder cannot be written, already holds a run, is in use by another process, or has
            finished steps and no sound checkpoint of them.
        ChangedSettingsError: the settings differ from those of the run in `folder`.
        NonFiniteError: too many updates in a row were not finite; names the last good checkpoint.
        TrainingError, ValueError: the parts or settings do not fit each other.
        KeyboardInterrupt: Ctrl-C was pressed twice. Once lets the step end, saves, and returns.
    """
    run = _Run(parts, settings, Path(folder), evaluate, reporter or Quiet(), how_to_resume)
    objective = {"objective": run.trainer.objective.name, "signal": run.trainer.signal.name}
    saved = flatten_settings({"train": settings, "recipe": parts.recipe, **objective, **(description or {})})
    with only_process(run.folder), run.trainer.devices(), StopRequests() as stop:
        try:
            run.open(saved, open_writers, resume=resume, allow_changed_settings=allow_changed_settings)
            outcome = run.go(stop)
        except BaseException:
            # What fails while things are closed must not take the place of what stopped the run.
            with contextlib.suppress(Exception):
                run.close()
            raise
        run.close()
        return outcome


class _Run:
    """A run in progress: its state, its files, and where it is."""

    def __init__(
        self,
        parts: Parts,
        settings: TrainSettings,
        folder: Path,
        evaluate: Evaluate | None,
        reporter: Reporter,
        how_to_resume: str,
    ) -> None:
        self.settings, self.folder, self.evaluate, self.reporter = settings, folder, evaluate, reporter
        self.how_to_resume = how_to_resume
        self.collection = make_collector(parts, settings, folder)
        self.collector = self.collection.collector
        self.trainer = Trainer(parts, settings, self.collector.shape, self.collection.law)
        self.vocab_size, self.model = parts.model.config.vocab_size, describe_model(parts.model, parts.trainable)
        self.record = Record(folder, parts.tokenizer, self.vocab_size, reporter)
        self.clock = self.record.clock
        self.checkpoints: Checkpoints | None = None
        self.progress = Progress(step=0, settings={}, frozen_hash="", file_bytes=dict.fromkeys(FILES, 0))
        self.sound: Callable[[], bool] = lambda: True

    # Start, save, stop

    def open(
        self,
        settings: dict[str, Any],
        open_writers: OpenWriters | None,
        *,
        resume: bool,
        allow_changed_settings: bool,
    ) -> None:
        """Find where the run stands, and open its files there."""
        self.checkpoints = Checkpoints(self.folder / "checkpoints", keep=self.settings.keep_checkpoints)
        if not resume and (self.checkpoints.latest() or any((self.folder / name).exists() for name in FILES)):
            raise StorageError(f"{self.folder} already holds a run; resume it or choose another folder.")
        self.state = self.trainer.initial_state()
        self.checkpoints.require_space(self.state)
        frozen_hash = state_hash(self.trainer.identity())
        restored = find_standing(
            self.folder,
            self.checkpoints,
            self.state,
            names=FILES,
            checkpoint_every=self.settings.checkpoint_every,
            say=self.reporter.say,
        )
        if restored is not None:
            self.state, self.progress = restored
            if not allow_changed_settings:
                refuse_changed_settings(self.progress.settings, settings)
            if self.progress.frozen_hash != frozen_hash:
                raise TrainingError(
                    f"The parameters that are not trained differ from those of the run in {self.folder}; "
                    "load the same weights, or start a new run."
                )
            changes = settings_difference(self.progress.model, self.model) if self.progress.model else []
            if changes and not allow_changed_settings:
                raise TrainingError(
                    f"The run in {self.folder} trained another model, with arrays of the same shapes: "
                    f"{'; '.join(changes)}. Load the same model, or start a new run."
                )
            self.reporter.say(f"Going on after step {self.progress.step} of {self.settings.steps}.")
        else:
            self.collection.forget_all()
        if self.trainer.stale:
            self.reporter.say(self.trainer.stale)
        self.progress = dataclasses.replace(self.progress, settings=settings, frozen_hash=frozen_hash, model=self.model)
        self.record.open(self.progress, open_writers)

    def close(self) -> None:
        """Let go of every file and thread."""
        self.collection.close()
        self.record.close()
        if self.checkpoints is not None:
            self.checkpoints.close()

    def save(self) -> Path | None:
        """Write a checkpoint of the last finished step, and everything that belongs to it.

        Raises:
            NonFiniteError: the policy is not finite; the checkpoint before stays the newest.
        """
        assert self.checkpoints is not None
        if not self.progress.step:
            return None
        broken = "" if finite_arrays(self.state) else "parameters"
        broken = broken or ("" if self.sound() else "log-probs that the policy gives")
        if broken:
            raise NonFiniteError(
                f"The {broken} after step {self.progress.step} are not finite; {self.last_good_checkpoint()}. A "
                "smaller learning rate may help."
            )
        lengths, hashes = self.record.flush()
        updates = int(self.state.updates)
        self.progress = dataclasses.replace(self.progress, file_bytes=lengths, file_sha256=hashes, updates=updates)
        path = self.checkpoints.save(self.state, self.progress)
        write_newest(self.folder, self.progress.step)
        # A run may have to go on from an older checkpoint, if the newest is damaged.
        self.collection.forget(self.progress.step - self.settings.keep_checkpoints * self.settings.checkpoint_every)
        return path

    def go(self, stop: StopRequests) -> Outcome:
        """Take the steps that are left, or as many as it takes until somebody asks to stop."""
        done, steps = self.progress.step, self.settings.steps
        self.reporter.begin(first_step=done, steps=steps)
        if not done:
            self.clock.start()
            self.record.write(0, self.evaluation(0))
        for index in range(done, steps):
            if stop.requested or not self.guarded_step(index, stop):
                return self.interrupted(stop)
            if index + 1 == steps or (index + 1) % self.settings.checkpoint_every == 0:
                self.save()
        return self.outcome(finished=True, message=f"Finished all {steps} steps.")

    def interrupted(self, stop: StopRequests) -> Outcome:
        """Save the last finished step and say how to go on."""
        path, step = self.save(), self.progress.step
        kept = f"everything up to step {step} of {self.settings.steps} is saved in {path}"
        message = f"Stopped by {stop.requested}: {kept if path else 'no step was finished yet'}. {self.how_to_resume}"
        self.reporter.say(message)
        return self.outcome(finished=False, message=message)

    def outcome(self, *, finished: bool, message: str) -> Outcome:
        """How the run ended."""
        assert self.checkpoints is not None
        latest, model_state = self.checkpoints.latest(), self.trainer.model_state(self.state)
        return Outcome(self.state, model_state, finished, message, latest)

    # One step

    def step(self, index: int, stop: StopRequests) -> bool:
        """Take one step; False if somebody asked to stop before anything was changed."""
        self.clock.start()
        with self.clock.phase("rollout"):
            policy = self.trainer.snapshot(self.state)
            experience = self.collector.collect(policy, self.state.key, index, self.progress.cursor)
            name = type(self.collector).__name__
            check_experience(experience, self.collector.shape, vocab_size=self.vocab_size, name=name)
        if stop.requested:
            return False
        with self.clock.phase("score"):
            prepared = self.trainer.prepare(self.state, index, experience)
        self.warn_of_dropped(index, prepared)
        rate = self.trainer.learning_rate(self.state)
        with self.clock.phase("update"):
            streak = int(self.state.skipped_in_a_row)
            self.state, updates = self.trainer.improve(self.state, prepared)
        metrics = step_metrics(experience, prepared, updates, policy.version) | {"actor/lr": rate}
        metrics |= self.compared(index, experience, prepared)
        self.progress = dataclasses.replace(self.progress, step=index + 1, cursor=dict(experience.cursor))
        self.record.write_samples(index + 1, experience)
        tokens = int(np.sum(experience.trajectories.token_mask))
        self.record.write(index + 1, metrics | self.evaluation(index + 1), tokens=tokens)
        self.stop_if_broken(streak, updates)
        return True

    def guarded_step(self, index: int, stop: StopRequests) -> bool:
        """A step; where it fails before the policy was changed, what is finished is saved first.

        Raises:
            TrainingError: what went wrong, what is saved and how to go on.
            ValueError, TypeError: in the first step of a run: the parts do not fit each other.
        """
        done = self.progress.step
        try:
            return self.step(index, stop)
        except (StorageError, NonFiniteError, MemoryError, jax.errors.JaxRuntimeError):
            raise
        except Exception as error:
            sentence = isinstance(error, CollectError | EngineError | TrainingError | ValueError)
            if self.changed_since(done) or (not done and isinstance(error, ValueError | TypeError)):
                raise
            said = str(error) if sentence else f"Step {index + 1} failed, {type(error).__name__}: {error}."
            path = self.save()
            kept = f" Everything up to step {done} is saved in {path}. {self.how_to_resume}" if path else ""
            raise TrainingError(f"{said}{kept}") from error

    def changed_since(self, done: int) -> bool:
        """Whether the policy is another one than after `done` steps, or its buffers were taken over."""
        taken = any(leaf.is_deleted() for leaf in jax.tree.leaves(self.state))
        return taken or int(np.asarray(self.state.step)) != done

    def compared(self, index: int, experience: Experience, prepared: Prepared) -> dict[str, float]:
        """The policy after the update against the one that sampled, and the bounds, where they are due."""
        every, episodes = self.settings.update.bounds_every, self.settings.episodes_every
        shown = episodes and not (index + 1) % episodes
        if not (shown or (every and index % every == 0)):
            self.sound = partial(self.trainer.scores_finite, self.state, prepared)
            return {}
        with self.clock.phase("bounds"):
            shift = self.trainer.compare(self.state, prepared)
            # Whole policies are compared: what one of them prunes has a finite log-prob here.
            self.sound = partial(finite_at, prepared.counted, shift.kl, shift.kl_reverse, shift.total_variation)
            if shown:
                self.record.write_episodes(index + 1, experience, prepared, shift)
            if not (every and index % every == 0):
                return {}
            reward_range = (self.settings.reward_low, self.settings.reward_high)
            return bound_metrics(shift, prepared, reward_range=reward_range, sampled_by_mu=self.trainer.law.known)

    def warn_of_dropped(self, index: int, prepared: Prepared) -> None:
        """Say which rollouts were dropped because they are not finite.

        Raises:
            NonFiniteError: all of them were, so that the step has nothing to learn from or to measure.
        """
        finite = prepared.finite
        if not finite.dropped:
            return
        self.reporter.say(finite.sentence(index + 1))
        if not finite.rows.any():
            raise NonFiniteError(f"{finite.sentence(index + 1)} None is left; {self.last_good_checkpoint()}.")

    def last_good_checkpoint(self) -> str:
        """Where to go back to, in words."""
        assert self.checkpoints is not None
        return self.checkpoints.last_good(int(self.state.updates))

    def evaluation(self, step: int) -> dict[str, float]:
        """What `evaluate` measures of the policy after `step` steps; nothing where none is due."""
        every, last = self.settings.evaluate_every, self.settings.steps
        if self.evaluate is None or not (step in (0, last) or (every and step % every == 0)):
            return {}
        with self.clock.phase("evaluate"):
            return dict(self.evaluate(step, self.trainer.model_state(self.state)))

    def stop_if_broken(self, streak: int, updates: Sequence[dict[str, SumCount]]) -> None:
        """Raise after too many updates in a row that were not finite; `streak` counts those before this step."""
        limit = self.settings.update.stop_after_skipped
        for values in updates:
            streak = streak + 1 if values["skipped"][0] else 0
            if streak >= limit:
                raise NonFiniteError(
                    f"The loss or its gradient was not finite in {limit} updates in a row, the last of them in step "
                    f"{self.progress.step}; {self.last_good_checkpoint()}. A smaller learning rate or max_grad_norm "
                    "may help."
                )
