"""Complete rollouts of a batch that failed, kept until the batch is asked for again."""

from collections.abc import Callable
from collections.abc import Sequence
from typing import Any
from typing import NamedTuple

import numpy as np

from jaxrl_llm.rollouts.engines.protocol import EngineError
from jaxrl_llm.rollouts.engines.protocol import EngineSettings
from jaxrl_llm.rollouts.engines.protocol import IncompleteRolloutsError
from jaxrl_llm.rollouts.engines.rows import Response
from jaxrl_llm.rollouts.engines.rows import request_seeds
from jaxrl_llm.typing import Int
from jaxrl_llm.typing import PRNGKey


class Job(NamedTuple):
    """One rollout to be sampled. Under the same weights, equal jobs have the same rollout."""

    prompt: tuple[int, ...]
    seed: int
    settings: EngineSettings


def jobs_of(
    prompts: Sequence[Sequence[int]],
    key: PRNGKey,
    step: int,
    prompt_index: Int[np.ndarray, " N"] | None,
    settings: EngineSettings,
) -> list[Job]:
    """The jobs of a batch, row = prompt * G + sample."""
    seeds = request_seeds(key, step, prompt_index, len(prompts), settings.group_size)
    return [Job(tuple(prompt), seed, settings) for prompt, row in zip(prompts, seeds, strict=True) for seed in row]


class KeptRollouts:
    """Samples batches, and keeps what is complete of one that failed.

    A batch that is returned leaves nothing behind. What was kept of a batch that is never asked for again stays until
    `clear`, which engines call when weights are pushed.
    """

    def __init__(self) -> None:
        self._complete: dict[Job, Response] = {}

    def clear(self) -> None:
        """Forget all."""
        self._complete.clear()

    def sampled(
        self,
        jobs: Sequence[Job],
        sample: Callable[[Job], Response],
        in_parallel: Callable[[Callable[[Job], None], Sequence[Job]], Any],
    ) -> list[Response]:
        """The response of every job; `sample` makes those that are not kept.

        Args:
            jobs: the batch.
            sample: one rollout, or EngineError.
            in_parallel: calls a function with every job; it may use threads.

        Raises:
            IncompleteRolloutsError: a job failed; those that had not begun by then are left out.
        """
        failures: list[EngineError] = []

        def fill(job: Job) -> None:
            if failures or job in self._complete:
                return
            try:
                self._complete[job] = sample(job)
            except EngineError as error:
                failures.append(error)

        in_parallel(fill, jobs)
        if failures:
            completed = sum(job in self._complete for job in jobs)
            raise IncompleteRolloutsError(completed, len(jobs), str(failures[0])) from failures[0]
        responses = [self._complete[job] for job in jobs]
        for job in jobs:
            self._complete.pop(job, None)  # None: a batch may have the same job twice
        return responses
