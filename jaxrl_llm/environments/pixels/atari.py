"""Games of the Atari 2600 (Bellemare et al. 2013) as ale-py plays them in threads of its own, shown small and grey.

ale-py is under the GPL and comes with the extra `atari-gpl` only; this module can be imported without it. What is done
to a game's pictures is what Mnih et al. (2015) did: an action is held for `frame_skip` frames, the brighter of the last
two is taken at each place, made small, and shown with those of the steps before. `sticky` is of Machado et al. (2018).
"""

import dataclasses
import difflib
import importlib
import importlib.util
import math
from collections.abc import Callable
from collections.abc import Sequence
from typing import Any

import numpy as np

from jaxrl_llm.environments.pixels.protocol import HostAnswer

SCREEN = (210, 160)
"""Height and width of the pictures of `screenshots`: the screen of nearly every game."""


@dataclasses.dataclass(frozen=True)
class _Rules:
    """The arguments of `Atari` that change what happens to a policy."""

    game: str
    size: int
    stack: int
    frame_skip: int
    sticky: float
    noops: int
    episodic_life: bool
    clip_rewards: bool
    all_actions: bool
    max_frames: int


class Atari:
    """N games at once; see `HostGames`.

    An observation is uint8 [size, size, stack], the newest picture last; of those before the first one there is black.
    A game that has ended begins again in the next step, as `HostAnswer.real` says. Its score is in `HostAnswer.scores`
    then: the sum of the game's own rewards since its first picture, through all lives, whatever the policy is given.
    Where the game has the action FIRE, it is pressed for the first frame: some do not begin otherwise.

    With one seed and the same actions the same happens, with any number of threads. With neither `noops` nor `sticky`
    all N games are one. The last picture of a game is mostly the one before it once more: ale-py looks at the last two
    frames of a step, which a game that ends does not get to.
    """

    def __init__(
        self,
        game: str = "pong",
        count: int = 16,
        *,
        size: int = 84,
        stack: int = 4,
        frame_skip: int = 4,
        sticky: float = 0.0,
        noops: int = 30,
        episodic_life: bool = False,
        clip_rewards: bool = True,
        all_actions: bool = False,
        max_frames: int = 108_000,
        threads: int | None = None,
    ) -> None:
        """Load a game N times; each takes a tenth of a second, and so it does again at `reset`.

        Args:
            game: its name in ale-py: "pong", "ms_pacman".
            count: N, how many are played at once.
            size: side of the grey square that is shown [pixels].
            stack: how many pictures are shown, of this step and those before.
            frame_skip: how many frames an action is held.
            sticky: how probable it is in each frame that the action before stays [prob]; 0.25 in Machado et al.
            noops: a game begins after fewer frames than this without an action, a random number of them.
            episodic_life: a lost life is `terminated`, and the game goes on with the next step; false: games only.
            clip_rewards: a reward is its sign; false: the game's own.
            all_actions: all 18 of the joystick; false: those that the game has a use for.
            max_frames: after so many frames a game is cut off: `truncated`.
            threads: of ale-py, at most one per core; None: one per core.

        Raises:
            ModuleNotFoundError: ale-py, or gymnasium without which it has no games in parallel, is not installed.
            ValueError: there is no such game, or an argument is out of range.
        """
        _require_whole(count=(count, 1, 4096), size=(size, 1, SCREEN[1]), stack=(stack, 1, 64))
        _require_whole(frame_skip=(frame_skip, 1, 1000), noops=(noops, 0, 1000), max_frames=(max_frames, 1, 2**30))
        _require_whole(threads=(1 if threads is None else threads, 1, 4096))
        if not 0 <= sticky < 1:
            raise ValueError(f"sticky is {sticky}; it must be a probability below 1.")
        self._rules = _Rules(
            game, size, stack, frame_skip, float(sticky), noops, episodic_life, clip_rewards, all_actions, max_frames
        )
        self._count = count
        self._simulator: Any = _simulator(
            self._rules, count, threads or 0, img_height=size, img_width=size, stack_num=stack
        )
        self._actions = tuple(action.name for action in self._simulator.ale.get_action_set())
        self._over: np.ndarray | None = None  # until the first reset
        self._lives = np.zeros(count, np.int32)
        self._scores = np.zeros(count)

    @property
    def name(self) -> str:
        """The game with what its rules depend on."""
        rules = self._rules
        parts = [
            f"atari_{rules.game}_{rules.size}x{rules.size}x{rules.stack}",
            f"skip_{rules.frame_skip}_sticky_{rules.sticky}_noops_{rules.noops}_frames_{rules.max_frames}",
            "lives" if rules.episodic_life else "games",
            "signs" if rules.clip_rewards else "rewards",
            f"{'all' if rules.all_actions else 'minimal'}_{len(self.actions)}",
        ]
        return "_".join(parts)

    @property
    def actions(self) -> tuple[str, ...]:
        """ALE's names: NOOP, FIRE, UP and so on."""
        return self._actions

    @property
    def observation_shape(self) -> tuple[int, int, int]:
        """Height, width and pictures."""
        return (self._rules.size, self._rules.size, self._rules.stack)

    @property
    def count(self) -> int:
        """N, how many are played at once."""
        return self._count

    def reset(self, seed: int) -> np.ndarray:
        """Begin N new games.

        Args:
            seed: of all N; game i is the same for every N above i.

        Returns:
            What each shows, uint8 [N, size, size, stack].

        Raises:
            ValueError: `seed` is not a whole number from 0 on.
            RuntimeError: the games have been closed.
        """
        pictures, info = self._running().reset(seed=_seeds(seed, self._count))
        self._over = np.zeros(self._count, bool)
        self._lives, self._scores = info["lives"], np.zeros(self._count)
        return _channels_last(pictures)

    def step(self, actions: np.ndarray) -> HostAnswer:
        """Take an action in each game.

        Args:
            actions: [N], whole numbers below the number of `actions`.

        Returns:
            uint8 observations, float32 rewards, float64 scores.

        Raises:
            ValueError: an action is out of range, or there are not N.
            TypeError: they are not whole numbers.
            RuntimeError: the games have not been reset, or have been closed.
        """
        simulator, over = self._running(), self._over
        if over is None:
            raise RuntimeError("the games have not begun; call reset(seed) before step.")
        pictures, rewards, ended, cut, info = simulator.step(self._checked(actions))
        # ale-py's own episodic_life begins a new game after a life: here the game goes on. Not where a new game has
        # begun, as the one before may have won lives; nor at 0 lives, which some games show before they end.
        lost = ~over & (info["lives"] < self._lives) & (info["lives"] > 0) & self._rules.episodic_life
        self._over, self._lives = ended | cut, info["lives"]
        self._scores = np.where(over, 0.0, self._scores) + rewards
        return HostAnswer(
            observation=_channels_last(pictures),
            reward=(np.sign(rewards) if self._rules.clip_rewards else rewards).astype(np.float32),
            terminated=ended | lost,
            truncated=cut & ~lost,
            real=~over,
            scores=np.where(self._over, self._scores, np.nan),
        )

    def close(self) -> None:
        """Let go of the simulator and its threads."""
        self._simulator = None

    def _running(self) -> Any:
        if self._simulator is None:
            raise RuntimeError("the games have been closed; make new ones.")
        return self._simulator

    def _checked(self, actions: np.ndarray) -> np.ndarray:
        """The actions as ale-py takes them: it waits for ever after one that a game does not have."""
        actions = np.asarray(actions)
        if actions.dtype.kind not in "iu":
            raise TypeError(f"actions have dtype {actions.dtype}; they must be whole numbers, one for each game.")
        if actions.shape != (self._count,):
            raise ValueError(f"actions have shape {actions.shape}; it must be ({self._count},), one for each game.")
        wrong = (actions < 0) | (actions >= len(self._actions))
        if wrong.any():
            game = int(np.argmax(wrong))
            raise ValueError(
                f"actions[{game}] is {actions[game]}; {self._rules.game} has those from 0 to {len(self._actions) - 1}: "
                f"{', '.join(self._actions)}."
            )
        return actions.astype(np.int32)

    def screenshots(
        self, policy: Callable[[np.ndarray], np.ndarray], steps: Sequence[int], *, seed: int
    ) -> list[np.ndarray]:
        """Play one more game of the same rules, the first one that `reset(seed)` begins, and keep pictures in colour.

        Two simulators play it side by side, one as the policy sees it and one in colour: what they are shown differs,
        their seed and actions do not. As in `step`, the brighter of two frames is taken, so nothing flickers.

        Args:
            policy: from observations [1, size, size, stack] to actions [1].
            steps: the steps after which a picture is kept; 0: before the first one.
            seed: of the game.

        Returns:
            RGB pictures, uint8 [210, 160, 3], in the order of the steps; none of steps that the game did not reach.

        Raises:
            ValueError: a step is below 0, or the policy takes an action out of range.
        """
        rules = self._rules
        _require_whole(**{f"steps[{i}]": (step, 0, 2**30) for i, step in enumerate(steps)})
        seen = Atari(count=1, threads=1, **dataclasses.asdict(rules))
        observation = seen.reset(seed)
        colour = _simulator(rules, 1, 1, img_height=SCREEN[0], img_width=SCREEN[1], stack_num=1, grayscale=False)
        picture, _ = colour.reset(seed=_seeds(seed, 1))
        kept = {0: picture[0, 0]}
        for step in range(1, max(steps, default=0) + 1):
            actions = seen._checked(policy(observation))
            answer = seen.step(actions)
            observation, picture = answer.observation, colour.step(actions)[0]
            if step in steps:
                kept[step] = picture[0, 0]
            if not math.isnan(answer.scores[0]):
                break
        return [kept[step] for step in steps if step in kept]


