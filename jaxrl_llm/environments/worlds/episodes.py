"""A batch of text episodes that step together; one that hangs is dropped, and the others go on."""

from collections.abc import Sequence
from contextlib import ExitStack
from contextlib import suppress

import numpy as np

from jaxrl_llm.environments.time_limits import TimeLimitError
from jaxrl_llm.environments.time_limits import time_limit
from jaxrl_llm.environments.worlds.text import Reply
from jaxrl_llm.environments.worlds.text import TextEpisode
from jaxrl_llm.environments.worlds.text import TextWorld
from jaxrl_llm.typing import Bool

STEP_SECONDS = 30.0
"""What a beginning, a step or an expert may take by default [s]: several times what the slowest needs when all cores
are busy."""


class TextEpisodes:
    """Episodes of one world, a row each.

    The rows step one after the other in this thread: a world in Python would not be faster in several, and a policy's
    own turn takes longer. What takes too long is interrupted by `time_limit`, so a world that waits in C for another
    process, in a thread other than the main one, has to bring a limit of its own.

    Attributes:
        prompts: the task and first observation of each row; empty where it was dropped at once.
        admissible: the actions that each row can take next.
        done: rows whose episode has come to its end.
        dropped: rows whose world took too long; what they earned until then is no outcome of the task.

    Args:
        world: the world.
        seeds: the task of each row.
        seconds: a beginning, a step or an expert may take [s].
    """

    def __init__(self, world: TextWorld, seeds: Sequence[int], *, seconds: float = STEP_SECONDS) -> None:
        if len(seeds) < 1:
            raise ValueError("seeds is empty; there must be a task for each row.")
        if not seconds > 0:
            raise ValueError(f"seconds is {seconds}; it must be positive.")
        self._world, self._seconds = world, seconds
        self._episodes: list[TextEpisode | None] = [None] * len(seeds)
        self.prompts = [""] * len(seeds)
        self.admissible: list[tuple[str, ...]] = [()] * len(seeds)
        self.done: Bool[np.ndarray, " B"] = np.zeros(len(seeds), bool)
        self.dropped: Bool[np.ndarray, " B"] = np.zeros(len(seeds), bool)
        try:
            for row, seed in enumerate(seeds):
                self._begin(row, int(seed))
        except BaseException:
            self.close()
            raise

    def _begin(self, row: int, seed: int) -> None:
        try:
            with time_limit(self._seconds, what=f"the beginning of task {seed} of {self._world.name}"):
                episode = self._episodes[row] = self._world.reset(seed)
                self.prompts[row], self.admissible[row] = episode.prompt, episode.admissible
        except TimeLimitError:
            self._drop(row)

    def step(self, actions: Sequence[str | None]) -> list[Reply | None]:
        """Each row's action.

        Args:
            actions: of every row, None of one that does not act; those of rows that are over or dropped are not read.

        Returns:
            The replies; None of a row that does not act, was over or dropped before, or is dropped now.

        Raises:
            ValueError: not as many actions as rows.
        """
        if len(actions) != len(self._episodes):
            raise ValueError(f"there are {len(actions)} actions for {len(self._episodes)} episodes.")
        return [self._step(row, action) for row, action in enumerate(actions)]

    def _step(self, row: int, action: str | None) -> Reply | None:
        episode = self._episodes[row]
        if action is None or episode is None or self.done[row] or self.dropped[row]:
            return None
        try:
            with time_limit(self._seconds, what=f"a step of {self._world.name}"):
                reply = episode.step(action)
        except TimeLimitError:
            self._drop(row)
            return None
        self.done[row], self.admissible[row] = reply.done, reply.admissible
        return reply

    def _drop(self, row: int) -> None:
        self.dropped[row], self.admissible[row] = True, ()
        self._close(row)

    def _close(self, row: int) -> None:
        episode, self._episodes[row] = self._episodes[row], None
        if episode is not None:
            # What it came to is known by now: a world that hangs only here loses no row.
            with suppress(TimeLimitError), time_limit(self._seconds, what=f"the end in {self._world.name}"):
                episode.close()

    def expert(self) -> list[str | None]:
        """What the expert does next in each row; None where it knows nothing, or the row is over or dropped."""
        return [
            None if episode is None or self.done[row] or self.dropped[row] else self._expert(row, episode)
            for row, episode in enumerate(self._episodes)
        ]

    def _expert(self, row: int, episode: TextEpisode) -> str | None:
        try:
            with time_limit(self._seconds, what=f"the expert of {self._world.name}"):
                return episode.expert()
        except TimeLimitError:
            self._drop(row)
            return None

    def close(self) -> None:
        """Let go of every episode, also where one of them cannot be let go of."""
        with ExitStack() as stack:
            for row in range(len(self._episodes)):
                stack.callback(self._close, row)
