"""What a world of texts is: one episode after the other in Python, beside the policy instead of compiled with it."""

from typing import NamedTuple
from typing import Protocol


class Reply(NamedTuple):
    """What a text world answers to one action.

    Attributes:
        text: what is shown next; of an action that could not be taken, the world's own words about it.
        reward: of this step.
        done: whether the episode is over.
        valid: whether the action was one that the world knows and could take.
        admissible: actions that can be taken next, all of them where there is no free text; empty where the world lists
            none, or is done.
    """

    text: str
    reward: float
    done: bool
    valid: bool
    admissible: tuple[str, ...] = ()


class TextEpisode(Protocol):
    """An episode in progress."""

    @property
    def prompt(self) -> str:
        """The task and the first observation."""
        ...

    @property
    def admissible(self) -> tuple[str, ...]:
        """The actions that can be taken first; empty where the world lists none."""
        ...

    def step(self, action: str) -> Reply:
        """Take an action; any text may come, as a model wrote it.

        One that cannot be taken is answered with `valid` False and a reward of 0, and what follows is as if it had not
        been said. After the end every one is answered so, with `done` True.
        """
        ...

    def expert(self) -> str | None:
        """An action that leads to the end by a shortest way, or a planner's; None where nobody knows one, and after the
        end.
        """
        ...

    def close(self) -> None:
        """Let go of what the episode holds, also in the middle of it, and more than once."""
        ...


class TextWorld(Protocol):
    """Tasks of one kind; an episode depends on its seed and its actions alone."""

    @property
    def name(self) -> str:
        """Of the world with its settings and the version of its data: two worlds of one name are the same."""
        ...

    @property
    def tasks(self) -> int:
        """Tasks that there are: seeds are 0 .. tasks - 1."""
        ...

    @property
    def turns(self) -> int:
        """Actions after which an episode is cut off."""
        ...

    def reset(self, seed: int) -> TextEpisode:
        """Begin the task of that seed; several episodes may be in progress at once.

        Raises:
            ValueError: there is no such task.
        """
        ...
