"""Arms, numbers and report of `divergence_atari`: a real game from its pictures, one run of each arm."""

import dataclasses
from collections.abc import Callable
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from typing import Literal

import jax
import numpy as np
from matplotlib.figure import Figure

from experiments.figures import legend
from experiments.games.numbers import curve
from experiments.games.numbers import mean_of_known
from experiments.games.page import COLOURS
from experiments.games.page import DASHED
from experiments.games.settings import LABELS
from experiments.ranges import NOT_NEGATIVE
from experiments.ranges import RATE
from experiments.ranges import SEED
from experiments.ranges import SIZE
from experiments.ranges import Range
from experiments.ranges import Ranges
from experiments.ranges import check_ranges
from experiments.study import Arrays
from experiments.study import Page
from experiments.study import Parts
from experiments.study import Results
from experiments.study import Resumable
from experiments.study import Section
from experiments.study import Table
from experiments.style import Picture
from experiments.style import new_axes
from experiments.words import NONE
from jaxrl_llm.checks import require_choice
from jaxrl_llm.environments.pixels import Atari
from jaxrl_llm.training.control import METHODS
from jaxrl_llm.training.control import ControlSettings
from jaxrl_llm.training.control import HostTrainer
from jaxrl_llm.training.control import train

SHOTS = (0, 150, 300, 450, 600, 750)
"""Steps of a game of which the report shows the picture."""


@dataclasses.dataclass(frozen=True)
class AtariSettings:
    """The game, the arms, and how they are trained.

    Attributes:
        game: name of an Atari game in ale-py.
        arms: methods of `jaxrl_llm.training.control.METHODS` that are compared.
        seed: seed of all random numbers of each arm.
        iterations: batches that each arm plays and learns from.
        parallel: games that are played at once.
        steps: steps of each of these games in a batch.
        size: side of the grey square pictures that are learned from.
        torso: network that reads them: "nature" for pictures of 84 x 84, "small" for half of that.
        frame_skip: frames that every action is held for.
        sticky: how probable it is in each frame that the action before stays.
        reuse: how often every step is used by an update.
        replay: batches over whose iterations this use is spread.
        minibatches: parts of a batch, each the size of an update.
        learning_rate: step size of Adam at the start; it falls on a line to 0.
        coefficient: weight of the divergence against advantages of size 1.
        width: width of the last layer of the network.
        memory: width of an LSTM behind it; none where 0.
        every: batches between two checkpoints; after each the games begin anew.
    """

    game: str = "pong"
    arms: tuple[str, ...] = ("ppo", "kl")
    seed: int = 0
    iterations: int = 490
    parallel: int = 16
    steps: int = 64
    size: int = 42
    torso: Literal["small", "nature"] = "small"
    frame_skip: int = 4
    sticky: float = 0.0
    reuse: int = 8
    replay: int = 4
    minibatches: int = 4
    learning_rate: float = 5e-4
    coefficient: float = 1.0
    width: int = 512
    memory: int = 0
    every: int = 98

    @property
    def frames(self) -> int:
        """Of each arm, as the simulator counts them."""
        return self.iterations * self.parallel * self.steps * self.frame_skip


RANGES: Ranges = {
    "seed": SEED,
    "iterations": Range(2, 1_000_000),
    "parallel": SIZE,
    "steps": SIZE,
    "size": Range(36, 160),
    "frame_skip": Range(1, 60),
    "sticky": Range(0, 1, below=True),
    "reuse": Range(1, 1000),
    "replay": Range(1, 1000),
    "minibatches": SIZE,
    "learning_rate": RATE,
    "coefficient": NOT_NEGATIVE,
    "width": SIZE,
    "memory": Range(0, 100_000),
    "every": SIZE,
}
"""What the fields of `AtariSettings` may be."""


def parts(settings: AtariSettings) -> Parts:
    """One part per arm.

    Raises:
        ValueError: a setting that cannot be.
    """
    check_ranges(settings, RANGES)
    if not settings.arms:
        raise ValueError(f"Field --arms is empty; it must name one at least, of {', '.join(METHODS)}.")
    for name in settings.arms:
        require_choice("Field --arms", name, tuple(METHODS))
    # Before anything is computed: whether the package is there, and the game.
    _games(settings, 1).close()
    return {name: Resumable(_compute(settings, _numbers(settings, name))) for name in settings.arms}


def _numbers(settings: AtariSettings, name: str) -> ControlSettings:
    return ControlSettings(
        method=dataclasses.replace(METHODS[name], coefficient=settings.coefficient),
        games=settings.parallel,
        steps=settings.steps,
        iterations=settings.iterations,
        reuse=settings.reuse,
        replay=min(settings.reuse, settings.replay),
        minibatches=settings.minibatches,
        optimizer=dataclasses.replace(ControlSettings().optimizer, learning_rate=settings.learning_rate),
        torso=settings.torso,
        width=settings.width,
        memory=settings.memory,
        measured=True,
    )


def _games(settings: AtariSettings, count: int) -> Atari:
    """The games.

    Raises:
        ValueError: there is no such game.
        ImportError: ale-py is not installed.
    """
    options = {"size": settings.size, "frame_skip": settings.frame_skip, "sticky": settings.sticky}
    return Atari(settings.game, count, **options)


