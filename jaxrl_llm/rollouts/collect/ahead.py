"""Sampling of later batches while an earlier one is learned, in a thread, by a sampler that has a device of its own."""

import time
from collections import deque
from collections.abc import Mapping
from concurrent.futures import Future
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp

from jaxrl_llm.rollouts.collect.protocol import BatchShape
from jaxrl_llm.rollouts.collect.protocol import Brings
from jaxrl_llm.rollouts.collect.protocol import Collector
from jaxrl_llm.rollouts.collect.protocol import Experience
from jaxrl_llm.rollouts.collect.protocol import PolicySnapshot
from jaxrl_llm.rollouts.collect.protocol import brought_by
from jaxrl_llm.typing import PRNGKey


class AheadCollector:
    """Hands out batch n and has the batches n + 1 .. n + ahead sampled meanwhile, by the policies there are when their
    turn comes: a batch is up to `ahead` steps of learning old, and each of its tokens says which version sampled it.

    Cursors follow each other as they do without it: batch n + 1 begins where batch n said.
    """

    def __init__(self, collector: Collector, *, ahead: int, last_step: int) -> None:
        """No thread runs yet.

        Args:
            collector: is called from one thread at a time.
            ahead: batches sampled before they are asked for.
            last_step: number of the last batch that will be asked for.
        """
        self._collector, self._ahead, self._last = collector, ahead, last_step
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="sampling-ahead")
        self._batches: deque[tuple[int, Future[tuple[Experience, float]]]] = deque()

    @property
    def shape(self) -> BatchShape:
        """See `Collector.shape`."""
        return self._collector.shape

    @property
    def brings(self) -> Brings:
        """What the collector brings."""
        return brought_by(self._collector)

    def collect(self, policy: PolicySnapshot, key: PRNGKey, step: int, cursor: Mapping[str, Any]) -> Experience:
        """See `Collector.collect`; adds `perf/ahead_saved`, the share of the sampling time that nobody waited for."""
        if self._batches and self._batches[0][0] != step:
            self._forget()
        copied = None
        while len(self._batches) <= self._ahead:
            following = self._batches[-1][0] + 1 if self._batches else step
            if following > self._last:
                break
            if copied is None:
                # Learning takes the buffers of the policy, and of the key beside it, over while the thread reads them.
                state, key = jax.block_until_ready(jax.tree.map(jnp.copy, (policy.state, key)))
                copied = PolicySnapshot(policy.graphdef, state, policy.version)
            before = self._batches[-1][1] if self._batches else None
            self._batches.append((following, self._thread.submit(self._sample, copied, key, following, before, cursor)))
        waiting = time.perf_counter()
        _, batch = self._batches.popleft()
        experience, seconds = batch.result()
        waited = time.perf_counter() - waiting
        saved = max(0.0, 1 - waited / seconds) if seconds > 0 else 0.0
        return Experience(**{**vars(experience), "metrics": {**experience.metrics, "perf/ahead_saved": saved}})

    def _sample(
        self,
        policy: PolicySnapshot,
        key: PRNGKey,
        step: int,
        before: "Future[tuple[Experience, float]] | None",
        cursor: Mapping[str, Any],
    ) -> tuple[Experience, float]:
        # There is one thread, so the batch before is done, or failed and is raised here again.
        cursor = cursor if before is None else before.result()[0].cursor
        started = time.perf_counter()
        return self._collector.collect(policy, key, step, cursor), time.perf_counter() - started

    def _forget(self) -> None:
        for _, batch in self._batches:
            batch.cancel()
        self._batches.clear()

    def close(self) -> None:
        """Wait for the batch that is being sampled, and drop those that were not begun."""
        self._forget()
        self._thread.shutdown(wait=True, cancel_futures=True)
