"""What collectors of a world's episodes share: which tasks a batch has, and how episodes are written down."""

from typing import Any

import numpy as np

from jaxrl_llm.environments import stable_key
from jaxrl_llm.environments.worlds import ArrayWorld
from jaxrl_llm.environments.worlds import Panel
from jaxrl_llm.environments.worlds import TextWorld
from jaxrl_llm.models.tokenizers import Tokenizer
from jaxrl_llm.rollouts.collect.protocol import BatchShape
from jaxrl_llm.trajectory import Trajectories
from jaxrl_llm.typing import Bool
from jaxrl_llm.typing import Int


class PanelTasks:
    """Batches of tasks of a panel, `group_size` episodes of each."""

    def __init__(
        self,
        world: ArrayWorld | TextWorld,
        panel: Panel,
        tokenizer: Tokenizer,
        *,
        seed: int,
        shape: BatchShape,
        samples: int,
    ) -> None:
        """Args:
            world, panel, tokenizer: of the episodes.
            seed: of the tasks.
            shape: of every batch.
            samples: tasks of each batch whose first episode is written down.

        Raises:
            ValueError: the panel is of another world, or empty.
        """
        if panel.world != world.name:
            raise ValueError(f"the panel is of {panel.world}; the world is {world.name}.")
        if not len(panel.seeds):
            raise ValueError(f"the panel of {world.name} has no tasks; it must have one.")
        self.panel = panel
        self._tokenizer, self._seed, self._shape, self._samples = tokenizer, seed, shape, samples

    @property
    def shape(self) -> BatchShape:
        """See `Collector.shape`."""
        return self._shape

    def tasks(self, step: int) -> Int[np.ndarray, " N"]:
        """The tasks of the batch of that step: drawn from the panel by hash, the same for every arm of a comparison."""
        drawn = [stable_key(self._seed, step, index) % len(self.panel.seeds) for index in range(self._shape.groups)]
        return self.panel.seeds[np.array(drawn)]

    def texts(self, rows: Trajectories, mask: Bool[np.ndarray, "B T"]) -> tuple[str, ...]:
        """What stands at these places of each row, decoded."""
        tokens = np.asarray(rows.tokens)
        return tuple(self._tokenizer.decode(row[real].tolist()) for row, real in zip(tokens, mask, strict=True))

    def written(self, seeds: np.ndarray, rows: Trajectories) -> tuple[dict[str, Any], ...]:
        """The first episode of each of the first tasks."""
        firsts = np.arange(min(self._samples, self._shape.groups)) * self._shape.group_size
        real, chosen = np.asarray(rows.token_mask), np.asarray(rows.action_mask)
        asked = np.cumsum(chosen, axis=1) == 0
        prompts, others = self.texts(rows, real & asked), self.texts(rows, real & ~asked)
        earned = np.asarray(rows.returns)
        return tuple(
            {
                "prompt": prompts[row],
                "answer": f"task {seeds[row // self._shape.group_size]}",
                "text": others[row],
                "reward": float(earned[row]),
            }
            for row in firsts
        )