def _compute(settings: AtariSettings, numbers: ControlSettings) -> Callable[..., Mapping[str, Any]]:
    def compute(folder: Path, say: Callable[[str], None]) -> Mapping[str, Any]:
        games = _games(settings, settings.parallel)
        try:
            trainer = HostTrainer(games, numbers)
            trained = train(trainer, [settings.seed], every=settings.every, folder=folder, say=say)
            # A root of its own: those of training come from the seed.
            key = jax.random.fold_in(jax.random.key(settings.seed), 3)
            policy = trainer.policy(trained.state.learning.params, key)
            shots = games.screenshots(policy, SHOTS, seed=settings.seed)
        finally:
            games.close()
        return {**trained.metrics, "screenshots": np.stack(shots)}

    return compute


def _scores(part: Arrays, share: float) -> float | None:
    """Mean score of the games that ended in the first or, below 0, the last share of the run; None where none did."""
    count = max(1, round(abs(share) * part["returns"].shape[1]))
    where = slice(0, count) if share > 0 else slice(-count, None)
    ended = part["ended"][0, where].sum()
    return float(part["returns"][0, where].sum() / ended) if ended else None


def _known_or_none(values: np.ndarray) -> float | None:
    """Mean of what is a number; None where nothing is."""
    mean = float(mean_of_known(values))
    return mean if np.isfinite(mean) else None


def summarise(settings: AtariSettings, results: Results) -> dict[str, Any]:
    """Every arm in numbers: scores at the beginning and at the end, how far its policies went, and speed."""
    summary: dict[str, Any] = {"frames": settings.frames, "arms": {}}
    for name in settings.arms:
        part = results[name]
        summary["arms"][name] = {
            "start": _scores(part, 0.1),
            "end": _scores(part, -0.1),
            "games": float(part["ended"].sum()),
            "occupancy_divergence": _known_or_none(part["occupancy_divergence"][0]),
            "effective_share": float(part["effective_share"].mean()),
            "entropy": float(part["entropy"][0, -1]),
            "skipped": float(part["skipped"].sum()),
            "steps_per_second": settings.frames / settings.frame_skip / float(part["seconds"]),
        }
    claimed = summary["arms"].get("kl", next(iter(summary["arms"].values())))
    summary["score_at_the_end"] = claimed["end"]
    return summary


def _learning(settings: AtariSettings, results: Results) -> Picture:
    figure, axes = new_axes("frames [millions]", "score")
    for name in settings.arms:
        values = curve(results[name], points=20)[0]
        at = (np.arange(len(values)) + 1) / len(values) * settings.frames / 1e6
        dashes = "--" if name in DASHED else "-"
        axes.plot(at, values, color=COLOURS[name], linestyle=dashes, label=LABELS[name])
    legend(axes, 2)
    caption = (
        f"Mean score of the games of {settings.game} that ended since the point before, against millions of frames: "
        "one run of each arm, so nothing is said of other seeds. After each checkpoint games begin anew, and long ones "
        "that were under way are not counted: the first point behind one is of short games, which are lost ones."
    )
    return Picture("score", "Score", caption, figure)


def _strip(settings: AtariSettings, results: Results, name: str) -> Picture:
    """Pictures of a game that the learned policy plays."""
    shots = results[name]["screenshots"]
    figure = Figure(figsize=(1.55 * len(shots), 2.3))
    for place, (picture, step) in enumerate(zip(shots, SHOTS, strict=False)):
        axes = figure.add_subplot(1, len(shots), place + 1)
        axes.imshow(picture)
        axes.set_title(f"step {step}", fontsize=10)
        axes.set_xticks([])
        axes.set_yticks([])
        axes.grid(False)
    said = f"A game of {settings.game} that the policy of “{LABELS[name]}” plays after training, step by step."
    return Picture(f"strip_{name}", f"{LABELS[name]} plays", said, figure)


def atari_page(settings: AtariSettings, results: Results, summary: Mapping[str, Any]) -> Page:
    """What was asked, what came out, how sure it is."""
    rows = [
        (
            LABELS[name],
            "none ended" if numbers["start"] is None else f"{numbers['start']:.1f}",
            "none ended" if numbers["end"] is None else f"{numbers['end']:.1f}",
            f"{numbers['games']:.0f}",
            NONE if numbers["occupancy_divergence"] is None else f"{numbers['occupancy_divergence']:.4f}",
            f"{numbers['effective_share']:.3f}",
            f"{numbers['entropy']:.2f}",
            f"{numbers['steps_per_second']:.0f}",
        )
        for name, numbers in summary["arms"].items()
    ]
    head = (
        "arm",
        "score, first tenth",
        "score, last tenth",
        "games ended",
        "divergence from the policy before [nats]",
        "effective share",
        "entropy at the end [nats]",
        "steps/s",
    )
    first = settings.arms[0] if "kl" not in settings.arms else "kl"
    claimed = summary["arms"][first]["end"]
    return Page(
        value="no game ended" if claimed is None else f"{claimed:+.1f}",
        value_range="points, own minus the opponent's" if settings.game == "pong" else "points",
        sentence=(
            f"Mean score of the last tenth of the run with “{LABELS[first]}”, every batch used {settings.reuse} times: "
            "one run, so no interval."
        ),
        facts=(
            f"{settings.game}, {settings.frames / 1e6:.2g} million frames each, grey pictures of {settings.size} x "
            f"{settings.size}, sticky {settings.sticky:g}"
        ),
        sections=[
            Section(
                "Scores",
                [
                    "The games are played in a thread while the updates learn from the batch before, so by the policy "
                    "from before these updates; the ratios know it.",
                ],
                [_learning(settings, results), *(_strip(settings, results, name) for name in settings.arms)],
                Table(head=head, rows=rows),
            )
        ],
    )
