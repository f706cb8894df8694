"""TextWorldExpress (Jansen and Côté 2023) as text worlds: coin, twc, cookingworld and its other games.

It needs the extra `worlds` and Java. Its folds are the panels: what is trained on is its `train`, what is measured on
its `dev` or `test`, 1,000 tasks each, which differ in rooms, objects and recipes as its authors chose.
"""

import dataclasses
import importlib.metadata

from jaxrl_llm.environments.worlds.text import Reply
from jaxrl_llm.environments.worlds.textworld_express.experts import coin_action
from jaxrl_llm.environments.worlds.textworld_express.experts import coin_map
from jaxrl_llm.environments.worlds.textworld_express.experts import errands_path
from jaxrl_llm.environments.worlds.textworld_express.maps import closed_doors
from jaxrl_llm.environments.worlds.textworld_express.maps import room_of
from jaxrl_llm.environments.worlds.textworld_express.simulator import Simulator

GAMES = ("arithmetic", "coin", "cookingworld", "mapreader", "peckingorder", "simonsays", "twc")
"""Not its `sorting`: two episodes of one task of it disturb each other, and a group of samples is such episodes."""
FOLD_SEEDS = {"train": 0, "dev": 10_000, "test": 20_000}
"""The first seed of each fold."""
FOLD_TASKS = 1_000
UNKNOWN = "Unknown action: I'm not sure what you mean."
"""What TextWorldExpress says to an action that it does not know."""
OVER = "The game is over."


class TextWorldExpressEpisode:
    """A task being played; see `TextEpisode`."""

    def __init__(self, game: str, settings: str, fold: str, seed: int) -> None:
        self._task = (game, settings, fold, seed)
        self._simulator: Simulator | None = Simulator(game, settings)
        self._taken: list[str] = []
        self._seen: dict[str, set[str]] = {}  # directions of closed doors, when a room was last seen
        try:
            self._shown = self._simulator.begin(seed, fold)
            self._look()
            self.prompt = f"{self._simulator.task().strip()}\n{self._shown.text}"
        except BaseException:
            self._simulator.close()
            raise
        self.admissible = self._shown.admissible

    def _look(self) -> None:
        """Notes the closed doors in sight: nobody else moves one, so what was seen last still holds."""
        self._seen.pop(room_of(self._shown), None)  # so that what is noted last comes last
        self._seen[room_of(self._shown)] = closed_doors(self._shown)

    @property
    def _over(self) -> bool:
        return self._shown.won or self._shown.lost

    def step(self, action: str) -> Reply:
        """See `TextEpisode.step`; the reward is what the game's score rises by."""
        if self._over or self._simulator is None:
            return Reply(OVER, 0.0, done=True, valid=False)
        if action not in self._shown.admissible:
            # Not sent: control characters are nothing for the line that leads to Java.
            return Reply(UNKNOWN, 0.0, done=False, valid=False, admissible=self._shown.admissible)
        before = self._shown.score
        self._shown = self._simulator.step(action)
        self._taken.append(action)
        self._look()
        text, reward = self._shown.text or OVER, self._shown.score - before
        return Reply(text, reward, self._over, True, () if self._over else self._shown.admissible)

    def expert(self) -> str | None:
        """See `experts`: a shortest way for coin; elsewhere the next action of a path, while that is followed."""
        if self._over or self._simulator is None:
            return None
        game, settings, fold, seed = self._task
        if game == "coin":
            return self._coin_action(settings, fold, seed)
        path, taken = errands_path(game, settings, fold, seed), tuple(self._taken)
        if path is None or path[: len(taken)] != taken:
            return None
        return path[len(taken)]

    def _coin_action(self, settings: str, fold: str, seed: int) -> str | None:
        found = coin_map(settings, fold, seed)
        closed = found.closed
        for room, shut in self._seen.items():  # what was seen last decides, since a door has two sides
            for direction in found.exits[room]:
                sides = found.sides(room, direction)
                closed = closed | sides if direction in shut else closed - sides
        return coin_action(found, room_of(self._shown), closed)

    def close(self) -> None:
        """Hand the game back to those that can be used."""
        if self._simulator is not None:
            self._simulator.close()
            self._simulator = None


@dataclasses.dataclass(frozen=True)
class TextWorldExpress:
    """A game of TextWorldExpress as a `TextWorld`.

    Attributes:
        game: one of `GAMES`.
        settings: as TextWorldExpress takes them, "numLocations=3, includeDoors=0"; empty for its defaults.
        measured: the fold that is measured on, "dev" or "test".
        turns: actions after which an episode is cut off.

    Raises:
        ValueError: an unknown game, setting or fold, or no turns.
        ModuleNotFoundError: its package is missing.
        FileNotFoundError: Java is.
    """

    game: str = "coin"
    settings: str = ""
    measured: str = "dev"
    turns: int = 50

    def __post_init__(self) -> None:
        """Refuse what cannot be played, before anything is."""
        if self.game not in GAMES:
            raise ValueError(f"game is {self.game!r}; there are: {', '.join(GAMES)}.")
        if self.measured not in ("dev", "test"):
            raise ValueError(f"measured is {self.measured!r}; it must be 'dev' or 'test'.")
        if self.turns < 1:
            raise ValueError(f"turns is {self.turns}; it must be at least 1.")
        Simulator(self.game, self.settings).close()

    @property
    def name(self) -> str:
        """See `TextWorld.name`."""
        version = importlib.metadata.version("textworld-express")
        settings = "".join(self.settings.split())
        parts = [
            "textworldexpress",
            version,
            self.game,
            self.measured,
            str(self.turns),
            *([settings] if settings else []),
        ]
        return "-".join(parts)

    @property
    def tasks(self) -> int:
        """Those of the train fold, and after them those that are measured on."""
        return 2 * FOLD_TASKS

    def held_out(self, seed: int) -> bool:
        """Whether the task is of the fold that is measured on."""
        return seed >= FOLD_TASKS

    def reset(self, seed: int) -> TextWorldExpressEpisode:
        """See `TextWorld.reset`."""
        if not 0 <= seed < self.tasks:
            raise ValueError(f"seed is {seed}; the tasks of {self.name} are 0 .. {self.tasks - 1}.")
        fold = self.measured if self.held_out(seed) else "train"
        return TextWorldExpressEpisode(self.game, self.settings, fold, FOLD_SEEDS[fold] + seed % FOLD_TASKS)
