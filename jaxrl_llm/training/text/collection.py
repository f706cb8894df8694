"""Which collector a run has: one of yours, or answers to its task; replayed, kept or ahead as the settings say."""

from pathlib import Path
from typing import NamedTuple

from jaxrl_llm.environments import Curriculum
from jaxrl_llm.models.tokenizers import Tokenizer
from jaxrl_llm.models.vocabulary import require_texts
from jaxrl_llm.rollouts.collect import NOBODYS_LAW
from jaxrl_llm.rollouts.collect import AheadCollector
from jaxrl_llm.rollouts.collect import Collector
from jaxrl_llm.rollouts.collect import KeptCollector
from jaxrl_llm.rollouts.collect import Law
from jaxrl_llm.rollouts.collect import PolicySampler
from jaxrl_llm.rollouts.collect import ReplayCollector
from jaxrl_llm.rollouts.collect import Sampler
from jaxrl_llm.rollouts.collect import Store
from jaxrl_llm.rollouts.collect import TaskCollector
from jaxrl_llm.rollouts.collect import brought_by
from jaxrl_llm.rollouts.collect.samplers import pruned_with_policy
from jaxrl_llm.training.text.fitting import require_fitting
from jaxrl_llm.training.text.fitting import require_temperature
from jaxrl_llm.training.text.objective import get_objective
from jaxrl_llm.training.text.routers import require_replay
from jaxrl_llm.training.text.settings import Parts
from jaxrl_llm.training.text.settings import TrainSettings
from jaxrl_llm.training.text.settings import end_tokens
from jaxrl_llm.training.text.signals import choose_signal


class Collection(NamedTuple):
    """The collector of a run.

    Attributes:
        collector: brings the batches.
        law: what the trainer knows of the distribution that sampled them.
        kept: batches that were written down before they were learned; None where the sampler repeats itself.
        replayed: the collector that repeats batches, to be told which ones are not needed any more.
        ahead: the collector that samples ahead, to be closed.
    """

    collector: Collector
    law: Law
    kept: Store | None = None
    replayed: ReplayCollector | None = None
    ahead: AheadCollector | None = None

    def forget(self, step: int) -> None:
        """A checkpoint of step `step` is written: batches before it are not asked for again."""
        for holder in (self.kept, self.replayed):
            if holder is not None:
                holder.forget(step)

    def forget_all(self) -> None:
        """A run begins: batches of an earlier one in its folder are not its own."""
        self.forget(2**62)

    def close(self) -> None:
        """Stop sampling ahead."""
        if self.ahead is not None:
            self.ahead.close()


def make_collector(parts: Parts, settings: TrainSettings, folder: Path) -> Collection:
    """The collector of a run in that folder.

    Raises:
        ValueError: neither task nor collector, a collector without what objective or signal reads, a sampler that
            cannot do what is asked, or ids of the model that the tokenizer has no text for.
    """
    require_texts(parts.tokenizer, parts.model.config.vocab_size)
    require_replay(settings.update, parts.model.config)
    sampler: Sampler | None = None
    if parts.collector is not None:
        objective = get_objective(parts.objective, parts.recipe)
        signal = choose_signal(parts.signal, parts.recipe, objective)
        require_fitting(brought_by(parts.collector), objective, signal, settings)
        collector, law, repeatable = parts.collector, getattr(parts.collector, "law", NOBODYS_LAW), True
        require_temperature(parts.collector, settings)
        if settings.ahead:
            raise ValueError("ahead needs a sampler of its own; a collector of yours decides itself when it samples.")
    else:
        sampler = parts.sampler or _policy_sampler(parts, settings)
        collector, law, repeatable = _task_collector(parts, settings, sampler), sampler.law, sampler.repeatable
    kept = replayed = ahead = None
    if settings.ahead and sampler is not None and not sampler.own_device:
        raise ValueError(
            f"ahead is {settings.ahead}; the built-in sampler works on the devices that train, so there is nothing to "
            "gain. Use another engine (--engine), or ahead 0."
        )
    if not repeatable or settings.ahead:
        kept = Store(folder / "batches")
        collector = KeptCollector(collector, kept)
    if settings.ahead:
        collector = ahead = AheadCollector(collector, ahead=settings.ahead, last_step=settings.steps - 1)
        law = NOBODYS_LAW
    if settings.update.router_replay != "off" and not isinstance(collector, TaskCollector):
        raise ValueError(
            f'update.router_replay is "{settings.update.router_replay}", which needs what the built-in sampler records '
            'of a task\'s answers; leave out ahead, engines and collectors of your own, or set it to "off".'
        )
    if settings.replay > 1:
        if settings.update.router_replay != "off":
            raise ValueError("update.router_replay needs batches that are learned once; set replay to 1, or it to off.")
        store = Store(folder / "replay")
        collector = replayed = ReplayCollector(collector, store, size=settings.replay)
        law = NOBODYS_LAW
    return Collection(collector, law, kept, replayed, ahead)


def _end_ids(parts: Parts) -> tuple[int, ...]:
    task = parts.task.levels[0] if isinstance(parts.task, Curriculum) else parts.task
    assert task is not None
    return parts.end_ids or end_tokens(parts.tokenizer, task.stop)


def _policy_sampler(parts: Parts, settings: TrainSettings) -> PolicySampler:
    objective = get_objective(parts.objective, parts.recipe)
    sampling = pruned_with_policy(settings.sampling, objective.log_min_p, objective.name)
    tokenizer: Tokenizer = parts.tokenizer
    if parts.task is None:
        raise ValueError("parts have neither a task nor a collector; one of them must bring the experience.")
    return PolicySampler(
        parts.model,
        sampling,
        response_length=settings.response_length,
        group_size=settings.group_size,
        end_ids=_end_ids(parts),
        pad_id=tokenizer.pad_id,
        decode_dtype=parts.decode_dtype,
        perturbation=parts.perturbation,
        mesh=parts.mesh,
        record_selections=settings.update.router_replay != "off",
    )


def _task_collector(parts: Parts, settings: TrainSettings, sampler: Sampler) -> TaskCollector:
    if parts.task is None:
        raise ValueError("parts have neither a task nor a collector; one of them must bring the experience.")
    return TaskCollector(
        parts.task,
        parts.tokenizer,
        sampler,
        seed=settings.seed,
        prompts=settings.prompts,
        group_size=settings.group_size,
        prompt_length=settings.prompt_length,
        response_length=settings.response_length,
        end_ids=_end_ids(parts),
        reward_range=(settings.reward_low, settings.reward_high),
        samples=settings.samples,
    )