def _seeds(seed: int, count: int) -> np.ndarray:
    """A seed for each game; ale-py's seed, seed + 1 .. would give two runs with seeds side by side the same games."""
    _require_whole(seed=(seed, 0, 2**63 - 1))
    return (np.random.SeedSequence(seed).generate_state(count) >> 1).astype(np.int32)  # not negative


def _channels_last(pictures: np.ndarray) -> np.ndarray:
    """[N, stack, H, W] as [N, H, W, stack], copied picture by picture: five times faster than numpy's own copy."""
    copy = np.empty((*pictures.shape[:1], *pictures.shape[2:], pictures.shape[1]), pictures.dtype)
    for place in range(pictures.shape[1]):
        copy[..., place] = pictures[:, place]
    return copy


def _require_whole(**numbers: tuple[object, int, int]) -> None:
    """Every number, given with the least and the most that it may be, must be whole and between them."""
    for name, (number, least, most) in numbers.items():
        if isinstance(number, bool) or not isinstance(number, (int, np.integer)) or not least <= int(number) <= most:
            raise ValueError(f"{name} is {number!r}; it must be a whole number from {least} to {most}.")


def _simulator(rules: _Rules, count: int, threads: int, **pictures: Any) -> Any:
    """ale-py's games in parallel; it is left to it to take actions and show pictures, all else is done here."""
    # Looked for by name: ale-py swallows the ImportError where gymnasium is missing, and then has no games in parallel.
    for module, package in (("ale_py", "ale-py (GPL-2.0)"), ("gymnasium", "gymnasium beside ale-py (GPL-2.0)")):
        if importlib.util.find_spec(module) is None:
            raise ModuleNotFoundError(
                f"Atari games need {package}; run: pip install 'jaxrl_llm[atari-gpl]'", name=module
            )
    known = importlib.import_module("ale_py.roms").get_all_rom_ids()
    if rules.game not in known:
        spelled = "".join(letter for letter in str(rules.game).lower() if letter.isalnum())
        plain = {game.replace("_", ""): game for game in known}
        near = [plain[game] for game in difflib.get_close_matches(spelled, plain, n=3, cutoff=0.5)]
        hint = f"did you mean {', '.join(near)}?" if near else f"there are {', '.join(sorted(known))}."
        raise ValueError(f"game is {rules.game!r}, which ale-py does not have; {hint}")
    return importlib.import_module("ale_py.vector_env").AtariVectorEnv(
        rules.game,
        count,
        num_threads=threads,
        max_num_frames_per_episode=rules.max_frames,
        repeat_action_probability=rules.sticky,
        full_action_space=rules.all_actions,
        frameskip=rules.frame_skip,
        noop_max=rules.noops,
        reward_clipping=False,
        **pictures,
    )
