"""The last batches again: each step learns from the new one and those before it, under the policies that sampled them.

What such data is worth depends on the objective: its ratios must be to the policy that sampled (`denominator`,
corrections, V-trace), and each token says which version of the weights that was.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from jaxrl_llm.rollouts.collect.protocol import BatchShape
from jaxrl_llm.rollouts.collect.protocol import Brings
from jaxrl_llm.rollouts.collect.protocol import Collector
from jaxrl_llm.rollouts.collect.protocol import Experience
from jaxrl_llm.rollouts.collect.protocol import PolicySnapshot
from jaxrl_llm.rollouts.collect.protocol import brought_by
from jaxrl_llm.rollouts.collect.store import Store
from jaxrl_llm.typing import PRNGKey


class ReplayCollector:
    """The new batch and the `size - 1` before it, newest first; groups of different batches stay different.

    Batches are kept on disk, since a run that was stopped needs them again, until `forget` says up to where. While
    there are fewer than `size`, those that there are stand in for the missing ones, newest first, so that the shape
    stays: of two batches in three places the newer one counts twice.
    """

    def __init__(self, collector: Collector, store: Store, *, size: int) -> None:
        """Repeat the batches of `collector`, kept in `store`.

        Raises:
            ValueError: `size` is below 1.
        """
        if size < 1:
            raise ValueError(f"size is {size}; it must be at least 1.")
        self._collector, self._store, self._size = collector, store, size

    @property
    def shape(self) -> BatchShape:
        """That of the collector, with `size` times its rows."""
        shape = self._collector.shape
        return dataclasses.replace(shape, rows=shape.rows * self._size)

    @property
    def brings(self) -> Brings:
        """What the collector brings."""
        return brought_by(self._collector)

    def collect(self, policy: PolicySnapshot, key: PRNGKey, step: int, cursor: Mapping[str, Any]) -> Experience:
        """See `Collector.collect`; texts, samples, metrics and the cursor are those of the new batch, and `per_row` has
        the numbers of all rows.
        """
        new = self._collector.collect(policy, key, step, cursor)
        self._store.save(step, new)
        found = [self._store.load(earlier) for earlier in range(max(step - self._size + 1, 0), step)]
        batches = [new, *(batch for batch in reversed(found) if batch is not None)]
        batches = [batches[index % len(batches)] for index in range(self._size)]
        together = jax.tree.map(lambda *columns: np.concatenate(columns), *(batch.trajectories for batch in batches))
        # Numbered anew, since a collector may give any numbers.
        numbers = np.repeat(np.arange(self._size), self._collector.shape.rows)
        pairs = np.stack([numbers, np.asarray(together.group_ids)], axis=1)
        groups = np.unique(pairs, axis=0, return_inverse=True)[1].reshape(-1)
        together = dataclasses.replace(together, group_ids=groups.astype(np.int32))
        per_row = {name: np.concatenate([batch.per_row[name] for batch in batches]) for name in new.per_row}
        return dataclasses.replace(new, trajectories=together, per_row=per_row)

    def forget(self, step: int) -> None:
        """The batches before `step` are not asked for again: remove those that no later batch repeats."""
        self._store.forget(step - self._size + 1)
